//! One writer, or many readers, to a file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::error::DriveError;

/// Take a file for ourselves: a lock that goes with the open file, shared among readers. QEMU's own image locks are of the
/// same kind, so it refuses the file too, and we refuse one that it has open.
///
/// # Errors
/// Somebody else has it.
pub fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), DriveError> {
    // SAFETY: all-zero is a valid flock; a length of 0 means the whole file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if read_only { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the lock structure is valid for the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(DriveError::InUse { path: path.to_owned() }),
        // A file system without locks cannot tell; that is no reason to refuse the file.
        _ => Ok(()),
    }
}

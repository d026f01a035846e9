//! One writer, or many readers, to a file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::error::DriveError;

/// Whether a file is kept from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    Held,
    /// Its file system has no locks, so that nothing tells whether somebody else has the file.
    Unavailable,
}

/// Take a file for ourselves: a lock that goes with the open file, shared among readers. QEMU's own image locks are of the
/// same kind, so it refuses the file too, and we refuse one that it has open.
///
/// # Errors
/// Somebody else has it, or whether somebody has cannot be told: no locks left, an interrupted call, a server that is away.
pub fn lock(file: &File, path: &Path, read_only: bool) -> Result<Lock, DriveError> {
    // SAFETY: all-zero is a valid flock; a length of 0 means the whole file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if read_only { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the lock structure is valid for the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(Lock::Held);
    }
    refused(io::Error::last_os_error(), path)
}

fn refused(source: io::Error, path: &Path) -> Result<Lock, DriveError> {
    match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(DriveError::InUse { path: path.to_owned() }),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => Ok(Lock::Unavailable),
        _ => Err(DriveError::Lock { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever was not "somebody else has it" was taken for a file system without locks: a lock server that was away, or
    /// out of locks, let two gateways write to one file.
    #[test]
    fn a_lock_that_cannot_be_had_is_not_taken_for_no_locks() {
        let answer = |errno| refused(io::Error::from_raw_os_error(errno), Path::new("/disk"));
        for errno in [libc::ENOLCK, libc::EIO, libc::EINTR, libc::ENOMEM, libc::EBADF, libc::ESTALE] {
            assert!(matches!(answer(errno), Err(DriveError::Lock { .. })), "{errno}");
        }
        for errno in [libc::EAGAIN, libc::EACCES] {
            assert!(matches!(answer(errno), Err(DriveError::InUse { .. })), "{errno}");
        }
        for errno in [libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL] {
            assert_eq!(answer(errno).unwrap(), Lock::Unavailable, "{errno}");
        }
    }
}

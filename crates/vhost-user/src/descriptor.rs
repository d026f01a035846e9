//! What a descriptor of a frontend is, told by calls that cannot wait for whatever is behind it.
//!
//! `fstat`, `mmap` or `close` of a file ask its file system, which may be the frontend's own and never answer. These do not:
//! `F_GET_SEALS` looks only at the kernel's inode, /proc/self/fd only at its name, and `SO_DOMAIN` and `SO_TYPE` at the socket.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::error::SessionError;
use crate::reaper::{Reaped, Reaper};

/// Take only eventfds where notifications are meant: writing to anything else could block or do harm. They are made
/// non-blocking, as io_uring writes to a blocking one from a kernel thread, some hundred microseconds later; a frontend that
/// undoes it delays nobody but itself. Closing one never waits, so it needs no reaper any more.
pub(crate) fn eventfd(fd: Reaped<OwnedFd>, what: &'static str) -> Result<OwnedFd, SessionError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if link.as_os_str() != "anon_inode:[eventfd]" {
        return Err(SessionError::NotAnEventFd { what });
    }
    // SAFETY: plain system calls on a descriptor that we own.
    let result = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if result < 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(fd.into_inner())
}

/// Only what lives in memory may be mapped: a page of any other file is there when its file system likes. The kernel has
/// seals for memfds and files on tmpfs and hugetlbfs, and for nothing else. From here on `reaper` has it, where nothing
/// waits behind descriptors of other kinds.
pub(crate) fn memory(
    fd: Reaped<OwnedFd>,
    what: &'static str,
    reaper: &Reaper,
) -> Result<Reaped<OwnedFd>, SessionError> {
    // SAFETY: a plain system call on a descriptor that we own.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(SessionError::NotMemory { what });
    }
    Ok(reaper.hold(fd.into_inner()))
}

/// Only a Unix stream socket can be the channel for messages of ours. What waits in its queue is closed with it, so it stays
/// with its reaper.
pub(crate) fn channel(fd: Reaped<OwnedFd>) -> Result<Reaped<OwnedFd>, SessionError> {
    let is = |option, wanted| {
        let mut value: libc::c_int = 0;
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: both options fill an int of the length given.
        let answer = unsafe {
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &mut len)
        };
        answer == 0 && value == wanted
    };
    if !(is(libc::SO_DOMAIN, libc::AF_UNIX) && is(libc::SO_TYPE, libc::SOCK_STREAM)) {
        return Err(SessionError::NotAChannel);
    }
    Ok(fd)
}

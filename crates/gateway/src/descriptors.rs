//! Room for file descriptors, made before it is needed.
//!
//! A process of several threads whose table of descriptors grows waits for all CPUs to pass a quiet point (the kernel's
//! `expand_fdtable`), some 8 ms each time it doubles. In the middle of a handover guests would wait with it.

use std::os::fd::AsFd;

use nix::fcntl::{fcntl, FcntlArg};
use nix::sys::resource::{getrlimit, Resource};

/// Entries of an engine's table from the start: 32 KiB, and enough for some dozens of guests.
pub const AT_START: usize = 4096;

/// Make the table hold descriptors up to number `wanted`, or as many as the process may have.
pub fn make_room(wanted: usize) {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    let highest = wanted.min(limit as usize).saturating_sub(1);
    let Ok(some) = nix::sys::eventfd::EventFd::new() else { return };
    // The lowest free number from `highest` on; the table grows to hold it, and stays so when it is closed again.
    if let Ok(fd) = fcntl(some.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(highest as i32)) {
        // It is ours and nobody else knows of it.
        let _ = nix::unistd::close(fd);
    }
}

/// How many descriptors the process has open.
pub fn open() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

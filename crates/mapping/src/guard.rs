//! The SIGBUS guard: a fixed table of mapped ranges that a signal handler can read without locks.
//!
//! Only async-signal-safe operations run in the handler: atomic loads, `mmap`, `write` on an eventfd, `sigaction`.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::Once;

use crate::error::MappingError;

/// Guarded mappings at one time. A frontend may bring 509 memory slots at most and a host serves tens of guests; the
/// handler scans the table only when a fault happens, so its length costs nothing otherwise.
pub const MAX_GUARDED: usize = 16384;

struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
    poisoned: AtomicBool,
    taken: AtomicBool,
}

static TABLE: [Slot; MAX_GUARDED] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
        taken: AtomicBool::new(false),
    }
}; MAX_GUARDED];
static EVENT_FD: AtomicI32 = AtomicI32::new(-1);
static INSTALL: Once = Once::new();

/// The signal's disposition before ours, restored when a SIGBUS has nothing to do with a guarded mapping.
static PREVIOUS: std::sync::OnceLock<libc::sigaction> = std::sync::OnceLock::new();

/// Where the next place is looked for first, as those before it are mostly taken. A hint: any value will do.
static NEXT: AtomicUsize = AtomicUsize::new(0);

/// A claimed place in the table; dropping it ends the guard. That comes before the range is unmapped, and when nobody
/// touches it any more: what is mapped there next is somebody else's, and its faults are too.
pub(crate) struct Guard {
    index: usize,
}

impl Guard {
    pub(crate) fn new(start: usize, len: usize) -> Result<Self, MappingError> {
        INSTALL.call_once(install);
        let first = NEXT.load(Ordering::Relaxed);
        for index in (first..MAX_GUARDED).chain(0..first) {
            let slot = &TABLE[index];
            // A look takes no cache line from others.
            let free = !slot.taken.load(Ordering::Relaxed);
            if free && slot.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                slot.poisoned.store(false, Ordering::Relaxed);
                slot.len.store(len, Ordering::Relaxed);
                slot.start.store(start, Ordering::Release);
                NEXT.store((index + 1) % MAX_GUARDED, Ordering::Relaxed);
                return Ok(Self { index });
            }
        }
        Err(MappingError::TooMany { limit: MAX_GUARDED })
    }

    #[inline]
    pub(crate) fn poisoned(&self) -> bool {
        TABLE[self.index].poisoned.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &TABLE[self.index];
        slot.start.store(0, Ordering::Release);
        slot.len.store(0, Ordering::Relaxed);
        slot.taken.store(false, Ordering::Release);
    }
}

/// An eventfd that becomes readable when a guarded mapping was poisoned: one for the whole process, never closed.
pub fn poison_event() -> BorrowedFd<'static> {
    INSTALL.call_once(install);
    // SAFETY: `install` made the descriptor and nobody closes it.
    unsafe { BorrowedFd::borrow_raw(EVENT_FD.load(Ordering::Acquire)) }
}

fn install() {
    // SAFETY: plain system calls; the handler installed is async-signal-safe and lives for the whole program.
    unsafe {
        EVENT_FD.store(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC), Ordering::Release);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        let mut previous: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, &action, &mut previous) == 0 {
            let _ = PREVIOUS.set(previous);
        }
    }
}

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler; si_addr is meaningful for SIGBUS.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &TABLE {
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Relaxed);
        if start != 0 && address >= start && address - start < len {
            // SAFETY: the range belongs to a live guarded mapping (its Guard is dropped before munmap), so replacing its
            // pages changes memory that is only ever reached through raw pointers.
            let page = unsafe {
                libc::mmap(
                    start as *mut libc::c_void,
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if page != libc::MAP_FAILED {
                slot.poisoned.store(true, Ordering::Release);
                let one = 1u64;
                // SAFETY: writes eight bytes of a live local to our own non-blocking eventfd.
                unsafe { libc::write(EVENT_FD.load(Ordering::Relaxed), (&raw const one).cast(), 8) };
                return;
            }
        }
    }
    // Not ours: give the signal back to whoever had it before; the faulting access then runs into that.
    if let Some(previous) = PREVIOUS.get() {
        // SAFETY: restores a disposition that the kernel handed out.
        unsafe { libc::sigaction(libc::SIGBUS, previous, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The next place is looked for behind the last one: the table must serve on when that has come to its end.
    #[test]
    fn places_are_used_again() {
        // Where nothing is ever mapped.
        let nowhere = usize::MAX / 2;
        let kept: Vec<_> = (0..3).map(|n| Guard::new(nowhere + n, 1).unwrap()).collect();
        let mut places = std::collections::BTreeSet::new();
        for _ in 0..2 * MAX_GUARDED {
            places.insert(Guard::new(nowhere, 1).unwrap().index);
        }
        assert!(places.len() > MAX_GUARDED / 2, "each look begins anew");
        assert!(kept.iter().all(|guard| !places.contains(&guard.index)));
    }
}

//! How other threads give requests to a reactor, and back to it: an intrusive stack that many push onto and one empties, without a
//! lock (Treiber, Systems Programming: Coping with Parallelism, 1986; taking all at once makes it free of ABA).

use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{fence, AtomicBool, AtomicI64, AtomicPtr, AtomicU64, Ordering};
use std::sync::Arc;

/// One request's way back. It belongs to its reactor, but between submission and return to librbd.
pub struct Ticket {
    next: AtomicPtr<Ticket>,
    /// Where it goes back to; held so that the stack outlives the thread that pushes.
    completions: AtomicPtr<Completions>,
    tag: AtomicU64,
    result: AtomicI64,
}

impl Default for Ticket {
    fn default() -> Self {
        Self {
            next: AtomicPtr::new(ptr::null_mut()),
            completions: AtomicPtr::new(ptr::null_mut()),
            tag: AtomicU64::new(0),
            result: AtomicI64::new(0),
        }
    }
}

impl Ticket {
    /// Before submission: `tag` comes back from `completions`.
    pub fn address_to(&self, completions: &Arc<Completions>, tag: u64) {
        self.tag.store(tag, Ordering::Relaxed);
        let held = Arc::into_raw(completions.clone()).cast_mut();
        let before = self.completions.swap(held, Ordering::Relaxed);
        debug_assert!(before.is_null(), "a ticket is submitted that is not back");
    }

    /// Nothing was submitted.
    pub(crate) fn take_back(&self) {
        drop(self.take_completions());
    }

    fn take_completions(&self) -> Option<Arc<Completions>> {
        let held = self.completions.swap(ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: the pointer came from Arc::into_raw in address_to, and the swap takes it once.
        (!held.is_null()).then(|| unsafe { Arc::from_raw(held) })
    }

    /// Give it back, from any thread. The ticket may be gone when this returns.
    pub fn give_back(&self, result: i64) {
        let Some(completions) = self.take_completions() else {
            debug_assert!(false, "a ticket came back that was not out");
            return;
        };
        self.result.store(result, Ordering::Relaxed);
        completions.push(self);
    }
}

/// What came back to one reactor.
pub struct Completions {
    newest: AtomicPtr<Ticket>,
    asleep: AtomicBool,
    bell: OwnedFd,
}

impl Completions {
    /// `bell`: an eventfd that wakes the reactor.
    pub fn new(bell: OwnedFd) -> Self {
        Self { newest: AtomicPtr::new(ptr::null_mut()), asleep: AtomicBool::new(false), bell }
    }

    fn push(&self, ticket: &Ticket) {
        let new = ptr::from_ref(ticket).cast_mut();
        let mut before = self.newest.load(Ordering::Relaxed);
        loop {
            ticket.next.store(before, Ordering::Relaxed);
            // Release: whoever takes the stack sees the ticket's result.
            match self.newest.compare_exchange_weak(before, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => before = now,
            }
        }
        // Pairs with the fence in may_sleep: either it sees this ticket, or we see that it sleeps.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            let one = 1u64;
            // SAFETY: eight bytes of a live local to our own non-blocking eventfd; a full counter rings already.
            unsafe { libc::write(self.bell.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// There is something to take. One load, for a reactor that polls.
    #[inline(always)]
    pub fn pending(&self) -> bool {
        !self.newest.load(Ordering::Relaxed).is_null()
    }

    /// Take all that came back, and call `with` (tag, result) for each, oldest first. For the owning reactor alone.
    pub fn take(&self, mut with: impl FnMut(u64, i64)) {
        let mut newest = self.newest.swap(ptr::null_mut(), Ordering::Acquire);
        let mut oldest: *mut Ticket = ptr::null_mut();
        while !newest.is_null() {
            // SAFETY: a pushed ticket stays where it is until its reactor, which is the caller, has it back.
            let next = unsafe { (*newest).next.swap(oldest, Ordering::Relaxed) };
            (oldest, newest) = (newest, next);
        }
        while !oldest.is_null() {
            // SAFETY: as above; `with` may free the ticket, so all is read before.
            let (tag, result, next) = unsafe {
                let ticket = &*oldest;
                let result = ticket.result.load(Ordering::Relaxed);
                (ticket.tag.load(Ordering::Relaxed), result, ticket.next.load(Ordering::Relaxed))
            };
            with(tag, result);
            oldest = next;
        }
    }

    /// The reactor wants to sleep: from here on the bell rings. False if something has come back.
    pub fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.pending() {
            self.awake();
            return false;
        }
        true
    }

    /// It polls again.
    pub fn awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use super::*;

    fn bell() -> OwnedFd {
        // SAFETY: a plain system call; the descriptor is owned from here on.
        unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)) }
    }

    fn rings(bell: &OwnedFd) -> bool {
        let mut count = 0u64;
        // SAFETY: eight bytes of a live local.
        unsafe { libc::read(bell.as_raw_fd(), (&raw mut count).cast(), 8) == 8 }
    }

    #[test]
    fn tickets_come_back_in_the_order_of_their_return() {
        let completions = Arc::new(Completions::new(bell()));
        let tickets: Vec<Ticket> = (0..5).map(|_| Ticket::default()).collect();
        for (tag, ticket) in tickets.iter().enumerate() {
            ticket.address_to(&completions, tag as u64);
        }
        for (at, ticket) in tickets.iter().enumerate().rev() {
            ticket.give_back(-(at as i64));
        }
        let mut seen = Vec::new();
        completions.take(|tag, result| seen.push((tag, result)));
        assert_eq!(seen, [(4, -4), (3, -3), (2, -2), (1, -1), (0, 0)]);
        assert!(!completions.pending());
        assert_eq!(Arc::strong_count(&completions), 1);
    }

    #[test]
    fn the_bell_rings_once_for_a_reactor_that_sleeps_and_not_for_one_that_polls() {
        let bell = bell();
        let completions = Arc::new(Completions::new(bell.try_clone().unwrap()));
        let tickets: Vec<Ticket> = (0..3).map(|_| Ticket::default()).collect();
        tickets.iter().for_each(|ticket| ticket.address_to(&completions, 7));
        tickets[0].give_back(0);
        assert!(!rings(&bell));
        assert!(!completions.may_sleep(), "something has come back");
        completions.take(|_, _| {});
        assert!(completions.may_sleep());
        tickets[1].give_back(0);
        tickets[2].give_back(0);
        assert!(rings(&bell));
        assert!(!rings(&bell), "one bell for both");
        completions.awake();
    }

    #[test]
    fn nothing_is_lost_between_many_threads_and_one() {
        const THREADS: usize = 3;
        const EACH: usize = 20_000;
        let bell = bell();
        let completions = Arc::new(Completions::new(bell.try_clone().unwrap()));
        let tickets: Vec<Vec<Ticket>> =
            (0..THREADS).map(|_| (0..EACH).map(|_| Ticket::default()).collect()).collect();
        let mut last = [-1i64; THREADS];
        let mut count = 0;
        std::thread::scope(|scope| {
            for (thread, own) in tickets.iter().enumerate() {
                let completions = &completions;
                scope.spawn(move || {
                    for (at, ticket) in own.iter().enumerate() {
                        ticket.address_to(completions, thread as u64);
                        ticket.give_back(at as i64);
                    }
                });
            }
            while count < THREADS * EACH {
                completions.take(|tag, result| {
                    assert_eq!(result, last[tag as usize] + 1, "out of order or twice");
                    last[tag as usize] = result;
                    count += 1;
                });
                if count < THREADS * EACH && completions.may_sleep() {
                    let mut poll = libc::pollfd { fd: bell.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                    // SAFETY: one live pollfd. A wake-up that is lost would end in the time limit.
                    let ready = unsafe { libc::poll(&raw mut poll, 1, 10_000) };
                    assert_eq!(ready, 1, "a bell was lost");
                    rings(&bell);
                    completions.awake();
                }
            }
        });
        assert_eq!(Arc::strong_count(&completions), 1);
    }
}

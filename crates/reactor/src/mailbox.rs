//! A single-producer single-consumer mailbox: bounded, no locks, empty checks that cost one load.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// Keeps the two indices on cache lines of their own.
#[repr(align(128))]
struct Padded(AtomicUsize);

struct Shared<T> {
    cells: Box<[UnsafeCell<MaybeUninit<T>>]>,
    written: Padded,
    read: Padded,
}

// SAFETY: a cell is touched by the sender before `written` is raised over it and by the receiver after, never by both.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

/// The writing end.
pub struct Sender<T>(Arc<Shared<T>>);

/// The reading end.
pub struct Receiver<T>(Arc<Shared<T>>);

/// A mailbox for `capacity` messages.
pub fn mailbox<T: Send>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        cells: (0..capacity).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect(),
        written: Padded(AtomicUsize::new(0)),
        read: Padded(AtomicUsize::new(0)),
    });
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Sender<T> {
    /// Put a message in; gives it back if the mailbox is full.
    pub fn send(&mut self, message: T) -> Result<(), T> {
        let shared = &*self.0;
        let written = shared.written.0.load(Ordering::Relaxed);
        if written - shared.read.0.load(Ordering::Acquire) == shared.cells.len() {
            return Err(message);
        }
        // SAFETY: the cell is free (checked above) and only this one sender writes.
        unsafe { (*shared.cells[written % shared.cells.len()].get()).write(message) };
        shared.written.0.store(written + 1, Ordering::Release);
        Ok(())
    }
}

impl<T> Receiver<T> {
    /// Take the oldest message.
    #[inline(always)]
    pub fn receive(&mut self) -> Option<T> {
        let shared = &*self.0;
        let read = shared.read.0.load(Ordering::Relaxed);
        if read == shared.written.0.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: the cell was written before `written` was raised over it, and only this one receiver reads.
        let message = unsafe { (*shared.cells[read % shared.cells.len()].get()).assume_init_read() };
        shared.read.0.store(read + 1, Ordering::Release);
        Some(message)
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        let (read, written) = (*self.read.0.get_mut(), *self.written.0.get_mut());
        for at in read..written {
            let len = self.cells.len();
            // SAFETY: cells between the two indices hold messages nobody took.
            unsafe { self.cells[at % len].get_mut().assume_init_drop() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_in_order_across_threads_and_none_is_lost_when_full() {
        let (mut sender, mut receiver) = mailbox::<Box<usize>>(4);
        let writer = std::thread::spawn(move || {
            for n in 0..10_000 {
                let mut message = Box::new(n);
                while let Err(back) = sender.send(message) {
                    message = back;
                    std::thread::yield_now();
                }
            }
        });
        let mut expected = 0;
        while expected < 10_000 {
            match receiver.receive() {
                Some(n) => {
                    assert_eq!(*n, expected);
                    expected += 1;
                }
                None => std::thread::yield_now(),
            }
        }
        writer.join().unwrap();
        assert!(receiver.receive().is_none());
    }

    #[test]
    fn messages_nobody_took_are_dropped_with_the_mailbox() {
        let alive = Arc::new(());
        let (mut sender, receiver) = mailbox(4);
        sender.send(alive.clone()).unwrap();
        drop((sender, receiver));
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}

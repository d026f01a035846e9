//! Lets go of what a peer has given on a thread that nobody else waits for.
//!
//! How long a close takes is the sender's choice (a socket that lingers, a file of a file system that does not answer, a
//! queue that holds such descriptors), and the memory of a large guest is unmapped for seconds. Each attachment has a
//! reaper of its own, so that what is slow to go holds up nothing of another guest.

use std::any::Any;
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How long the thread waits for more before it ends.
const LINGER: Duration = Duration::from_secs(1);

type Item = Box<dyn FnOnce() + Send>;

/// The way to the thread, which runs while there is something to do. It ends when everything is let go of, whether or not a
/// handle is left.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Item>,
    /// The one in hand too.
    count: usize,
    running: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The next one; `None` once there was none for a while.
    fn next(&self) -> Option<Item> {
        let mut state = self.state();
        if state.waiting.is_empty() {
            state = self.more.wait_timeout(state, LINGER).unwrap_or_else(|e| e.into_inner()).0;
        }
        let item = state.waiting.pop_front();
        state.running = item.is_some();
        item
    }

    fn work(&self) {
        while let Some(item) = self.next() {
            item();
            self.state().count -= 1;
        }
    }
}

impl Reaper {
    /// Drop `what` there.
    pub fn take(&self, what: impl Any + Send) {
        self.run(move || drop(what));
    }

    /// Do `job` there: something to a peer's descriptor that may wait.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state();
        state.waiting.push_back(Box::new(job));
        state.count += 1;
        if state.running {
            self.0.more.notify_one();
            return;
        }
        let shared = self.0.clone();
        // Without a thread things wait for the next that comes: letting go of them here is what must not be.
        state.running =
            std::thread::Builder::new().name("reaper".into()).spawn(move || shared.work()).is_ok();
    }

    /// What is not let go of yet.
    pub fn len(&self) -> usize {
        self.0.state().count
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `value` for as long as it is wanted; then it goes there.
    pub fn hold<T: Send + 'static>(&self, value: T) -> Reaped<T> {
        Reaped { value: Some(value), reaper: self.clone() }
    }
}

/// A value that its reaper drops, wherever it goes out of scope.
pub struct Reaped<T: Send + 'static> {
    /// Always there, but in `drop` and `into_inner`.
    value: Option<T>,
    reaper: Reaper,
}

impl<T: Send + 'static> Reaped<T> {
    /// The value, for whoever may drop it.
    pub fn into_inner(mut self) -> T {
        self.value.take().expect("it is there until now")
    }
}

impl<T: Send + 'static> Deref for Reaped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("it is there until it is dropped")
    }
}

impl<T: Send + 'static> DerefMut for Reaped<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("it is there until it is dropped")
    }
}

impl<T: Send + 'static> Drop for Reaped<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            self.reaper.take(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{channel, Receiver, Sender};

    use super::*;

    /// Tells that it goes, and waits until it may.
    struct Slow(Sender<()>, Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
            // Its other end is dropped.
            assert!(self.1.recv().is_err());
        }
    }

    fn slow() -> (Slow, Receiver<()>, Sender<()>) {
        let ((tell, told), (may, wait)) = (channel(), channel());
        (Slow(tell, wait), told, may)
    }

    /// There was one thread for all guests, which let go of things in order.
    #[test]
    fn what_is_slow_to_go_holds_up_nothing_of_another_reaper() {
        let (first, second) = (Reaper::default(), Reaper::default());
        let (one, one_goes, one_may) = slow();
        drop(first.hold(one));
        one_goes.recv().unwrap();
        assert_eq!(first.len(), 1);
        let (two, two_goes, two_may) = slow();
        second.take(two);
        drop(two_may);
        two_goes.recv().unwrap();
        // What comes behind the slow one waits for it, and only that.
        let (three, three_goes, three_may) = slow();
        first.take(three);
        drop(three_may);
        assert!(three_goes.try_recv().is_err());
        drop(one_may);
        three_goes.recv().unwrap();
    }

    #[test]
    fn what_was_taken_out_stays_with_its_owner() {
        let reaper = Reaper::default();
        assert_eq!(reaper.hold(7).into_inner(), 7);
        assert!(reaper.is_empty());
    }
}

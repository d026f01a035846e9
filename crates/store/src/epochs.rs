//! When a place may be used again: not before every reactor has passed a moment in which it holds no request that may still
//! touch it (read-copy-update; McKenney and Slingwine, Read-Copy Update, 1998).
//!
//! The keeper makes something unreachable in a map, and then begins the next epoch. A reactor reads the epoch when its turn
//! begins, before it looks into any map, and gives it to the requests that it begins in that turn. It says which is the oldest
//! that a request of its own still has. Once no reactor has an older one than the next epoch, nobody can still reach it.
//!
//! A reactor holds a request while I/O of its own for it is under way, no longer: not while the keeper has it, which holds what
//! it does by itself and may have the request wait for others to end, and not while nothing is under way.

use std::sync::atomic::{fence, AtomicU64, AtomicUsize, Ordering};

/// Reactors that may take part.
pub const MOST_READERS: usize = 256;
/// Keepers that may take part: stores that are open.
const MOST_KEEPERS: usize = 64;
const ABSENT: u64 = u64::MAX;

/// On a cache line of its own, as each is written by another core.
#[repr(align(64))]
struct Oldest(AtomicU64);

/// See the module.
pub struct Epochs {
    now: AtomicU64,
    /// The keepers' come first, and behind [`MOST_KEEPERS`] of them the reactors'.
    oldest: [Oldest; MOST_KEEPERS + MOST_READERS],
    /// Reactors from this number on were never here.
    readers: AtomicUsize,
    /// A bit for each keeper that has a part.
    keepers: AtomicU64,
}

impl Default for Epochs {
    fn default() -> Self {
        Self {
            now: AtomicU64::new(1),
            oldest: [const { Oldest(AtomicU64::new(ABSENT)) }; MOST_KEEPERS + MOST_READERS],
            readers: AtomicUsize::new(0),
            keepers: AtomicU64::new(0),
        }
    }
}

impl Epochs {
    /// Begin the next epoch, unless requests of the one before the present are still there. What was made unreachable before
    /// is out of reach for everybody once [`passed`](Self::passed) is true for the present one.
    pub fn advance(&self) -> u64 {
        let now = self.now.load(Ordering::Relaxed);
        if self.floor() < now {
            return now;
        }
        // Release: who sees the new epoch sees what was made unreachable before.
        self.now.store(now + 1, Ordering::Release);
        now + 1
    }

    pub fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    /// Nobody has a request of `epoch` or an older one.
    pub fn passed(&self, epoch: u64) -> bool {
        self.now.load(Ordering::Relaxed) > epoch && self.floor() > epoch
    }

    /// The oldest epoch of any request.
    fn floor(&self) -> u64 {
        // Pairs with the fence in `Reader::begin` of a reactor that was absent.
        fence(Ordering::SeqCst);
        self.present().map(|oldest| oldest.0.load(Ordering::Acquire)).min().unwrap_or(ABSENT)
    }

    /// Who may have requests: a line for each keeper that is here and each reactor that ever was. Those below the highest of
    /// either are among them, as they take the lowest numbers that are free.
    fn present(&self) -> impl Iterator<Item = &Oldest> {
        let keepers = (u64::BITS - self.keepers.load(Ordering::Relaxed).leading_zeros()) as usize;
        let readers = self.readers.load(Ordering::Relaxed);
        self.oldest[..keepers].iter().chain(&self.oldest[MOST_KEEPERS..MOST_KEEPERS + readers])
    }
}

/// A reactor's part. Only one thread has it.
#[derive(Debug)]
pub struct Reader {
    /// In [`Epochs::oldest`].
    index: usize,
    /// The present turn's epoch; 0 while absent.
    epoch: u64,
    /// Requests by the parity of their epoch: there are never more than two.
    held: [u64; 2],
}

impl Reader {
    /// `index`: below [`MOST_READERS`], and nobody else's.
    pub fn new(index: usize) -> Self {
        debug_assert!(index < MOST_READERS);
        Self { index: MOST_KEEPERS + index, epoch: 0, held: [0; 2] }
    }

    /// A keeper's part; None where there are too many. It is to be [given back](Self::give_back).
    pub(crate) fn of_keeper(epochs: &Epochs) -> Option<Self> {
        let claim = |taken: u64| (taken != u64::MAX).then(|| taken | (taken + 1));
        let before = epochs.keepers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim).ok()?;
        Some(Self { index: before.trailing_ones() as usize, epoch: 0, held: [0; 2] })
    }

    /// The keeper goes, and with it all that it held.
    pub(crate) fn give_back(&mut self, epochs: &Epochs) {
        self.held = [0; 2];
        self.leave(epochs);
        epochs.keepers.fetch_and(!(1 << self.index), Ordering::Relaxed);
    }

    /// A turn begins. Maps are looked into between this and [`leave`](Self::leave) only.
    #[inline(always)]
    pub fn begin(&mut self, epochs: &Epochs) {
        let now = epochs.now.load(Ordering::Acquire);
        if now != self.epoch {
            self.renew(epochs, now);
        }
    }

    #[cold]
    fn renew(&mut self, epochs: &Epochs, now: u64) {
        let was_absent = self.epoch == 0;
        if let (true, Some(number)) = (was_absent, self.index.checked_sub(MOST_KEEPERS)) {
            epochs.readers.fetch_max(number + 1, Ordering::Relaxed);
        }
        self.epoch = now;
        self.publish(epochs);
        if was_absent {
            // Either the keeper sees that this reactor is here, or this reactor sees what it has unpublished.
            fence(Ordering::SeqCst);
        }
    }

    /// A request begins. What comes back goes with it to [`end`](Self::end).
    #[inline(always)]
    pub fn hold(&mut self) -> u8 {
        let parity = (self.epoch & 1) as usize;
        self.held[parity] += 1;
        parity as u8
    }

    /// A request has ended.
    #[inline(always)]
    pub fn end(&mut self, epochs: &Epochs, parity: u8) {
        let parity = usize::from(parity & 1);
        self.held[parity] -= 1;
        if self.held[parity] == 0 && parity != (self.epoch & 1) as usize {
            self.publish(epochs);
        }
    }

    #[cold]
    fn publish(&self, epochs: &Epochs) {
        let before = ((self.epoch ^ 1) & 1) as usize;
        let oldest = self.epoch - u64::from(self.held[before] > 0);
        epochs.oldest[self.index].0.store(oldest, Ordering::Release);
    }

    /// The reactor looks into no map until it begins again. It stays if it has requests.
    pub fn leave(&mut self, epochs: &Epochs) {
        if self.epoch != 0 && self.held == [0, 0] {
            self.epoch = 0;
            epochs.oldest[self.index].0.store(ABSENT, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_passed_when_its_last_request_ended() {
        let epochs = Epochs::default();
        let (mut a, mut b) = (Reader::new(0), Reader::new(1));
        a.begin(&epochs);
        b.begin(&epochs);
        let request = a.hold();
        let freed = epochs.now();
        epochs.advance();
        assert!(!epochs.passed(freed), "both may still look");
        b.begin(&epochs);
        a.begin(&epochs);
        assert!(!epochs.passed(freed), "a request is under way");
        let later = a.hold();
        a.end(&epochs, request);
        assert!(epochs.passed(freed));
        a.end(&epochs, later);
    }

    #[test]
    fn there_are_never_three_epochs() {
        let epochs = Epochs::default();
        let mut a = Reader::new(0);
        a.begin(&epochs);
        let request = a.hold();
        assert_eq!(epochs.advance(), 2);
        a.begin(&epochs);
        assert_eq!(epochs.advance(), 2, "the first epoch has a request");
        a.end(&epochs, request);
        assert_eq!(epochs.advance(), 3);
    }

    #[test]
    fn who_sleeps_holds_nothing_up() {
        let epochs = Epochs::default();
        let mut a = Reader::new(0);
        a.begin(&epochs);
        a.leave(&epochs);
        let freed = epochs.now();
        epochs.advance();
        assert!(epochs.passed(freed));
        a.begin(&epochs);
        let request = a.hold();
        a.leave(&epochs);
        let freed = epochs.now();
        epochs.advance();
        assert!(!epochs.passed(freed), "it has a request and cannot leave");
        a.end(&epochs, request);
        assert!(!epochs.passed(freed), "it may look until its next turn");
        a.begin(&epochs);
        assert!(epochs.passed(freed));
    }

    /// Each is a cache line that another core writes, and the keeper looks at all of them several times a turn.
    #[test]
    fn only_those_are_asked_who_are_here() {
        let epochs = Epochs::default();
        assert_eq!(epochs.present().count(), 0);
        let mut keeper = Reader::of_keeper(&epochs).unwrap();
        let mut second = Reader::of_keeper(&epochs).unwrap();
        let mut reactor = Reader::new(0);
        for reader in [&mut keeper, &mut second, &mut reactor] {
            reader.begin(&epochs);
        }
        assert_eq!(epochs.present().count(), 3);
        second.give_back(&epochs);
        assert_eq!(epochs.present().count(), 2);
    }

    #[test]
    fn a_keeper_s_step_keeps_its_epoch_from_passing() {
        let epochs = Epochs::default();
        let mut keepers = [(); MOST_KEEPERS].map(|()| Reader::of_keeper(&epochs).unwrap());
        assert!(Reader::of_keeper(&epochs).is_none());
        for n in [0, 7, MOST_KEEPERS - 1] {
            keepers[n].begin(&epochs);
            let step = keepers[n].hold();
            keepers[n].leave(&epochs);
            let freed = epochs.now();
            epochs.advance();
            assert!(!epochs.passed(freed), "keeper {n} has a step under way");
            keepers[n].begin(&epochs);
            keepers[n].end(&epochs, step);
            keepers[n].leave(&epochs);
            assert!(epochs.passed(freed));
        }
        keepers[9].give_back(&epochs);
        assert!(Reader::of_keeper(&epochs).is_some(), "a place that was given back is given out");
    }
}

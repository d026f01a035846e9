//! Fairness among the guests of one reactor: what one of them may have of a turn and of the pools, however many queues it has.
//!
//! A guest is a session: one frontend's connection for one volume. In each turn every guest may spend a budget, in bytes of
//! copying; what else takes time counts as the bytes that could be copied meanwhile. A queue that finds its guest's budget
//! spent waits for the next turn, which begins with the queue behind the last one that was served.

use crate::pools::{BLOCKS, BOUNCES};

/// Budget of a guest that has the reactor to itself: large enough for a whole batch of small requests.
const ALONE: u64 = 256 << 10;
/// Budget of each of several: some 10 us, which is what the others wait for it at most.
const SHARED: u64 = 64 << 10;
/// Bytes of one step of a request that goes to a drive: what the kernel or librbd does inline when it is given one (finding
/// pages, zeroing for a hole, copying) takes some 100 us for this.
const ALONE_STEP: u64 = 1 << 20;
const SHARED_STEP: u64 = 256 << 10;
/// What reading a descriptor costs, in bytes of copying.
const DESCRIPTOR: u64 = 32;
/// Giving a drive so many bytes costs as much as copying one.
const SUBMITTED_PER_COPIED: u64 = 4;

/// What each guest may have, by how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Iovec blocks at a time.
    pub blocks: u32,
    /// Bounce buffers at a time.
    pub bounces: u32,
    /// Bytes of copying in a turn.
    pub turn: u64,
    /// Bytes of one step of a request that goes to a drive.
    pub step: u64,
}

impl Quota {
    /// An equal share for each of `guests`, and never nothing.
    pub fn share(guests: usize) -> Self {
        let share = |all: usize| (all / guests.max(1)).max(1) as u32;
        let (turn, step) = if guests > 1 { (SHARED, SHARED_STEP) } else { (ALONE, ALONE_STEP) };
        Self { blocks: share(BLOCKS), bounces: share(BOUNCES), turn, step }
    }
}

/// What the guest whose turn it is may still spend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Budget(i64);

impl Budget {
    pub fn new(quota: &Quota) -> Self {
        Self(quota.turn as i64)
    }

    #[inline(always)]
    pub fn is_spent(self) -> bool {
        self.0 <= 0
    }

    #[inline(always)]
    pub fn copied(&mut self, bytes: u64) {
        self.0 -= bytes as i64;
    }

    #[inline(always)]
    pub fn submitted(&mut self, bytes: u64) {
        self.0 -= (bytes / SUBMITTED_PER_COPIED) as i64;
    }

    #[inline(always)]
    pub fn walked(&mut self, descriptors: usize) {
        self.0 -= (descriptors as u64 * DESCRIPTOR) as i64;
    }
}

/// What a guest has of the pools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub blocks: u32,
    pub bounces: u32,
}

struct Guest {
    session: u64,
    /// Places of its queues; empty if nobody has this number.
    places: Vec<u16>,
    /// Which of them is served next.
    next: usize,
}

/// The guests that have queues here, by number.
#[derive(Default)]
pub struct Guests {
    all: Vec<Guest>,
    present: usize,
    /// Whose turn comes first.
    first: usize,
}

impl Guests {
    /// A queue of `session` came to `place`: the guest's number.
    pub fn add(&mut self, session: u64, place: u16) -> u16 {
        let of_session = self.all.iter().position(|g| g.session == session && !g.places.is_empty());
        let number = of_session.or_else(|| self.all.iter().position(|g| g.places.is_empty()));
        let number = number.unwrap_or_else(|| {
            self.all.push(Guest { session, places: Vec::new(), next: 0 });
            self.all.len() - 1
        });
        let guest = &mut self.all[number];
        self.present += usize::from(guest.places.is_empty());
        guest.session = session;
        guest.places.push(place);
        number as u16
    }

    /// The queue at `place` has gone.
    pub fn remove(&mut self, number: u16, place: u16) {
        let guest = &mut self.all[usize::from(number)];
        guest.places.retain(|one| *one != place);
        guest.next = 0;
        self.present -= usize::from(guest.places.is_empty());
    }

    pub fn present(&self) -> usize {
        self.present
    }

    /// Numbers that were given out, of guests that have gone too.
    #[inline(always)]
    pub fn numbers(&self) -> usize {
        self.all.len()
    }

    /// A new turn: the guest that comes first in it. The others follow in the order of their numbers.
    #[inline(always)]
    pub fn rotate(&mut self) -> usize {
        self.first = if self.first + 1 < self.all.len() { self.first + 1 } else { 0 };
        self.first
    }

    /// How many queues guest `number` has.
    #[inline(always)]
    pub fn queues(&self, number: usize) -> usize {
        self.all[number].places.len()
    }

    /// The place of the queue of guest `number` whose turn it is; the next one's is after it.
    #[inline(always)]
    pub fn next_queue(&mut self, number: usize) -> usize {
        let guest = &mut self.all[number];
        let place = guest.places[guest.next];
        guest.next = if guest.next + 1 < guest.places.len() { guest.next + 1 } else { 0 };
        usize::from(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_one_share_however_many_queues_it_has() {
        let mut guests = Guests::default();
        let many = guests.add(7, 0);
        (1..64).for_each(|place| assert_eq!(guests.add(7, place), many));
        let one = guests.add(8, 64);
        assert_ne!(many, one);
        assert_eq!((guests.present(), guests.numbers()), (2, 2));
        assert_eq!(Quota::share(guests.present()).bounces, BOUNCES as u32 / 2);
        (0..64).for_each(|place| guests.remove(many, place));
        assert_eq!((guests.present(), guests.numbers()), (1, 2));
        assert_eq!(guests.add(9, 3), many, "a number is given out again");
    }

    #[test]
    fn queues_and_guests_take_turns() {
        let mut guests = Guests::default();
        let number = usize::from(guests.add(1, 10));
        guests.add(1, 11);
        guests.add(1, 12);
        guests.add(2, 13);
        let order: Vec<_> = (0..4).map(|_| guests.next_queue(number)).collect();
        assert_eq!(order, [10, 11, 12, 10]);
        assert_eq!([guests.rotate(), guests.rotate(), guests.rotate()], [1, 0, 1]);
    }

    #[test]
    fn a_budget_is_spent_by_whatever_takes_time() {
        let quota = Quota::share(2);
        let mut budget = Budget::new(&quota);
        budget.copied(quota.turn / 2);
        assert!(!budget.is_spent());
        budget.submitted(quota.turn * 2);
        assert!(budget.is_spent());
        let mut budget = Budget::new(&quota);
        budget.walked(32768);
        assert!(budget.is_spent(), "the longest chain there is takes a turn");
    }
}

//! The in-flight region of a packed ring: `QueueRegionPacked` in the vhost-user specification.
//!
//! Three things are done more strictly than the specification's steps say, with the same layout and the same meaning to
//! any other backend:
//!
//! - Entries of completed requests go back to the free list when the batch is published, not before. Otherwise a request
//!   taken in between would get such an entry, and commit its loss, while the driver still waits for the first request.
//! - Used index and wrap counter, old and new, share an aligned word and change in one store. Piecemeal, a process
//!   killed between an index and its wrap counter would leave a position that the ring never had. For the same reason
//!   they are compared as a pair: a batch that fills the ring changes only the counter.
//! - After a batch that the driver was not shown is rolled back, the flags of its further entries still say "used";
//!   `PackedRing::take_back_flags` sets them back.

use super::{InflightRegion, DESC_NUM, FEATURES, REGION_VERSION, VERSION};
use crate::error::RingError;
use crate::packed::Position;
use crate::shared::{get_u16, get_u32, get_u64, put_u16, put_u32, put_u64};

/// `free_head` and, in the upper half, `old_free_head`.
const FREE_HEADS: usize = 12;
/// `used_idx`, `old_used_idx`, `used_wrap_counter`, `old_used_wrap_counter` and padding.
const POSITIONS: usize = 16;
pub(super) const HEADER: usize = 32;

// `DescStatePacked`. Its first word is `inflight`, padding, `next`, `last`, `num`.
const STATE: usize = 0;
const NEXT: usize = 2;
const COUNTER: usize = 8;
/// `id`, `flags`, `len`.
const REST: usize = 16;
const ADDRESS: usize = 24;
pub(super) const ENTRY: usize = 32;

/// A descriptor as it was read from the ring.
#[derive(Clone, Copy, Default)]
pub(crate) struct Copied {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub id: u16,
}

/// A request in flight: its descriptors are entries `first` to `last` along `next`. In one word for the reason that
/// [`Wide`](crate::wide::Wide) has.
#[derive(Clone, Copy, Default, Hash)]
struct Held(u32);

impl Held {
    #[inline(always)]
    fn new(first: u16, last: u16) -> Self {
        Self(u32::from(first) | u32::from(last) << 16)
    }

    #[inline(always)]
    fn first(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    fn last(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// A request to be done again.
#[derive(Clone, Copy, Hash)]
pub(crate) struct Again {
    pub id: u16,
    pub num: u16,
    first: u16,
}

/// What a region said when it was opened.
pub(crate) struct Opened {
    /// The next descriptor to use.
    pub used: Position,
    /// Descriptors behind it that are in flight.
    pub in_use: u16,
}

/// The region as the ring that uses it sees it.
#[cfg_attr(test, derive(Clone))]
pub(crate) struct PackedInflight {
    at: *mut u8,
    /// Keeps the mapping alive.
    _region: InflightRegion,
    size: u16,
    /// Value for the request taken next.
    counter: u64,
    free_head: u16,
    /// What the `next` fields say.
    next: Box<[u16]>,
    /// By buffer id.
    held: Box<[Held]>,
    /// Used and not published.
    batch: Vec<Held>,
    /// To be done again; the one taken first is the last.
    resubmit: Vec<Again>,
    /// The descriptors of the chain that was walked last.
    walked: Box<[Copied]>,
}

impl PackedInflight {
    /// Make the region ready for a ring of `size`. `used` is where the ring begins if nobody used the region yet, in which
    /// case nothing else is answered; `is_available` tells whether the descriptor at a position still looks available.
    pub(crate) fn open(
        region: InflightRegion,
        size: u16,
        used: Result<Position, RingError>,
        is_available: impl Fn(Position) -> bool,
    ) -> Result<(Self, Option<Opened>), RingError> {
        region.check(size, true)?;
        let entries = usize::from(size);
        let mut inflight = Self {
            at: region.ptr(),
            _region: region,
            size,
            counter: 0,
            free_head: 0,
            next: (1..=size).collect(),
            held: vec![Held::default(); entries].into(),
            batch: Vec::with_capacity(entries),
            resubmit: Vec::new(),
            walked: vec![Copied::default(); entries].into(),
        };
        // SAFETY: the header lies inside the region, which is aligned to 8.
        match unsafe { get_u16(inflight.at.add(REGION_VERSION)) } {
            0 => {
                inflight.initialise(used?);
                Ok((inflight, None))
            }
            VERSION => {
                let opened = inflight.recover(is_available)?;
                Ok((inflight, Some(opened)))
            }
            version => Err(RingError::InflightVersion { version }),
        }
    }

    /// Address of a field of entry `index`, which must be less than the ring's size.
    #[inline(always)]
    fn entry(&self, index: u16, field: usize) -> *mut u8 {
        debug_assert!(index < self.size);
        // SAFETY: every index kept here was checked against the size, and the region has at least as many entries.
        unsafe { self.at.add(HEADER + ENTRY * usize::from(index) + field) }
    }

    #[inline(always)]
    fn put_free_heads(&self, free: u16, old: u16) {
        // SAFETY: a field of the header, aligned to 4.
        unsafe { put_u32(self.at.add(FREE_HEADS), u32::from(free) | u32::from(old) << 16) };
    }

    #[inline(always)]
    fn put_positions(&self, used: Position, old: Position) {
        let word = u64::from(used.index())
            | u64::from(old.index()) << 16
            | u64::from(used.wrap()) << 32
            | u64::from(old.wrap()) << 40;
        // SAFETY: fields of the header, aligned to 8.
        unsafe { put_u64(self.at.add(POSITIONS), word) };
    }

    #[inline(always)]
    fn put_state(&self, index: u16, is_inflight: bool, next: u16, last: u16, num: u16) {
        let word =
            u64::from(is_inflight) | u64::from(next) << 16 | u64::from(last) << 32 | u64::from(num) << 48;
        // SAFETY: a field of an entry; see `entry`.
        unsafe { put_u64(self.entry(index, STATE), word) };
    }

    fn initialise(&mut self, used: Position) {
        for index in 0..self.size {
            self.put_state(index, false, index + 1, 0, 0);
        }
        self.put_free_heads(0, 0);
        self.put_positions(used, used);
        // SAFETY: fields of the header. The version comes last: a region without it is begun anew.
        unsafe {
            put_u64(self.at.add(FEATURES), 0);
            put_u16(self.at.add(DESC_NUM), self._region.entries);
            put_u16(self.at.add(REGION_VERSION), VERSION);
        }
    }

    /// Commit or roll back the batch that was being published and collect what is in flight.
    fn recover(&mut self, is_available: impl Fn(Position) -> bool) -> Result<Opened, RingError> {
        let used = self.settle(is_available)?;
        let mut seen = vec![false; usize::from(self.size)];
        // SAFETY: fields of entries; see `entry`.
        let states: Vec<u64> =
            (0..self.size).map(|index| unsafe { get_u64(self.entry(index, STATE)) }).collect();
        let is_inflight = |index: u16| states[usize::from(index)] as u8 == 1;
        self.next = states.iter().map(|state| (state >> 16) as u16).collect();
        // The list ends where it leads outside; one that comes back to itself leaves entries over, which is found below.
        let mut free = 0;
        let mut index = self.free_head;
        while index < self.size && !std::mem::replace(&mut seen[usize::from(index)], true) {
            free += 1;
            if is_inflight(index) {
                let [next, last, num] =
                    [16, 32, 48].map(|shift| (states[usize::from(index)] >> shift) as u16);
                self.put_state(index, false, next, last, num);
            }
            index = self.next[usize::from(index)];
        }
        let mut in_use = 0;
        let mut found = Vec::new();
        let mut known = vec![false; usize::from(self.size)];
        for first in 0..self.size {
            if seen[usize::from(first)] || !is_inflight(first) {
                continue;
            }
            let (again, last) = self.chain(first, states[usize::from(first)], &mut seen)?;
            if std::mem::replace(&mut known[usize::from(again.id)], true) {
                return Err(RingError::HeadInFlight { head: again.id });
            }
            in_use += again.num;
            self.held[usize::from(again.id)] = Held::new(first, last);
            // SAFETY: a field of an entry; see `entry`.
            found.push((unsafe { get_u64(self.entry(first, COUNTER)) }, again));
        }
        if free + in_use != self.size {
            return Err(RingError::InflightContent { why: "an entry is neither free nor in flight" });
        }
        found.sort_unstable_by_key(|(counter, again)| (*counter, again.first));
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        self.resubmit = found.into_iter().rev().map(|(_, again)| again).collect();
        Ok(Opened { used, in_use })
    }

    /// Decide whether the last batch counts, and set the free list and the used position accordingly.
    fn settle(&mut self, is_available: impl Fn(Position) -> bool) -> Result<Position, RingError> {
        // SAFETY: fields of the header, aligned to their size.
        let (heads, positions) =
            unsafe { (get_u32(self.at.add(FREE_HEADS)), get_u64(self.at.add(POSITIONS))) };
        let position = |index: u32, wrap: u32| {
            Position::new((positions >> index) as u16, (positions >> wrap) as u8 != 0)
        };
        let (used, old) = (position(0, 32), position(16, 40));
        if used.index() >= self.size || old.index() >= self.size {
            return Err(RingError::InflightContent { why: "a used index is outside the ring" });
        }
        // The flags of the batch's first descriptor are written last: they show whether the driver was shown the batch. It
        // may have made the descriptor available again since, but not twice. If only the wrap counters differ, either the
        // batch fills the ring, or another backend that stores them by themselves was killed between index and counter,
        // in which case it had settled the free list before.
        let (free, old_free) = (heads as u16, (heads >> 16) as u16);
        let half_settled = used.index() == old.index() && free == old_free;
        let shown = used != old && (half_settled || !is_available(old));
        let (used, free) = if shown { (used, free) } else { (old, old_free) };
        // While the positions differ the next process decides again: it must do so in the same way. So what was shown settles
        // the positions last, and what is rolled back the free list.
        if shown {
            self.put_free_heads(free, free);
        }
        self.put_positions(used, used);
        if !shown {
            self.put_free_heads(free, free);
        }
        self.free_head = free;
        Ok(used)
    }

    /// The request in flight that begins at entry `first`, whose state is `state`, and its last entry.
    fn chain(&self, first: u16, state: u64, seen: &mut [bool]) -> Result<(Again, u16), RingError> {
        let fail = |why| Err(RingError::InflightContent { why });
        let (last, num) = ((state >> 32) as u16, (state >> 48) as u16);
        let mut index = first;
        for step in 0..num {
            if step > 0 {
                index = self.next[usize::from(index)];
            }
            if index >= self.size {
                return fail("a request leads to an entry outside the ring");
            }
            if std::mem::replace(&mut seen[usize::from(index)], true) {
                return fail("an entry belongs to two requests, or to one and the free list");
            }
        }
        if num == 0 || index != last {
            return fail("a request does not end at its last entry");
        }
        let id = self.copied(last).id;
        if id >= self.size {
            return Err(RingError::BufferId { id, size: self.size });
        }
        Ok((Again { id, num, first }, last))
    }

    #[inline(always)]
    fn copied(&self, index: u16) -> Copied {
        // SAFETY: fields of an entry; see `entry`.
        let (rest, address) =
            unsafe { (get_u64(self.entry(index, REST)), get_u64(self.entry(index, ADDRESS))) };
        Copied { address, len: (rest >> 32) as u32, flags: (rest >> 16) as u16, id: rest as u16 }
    }

    #[inline(always)]
    pub(crate) fn resubmitting(&self) -> u16 {
        self.resubmit.len() as u16
    }

    /// What `open` found in flight.
    pub(crate) fn all_resubmissions(&self) -> &[Again] {
        &self.resubmit
    }

    /// The request to be done again next.
    #[inline(always)]
    pub(crate) fn resubmission(&self) -> Option<Again> {
        self.resubmit.last().copied()
    }

    /// The descriptors of a request to be done again, as they were taken.
    pub(crate) fn descriptors(&self, again: Again) -> impl Iterator<Item = Copied> + '_ {
        let mut index = again.first;
        (0..again.num).map(move |_| {
            let copied = self.copied(index);
            index = self.next[usize::from(index)];
            copied
        })
    }

    /// The request that `resubmission` named was taken again. True if there was one.
    #[inline(always)]
    pub(crate) fn resubmitted(&mut self) -> bool {
        self.resubmit.pop().is_some()
    }

    /// Remember the descriptor `step` of the chain that is being walked: the driver may change it before it is taken.
    #[inline(always)]
    pub(crate) fn walked(&mut self, step: u16, copied: Copied) {
        self.walked[usize::from(step)] = copied;
    }

    /// The chain that was walked last was taken; it has `num` descriptors, and that many entries are free.
    #[inline(always)]
    pub(crate) fn taken(&mut self, id: u16, num: u16) {
        let first = self.free_head;
        let mut last = first;
        let mut free = first;
        for copied in &self.walked[..usize::from(num)] {
            last = free;
            let rest = u64::from(copied.id) | u64::from(copied.flags) << 16 | u64::from(copied.len) << 32;
            // SAFETY: fields of an entry; see `entry`.
            unsafe {
                put_u64(self.entry(last, ADDRESS), copied.address);
                put_u64(self.entry(last, REST), rest);
            }
            free = self.next[usize::from(last)];
        }
        // SAFETY: a field of an entry; see `entry`.
        unsafe { put_u64(self.entry(first, COUNTER), self.counter) };
        self.put_state(first, true, self.next[usize::from(first)], last, num);
        // Until the entries have left the free list, the request does not count as taken.
        self.put_free_heads(free, free);
        self.free_head = free;
        self.counter = self.counter.wrapping_add(1);
        self.held[usize::from(id)] = Held::new(first, last);
    }

    /// A used descriptor was written that the driver does not see yet.
    #[inline(always)]
    pub(crate) fn used(&mut self, id: u16) {
        self.batch.push(self.held[usize::from(id)]);
    }

    /// The batch is about to be shown to the driver, which moves the used position from `old` to `new`.
    #[inline(always)]
    pub(crate) fn publishing(&mut self, old: Position, new: Position) {
        let old_head = self.free_head;
        for held in &self.batch {
            self.next[usize::from(held.last())] = self.free_head;
            // SAFETY: a field of an entry; see `entry`.
            unsafe { put_u16(self.entry(held.last(), NEXT), self.free_head) };
            self.free_head = held.first();
        }
        self.put_free_heads(self.free_head, old_head);
        self.put_positions(new, old);
    }

    /// The driver was shown the batch, up to `new`.
    #[inline(always)]
    pub(crate) fn published(&mut self, new: Position) {
        for held in &self.batch {
            // `last` and `num` mean nothing any more.
            self.put_state(held.first(), false, self.next[usize::from(held.first())], 0, 0);
        }
        self.batch.clear();
        self.put_free_heads(self.free_head, self.free_head);
        self.put_positions(new, new);
    }

    /// What of the process's own state decides what it does next.
    #[cfg(test)]
    pub(crate) fn state(&self) -> impl std::hash::Hash {
        let lists = (self.next.clone(), self.held.clone(), self.batch.clone(), self.resubmit.clone());
        (self.counter, self.free_head, lists)
    }
}

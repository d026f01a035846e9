//! Which slots are free.

use crate::geometry::{Layout, Zone};

/// A bit for each slot, set where it is taken.
pub struct Allocator {
    taken: Vec<u64>,
    zones: Vec<Zone>,
    /// Extents that can be given out.
    free: u64,
    /// Where the search for extents and for tombstones goes on.
    next: u32,
    next_tomb: u32,
}

impl Allocator {
    /// `is_taken` says it for each slot.
    pub fn new(layout: &Layout, is_taken: impl Fn(u32) -> bool) -> Self {
        let mut this = Self { taken: Vec::new(), zones: Vec::new(), free: 0, next: 0, next_tomb: 0 };
        this.grow(layout, is_taken);
        this
    }

    /// The store has more zones.
    pub fn grow(&mut self, layout: &Layout, is_taken: impl Fn(u32) -> bool) {
        self.taken.resize(layout.slots().div_ceil(64) as usize, 0);
        for zone in &layout.zones[self.zones.len()..] {
            for slot in zone.first..zone.first + zone.slots() {
                if is_taken(slot) {
                    self.set(slot);
                } else {
                    self.free += u64::from(slot < zone.first + zone.extents);
                }
            }
            self.zones.push(*zone);
        }
    }

    /// Extents that can be given out now.
    pub fn free(&self) -> u64 {
        self.free
    }

    pub fn is_taken(&self, slot: u32) -> bool {
        self.taken[(slot / 64) as usize] >> (slot % 64) & 1 == 1
    }

    fn set(&mut self, slot: u32) {
        self.taken[(slot / 64) as usize] |= 1 << (slot % 64);
    }

    /// Up to `want` extents that lie one behind the other: the first slot and how many. They are behind the last ones given
    /// out where that is possible, so that what is written in order lies in order.
    pub fn take(&mut self, want: u32) -> Option<(u32, u32)> {
        if self.free == 0 || want == 0 {
            return None;
        }
        let first = self.find(self.next, |zone| (zone.first, zone.first + zone.extents))?;
        let end = self.zones.iter().find(|zone| first < zone.first + zone.extents)?;
        let end = end.first + end.extents;
        let mut count = 0;
        while count < want && first + count < end && !self.is_taken(first + count) {
            self.set(first + count);
            count += 1;
        }
        self.free -= u64::from(count);
        self.next = first + count;
        Some((first, count))
    }

    /// A slot for a tombstone: one without a place, or an extent's where those have run out.
    pub fn take_tomb(&mut self) -> Option<u32> {
        let range = |zone: &Zone| (zone.first + zone.extents, zone.first + zone.slots());
        match self.find(self.next_tomb, range) {
            Some(slot) => {
                self.set(slot);
                self.next_tomb = slot + 1;
                Some(slot)
            }
            None => self.take(1).map(|(slot, _)| slot),
        }
    }

    /// The first free slot from `from` on, in the ranges that `range` gives of zones, and from the begin again.
    fn find(&self, from: u32, range: impl Fn(&Zone) -> (u32, u32)) -> Option<u32> {
        let seek = |low: u32, high: u32| {
            self.zones.iter().find_map(|zone| {
                let (first, end) = range(zone);
                self.find_between(first.max(low), end.min(high))
            })
        };
        seek(from, u32::MAX).or_else(|| seek(0, from))
    }

    fn find_between(&self, mut at: u32, end: u32) -> Option<u32> {
        while at < end {
            let rest = !self.taken[(at / 64) as usize] >> (at % 64);
            if rest == 0 {
                at = (at / 64 + 1) * 64;
                continue;
            }
            at += rest.trailing_zeros();
            return (at < end).then_some(at);
        }
        None
    }

    /// It may be given out again.
    pub fn give(&mut self, slot: u32) {
        debug_assert!(self.is_taken(slot), "slot {slot} was not taken");
        self.taken[(slot / 64) as usize] &= !(1 << (slot % 64));
        let has_place = |zone: &Zone| (zone.first..zone.first + zone.extents).contains(&slot);
        self.free += u64::from(self.zones.iter().any(has_place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_go_on_where_the_last_ended_and_wrap_around() {
        let layout = Layout::new(16 << 20, 64 << 10).unwrap();
        let all = layout.capacity() as u32;
        let mut allocator = Allocator::new(&layout, |slot| slot == 2);
        assert_eq!(allocator.free(), u64::from(all) - 1);
        assert_eq!(allocator.take(8), Some((0, 2)), "a run ends at what is taken");
        assert_eq!(allocator.take(8), Some((3, 8)));
        allocator.give(1);
        assert_eq!(allocator.take(u32::MAX), Some((11, all - 11)));
        assert_eq!(allocator.take(2), Some((1, 1)), "from the begin again");
        assert_eq!(allocator.take(1), None);
        let tomb = allocator.take_tomb().unwrap();
        assert_eq!((tomb, layout.place(tomb)), (all, None));
    }
}

//! Times in which nothing completed although something was in flight.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Shorter gaps are not listed.
const LISTED_NS: u64 = 2_000_000;
/// How many are listed; the longest ones.
const MAX_LISTED: usize = 64;

/// One gap; its start counts from the start of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Gap {
    pub start_ns: u64,
    pub duration_ns: u64,
}

/// Gaps as one thread found them.
#[derive(Debug, Clone, Default)]
pub(super) struct Gaps {
    longest: u64,
    listed: Vec<Gap>,
}

impl Gaps {
    #[inline(always)]
    pub fn note(&mut self, start_ns: u64, duration_ns: u64) {
        self.longest = self.longest.max(duration_ns);
        if duration_ns > LISTED_NS {
            self.list(Gap { start_ns, duration_ns });
        }
    }

    fn list(&mut self, gap: Gap) {
        self.listed.push(gap);
        if self.listed.len() > MAX_LISTED {
            let shortest = (0..self.listed.len()).min_by_key(|&at| self.listed[at].duration_ns);
            self.listed.swap_remove(shortest.expect("a list that is not empty"));
        }
    }

    pub fn merge(&mut self, other: &Self) {
        self.longest = self.longest.max(other.longest);
        other.listed.iter().for_each(|&gap| self.list(gap));
    }

    pub fn longest(&self) -> u64 {
        self.longest
    }

    /// By their start.
    pub fn into_listed(mut self) -> Vec<Gap> {
        self.listed.sort_unstable_by_key(|gap| gap.start_ns);
        self.listed
    }
}

/// The last completion of the whole job, whichever thread took it. Times are nanoseconds of one clock.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    last: AtomicU64,
    in_flight: AtomicU64,
}

impl Pulse {
    /// `count` requests were made at `now`. What passed while none was in flight is no gap.
    #[inline(always)]
    pub fn submitted(&self, count: u64, now: u64) {
        if self.in_flight.fetch_add(count, Ordering::Relaxed) == 0 {
            self.last.fetch_max(now, Ordering::Relaxed);
        }
    }

    /// `count` requests completed at `now`, or were given up: the gap that this ends, as its start and its length.
    #[inline(always)]
    pub fn completed(&self, count: u64, now: u64) -> (u64, u64) {
        self.in_flight.fetch_sub(count, Ordering::Relaxed);
        let last = self.last.fetch_max(now, Ordering::Relaxed);
        (last, now.saturating_sub(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_lies_between_two_completions_with_something_in_flight() {
        let pulse = Pulse::default();
        pulse.submitted(2, 1_000);
        assert_eq!(pulse.completed(1, 1_700), (1_000, 700));
        assert_eq!(pulse.completed(1, 1_800), (1_700, 100));
        // Nothing in flight from 1800 to 9000.
        pulse.submitted(1, 9_000);
        pulse.submitted(1, 9_500);
        assert_eq!(pulse.completed(1, 9_600), (9_000, 600));
        // Another thread's completion that was stamped earlier and comes late ends no gap.
        assert_eq!(pulse.completed(1, 9_550).1, 0);
    }

    #[test]
    fn the_longest_gaps_are_listed_by_their_start() {
        let mut gaps = Gaps::default();
        gaps.note(5, LISTED_NS);
        assert_eq!((gaps.longest(), gaps.listed.len()), (LISTED_NS, 0));
        let mut other = Gaps::default();
        for start in (0..100).rev() {
            other.note(start, LISTED_NS + 1 + start);
        }
        gaps.merge(&other);
        assert_eq!(gaps.longest(), LISTED_NS + 100);
        let listed = gaps.into_listed();
        assert_eq!(listed.iter().map(|gap| gap.start_ns).collect::<Vec<_>>(), (36..100).collect::<Vec<_>>());
    }
}

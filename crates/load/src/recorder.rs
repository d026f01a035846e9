//! What a client thread counts while it runs.

use crate::clock::Clock;
use crate::Histogram;

/// Counters of one queue, written by the one thread that drives it.
#[derive(Debug, Clone, Default)]
pub(crate) struct QueueRecord {
    pub reads: Histogram,
    pub writes: Histogram,
    /// Requests completed with a status other than ok; they are in the histograms too.
    pub errors: u64,
}

impl QueueRecord {
    #[inline(always)]
    pub(crate) fn record(&mut self, write: bool, nanoseconds: u64) {
        if write {
            self.writes.record(nanoseconds);
        } else {
            self.reads.record(nanoseconds);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.reads.clear();
        self.writes.clear();
        self.errors = 0;
    }

    pub(crate) fn operations(&self) -> u64 {
        self.reads.count() + self.writes.count()
    }
}

/// How a client thread spent its time: a turn that found a completion is busy until the requests that replace it are
/// on the ring; the time until the next such turn is waiting, with every slot in flight.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct TurnRecord {
    pub busy_ticks: u64,
    pub busy_turns: u64,
}

impl TurnRecord {
    #[inline(always)]
    pub(crate) fn busy(&mut self, ticks: u64) {
        self.busy_ticks += ticks;
        self.busy_turns += 1;
    }
}

/// When a thread counts: from the end of the warm-up to the deadline, both in ticks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub begin: u64,
    pub end: u64,
    pub stall_ticks: u64,
}

impl Window {
    pub(crate) fn starting_now(clock: &Clock, warmup: f64, seconds: f64, stall: f64) -> Self {
        let begin = clock.ticks() + clock.ticks_in(warmup);
        Self { begin, end: begin + clock.ticks_in(seconds), stall_ticks: clock.ticks_in(stall) }
    }
}

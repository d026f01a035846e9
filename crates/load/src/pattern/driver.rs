//! One queue under load: what it asks, and the judgement of each answer.
//!
//! A queue goes through its phases by itself, since its blocks are its own: load with every slot in flight, drain until
//! all is answered, check by reading every block that was written, done.

use std::collections::HashMap;

use libc::c_void;
use virtio_driver::iovec;

use crate::config::PatternConfig;
use crate::memory::SharedMemory;
use crate::pattern::blocks::{Blocks, Flushed, Verdict};
use crate::pattern::gaps::{Gaps, Pulse};
use crate::pattern::report::{Counts, Findings};
use crate::pattern::ring::{Reaped, Ring};
use crate::queue::{kind, STATUS_NOT_WRITTEN};
use crate::random::Random;
use crate::{Histogram, LoadError};

const SECTOR: usize = 512;
/// Blocks tried for a write before the request becomes a read: all tries met a write in flight.
const TRIES: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Load,
    Drain,
    /// Reads back; the queue's next block to read.
    Check(usize),
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Read { block: usize, floor: u64 },
    Write { block: usize, sequence: u64 },
    Flush,
}

/// A place for one request; it is in flight while it is not in `Driver::free`.
struct Slot {
    operation: Operation,
    submitted: u64,
    /// Given up: it was counted as stuck, and may still complete.
    stuck: bool,
}

/// What all queues read.
#[derive(Clone, Copy)]
pub(super) struct Common<'a> {
    pub config: &'a PatternConfig,
    pub payload: &'a SharedMemory,
    pub pulse: &'a Pulse,
    pub flush: bool,
    /// When the job began.
    pub started: u64,
}

/// What one queue brings home. Times are nanoseconds.
#[derive(Default)]
pub(super) struct QueueRecord {
    pub counts: Counts,
    pub findings: Findings,
    pub latency: Histogram,
    /// Longest time without a completion while something was in flight.
    pub longest_gap: u64,
    /// Gaps of the whole job that this queue's completions ended.
    pub gaps: Gaps,
    /// When the last request of the load completed.
    pub last_completion: u64,
    pub reads_checked: u64,
    pub blocks_checked: u64,
    pub blocks_written: u64,
    pub mixed: u64,
    /// Completions of every 10 ms.
    pub windows: Vec<u32>,
}

pub(super) struct Driver<'a> {
    pub ring: Ring,
    pub record: QueueRecord,
    phase: Phase,
    common: Common<'a>,
    blocks: Blocks,
    slots: Vec<Slot>,
    free: Vec<u32>,
    stuck: usize,
    /// What the flushes in flight make durable, by their slots; where what was not flushed may be lost.
    flushes: HashMap<u32, Flushed>,
    random: Random,
    scratch: Vec<u8>,
    last_progress: u64,
    /// Nanoseconds between two requests, and when the next is due; 0: no limit.
    interval: u64,
    due: u64,
}

impl<'a> Driver<'a> {
    pub fn new(common: Common<'a>, ring: Ring, blocks: Blocks) -> Self {
        let config = common.config;
        let slots =
            (0..config.depth).map(|_| Slot { operation: Operation::Flush, submitted: 0, stuck: false });
        let interval = match config.rate > 0.0 {
            true => (config.queues as f64 * 1e9 / config.rate) as u64,
            false => 0,
        };
        let index = ring.index() as u64;
        Self {
            slots: slots.collect(),
            free: (0..config.depth as u32).rev().collect(),
            stuck: 0,
            flushes: HashMap::new(),
            random: Random::new(config.seed ^ (index + 1).wrapping_mul(0x9e37_79b9)),
            scratch: vec![0; config.block_size],
            last_progress: common.started,
            interval,
            due: common.started + interval / config.queues as u64 * index,
            phase: Phase::Load,
            record: QueueRecord { last_completion: common.started, ..Default::default() },
            common,
            blocks,
            ring,
        }
    }

    pub fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// When this queue has to be looked at although nothing completed: the next request is due.
    pub fn due(&self) -> Option<u64> {
        (self.phase == Phase::Load && self.interval > 0 && !self.free.is_empty()).then_some(self.due)
    }

    /// Takes every completion there is.
    #[inline]
    pub fn reap(&mut self, now: u64) {
        let mut completed = 0;
        let mut broken = false;
        while let Some(reaped) = self.ring.reap() {
            let sound = match reaped {
                Reaped::Done { tag, status } => {
                    completed += u64::from(!self.slots[tag as usize].stuck);
                    self.complete(tag, status, now)
                }
                Reaped::Stray { head } => {
                    self.record.findings.doubled(format!(
                        "queue {}: descriptor {head} was completed while it headed no request",
                        self.ring.index()
                    ));
                    false
                }
            };
            if !sound {
                // Nobody can tell any more which request a descriptor stands for.
                completed += (self.ring.in_flight() - self.stuck) as u64;
                broken = true;
                break;
            }
        }
        self.progressed(completed, now);
        if broken {
            self.phase = Phase::Done;
        }
    }

    /// The backend has gone, and with it perhaps what was not flushed. What it completed is in the ring.
    pub fn lose_unflushed(&mut self, now: u64) {
        self.reap(now);
        self.blocks.lose_unflushed();
        // A read in flight is answered behind the loss.
        for slot in &mut self.slots {
            if let Operation::Read { block, floor } = &mut slot.operation {
                *floor = (*floor).min(self.blocks.floor(*block));
            }
        }
        // Those in flight are done again, on what is left.
        self.flushes.clear();
    }

    /// Moves on to the next phase when it is time, and makes the requests that are due.
    #[inline]
    pub fn advance(&mut self, stop: bool, now: u64) -> Result<(), LoadError> {
        if self.phase == Phase::Load && stop {
            self.phase = Phase::Drain;
        }
        if self.phase == Phase::Drain && self.ring.in_flight() == self.stuck {
            self.record.blocks_written = self.blocks.written();
            self.phase = Phase::Check(0);
        }
        let before = self.ring.in_flight();
        match self.phase {
            Phase::Load => self.load(now)?,
            Phase::Check(next) => self.check(next, now)?,
            Phase::Drain | Phase::Done => {}
        }
        let made = self.ring.in_flight() - before;
        if made == 0 {
            return Ok(());
        }
        if before == self.stuck {
            self.last_progress = now;
        }
        if self.phase == Phase::Load {
            self.common.pulse.submitted(made as u64, now);
        }
        self.ring.kick_if_needed()
    }

    /// Gives up what is in flight when nothing has completed since `stall` ns, nor since the backend came back.
    pub fn give_up_after(&mut self, stall: u64, connected: u64, now: u64) {
        let waiting = self.ring.in_flight() - self.stuck;
        let waited = now.saturating_sub(self.last_progress.max(connected));
        if waiting == 0 || waited < stall || self.is_done() {
            return;
        }
        let flying = (0..self.slots.len()).filter(|slot| !self.free.contains(&(*slot as u32)));
        for slot in flying.collect::<Vec<_>>() {
            if !self.slots[slot].stuck {
                self.slots[slot].stuck = true;
                let what = self.describe(slot);
                let seconds = (now - self.slots[slot].submitted) as f64 / 1e9;
                self.record.findings.stuck(format!("{what} did not complete in {seconds:.1} s"));
            }
        }
        self.stuck = self.ring.in_flight();
        self.progressed(waiting as u64, now);
        self.phase = match self.phase {
            // Half of a queue's blocks may be behind the requests that are stuck; the rest can still be read.
            Phase::Load | Phase::Drain if !self.free.is_empty() => Phase::Drain,
            _ => Phase::Done,
        };
    }

    /// Accounts for `completed` requests at `now`.
    #[inline(always)]
    fn progressed(&mut self, completed: u64, now: u64) {
        if completed == 0 {
            return;
        }
        if !matches!(self.phase, Phase::Check(_)) {
            let record = &mut self.record;
            record.longest_gap = record.longest_gap.max(now.saturating_sub(self.last_progress));
            record.last_completion = now;
            let started = self.common.started;
            let (last, gap) = self.common.pulse.completed(completed, now);
            record.gaps.note(last.saturating_sub(started), gap);
            if self.common.config.windows {
                let window = ((now - started) / 10_000_000) as usize;
                if record.windows.len() <= window {
                    record.windows.resize(window + 1, 0);
                }
                record.windows[window] += completed as u32;
            }
        }
        self.last_progress = now;
    }

    #[inline]
    fn load(&mut self, now: u64) -> Result<(), LoadError> {
        while let Some(&slot) = self.free.last() {
            if self.interval > 0 {
                if now < self.due {
                    break;
                }
                // What was missed while every slot was in flight is not made up for.
                let late = now - self.due > self.interval * self.slots.len() as u64;
                self.due = if late { now } else { self.due } + self.interval;
            }
            let operation = self.next_operation(slot);
            self.submit(slot, operation, now)?;
        }
        Ok(())
    }

    #[inline]
    fn next_operation(&mut self, slot: u32) -> Operation {
        let config = self.common.config;
        let choice = self.random.below(100) as u32;
        if choice < config.flush_share && self.common.flush {
            return Operation::Flush;
        }
        if choice >= config.flush_share + config.read_share {
            for _ in 0..TRIES {
                let block = self.random.below(self.blocks.count() as u64) as usize;
                if let Some(sequence) = self.blocks.begin_write(block, &mut self.scratch) {
                    self.common.payload.store(self.buffer(slot), &self.scratch);
                    return Operation::Write { block, sequence };
                }
            }
        }
        let block = self.random.below(self.blocks.count() as u64) as usize;
        self.read_of(block, slot)
    }

    /// A read of `block`; what an earlier request left in the slot's buffer must not pass for what it returns.
    fn read_of(&self, block: usize, slot: u32) -> Operation {
        let buffer = self.buffer(slot);
        for sector in (0..self.scratch.len()).step_by(SECTOR) {
            self.common.payload.store(buffer + sector, &[0xa5; 8]);
        }
        Operation::Read { block, floor: self.blocks.floor(block) }
    }

    fn check(&mut self, mut next: usize, now: u64) -> Result<(), LoadError> {
        while let (true, Some(&slot)) = (next < self.blocks.count(), self.free.last()) {
            if self.blocks.floor(next) > 0 {
                self.submit(slot, self.read_of(next, slot), now)?;
            }
            next += 1;
        }
        let finished = next == self.blocks.count() && self.ring.in_flight() == self.stuck;
        self.phase = if finished { Phase::Done } else { Phase::Check(next) };
        Ok(())
    }

    /// Offset of a slot's buffer in the payload memory.
    fn buffer(&self, slot: u32) -> usize {
        (self.ring.index() * self.slots.len() + slot as usize) * self.scratch.len()
    }

    #[inline]
    fn submit(&mut self, slot: u32, operation: Operation, now: u64) -> Result<(), LoadError> {
        let len = self.scratch.len();
        let sector = |block| self.blocks.number(block) * (len / SECTOR) as u64;
        let base = self.common.payload.at(self.buffer(slot), len);
        let data = [iovec { iov_base: base.cast::<c_void>(), iov_len: len }];
        match operation {
            Operation::Read { block, .. } => self.ring.submit(kind::IN, sector(block), &[], &data, slot)?,
            Operation::Write { block, .. } => self.ring.submit(kind::OUT, sector(block), &data, &[], slot)?,
            Operation::Flush => {
                if self.common.config.volatile {
                    self.flushes.insert(slot, self.blocks.flushing());
                }
                self.ring.submit(kind::FLUSH, 0, &[], &[], slot)?
            }
        }
        self.slots[slot as usize] = Slot { operation, submitted: now, stuck: false };
        self.free.pop();
        Ok(())
    }

    /// Judges an answer and frees its slot; false when it shows that the ring cannot be trusted.
    #[inline]
    fn complete(&mut self, tag: u32, status: u8, now: u64) -> bool {
        let slot = tag as usize;
        let Slot { operation, submitted, stuck } = self.slots[slot];
        if status == STATUS_NOT_WRITTEN {
            let what = self.describe(slot);
            self.record.findings.doubled(format!(
                "{what} was completed without a status: the descriptor's earlier request was completed twice"
            ));
            return false;
        }
        self.stuck -= usize::from(stuck);
        let checking = matches!(self.phase, Phase::Check(_));
        if !checking {
            self.record.latency.record(now.saturating_sub(submitted));
            self.record
                .counts
                .count(matches!(operation, Operation::Read { .. }), operation == Operation::Flush);
        }
        if status != 0 {
            let what = self.describe(slot);
            self.record.findings.error(format!("{what} completed with status {status}"));
            if let Operation::Write { block, .. } = operation {
                self.blocks.forget(block);
            }
        } else {
            match operation {
                Operation::Flush => {
                    if let Some(flushed) = self.flushes.remove(&tag) {
                        self.blocks.flushed(&flushed);
                    }
                }
                Operation::Write { block, .. } => {
                    self.blocks.acknowledge(block, self.common.config.write_through);
                }
                Operation::Read { block, floor } => {
                    self.common.payload.load_into(self.buffer(tag), &mut self.scratch);
                    let verdict = self.blocks.check(block, floor, &self.scratch);
                    self.judge(verdict, checking);
                }
            }
        }
        self.free.push(tag);
        true
    }

    fn judge(&mut self, verdict: Verdict, checking: bool) {
        let record = &mut self.record;
        match verdict {
            Verdict::Unknown => return,
            Verdict::Right => {}
            Verdict::Mixed => record.mixed += 1,
            Verdict::Lost(finding) => record.findings.lost(finding),
            Verdict::Wrong(finding) => record.findings.wrong(finding),
            Verdict::Torn(finding) => record.findings.torn(finding),
        }
        if checking {
            record.blocks_checked += 1;
        } else {
            record.reads_checked += 1;
        }
    }

    fn describe(&self, slot: usize) -> String {
        let queue = self.ring.index();
        match self.slots[slot].operation {
            Operation::Read { block, .. } => {
                format!("queue {queue}: the read of block {}", self.blocks.number(block))
            }
            Operation::Write { block, sequence } => {
                format!("queue {queue}: write {sequence}, to block {},", self.blocks.number(block))
            }
            Operation::Flush => format!("queue {queue}: a flush"),
        }
    }
}

//! One queue on its reactor: requests come off the ring here and go back onto it.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use ringstone_blockdev::{Drive, Fault, FaultDice, MappedDrive};
use ringstone_telemetry::{Latency, QueueCounter, QueueStats, ReactorCounter};
use ringstone_virtio_blk::{glance_read, parse, status, Geometry, Operation, Request};
use ringstone_virtqueue::{GuestByte, RingError, SplitRing};
use ringstone_volume::Volume;

use crate::core::Shared;
use crate::slots::Slot;

/// Requests taken from one ring before the next ring has its turn.
const BATCH: u16 = 32;
/// Used entries written before the driver is shown them: it works on the first while we do the next.
const PUBLISH_EVERY: u16 = 4;
/// How far ahead descriptors and headers are brought near.
const AHEAD_DESCRIPTORS: u16 = 4;
const AHEAD_HEADER: u16 = 2;
/// Bytes copied for one queue before the next has its turn; a longer copy goes in steps of this. What one guest asks for
/// holds the others up for some tens of microseconds at most.
pub const TURN_BYTES: u64 = 256 << 10;

/// Names a queue between reactor and control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueueKey {
    pub session: u64,
    pub vring: u16,
}

/// What a queue is made of. The control thread hands it over and gets it back, drained.
pub struct QueueParts {
    pub key: QueueKey,
    pub ring: SplitRing,
    pub volume: Arc<Volume>,
    /// The guest sees a volatile write cache; false: every write is durable before it is completed.
    pub writeback: Arc<AtomicBool>,
    pub stats: QueueStats,
    /// `None`: the frontend polls and never kicks.
    pub kick: Option<OwnedFd>,
    /// `None`: the frontend polls and wants no calls.
    pub call: Option<OwnedFd>,
    pub geometry: Geometry,
}

/// A queue as its reactor runs it.
pub struct Queue {
    pub(crate) parts: QueueParts,
    pub(crate) slots: Box<[Slot]>,
    pub(crate) in_flight: u32,
    /// Long copies, to go on one step a turn.
    pub(crate) partial: VecDeque<u16>,
    /// Requests that wait for a bounce buffer.
    pub(crate) starved: VecDeque<u16>,
    /// What this queue has of the reactor's pools.
    pub(crate) blocks: u32,
    pub(crate) bounces: u32,
    pub(crate) place: u16,
    pub(crate) generation: u16,
    dice: Option<FaultDice>,
    stopping: bool,
    failed: Option<String>,
    dirty: bool,
    pub(crate) errors: u64,
    /// The chain taken last, and where its header was.
    last: (u16, *const u8),
}

// SAFETY: `last` is only ever prefetched; everything else is Send.
unsafe impl Send for Queue {}

impl Queue {
    pub fn new(parts: QueueParts) -> Self {
        let size = usize::from(parts.ring.size());
        let dice = parts.volume.faults().map(|faults| FaultDice::new(faults, usize::from(parts.key.vring)));
        Self {
            slots: (0..size).map(|_| Slot::default()).collect(),
            in_flight: 0,
            partial: VecDeque::new(),
            starved: VecDeque::new(),
            blocks: 0,
            bounces: 0,
            place: 0,
            generation: 0,
            dice,
            stopping: false,
            failed: None,
            dirty: false,
            errors: 0,
            last: (0, std::ptr::null()),
            parts,
        }
    }

    pub fn key(&self) -> QueueKey {
        self.parts.key
    }

    pub fn into_parts(self) -> QueueParts {
        self.parts
    }

    /// The volume's drive, without a borrow of the queue (and without raising a count that other cores share).
    #[inline(always)]
    pub(crate) fn drive<'a>(&self) -> &'a Drive {
        // SAFETY: `parts` holds the volume for as long as the queue lives, never replaces it, and no caller keeps the
        // reference beyond its own call with the queue.
        unsafe { &*std::ptr::from_ref(self.parts.volume.drive()) }
    }

    /// Take no more requests; [`drained`](Self::drained) tells when those in flight are done.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
    }

    #[inline(always)]
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping
    }

    pub(crate) fn drained(&self) -> bool {
        self.stopping && self.in_flight == 0
    }

    /// The ring is unusable: nothing more is taken, and the control thread hears of it once.
    #[cold]
    fn fail(&mut self, why: String) {
        self.stopping = true;
        self.failed = Some(why);
    }

    pub(crate) fn take_failure(&mut self) -> Option<String> {
        self.failed.take()
    }

    /// Work that waits in the ring, for a reactor about to sleep.
    pub(crate) fn has_work(&mut self) -> bool {
        !self.stopping && !matches!(self.parts.ring.available(), Ok(0)) || !self.partial.is_empty()
    }

    /// Take requests off the ring. Answers how many.
    #[inline]
    pub(crate) fn poll(&mut self, shared: &mut Shared) -> u32 {
        if self.stopping {
            return 0;
        }
        let waiting = match self.parts.ring.available() {
            Ok(0) => return 0,
            Ok(waiting) => waiting,
            Err(error) => {
                self.fail(error.to_string());
                return 1;
            }
        };
        let result = match self.drive() {
            _ if self.dice.is_some() => self.take(waiting.min(BATCH), &Submitted, shared),
            Drive::Mapped(drive) => self.take(waiting.min(BATCH), &Inline(drive), shared),
            Drive::Null => self.take(waiting.min(BATCH), &Nothing, shared),
            Drive::File(_) => self.take(waiting.min(BATCH), &Submitted, shared),
        };
        if let Err(error) = result {
            self.fail(error.to_string());
        }
        u32::from(waiting)
    }

    #[inline(always)]
    fn take<M: Mover>(&mut self, batch: u16, mover: &M, shared: &mut Shared) -> Result<(), RingError> {
        if batch == 1 {
            self.parts.ring.prefetch_lone(self.last.0, self.last.1);
        }
        shared.work_found();
        let started = shared.now;
        let geometry = Geometry { size: self.parts.volume.size(), ..self.parts.geometry };
        let mut tally = Tally::default();
        let mut result = Ok(());
        for i in 0..batch {
            self.prefetch(i, batch, mover);
            match self.take_one(&geometry, mover, started, &mut tally, shared) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            if tally.bytes_read + tally.bytes_written >= TURN_BYTES {
                break;
            }
            if i % PUBLISH_EVERY == PUBLISH_EVERY - 1 {
                self.parts.ring.publish();
            }
        }
        self.flush(shared);
        self.count(&tally, shared.clock.ns(shared.clock.now() - started));
        result
    }

    #[inline(always)]
    fn prefetch<M: Mover>(&self, done: u16, batch: u16, mover: &M) {
        // Distances count from the entry about to be taken. Heads are checked by peek; a bad one is dealt with in its turn.
        let ring = &self.parts.ring;
        if done == 0 {
            for ahead in 1..AHEAD_DESCRIPTORS.min(batch) {
                if let Ok(head) = ring.peek(ahead) {
                    ring.prefetch_descriptors(head);
                }
            }
        }
        if done + AHEAD_DESCRIPTORS < batch {
            if let Ok(head) = ring.peek(AHEAD_DESCRIPTORS) {
                ring.prefetch_descriptors(head);
            }
        }
        if done + AHEAD_HEADER < batch {
            if let Ok(head) = ring.peek(AHEAD_HEADER) {
                ring.prefetch_first_buffer(head);
            }
        }
        if done + 1 < batch {
            if let Some(header) = ring.peek(1).ok().and_then(|head| ring.glance(head)) {
                mover.foresee(&header);
            }
        }
    }

    /// False if the next request has to wait in the ring.
    #[inline(always)]
    fn take_one<M: Mover>(
        &mut self,
        geometry: &Geometry,
        mover: &M,
        started: u64,
        tally: &mut Tally,
        shared: &mut Shared,
    ) -> Result<bool, RingError> {
        let ring = &self.parts.ring;
        let head = ring.peek(0)?;
        if self.slots[usize::from(head)].busy {
            return Err(RingError::HeadInFlight { head });
        }
        ring.walk(head, &mut shared.chain)?;
        ring.prefetch_used();
        self.last = (head, shared.chain.begin());
        let (request, guest_status) = match parse(&mut shared.chain, geometry) {
            Ok((request, guest_status)) => {
                guest_status.prefetch();
                (request, guest_status)
            }
            Err((Some(guest_status), refusal)) => {
                // SAFETY: the ring keeps the memory table alive.
                unsafe { guest_status.set(refusal.status()) };
                self.parts.ring.take();
                self.parts.ring.push_used(head, 1);
                tally.errors += 1;
                tally.others += 1;
                self.dirty = true;
                return Ok(true);
            }
            Err((None, refusal)) => {
                self.fail(refusal.to_string());
                return Ok(false);
            }
        };
        if let Some(moved) = mover.move_now(&request, shared) {
            let (value, written) = match (moved, request.operation) {
                (false, _) => (status::IOERR, 1),
                (true, Operation::Read) => (status::OK, request.len as u32 + 1),
                (true, _) => (status::OK, 1),
            };
            // SAFETY: the ring keeps the memory table alive.
            unsafe { guest_status.set(value) };
            self.parts.ring.take();
            self.parts.ring.push_used(head, written);
            tally.add(&request, moved);
            self.dirty = true;
            return Ok(true);
        }
        Ok(self.begin(head, &request, guest_status, started, shared))
    }

    /// Keep a request that cannot be done at once, and begin it. False if the queue has its share of the iovec blocks in
    /// use: the request stays in the ring until some are back.
    fn begin(
        &mut self,
        head: u16,
        request: &Request,
        guest_status: GuestByte,
        started: u64,
        shared: &mut Shared,
    ) -> bool {
        let slot = &mut self.slots[usize::from(head)];
        *slot = Slot {
            busy: true,
            operation: request.operation,
            status: guest_status,
            offset: request.offset,
            len: request.len,
            asked: request.len,
            started,
            ..Slot::default()
        };
        let segments = match request.operation {
            Operation::Read | Operation::GetId => shared.chain.writable(),
            Operation::Write => shared.chain.readable(),
            _ => &[],
        };
        if segments.len() > 1 {
            if self.blocks >= shared.quota.blocks || !slot.set_segments(segments, &mut shared.pools) {
                slot.busy = false;
                return false;
            }
            self.blocks += 1;
        } else {
            slot.set_segments(segments, &mut shared.pools);
        }
        self.parts.ring.take();
        self.in_flight += 1;
        self.parts.stats.set(QueueCounter::InFlight, u64::from(self.in_flight));
        if let Some(dice) = &mut self.dice {
            let is_write = request.operation == Operation::Write;
            slot.fault = dice.roll(is_write);
            if slot.fault == Fault::Torn {
                let block = u64::from(self.parts.volume.block_size());
                slot.truncate(request.len / 2 / block * block, &mut shared.pools);
            }
            if dice.delay_us() > 0 {
                let until = shared.clock.now() + shared.clock.ticks(u64::from(dice.delay_us()) * 1000);
                shared.delayed.push(until, self.place, self.generation, head);
                return true;
            }
        }
        self.execute(head, shared);
        true
    }

    /// Answer the request in `head`'s slot.
    pub(crate) fn complete(&mut self, head: u16, ok: bool, shared: &mut Shared) {
        let slot = &mut self.slots[usize::from(head)];
        let (value, written) = match (ok, slot.operation) {
            (false, _) => (status::IOERR, 1),
            (true, Operation::Read | Operation::GetId) => (status::OK, slot.asked as u32 + 1),
            (true, _) => (status::OK, 1),
        };
        // SAFETY: the ring keeps the memory table alive.
        unsafe { slot.status.set(value) };
        let mut tally = Tally::default();
        tally.add(&Request { operation: slot.operation, offset: slot.offset, len: slot.asked }, ok);
        let ns = shared.clock.ns(shared.now.saturating_sub(slot.started));
        let held = slot.release(&mut shared.pools);
        self.blocks -= u32::from(held.block);
        self.bounces -= u32::from(held.bounce);
        self.parts.ring.push_used(head, written);
        self.in_flight -= 1;
        self.count(&tally, ns);
        self.parts.stats.set(QueueCounter::InFlight, u64::from(self.in_flight));
        if !self.dirty {
            self.dirty = true;
            shared.dirty.push(self.place);
        }
    }

    /// Show the driver what is done, and call it if it waits.
    #[inline(always)]
    pub(crate) fn flush(&mut self, shared: &mut Shared) {
        if !self.dirty {
            return;
        }
        self.dirty = false;
        self.parts.ring.publish();
        if self.parts.ring.wants_call() {
            self.call(shared);
        }
    }

    pub(crate) fn call(&mut self, shared: &mut Shared) {
        if let Some(call) = &self.parts.call {
            shared.uring.signal(call.as_raw_fd());
            self.parts.stats.add(QueueCounter::Calls, 1);
            shared.stats.add(ReactorCounter::Calls, 1);
        }
    }

    #[inline(always)]
    fn count(&mut self, tally: &Tally, ns: u64) {
        let stats = &self.parts.stats;
        let each = [
            (QueueCounter::Reads, tally.reads, Some(Latency::Read)),
            (QueueCounter::Writes, tally.writes, Some(Latency::Write)),
            (QueueCounter::BytesRead, tally.bytes_read, None),
            (QueueCounter::BytesWritten, tally.bytes_written, None),
        ];
        for (counter, n, latency) in each {
            if n > 0 {
                stats.add(counter, n);
                if let Some(kind) = latency {
                    stats.latency(kind, ns, n);
                }
            }
        }
        if tally.rare() {
            self.count_rare(tally, ns);
        }
    }

    #[cold]
    fn count_rare(&mut self, tally: &Tally, ns: u64) {
        let stats = &self.parts.stats;
        stats.add(QueueCounter::Flushes, tally.flushes);
        stats.add(QueueCounter::Discards, tally.discards);
        stats.add(QueueCounter::WriteZeroes, tally.zeroes);
        stats.add(QueueCounter::Others, tally.others);
        stats.add(QueueCounter::BytesDiscarded, tally.bytes_discarded);
        stats.add(QueueCounter::Errors, tally.errors);
        self.errors += tally.errors;
        let others = tally.flushes + tally.discards + tally.zeroes + tally.others;
        if others > 0 {
            stats.latency(Latency::Other, ns, others);
        }
    }
}

/// Requests done in one go, counted together.
#[derive(Default)]
struct Tally {
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    zeroes: u64,
    others: u64,
    bytes_read: u64,
    bytes_written: u64,
    bytes_discarded: u64,
    errors: u64,
}

impl Tally {
    #[inline(always)]
    fn add(&mut self, request: &Request, ok: bool) {
        let bytes = if ok { request.len } else { 0 };
        match request.operation {
            Operation::Read => {
                self.reads += 1;
                self.bytes_read += bytes;
            }
            Operation::Write => {
                self.writes += 1;
                self.bytes_written += bytes;
            }
            Operation::Flush => self.flushes += 1,
            Operation::GetId => self.others += 1,
            Operation::Discard => {
                self.discards += 1;
                self.bytes_discarded += bytes;
            }
            Operation::WriteZeroes { .. } => {
                self.zeroes += 1;
                self.bytes_discarded += bytes;
            }
        }
        self.errors += u64::from(!ok);
    }

    #[inline(always)]
    fn rare(&self) -> bool {
        self.flushes + self.discards + self.zeroes + self.others + self.errors > 0
    }
}

/// How a kind of drive moves the data of a request that can be done at once. Chosen once a batch, so that the loop is
/// compiled for each kind.
trait Mover {
    /// `Some(succeeded)`, or `None` if the request needs a slot.
    fn move_now(&self, request: &Request, shared: &mut Shared) -> Option<bool>;

    /// The next request seems to begin with `header`.
    #[inline(always)]
    fn foresee(&self, _header: &[u8; 16]) {}
}

struct Inline<'a>(&'a MappedDrive);

impl Mover for Inline<'_> {
    #[inline(always)]
    fn move_now(&self, request: &Request, shared: &mut Shared) -> Option<bool> {
        if request.len > TURN_BYTES {
            return None;
        }
        let mut at = request.offset;
        match request.operation {
            Operation::Read => {
                for segment in shared.chain.writable() {
                    // SAFETY: parse checked that the range is on the volume and every segment inside guest memory.
                    if unsafe { self.0.read(at, segment.ptr, segment.len as usize) }.is_err() {
                        return Some(false);
                    }
                    at += u64::from(segment.len);
                }
            }
            Operation::Write => {
                for segment in shared.chain.readable() {
                    // SAFETY: as above.
                    if unsafe { self.0.write(at, segment.ptr, segment.len as usize) }.is_err() {
                        return Some(false);
                    }
                    at += u64::from(segment.len);
                }
            }
            // Memory is as stable as it gets.
            Operation::Flush => {}
            _ => return None,
        }
        Some(true)
    }

    #[inline(always)]
    fn foresee(&self, header: &[u8; 16]) {
        /// Lines of the next block, brought near while this one is copied.
        const LINES: usize = 32;
        if let Some(offset) = glance_read(header) {
            self.0.prefetch::<LINES>(offset);
        }
    }
}

struct Nothing;

impl Mover for Nothing {
    #[inline(always)]
    fn move_now(&self, request: &Request, _shared: &mut Shared) -> Option<bool> {
        (request.operation != Operation::GetId).then_some(true)
    }
}

struct Submitted;

impl Mover for Submitted {
    #[inline(always)]
    fn move_now(&self, _request: &Request, _shared: &mut Shared) -> Option<bool> {
        None
    }
}

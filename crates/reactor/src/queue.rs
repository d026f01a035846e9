//! One queue on its reactor: requests come off the ring here and go back onto it.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use ringstone_blockdev::{Drive, Fault, FaultDice};
use ringstone_rbd::Ticket;
use ringstone_telemetry::{QueueCounter, QueueStats, ReactorCounter};
use ringstone_virtio_blk::{parse, status, Geometry, Operation, Request};
use ringstone_virtqueue::{GuestByte, Notify, PackedRing, RingError, RingSetup, SplitRing, VirtRing};
use ringstone_volume::Volume;

use crate::core::Shared;
use crate::errand::Errand;
use crate::mover::{Inline, Looked, Mover, Nothing, Submitted};
use crate::slots::Slot;
use crate::tally::Tally;
use crate::uring::Tag;

/// Requests taken from one ring before the next ring has its turn.
const BATCH: u16 = 32;
/// Used entries written before the driver is shown them: it works on the first while we do the next.
const PUBLISH_EVERY: u16 = 4;

/// Names a queue between reactor and control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueueKey {
    pub session: u64,
    pub vring: u16,
}

/// What a queue is made of. The control thread hands it over and gets it back, drained.
pub struct QueueParts {
    pub key: QueueKey,
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

/// A queue as its reactor runs it: which ring it has is decided once a batch or once a completion, not by a virtual call.
pub enum Queue {
    Split(RingQueue<SplitRing>),
    Packed(RingQueue<PackedRing>),
}

/// Run an expression for the queue inside, whichever ring it has.
macro_rules! each {
    ($queue:expr, $one:ident => $body:expr) => {
        match $queue {
            $crate::queue::Queue::Split($one) => $body,
            $crate::queue::Queue::Packed($one) => $body,
        }
    };
}
pub(crate) use each;

/// A ring of either kind, before a queue is made of it.
pub enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

impl Ring {
    /// # Errors
    /// As for the ring in question.
    pub fn new(packed: bool, setup: RingSetup) -> Result<Self, RingError> {
        match packed {
            true => PackedRing::new(setup).map(Self::Packed),
            false => SplitRing::new(setup).map(Self::Split),
        }
    }
}

impl Queue {
    pub fn new(ring: Ring, parts: QueueParts) -> Self {
        match ring {
            Ring::Split(ring) => Self::Split(RingQueue::new(ring, parts)),
            Ring::Packed(ring) => Self::Packed(RingQueue::new(ring, parts)),
        }
    }

    pub fn key(&self) -> QueueKey {
        each!(self, queue => queue.parts.key)
    }

    pub fn stats(&self) -> &QueueStats {
        each!(self, queue => &queue.parts.stats)
    }

    /// Its requests go to librbd.
    pub(crate) fn is_of_image(&self) -> bool {
        each!(self, queue => matches!(queue.drive(), Drive::Rbd(_)))
    }

    /// Ring entries.
    pub fn size(&self) -> u16 {
        each!(self, queue => queue.ring.size())
    }

    /// Where the ring goes on, as GET_VRING_BASE codes it.
    pub fn base(&self) -> u32 {
        each!(self, queue => queue.ring.base())
    }

    /// Requests of a process before that are to be done again.
    pub fn resubmitting(&self) -> u16 {
        each!(self, queue => queue.ring.resubmitting())
    }

    /// Other kick and call descriptors, while the queue is with nobody.
    pub fn set_notifiers(&mut self, kick: Option<OwnedFd>, call: Option<OwnedFd>) {
        each!(self, queue => (queue.parts.kick, queue.parts.call) = (kick, call));
    }

    pub fn into_parts(self) -> QueueParts {
        each!(self, queue => queue.parts)
    }
}

/// See [`Queue`].
pub struct RingQueue<R> {
    pub(crate) ring: R,
    pub(crate) parts: QueueParts,
    pub(crate) slots: Box<[Slot]>,
    /// A slot's request at librbd; none for other drives.
    pub(crate) tickets: Box<[Ticket]>,
    /// A slot's request at a store's keeper; none for other drives.
    pub(crate) errands: Box<[Errand]>,
    pub(crate) in_flight: u32,
    /// Requests whose next step waits for its turn.
    pub(crate) partial: VecDeque<u16>,
    /// Requests that wait for a bounce buffer.
    pub(crate) starved: VecDeque<u16>,
    /// New requests come before those that go on, in this turn.
    new_first: bool,
    /// The number that its guest has on the reactor.
    pub(crate) guest: u16,
    pub(crate) place: u16,
    pub(crate) generation: u16,
    dice: Option<FaultDice>,
    stopping: Stopping,
    failed: Option<String>,
    dirty: bool,
    pub(crate) errors: u64,
    /// The chain taken last, and where its header was.
    last: (u16, *const u8),
}

/// Whether a queue takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopping {
    No,
    /// What is in flight is finished first.
    Drain,
    /// What the drive does not have yet, or gives back, stays undone in the in-flight region.
    Leave,
}

// SAFETY: `last` is only ever prefetched; everything else is Send.
unsafe impl<R: VirtRing> Send for RingQueue<R> {}

impl<R: VirtRing> RingQueue<R> {
    fn new(ring: R, parts: QueueParts) -> Self {
        let size = usize::from(ring.size());
        let at_librbd = if matches!(parts.volume.drive(), Drive::Rbd(_)) { size } else { 0 };
        let at_keeper = if matches!(parts.volume.drive(), Drive::Store(_)) { size } else { 0 };
        let dice = parts.volume.faults().map(|faults| FaultDice::new(faults, usize::from(parts.key.vring)));
        Self {
            slots: (0..size).map(|_| Slot::default()).collect(),
            tickets: (0..at_librbd).map(|_| Ticket::default()).collect(),
            errands: (0..at_keeper).map(|_| Errand::default()).collect(),
            in_flight: 0,
            partial: VecDeque::new(),
            starved: VecDeque::new(),
            new_first: false,
            guest: 0,
            place: 0,
            generation: 0,
            dice,
            stopping: Stopping::No,
            failed: None,
            dirty: false,
            errors: 0,
            last: (0, std::ptr::null()),
            ring,
            parts,
        }
    }

    /// The queue was given to a reactor, as number `generation` of its `place`, and as one of guest number `guest`.
    pub(crate) fn begin_at(&mut self, place: u16, generation: u16, guest: u16) {
        (self.place, self.generation, self.guest) = (place, generation, guest);
        self.stopping = Stopping::No;
        self.ring.set_kicks(Notify::Suppressed);
        self.parts.stats.add(QueueCounter::Resubmitted, u64::from(self.ring.resubmitting()));
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
        if self.stopping == Stopping::No {
            self.stopping = Stopping::Drain;
        }
    }

    /// As [`stop`](Self::stop), but leave in the in-flight region what has not reached the drive and what the drive gives
    /// back when asked; the frontend takes the region along.
    pub(crate) fn leave(&mut self, shared: &mut Shared) {
        self.stopping = Stopping::Leave;
        let undone: Vec<u16> = self.partial.drain(..).chain(self.starved.drain(..)).collect();
        undone.into_iter().for_each(|head| self.forget(head, shared));
        for (head, _) in self.slots.iter().enumerate().filter(|(_, slot)| slot.busy) {
            let tag = Tag::Request { place: self.place, generation: self.generation, head: head as u16 };
            shared.uring.cancel(tag);
        }
    }

    /// A request that a faulty drive held back goes on. It has not reached the drive behind yet.
    #[cold]
    pub(crate) fn resume(&mut self, head: u16, shared: &mut Shared) {
        match self.stopping {
            Stopping::Leave => self.forget(head, shared),
            _ => self.execute(head, shared),
        }
    }

    /// The drive gave a request back undone, as it was asked to: forget it, it stays in the in-flight region.
    pub(crate) fn left(&mut self, head: u16, result: i32, shared: &mut Shared) -> bool {
        if self.stopping != Stopping::Leave || result != -libc::ECANCELED {
            return false;
        }
        self.forget(head, shared);
        true
    }

    /// The volume has another owner now: what this request came to is not ours to say. It stays in the in-flight region, and
    /// the queue takes nothing more.
    #[cold]
    pub(crate) fn disown(&mut self, head: u16, shared: &mut Shared) {
        self.forget(head, shared);
        self.fail_fenced();
    }

    fn forget(&mut self, head: u16, shared: &mut Shared) {
        self.end_hold(head, shared);
        self.slots[usize::from(head)].release(&mut shared.pools, &mut shared.held[usize::from(self.guest)]);
        self.in_flight -= 1;
    }

    #[inline(always)]
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping != Stopping::No
    }

    pub(crate) fn drained(&self) -> bool {
        self.is_stopping() && self.in_flight == 0
    }

    /// The ring is unusable: nothing more is taken, and the control thread hears of it once.
    #[cold]
    fn fail(&mut self, why: String) {
        self.stop();
        self.failed = Some(why);
    }

    #[cold]
    fn fail_fenced(&mut self) {
        if !self.is_stopping() {
            self.fail("another host owns the volume now; nothing is read or written here any more".into());
        }
    }

    pub(crate) fn take_failure(&mut self) -> Option<String> {
        self.failed.take()
    }

    /// Work that waits in the ring, for a reactor about to sleep.
    pub(crate) fn has_work(&mut self) -> bool {
        !self.is_stopping() && !matches!(self.ring.available(), Ok(0)) || !self.partial.is_empty()
    }

    /// Ask the driver for kicks, or to spare them, on the way to sleep and back.
    pub(crate) fn set_kicks(&mut self, notify: Notify) {
        if !self.is_stopping() {
            self.ring.set_kicks(notify);
        }
    }

    /// Take requests off the ring and go on with those that were begun, as far as the guest's budget goes. True if there was
    /// something to do.
    #[inline(always)]
    pub(crate) fn serve(&mut self, shared: &mut Shared) -> bool {
        if self.partial.is_empty() && self.starved.is_empty() {
            return self.poll(shared);
        }
        self.share(shared)
    }

    /// New requests and those that go on take turns in being first, so that neither keeps the other waiting for long.
    #[cold]
    fn share(&mut self, shared: &mut Shared) -> bool {
        self.new_first = !self.new_first;
        let mut work = if self.new_first { self.poll(shared) } else { self.carry_on(shared) };
        if !shared.budget.is_spent() {
            work |= if self.new_first { self.carry_on(shared) } else { self.poll(shared) };
        }
        work
    }

    /// Take requests off the ring. True if there were any.
    #[inline]
    fn poll(&mut self, shared: &mut Shared) -> bool {
        if self.is_stopping() {
            return false;
        }
        if self.parts.volume.is_fenced() {
            self.fail_fenced();
            return true;
        }
        let waiting = match self.ring.available() {
            Ok(0) => return false,
            Ok(waiting) => waiting,
            Err(error) => {
                self.fail(error.to_string());
                return true;
            }
        };
        let result = match self.drive() {
            _ if self.dice.is_some() => self.take(waiting.min(BATCH), &Submitted, shared),
            Drive::Mapped(drive) => self.take(waiting.min(BATCH), &Inline(drive), shared),
            Drive::Null => self.take(waiting.min(BATCH), &Nothing, shared),
            Drive::Store(volume) => self.take(waiting.min(BATCH), &Looked(volume), shared),
            Drive::File(_) | Drive::Rbd(_) => self.take(waiting.min(BATCH), &Submitted, shared),
        };
        if let Err(error) = result {
            self.fail(error.to_string());
        }
        true
    }

    #[inline(always)]
    fn take<M: Mover>(&mut self, batch: u16, mover: &M, shared: &mut Shared) -> Result<(), RingError> {
        if batch == 1 {
            self.ring.prefetch_lone(self.last.0, self.last.1);
        }
        shared.work_found();
        let started = shared.now;
        let geometry = Geometry { size: self.parts.volume.size(), ..self.parts.geometry };
        let mut tally = Tally::default();
        let mut result = Ok(());
        for i in 0..batch {
            if let Some(header) = self.ring.prefetch_batch(i, batch) {
                mover.foresee(&header);
            }
            match self.take_one(&geometry, mover, started, &mut tally, shared) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            if shared.budget.is_spent() {
                break;
            }
            if i % PUBLISH_EVERY == PUBLISH_EVERY - 1 {
                self.ring.publish();
            }
            // How many wait is an upper bound: a chain may take several entries of a packed ring.
            if i + 1 < batch && !matches!(self.ring.available(), Ok(1..)) {
                break;
            }
        }
        self.flush(shared);
        let spent = shared.clock.ns(shared.clock.now() - started);
        self.parts.stats.add(QueueCounter::BusyNs, spent);
        tally.count(&self.parts.stats, spent);
        self.errors += tally.errors;
        result
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
        let head = self.ring.walk_next(&mut shared.chain)?;
        shared.budget.walked(shared.chain.descriptors());
        if self.slots[usize::from(head)].busy {
            return Err(RingError::HeadInFlight { head });
        }
        self.ring.prefetch_used();
        self.last = (head, shared.chain.begin());
        let (request, guest_status) = match parse(&mut shared.chain, geometry) {
            Ok((request, guest_status)) => {
                guest_status.prefetch();
                (request, guest_status)
            }
            Err((Some(guest_status), refusal)) => {
                self.answer(guest_status, refusal.status());
                self.ring.take();
                self.ring.push_used(head, 1);
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
            if let (Some(log), Operation::Read) = (self.ring.log(), request.operation) {
                for segment in shared.chain.writable() {
                    log.mark(self.ring.memory(), segment.ptr, segment.len as usize);
                }
            }
            self.answer(guest_status, value);
            self.ring.take();
            self.ring.push_used(head, written);
            tally.add(&request, moved);
            self.dirty = true;
            return Ok(true);
        }
        Ok(self.begin(head, &request, guest_status, started, shared))
    }

    /// Keep a request that cannot be done at once, and begin it. False if the guest has its share of the iovec blocks in
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
            let held = &mut shared.held[usize::from(self.guest)];
            if held.blocks >= shared.quota.blocks || !slot.set_segments(segments, &mut shared.pools) {
                slot.busy = false;
                return false;
            }
            held.blocks += 1;
        } else {
            slot.set_segments(segments, &mut shared.pools);
        }
        self.ring.take();
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
        let guest_status = slot.status;
        self.answer(guest_status, value);
        let slot = &mut self.slots[usize::from(head)];
        let mut tally = Tally::default();
        tally.add(&Request { operation: slot.operation, offset: slot.offset, len: slot.asked }, ok);
        let ns = shared.clock.ns(shared.now.saturating_sub(slot.started));
        slot.release(&mut shared.pools, &mut shared.held[usize::from(self.guest)]);
        self.ring.push_used(head, written);
        self.in_flight -= 1;
        tally.count(&self.parts.stats, ns);
        self.errors += tally.errors;
        self.parts.stats.set(QueueCounter::InFlight, u64::from(self.in_flight));
        if !self.dirty {
            self.dirty = true;
            shared.dirty.push(self.place);
        }
    }

    /// Write a request's status, and into the dirty log that it was written.
    #[inline(always)]
    fn answer(&self, guest_status: GuestByte, value: u8) {
        // SAFETY: the ring keeps the memory table alive.
        unsafe { guest_status.set(value) };
        if let Some(log) = self.ring.log() {
            log.mark(self.ring.memory(), guest_status.address(), 1);
        }
    }

    /// Show the driver what is done, and call it if it waits.
    #[inline(always)]
    pub(crate) fn flush(&mut self, shared: &mut Shared) {
        if !self.dirty {
            return;
        }
        self.dirty = false;
        self.ring.publish();
        if self.ring.wants_call() {
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
}

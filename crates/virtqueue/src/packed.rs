//! The packed ring: virtio 1.2, section 2.8.

use std::sync::atomic::{fence, AtomicU64, Ordering};
use std::sync::Arc;

use crate::chain::Chain;
use crate::descriptor::{self, append, indirect_table, DESC_SIZE, INDIRECT, NEXT, WRITE};
use crate::dirty::DirtyLog;
use crate::error::RingError;
use crate::inflight::{Copied, InflightRegion, PackedInflight};
use crate::memory::MemoryTable;
use crate::prefetch::prefetch_for_write;
use crate::ring::{check_size, locate, Notify, RingSetup, VirtRing};
use crate::shared::{get_u16, get_u32, put_u16, put_u32, put_u64};
use crate::wide::Wide;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Where the length, the id and the flags of a descriptor are.
const LEN: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;

// Event suppression areas (2.8.14): a 16-bit offset with the wrap counter on top, then flags.
const EVENT_SIZE: u64 = 4;
const EVENT_ENABLE: u32 = 0;
const EVENT_DISABLE: u32 = 1;
const EVENT_DESC: u32 = 2;

/// Descriptors looked at to find out how many chains wait: a batch's worth, a few cache lines.
const LOOK_AHEAD: u16 = 32;

/// A place in the ring, and the wrap counter with which it is reached: the index in the lower half, the counter above. In
/// one word for the reason that [`Wide`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Position(u32);

impl Position {
    #[inline(always)]
    pub fn new(index: u16, wrap: bool) -> Self {
        Self(u32::from(index) | u32::from(wrap) << 16)
    }

    #[inline(always)]
    pub fn index(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    pub fn wrap(self) -> bool {
        self.0 >> 16 != 0
    }

    /// `by` is at most `size`.
    #[inline(always)]
    fn advance(self, by: u16, size: u16) -> Self {
        let index = u32::from(self.index()) + u32::from(by);
        if index >= u32::from(size) {
            return Self::new((index - u32::from(size)) as u16, !self.wrap());
        }
        Self::new(index as u16, self.wrap())
    }

    /// The flags of a descriptor here that the driver made available.
    #[inline(always)]
    fn available(self) -> u16 {
        if self.wrap() {
            AVAIL
        } else {
            USED
        }
    }

    /// The flags of a used descriptor here.
    #[inline(always)]
    fn used(self) -> u16 {
        if self.wrap() {
            AVAIL | USED
        } else {
            0
        }
    }

    #[inline(always)]
    fn coded(self) -> u16 {
        self.index() | u16::from(self.wrap()) << 15
    }

    fn decode(coded: u16) -> Self {
        Self::new(coded & 0x7fff, coded & 0x8000 != 0)
    }
}

/// One packed ring.
#[cfg_attr(test, derive(Clone))]
pub struct PackedRing {
    size: u16,
    event_idx: bool,
    indirect: bool,
    descriptors: *mut u8,
    driver_events: *mut u8,
    device_events: *mut u8,
    /// The next descriptor to take.
    available: Position,
    /// The next descriptor to use; what the driver sees of it is `published`.
    used: Position,
    published: Position,
    /// Flags of the first used descriptor since `published`. They are written last and show the whole batch.
    first_flags: Wide,
    /// Descriptors taken and not published as used.
    in_use: Wide,
    /// Of these, how many were used.
    unpublished: Wide,
    /// Descriptors published since the driver was last asked whether it wants a call; at most 65535.
    unasked: Wide,
    /// Chains that are known to wait.
    waiting: Wide,
    /// The chain that was walked last: its id and its number of descriptors.
    walked: (Wide, Wide),
    /// Number of descriptors of the chain taken last.
    last_len: Wide,
    /// Number of descriptors of the chain in flight, by buffer id; 0 if there is none.
    chains: Box<[u16]>,
    inflight: Option<PackedInflight>,
    log: Option<Arc<DirtyLog>>,
    memory: Arc<MemoryTable>,
}

// SAFETY: the pointers lead into mappings that `memory` and `inflight` keep alive and that any thread may use; a ring is
// moved between threads but never shared.
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// Set a ring up. With an in-flight region that was in use, what a process before this one left is put in order.
    ///
    /// # Errors
    /// A size that is none, a part that is misaligned or outside guest memory, a base outside the ring, an in-flight region
    /// that does not fit or makes no sense.
    pub fn new(setup: RingSetup) -> Result<Self, RingError> {
        let RingSetup { memory, size, addresses, base, event_idx, indirect, inflight, log } = setup;
        let size = check_size(size)?;
        let len = u64::from(size) * DESC_SIZE;
        let descriptors = locate(&memory, "descriptor ring", addresses.descriptors, len, 16)?;
        let driver_events = locate(&memory, "driver event area", addresses.available, EVENT_SIZE, 4)?;
        let device_events = locate(&memory, "device event area", addresses.used, EVENT_SIZE, 4)?;
        let (available, used) = (Position::decode(base as u16), Position::decode((base >> 16) as u16));
        let mut ring = Self {
            size,
            event_idx,
            indirect,
            descriptors,
            driver_events,
            device_events,
            available,
            used,
            published: used,
            first_flags: Wide::new(0),
            in_use: Wide::new(0),
            unpublished: Wide::new(0),
            unasked: Wide::new(0),
            waiting: Wide::new(0),
            walked: (Wide::new(0), Wide::new(0)),
            last_len: Wide::new(1),
            chains: vec![0; usize::from(size)].into(),
            inflight: None,
            log,
            memory,
        };
        let between = ring.between(base);
        match inflight {
            Some(region) => ring.open(region, between)?,
            None => ring.in_use.set(between?),
        }
        if let Some(log) = &ring.log {
            // A process before this one may have been killed between a write and its mark.
            log.mark(&ring.memory, descriptors, len as usize);
            log.mark(&ring.memory, device_events, EVENT_SIZE as usize);
        }
        Ok(ring)
    }

    /// Descriptors between the positions that the base names. Somebody took them, and they will not be used.
    fn between(&self, base: u32) -> Result<u16, RingError> {
        let (available, used) = (self.available, self.used);
        let fail = Err(RingError::Base { base, size: self.size });
        if available.index() >= self.size || used.index() >= self.size {
            return fail;
        }
        match available.wrap() == used.wrap() {
            true if available.index() >= used.index() => Ok(available.index() - used.index()),
            false if available.index() <= used.index() => Ok(self.size - used.index() + available.index()),
            _ => fail,
        }
    }

    // Field addresses. SAFETY common to all: `new` checked that each part lies inside guest memory for this ring size
    // and is aligned; the mapping lives as long as `self.memory`; the memory is only touched atomically; indices are kept
    // less than the size.

    #[inline(always)]
    fn field(&self, index: u16, field: usize) -> *mut u8 {
        debug_assert!(index < self.size);
        self.descriptors.wrapping_add(DESC_SIZE as usize * usize::from(index) + field)
    }

    #[inline(always)]
    fn flags(&self, index: u16) -> u16 {
        // SAFETY: a field of a descriptor.
        let flags = unsafe { get_u16(self.field(index, FLAGS)) };
        // Acquire: a chain's other descriptors are read after the flags that make it available.
        fence(Ordering::Acquire);
        flags
    }

    #[inline(always)]
    fn is_available(&self, at: Position) -> bool {
        self.flags(at.index()) & (AVAIL | USED) == at.available()
    }

    /// The descriptor at `index`, read once.
    #[inline(always)]
    fn descriptor(&self, index: u16) -> Copied {
        // SAFETY: the second word of a descriptor. Acquire, as for `flags`, which are part of it.
        let rest = unsafe { (*self.field(index, LEN).cast::<AtomicU64>()).load(Ordering::Acquire) };
        // SAFETY: the index is inside the ring.
        let (address, _) = unsafe { descriptor::read(self.descriptors, index) };
        Copied { address, len: rest as u32, id: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }

    #[inline(always)]
    fn mark(&self, at: *const u8, len: usize) {
        if let Some(log) = &self.log {
            log.mark(&self.memory, at, len);
        }
    }

    /// Chains that wait from `available` on, as far as is looked; at least 1 if there are any.
    #[inline(always)]
    fn look_ahead(&self) -> u16 {
        let mut at = self.available;
        let mut chains = 0;
        for seen in 0..LOOK_AHEAD.min(self.size) {
            let flags = self.flags(at.index());
            if flags & (AVAIL | USED) != at.available() {
                return chains.max(u16::from(seen > 0));
            }
            chains += u16::from(flags & NEXT == 0);
            at = at.advance(1, self.size);
        }
        chains.max(1)
    }

    /// Append what one descriptor names: a buffer, or, if it is alone in its chain, a table of them.
    #[inline(always)]
    fn follow(&self, chain: &mut Chain, head: u16, step: u16, copied: Copied) -> Result<(), RingError> {
        if copied.flags & INDIRECT == 0 {
            return append(chain, &self.memory, head, copied.address, copied.len, copied.flags);
        }
        let alone = match copied.flags & NEXT != 0 || step > 0 {
            true => Err("it is part of a longer chain"),
            false => Ok(()),
        };
        let (table, entries) =
            indirect_table(&self.memory, self.indirect, head, alone, copied.address, copied.len)?;
        chain.descriptors += usize::from(entries);
        for index in 0..entries {
            // 2.8.7: the entries are consecutive, and of their flags only WRITE means something.
            // SAFETY: the index is inside the table, and the table inside guest memory and aligned to 8.
            let (address, rest) = unsafe { descriptor::read(table, index) };
            append(chain, &self.memory, head, address, rest as u32, (rest >> 48) as u16)?;
        }
        Ok(())
    }

    /// Follow a request of the process before, as it was copied when it was taken.
    #[cold]
    fn walk_again(&self, inflight: &PackedInflight, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        let Some(again) = inflight.resubmission() else { return Ok(None) };
        chain.clear();
        for (step, copied) in inflight.descriptors(again).enumerate() {
            self.follow(chain, again.id, step as u16, copied)?;
        }
        chain.descriptors += usize::from(again.num);
        Ok(Some(again.id))
    }

    /// What of the process's own state decides what it does next.
    #[cfg(test)]
    pub(crate) fn state(&self) -> impl std::hash::Hash {
        let positions = (self.available, self.used, self.published, self.first_flags.get());
        let counts = (self.in_use.get(), self.unpublished.get(), self.waiting.get(), self.walked);
        (positions, counts, self.chains.clone(), self.inflight.as_ref().map(PackedInflight::state))
    }
}

/// Recovery.
impl PackedRing {
    /// Make use of the in-flight region. Only if nobody used it before does the base count, and `between` with it.
    fn open(&mut self, region: InflightRegion, between: Result<u16, RingError>) -> Result<(), RingError> {
        let begin = between.map(|_| self.used);
        let (inflight, opened) = PackedInflight::open(region, self.size, begin, |at| self.is_available(at))?;
        if let Some(opened) = opened {
            self.used = opened.used;
            self.published = opened.used;
            self.available = opened.used.advance(opened.in_use, self.size);
            self.in_use.set(opened.in_use);
            for again in inflight.all_resubmissions() {
                self.chains[usize::from(again.id)] = again.num;
            }
            self.take_back_flags();
        }
        self.inflight = Some(inflight);
        Ok(())
    }

    /// Used descriptors of a batch that the driver was not shown have their flags already, all but the first. The driver
    /// would take them for used as soon as it comes to them, so they are made to look as it left them.
    fn take_back_flags(&self) {
        let mut at = self.used;
        for _ in 0..self.in_use.get() {
            let flags = self.flags(at.index());
            if flags & (AVAIL | USED) != at.available() {
                // SAFETY: a field of a descriptor.
                unsafe { put_u16(self.field(at.index(), FLAGS), flags & !(AVAIL | USED) | at.available()) };
            }
            at = at.advance(1, self.size);
        }
    }
}

impl VirtRing for PackedRing {
    fn size(&self) -> u16 {
        self.size
    }

    fn memory(&self) -> &Arc<MemoryTable> {
        &self.memory
    }

    #[inline(always)]
    fn log(&self) -> Option<&DirtyLog> {
        self.log.as_deref()
    }

    fn base(&self) -> u32 {
        u32::from(self.available.coded()) | u32::from(self.published.coded()) << 16
    }

    #[inline(always)]
    fn resubmitting(&self) -> u16 {
        self.inflight.as_ref().map_or(0, PackedInflight::resubmitting)
    }

    #[inline(always)]
    fn available(&mut self) -> Result<u16, RingError> {
        if self.waiting.get() == 0 {
            self.waiting.set(self.look_ahead());
        }
        Ok(self.waiting.get().saturating_add(self.resubmitting()).min(self.size))
    }

    #[inline(always)]
    fn walk_next(&mut self, chain: &mut Chain) -> Result<u16, RingError> {
        if let Some(inflight) = self.inflight.as_ref().filter(|inflight| inflight.resubmitting() > 0) {
            if let Some(id) = self.walk_again(inflight, chain)? {
                return Ok(id);
            }
        }
        chain.clear();
        let head = self.available.index();
        let room = self.size - self.in_use.get();
        let mut at = self.available;
        let mut num = 0;
        loop {
            let copied = self.descriptor(at.index());
            if num == 0 && copied.flags & (AVAIL | USED) != at.available() {
                return Err(RingError::NotAvailable { index: head });
            }
            if num == room {
                return Err(RingError::Overrun { index: head, size: self.in_use.get() });
            }
            if let Some(inflight) = &mut self.inflight {
                inflight.walked(num, copied);
            }
            self.follow(chain, head, num, copied)?;
            num += 1;
            if copied.flags & NEXT == 0 {
                chain.descriptors += usize::from(num);
                // 2.8.6: the id is that of the chain's last descriptor.
                let id = copied.id;
                match self.chains.get(usize::from(id)) {
                    None => return Err(RingError::BufferId { id, size: self.size }),
                    Some(0) => {}
                    Some(_) => return Err(RingError::HeadInFlight { head: id }),
                }
                self.walked = (Wide::new(id), Wide::new(num));
                return Ok(id);
            }
            at = at.advance(1, self.size);
        }
    }

    #[inline(always)]
    fn take(&mut self) {
        if self.inflight.as_mut().is_some_and(PackedInflight::resubmitted) {
            return;
        }
        let (id, num) = (self.walked.0.take(), self.walked.1.take());
        debug_assert!(num > 0, "nothing was walked");
        if num == 0 {
            return;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.taken(id, num);
        }
        self.chains[usize::from(id)] = num;
        self.last_len.set(num);
        self.in_use.set(self.in_use.get() + num);
        self.available = self.available.advance(num, self.size);
        self.waiting.set(self.waiting.get().saturating_sub(1));
    }

    #[inline(always)]
    fn push_used(&mut self, head: u16, written: u32) {
        let num = std::mem::take(&mut self.chains[usize::from(head)]);
        debug_assert!(num > 0, "{head} is not in flight");
        if num == 0 {
            return;
        }
        // 2.8.4: WRITE tells that the length means something.
        let flags = self.used.used() | if written > 0 { WRITE } else { 0 };
        let at = self.field(self.used.index(), LEN);
        // SAFETY: the second word of a descriptor, or its parts. What `descriptor` read of it was copied where needed.
        unsafe {
            if self.unpublished.get() == 0 {
                put_u32(at, written);
                put_u16(self.field(self.used.index(), ID), head);
                self.first_flags.set(flags);
            } else {
                put_u64(at, u64::from(written) | u64::from(head) << 32 | u64::from(flags) << 48);
            }
        }
        self.mark(at, 8);
        if let Some(inflight) = &mut self.inflight {
            inflight.used(head);
        }
        self.unpublished.set(self.unpublished.get() + num);
        self.used = self.used.advance(num, self.size);
    }

    #[inline(always)]
    fn publish(&mut self) {
        if self.unpublished.get() == 0 {
            return;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.publishing(self.published, self.used);
        }
        let at = self.field(self.published.index(), FLAGS);
        // Release, as every store: the further descriptors, and the data and status bytes before them, are visible before
        // these flags, which the driver waits for.
        // SAFETY: a field of a descriptor.
        unsafe { put_u16(at, self.first_flags.get()) };
        self.mark(at, 2);
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.used);
        }
        self.published = self.used;
        self.in_use.set(self.in_use.get() - self.unpublished.get());
        self.unasked.set(self.unasked.get().saturating_add(self.unpublished.get()));
        self.unpublished.set(0);
    }

    /// virtio 1.2, 2.8.10 and 2.8.14.
    #[inline(always)]
    fn wants_call(&mut self) -> bool {
        if self.unasked.get() == 0 {
            return false;
        }
        let since = self.unasked.take();
        // The used flags must be visible before we read whether the driver sleeps; it does the opposite.
        fence(Ordering::SeqCst);
        // SAFETY: the driver's event area.
        let word = unsafe { get_u32(self.driver_events) };
        match (word >> 16) & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                let event = Position::decode(word as u16);
                // Counted from the begin of this lap, an event of the lap before lies below zero.
                let lap = if event.wrap() == self.published.wrap() { 0 } else { self.size };
                let event = event.index().wrapping_sub(lap);
                self.published.index().wrapping_sub(event).wrapping_sub(1) < since
            }
            _ => true,
        }
    }

    fn set_kicks(&mut self, notify: Notify) {
        let word = match (notify, self.event_idx) {
            (Notify::Suppressed, _) => EVENT_DISABLE << 16,
            (Notify::Armed, false) => EVENT_ENABLE << 16,
            (Notify::Armed, true) => u32::from(self.available.coded()) | EVENT_DESC << 16,
        };
        // SAFETY: the device's event area. In one store, so that the driver never sees one half of it.
        unsafe { put_u32(self.device_events, word) };
        self.mark(self.device_events, 4);
        fence(Ordering::SeqCst);
    }

    /// Where the chains behind begin is not known; that they are as long as the one before is a good guess. Descriptors need
    /// no hint, the processor sees that they are read in order.
    #[inline(always)]
    fn prefetch_batch(&self, done: u16, batch: u16) -> Option<[u8; 16]> {
        if self.resubmitting() > 0 {
            return None;
        }
        let len = self.last_len.get();
        let first_buffer = |ahead: u16| {
            let at = self.available.advance((len * ahead).min(self.size), self.size);
            let copied = self.descriptor(at.index());
            (copied.flags & (AVAIL | USED) == at.available()).then_some((copied.address, copied.len))
        };
        if done + 2 < batch {
            if let Some((address, _)) = first_buffer(2) {
                descriptor::prefetch_buffer(&self.memory, address);
            }
        }
        if done + 1 < batch {
            let (address, len) = first_buffer(1)?;
            return descriptor::glance(&self.memory, address, len);
        }
        None
    }

    #[inline(always)]
    fn prefetch_lone(&self, _guess: u16, header: *const u8) {
        prefetch_for_write(self.field(self.available.index(), 0));
        prefetch_for_write(header);
        self.prefetch_used();
    }

    #[inline(always)]
    fn prefetch_used(&self) {
        prefetch_for_write(self.field(self.used.index(), 0));
    }
}

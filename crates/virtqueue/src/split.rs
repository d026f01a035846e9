//! The split ring: virtio 1.2, section 2.7.

use std::sync::atomic::{fence, AtomicU16, Ordering};
use std::sync::Arc;

use crate::chain::Chain;
use crate::descriptor::{self, append, indirect_table, DESC_SIZE, INDIRECT, NEXT};
use crate::dirty::DirtyLog;
use crate::error::RingError;
use crate::inflight::SplitInflight;
use crate::memory::MemoryTable;
use crate::prefetch::{prefetch, prefetch_for_write};
use crate::ring::{check_size, locate, Notify, RingSetup, VirtRing};
use crate::shared::{get_u16, put_u16, put_u32};
use crate::wide::Wide;

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// How far ahead descriptors and headers are brought near.
const AHEAD_DESCRIPTORS: u16 = 4;
const AHEAD_HEADER: u16 = 2;

/// One split ring.
#[cfg_attr(test, derive(Clone))]
pub struct SplitRing {
    size: u16,
    mask: u16,
    event_idx: bool,
    indirect: bool,
    descriptors: *mut u8,
    available: *mut u8,
    used: *mut u8,
    /// Entries of the available ring taken so far (free running).
    next_available: Wide,
    /// Entries of the used ring written so far (free running); what the driver sees is `published`.
    next_used: Wide,
    published: Wide,
    /// Value of `published` when the driver was last asked whether it wants a call.
    asked: Wide,
    /// The available index read last: spares a read of the driver's cache line while entries remain.
    cached_available: Wide,
    /// The head that was walked last.
    walked: Wide,
    inflight: Option<SplitInflight>,
    log: Option<Arc<DirtyLog>>,
    memory: Arc<MemoryTable>,
}

// SAFETY: the pointers lead into mappings that `memory` and `inflight` keep alive and that any thread may use; a ring is
// moved between threads but never shared.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Set a ring up. With an in-flight region that was in use, what a process before this one left is put in order.
    ///
    /// # Errors
    /// A size that is none, a part that is misaligned or outside guest memory, an in-flight region that does not fit or
    /// makes no sense.
    pub fn new(setup: RingSetup) -> Result<Self, RingError> {
        let RingSetup { memory, size, addresses, base, event_idx, indirect, inflight, log } = setup;
        let size = check_size(size)?;
        // The event field behind each ring is there whether EVENT_IDX was negotiated or not (2.7.6, 2.7.8), but a driver
        // that did not negotiate it need not have allocated it.
        let event = if event_idx { 2 } else { 0 };
        let n = u64::from(size);
        let descriptors = locate(&memory, "descriptor table", addresses.descriptors, n * DESC_SIZE, 16)?;
        let available = locate(&memory, "available ring", addresses.available, 4 + 2 * n + event, 2)?;
        let used_len = 4 + 8 * n + event;
        let used = locate(&memory, "used ring", addresses.used, used_len, 4)?;
        // The used index is the driver's truth over a reconnect: what was published before stays published.
        // SAFETY: offset 2 of the used ring.
        let published = unsafe { get_u16(used.add(2)) };
        let mut next_available = base as u16;
        let mut kept = None;
        if let Some(region) = inflight {
            let (region, recovered) = SplitInflight::open(region, size, published)?;
            next_available = recovered.unwrap_or(next_available);
            kept = Some(region);
        }
        if let Some(log) = &log {
            // A process before this one may have been killed between a write and its mark.
            log.mark(&memory, used, used_len as usize);
        }
        Ok(Self {
            size,
            mask: size - 1,
            event_idx,
            indirect,
            descriptors,
            available,
            used,
            next_available: Wide::new(next_available),
            next_used: Wide::new(published),
            published: Wide::new(published),
            asked: Wide::new(published),
            cached_available: Wide::new(next_available),
            walked: Wide::new(0),
            inflight: kept,
            log,
            memory,
        })
    }

    // Field addresses. SAFETY common to all: `new` checked that each part lies inside guest memory for this ring size
    // and is aligned; the mapping lives as long as `self.memory`; the memory is only touched atomically.

    #[inline(always)]
    fn available_index(&self) -> &AtomicU16 {
        // SAFETY: offset 2 of the available ring.
        unsafe { &*self.available.add(2).cast::<AtomicU16>() }
    }

    #[inline(always)]
    fn available_entry(&self, at: u16) -> u16 {
        // SAFETY: the entry at `at & mask` lies inside the available ring.
        unsafe { get_u16(self.available.add(4 + 2 * usize::from(at & self.mask))) }
    }

    #[inline(always)]
    fn used_event(&self) -> u16 {
        // SAFETY: behind the last available entry; only called with EVENT_IDX, for which `new` checked it.
        unsafe { get_u16(self.available.add(4 + 2 * usize::from(self.size))) }
    }

    /// Where the flags of the used ring are.
    #[inline(always)]
    fn used_flags(&self) -> *mut u8 {
        self.used
    }

    /// Where the event index behind the used ring is; it is there with EVENT_IDX only.
    #[inline(always)]
    fn available_event(&self) -> *mut u8 {
        self.used.wrapping_add(4 + 8 * usize::from(self.size))
    }

    #[inline(always)]
    fn mark(&self, at: *const u8, len: usize) {
        if let Some(log) = &self.log {
            log.mark(&self.memory, at, len);
        }
    }

    /// Head of the chain `ahead` entries behind the next one, as good as it is: for hints only.
    #[inline(always)]
    fn peek(&self, ahead: u16) -> u16 {
        self.available_entry(self.next_available.get().wrapping_add(ahead)) & self.mask
    }

    #[inline(always)]
    fn prefetch_descriptors(&self, head: u16) {
        prefetch(self.descriptors.wrapping_add(16 * usize::from(head & self.mask)));
    }

    /// Address and length of the first buffer of the chain at `head`.
    #[inline(always)]
    fn first_buffer(&self, head: u16) -> (u64, u32) {
        // SAFETY: the index is inside the table.
        let (address, rest) = unsafe { descriptor::read(self.descriptors, head & self.mask) };
        (address, rest as u32)
    }

    /// Follow the chain that begins at `head` into `chain`.
    #[inline(always)]
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.clear();
        let mut index = head;
        let mut table = self.descriptors;
        let mut table_size = self.size;
        let mut inside_indirect = false;
        let mut steps = 0u32;
        loop {
            if index >= table_size {
                return Err(RingError::DescriptorIndex { index, size: table_size });
            }
            steps += 1;
            if steps > u32::from(table_size) {
                return Err(RingError::Loop { head });
            }
            // SAFETY: the index is inside the table, and the table inside guest memory and aligned to 8.
            let (address, rest) = unsafe { descriptor::read(table, index) };
            let (len, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
            if flags & INDIRECT != 0 {
                let alone = match (inside_indirect, flags & NEXT != 0 || steps > 1) {
                    (true, _) => Err("it names another indirect table"),
                    (false, true) => Err("it is part of a longer chain"),
                    (false, false) => Ok(()),
                };
                (table, table_size) = indirect_table(&self.memory, self.indirect, head, alone, address, len)?;
                inside_indirect = true;
                index = 0;
                steps = 0;
                continue;
            }
            append(chain, &self.memory, head, address, len, flags)?;
            if flags & NEXT == 0 {
                // Descriptors of no length count too.
                chain.descriptors = steps as usize;
                return Ok(());
            }
            index = next;
        }
    }

    /// What of the process's own state decides what it does next.
    #[cfg(test)]
    pub(crate) fn state(&self) -> impl std::hash::Hash {
        let positions = (
            self.next_available.get(),
            self.next_used.get(),
            self.published.get(),
            self.asked.get(),
            self.cached_available.get(),
        );
        (positions, self.walked.get(), self.inflight.as_ref().map(SplitInflight::state))
    }
}

impl VirtRing for SplitRing {
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
        self.next_available.get().into()
    }

    #[inline(always)]
    fn resubmitting(&self) -> u16 {
        self.inflight.as_ref().map_or(0, SplitInflight::resubmitting)
    }

    #[inline(always)]
    fn available(&mut self) -> Result<u16, RingError> {
        if self.cached_available.get() == self.next_available.get() {
            // Acquire: the entries and descriptors that the index covers are read after it.
            self.cached_available.set(self.available_index().load(Ordering::Acquire));
        }
        let waiting = self.cached_available.get().wrapping_sub(self.next_available.get());
        if waiting > self.size {
            return Err(RingError::AvailableIndex {
                index: self.cached_available.get(),
                seen: self.next_available.get(),
                size: self.size,
            });
        }
        Ok(waiting.saturating_add(self.resubmitting()).min(self.size))
    }

    #[inline(always)]
    fn walk_next(&mut self, chain: &mut Chain) -> Result<u16, RingError> {
        let again = self.inflight.as_ref().and_then(SplitInflight::resubmission);
        let head = match again {
            Some(head) => head,
            None => self.available_entry(self.next_available.get()),
        };
        // `walk` refuses a head outside the table.
        self.walk(head, chain)?;
        self.walked.set(head);
        Ok(head)
    }

    #[inline(always)]
    fn take(&mut self) {
        if let Some(inflight) = &mut self.inflight {
            if inflight.resubmitted() {
                return;
            }
            inflight.taken(self.walked.get());
        }
        self.next_available.set(self.next_available.get().wrapping_add(1));
    }

    #[inline(always)]
    fn push_used(&mut self, head: u16, written: u32) {
        let at = self.used.wrapping_add(4 + 8 * usize::from(self.next_used.get() & self.mask));
        // SAFETY: the entry at `next_used & mask` lies inside the used ring, which is aligned to 4.
        unsafe {
            put_u32(at, u32::from(head));
            put_u32(at.add(4), written);
        }
        self.mark(at, 8);
        if let Some(inflight) = &mut self.inflight {
            inflight.used(head);
        }
        self.next_used.set(self.next_used.get().wrapping_add(1));
    }

    #[inline(always)]
    fn publish(&mut self) {
        if self.published.get() == self.next_used.get() {
            return;
        }
        // Release, as every store: the entries, and the data and status bytes before them, are visible before the index.
        // SAFETY: offset 2 of the used ring.
        unsafe { put_u16(self.used.add(2), self.next_used.get()) };
        self.mark(self.used, 4);
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.next_used.get().wrapping_sub(self.published.get()), self.next_used.get());
        }
        self.published.set(self.next_used.get());
    }

    /// virtio 1.2, 2.7.7.2.
    #[inline(always)]
    fn wants_call(&mut self) -> bool {
        if self.asked.get() == self.published.get() {
            return false;
        }
        let old = self.asked.get();
        self.asked = self.published;
        // The used index must be visible before we read whether the driver sleeps; it does the opposite.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.used_event();
            self.published.get().wrapping_sub(event).wrapping_sub(1) < self.published.get().wrapping_sub(old)
        } else {
            // SAFETY: offset 0 of the available ring.
            unsafe { get_u16(self.available) & AVAIL_NO_INTERRUPT == 0 }
        }
    }

    /// virtio 1.2, 2.7.10.
    fn set_kicks(&mut self, notify: Notify) {
        let (field, value) = match (self.event_idx, notify) {
            (true, Notify::Armed) => (self.available_event(), self.next_available.get()),
            // An event index that lies behind asks for nothing until the index wraps around; the one that was armed still
            // asks for the next request, when something else has woken us.
            (true, Notify::Suppressed) => (self.available_event(), self.next_available.get().wrapping_sub(1)),
            (false, Notify::Armed) => (self.used_flags(), 0),
            (false, Notify::Suppressed) => (self.used_flags(), USED_NO_NOTIFY),
        };
        // SAFETY: a field of the used ring.
        unsafe { put_u16(field, value) };
        self.mark(field, 2);
        fence(Ordering::SeqCst);
    }

    #[inline(always)]
    fn prefetch_batch(&self, done: u16, batch: u16) -> Option<[u8; 16]> {
        if self.resubmitting() > 0 {
            return None;
        }
        // Distances count from the entry about to be taken. A bad head is dealt with in its turn.
        if done == 0 {
            for ahead in 1..AHEAD_DESCRIPTORS.min(batch) {
                self.prefetch_descriptors(self.peek(ahead));
            }
        }
        if done + AHEAD_DESCRIPTORS < batch {
            self.prefetch_descriptors(self.peek(AHEAD_DESCRIPTORS));
        }
        if done + AHEAD_HEADER < batch {
            let (address, _) = self.first_buffer(self.peek(AHEAD_HEADER));
            descriptor::prefetch_buffer(&self.memory, address);
        }
        if done + 1 < batch {
            let (address, len) = self.first_buffer(self.peek(1));
            return descriptor::glance(&self.memory, address, len);
        }
        None
    }

    /// The available entry, the place of the used entry, the descriptors and the header: the misses overlap that would come
    /// one after the other.
    #[inline(always)]
    fn prefetch_lone(&self, guess: u16, header: *const u8) {
        prefetch(self.available.wrapping_add(4 + 2 * usize::from(self.next_available.get() & self.mask)));
        self.prefetch_descriptors(guess);
        prefetch_for_write(header);
        self.prefetch_used();
    }

    #[inline(always)]
    fn prefetch_used(&self) {
        prefetch_for_write(self.used.wrapping_add(4 + 8 * usize::from(self.next_used.get() & self.mask)));
    }
}

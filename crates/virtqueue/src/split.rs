//! The split ring: virtio 1.2, section 2.7.

use std::sync::atomic::{fence, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

use crate::chain::{Chain, MAX_SEGMENTS};
use crate::error::RingError;
use crate::memory::MemoryTable;

/// virtio 1.2, 2.7: "The maximum Queue Size value is 32768".
pub const MAX_RING_SIZE: u16 = 32768;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;
const DESC_SIZE: u64 = 16;

/// Where the three parts of a ring are, in the frontend's virtual addresses (vhost-user `SET_VRING_ADDR`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// Whether the driver wants to hear of used entries, and may tell of available ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    Suppressed,
    Armed,
}

/// One split ring, owned by one reactor at a time.
pub struct SplitRing {
    size: u16,
    mask: u16,
    event_idx: bool,
    indirect: bool,
    descriptors: *mut u8,
    available: *mut u8,
    used: *mut u8,
    /// Entries of the available ring taken so far (free running).
    next_available: u16,
    /// Entries of the used ring written so far (free running); what the driver sees is `published`.
    next_used: u16,
    published: u16,
    /// Value of `published` when the driver was last asked whether it wants a call.
    asked: u16,
    /// The available index read last: spares a read of the driver's cache line while entries remain.
    cached_available: u16,
    memory: Arc<MemoryTable>,
}

// SAFETY: the pointers lead into mappings that `memory` keeps alive and that any thread may use; a ring is moved between
// threads but never shared.
unsafe impl Send for SplitRing {}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl SplitRing {
    /// Set a ring up at `addresses`. `next_available` is the vring base: the next available entry to take.
    ///
    /// # Errors
    /// A size that is none, or a part that is misaligned or outside guest memory.
    pub fn new(
        memory: Arc<MemoryTable>,
        size: u32,
        addresses: RingAddresses,
        next_available: u16,
        event_idx: bool,
        indirect: bool,
    ) -> Result<Self, RingError> {
        if !(2..=u32::from(MAX_RING_SIZE)).contains(&size) || !size.is_power_of_two() {
            return Err(RingError::BadSize { size });
        }
        // The event field behind each ring is there whether EVENT_IDX was negotiated or not (2.7.6, 2.7.8), but a driver
        // that did not negotiate it need not have allocated it.
        let event = if event_idx { 2 } else { 0 };
        let n = u64::from(size);
        let part = |part, address: u64, len, align| {
            let ptr =
                memory.translate_user(address, len).ok_or(RingError::OutsideMemory { part, address, len })?;
            // Atomic access needs the host address aligned; mappings begin at the same offset in a page as the region.
            if !address.is_multiple_of(align) || !(ptr as u64).is_multiple_of(align) {
                return Err(RingError::Misaligned { part, address, align });
            }
            Ok(ptr)
        };
        let descriptors = part("descriptor table", addresses.descriptors, n * DESC_SIZE, 16)?;
        let available = part("available ring", addresses.available, 4 + 2 * n + event, 2)?;
        let used = part("used ring", addresses.used, 4 + 8 * n + event, 4)?;
        let mut ring = Self {
            size: size as u16,
            mask: (size - 1) as u16,
            event_idx,
            indirect,
            descriptors,
            available,
            used,
            next_available,
            next_used: 0,
            published: 0,
            asked: 0,
            cached_available: next_available,
            memory,
        };
        // The used index is the driver's truth over a reconnect: what was published before stays published.
        ring.next_used = ring.used_index().load(Ordering::Relaxed);
        ring.published = ring.next_used;
        ring.asked = ring.next_used;
        Ok(ring)
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn memory(&self) -> &Arc<MemoryTable> {
        &self.memory
    }

    /// The next available entry to take: what `GET_VRING_BASE` answers once everything taken was used.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    // Field addresses. SAFETY common to all: `new` checked that each part lies inside guest memory for this ring size
    // and is aligned; the mapping lives as long as `self.memory`; only atomic types are made of the memory.

    #[inline(always)]
    fn available_flags(&self) -> &AtomicU16 {
        // SAFETY: offset 0 of the available ring.
        unsafe { &*self.available.cast::<AtomicU16>() }
    }

    #[inline(always)]
    fn available_index(&self) -> &AtomicU16 {
        // SAFETY: offset 2 of the available ring.
        unsafe { &*self.available.add(2).cast::<AtomicU16>() }
    }

    #[inline(always)]
    fn available_entry(&self, at: u16) -> u16 {
        // SAFETY: the entry at `at & mask` lies inside the available ring.
        let entry = unsafe { &*self.available.add(4 + 2 * usize::from(at & self.mask)).cast::<AtomicU16>() };
        entry.load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn used_event(&self) -> u16 {
        // SAFETY: behind the last available entry; only called with EVENT_IDX, for which `new` checked it.
        let event = unsafe { &*self.available.add(4 + 2 * usize::from(self.size)).cast::<AtomicU16>() };
        event.load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn used_flags(&self) -> &AtomicU16 {
        // SAFETY: offset 0 of the used ring.
        unsafe { &*self.used.cast::<AtomicU16>() }
    }

    #[inline(always)]
    fn used_index(&self) -> &AtomicU16 {
        // SAFETY: offset 2 of the used ring.
        unsafe { &*self.used.add(2).cast::<AtomicU16>() }
    }

    #[inline(always)]
    fn available_event(&self) -> &AtomicU16 {
        // SAFETY: behind the last used entry; only called with EVENT_IDX, for which `new` checked it.
        unsafe { &*self.used.add(4 + 8 * usize::from(self.size)).cast::<AtomicU16>() }
    }

    /// Entries that wait to be taken.
    ///
    /// # Errors
    /// The driver moved the index further than the ring is long.
    #[inline(always)]
    pub fn available(&mut self) -> Result<u16, RingError> {
        if self.cached_available == self.next_available {
            // Acquire: the entries and descriptors that the index covers are read after it.
            self.cached_available = self.available_index().load(Ordering::Acquire);
        }
        let waiting = self.cached_available.wrapping_sub(self.next_available);
        if waiting > self.size {
            return Err(RingError::AvailableIndex {
                index: self.cached_available,
                seen: self.next_available,
                size: self.size,
            });
        }
        Ok(waiting)
    }

    /// Head of the chain `ahead` entries behind the next one, not taken yet. `ahead` must be less than `available()`.
    ///
    /// # Errors
    /// The head is outside the table.
    #[inline(always)]
    pub fn peek(&self, ahead: u16) -> Result<u16, RingError> {
        let head = self.available_entry(self.next_available.wrapping_add(ahead));
        if head >= self.size {
            return Err(RingError::DescriptorIndex { index: head, size: self.size });
        }
        Ok(head)
    }

    /// Take the entry that `peek(0)` showed.
    #[inline(always)]
    pub fn take(&mut self) {
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Hint that the descriptors of `head` are needed soon.
    #[inline(always)]
    pub fn prefetch_descriptors(&self, head: u16) {
        prefetch(self.descriptors.wrapping_add(16 * usize::from(head & self.mask)));
    }

    /// Hint that what the first descriptor of `head` points at is needed soon: the header, and in drivers' usual layout the
    /// status byte beside it, which will be written.
    #[inline(always)]
    pub fn prefetch_first_buffer(&self, head: u16) {
        let descriptor = self.descriptor(self.descriptors, head & self.mask);
        if let Some((_, region)) = self.memory.find(descriptor.address, 0) {
            prefetch_for_write(
                region.mapping.as_ptr().wrapping_add((descriptor.address - region.guest) as usize),
            );
        }
    }

    /// A guess at what the chain at `head` begins with, for prefetching: its first 16 bytes, if they are one buffer. They may
    /// change until the chain is walked.
    #[inline(always)]
    pub fn glance(&self, head: u16) -> Option<[u8; 16]> {
        let descriptor = self.descriptor(self.descriptors, head & self.mask);
        let (_, region) = self.memory.find(descriptor.address, 0)?;
        let at = descriptor.address - region.guest;
        if descriptor.len != 16 || region.len - at < 16 {
            return None;
        }
        // SAFETY: the 16 bytes lie inside the region, which is no longer than its mapping.
        Some(unsafe { region.mapping.as_ptr().add(at as usize).cast::<[u8; 16]>().read_unaligned() })
    }

    /// Hint that the next request is about to be taken and is the only one: its available entry, the place of its used
    /// entry, and, guessing that the driver takes the descriptors that it got back last, those (`guess`) and their `header`.
    /// The misses overlap that would come one after the other; a wrong guess costs nothing.
    #[inline(always)]
    pub fn prefetch_lone(&self, guess: u16, header: *const u8) {
        prefetch(self.available.wrapping_add(4 + 2 * usize::from(self.next_available & self.mask)));
        self.prefetch_descriptors(guess);
        prefetch_for_write(header);
        self.prefetch_used();
    }

    /// Hint that the next used entry will be written.
    #[inline(always)]
    pub fn prefetch_used(&self) {
        prefetch_for_write(self.used.wrapping_add(4 + 8 * usize::from(self.next_used & self.mask)));
    }

    /// Follow the chain that begins at `head` into `chain`.
    ///
    /// # Errors
    /// Every malformed chain; see [`RingError`]. A buffer outside guest memory is no ring error: its segment is null.
    #[inline(always)]
    pub fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
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
            // Also counts descriptors of no length, so that a chain of them cannot hold the reactor.
            if steps as usize > MAX_SEGMENTS {
                return Err(RingError::TooLong { head, limit: MAX_SEGMENTS });
            }
            let descriptor = self.descriptor(table, index);
            if descriptor.flags & DESC_INDIRECT != 0 {
                (table, table_size) = self.indirect_table(head, &descriptor, inside_indirect, steps)?;
                inside_indirect = true;
                index = 0;
                steps = 0;
                continue;
            }
            let writable = descriptor.flags & DESC_WRITE != 0;
            if !writable && chain.has_writable() {
                return Err(RingError::Order { head });
            }
            if descriptor.len > 0 && !chain.push(&self.memory, descriptor.address, descriptor.len, writable) {
                return Err(RingError::TooLong { head, limit: MAX_SEGMENTS });
            }
            if descriptor.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    /// virtio 1.2, 2.7.5.3: one table for the whole chain, not nested, its length a multiple of 16. A table may be longer
    /// than the ring: drivers size it by seg_max.
    #[cold]
    fn indirect_table(
        &self,
        head: u16,
        descriptor: &Descriptor,
        nested: bool,
        steps: u32,
    ) -> Result<(*mut u8, u16), RingError> {
        let fail = |why| Err(RingError::Indirect { head, why });
        if !self.indirect {
            return fail("RING_INDIRECT_DESC was not negotiated");
        }
        if nested {
            return fail("it names another indirect table");
        }
        if descriptor.flags & DESC_NEXT != 0 || steps > 1 {
            return fail("it is part of a longer chain");
        }
        let len = u64::from(descriptor.len);
        if len == 0 || len % DESC_SIZE != 0 || len / DESC_SIZE > u64::from(MAX_RING_SIZE) {
            return fail("its length is no multiple of 16 from 16 to 524288");
        }
        match self.memory.translate(descriptor.address, len) {
            Some(table) if (table as usize).is_multiple_of(8) => Ok((table, (len / DESC_SIZE) as u16)),
            Some(_) => fail("it is not aligned to 8 bytes"),
            None => fail("it is not inside guest memory"),
        }
    }

    #[inline(always)]
    fn descriptor(&self, table: *mut u8, index: u16) -> Descriptor {
        // SAFETY: the caller checked that `index` is inside the table, the table is inside guest memory and aligned to 8.
        unsafe {
            let at = table.add(16 * usize::from(index));
            let address = (*at.cast::<AtomicU64>()).load(Ordering::Relaxed);
            let rest = (*at.add(8).cast::<AtomicU64>()).load(Ordering::Relaxed);
            Descriptor { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
        }
    }

    /// Write a used entry for `head`, of whose writable bytes `written` were written. The driver sees it at [`publish`](Self::publish).
    #[inline(always)]
    pub fn push_used(&mut self, head: u16, written: u32) {
        // SAFETY: the entry at `next_used & mask` lies inside the used ring, which is aligned to 4.
        unsafe {
            let at = self.used.add(4 + 8 * usize::from(self.next_used & self.mask));
            (*at.cast::<AtomicU32>()).store(u32::from(head), Ordering::Relaxed);
            (*at.add(4).cast::<AtomicU32>()).store(written, Ordering::Relaxed);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Show the driver every used entry written so far.
    #[inline(always)]
    pub fn publish(&mut self) {
        if self.published != self.next_used {
            // Release: the entries, and the data and status bytes before them, are visible before the index.
            self.used_index().store(self.next_used, Ordering::Release);
            self.published = self.next_used;
        }
    }

    /// Whether the driver wants a call for what was published since the last time this was asked (2.7.7.2).
    #[inline(always)]
    pub fn wants_call(&mut self) -> bool {
        if self.asked == self.published {
            return false;
        }
        let old = std::mem::replace(&mut self.asked, self.published);
        // The used index must be visible before we read whether the driver sleeps; it does the opposite.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.used_event();
            self.published.wrapping_sub(event).wrapping_sub(1) < self.published.wrapping_sub(old)
        } else {
            self.available_flags().load(Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Ask the driver for kicks, or to spare them while we poll (2.7.10). After arming, the caller must look at
    /// [`available`](Self::available) once more before it sleeps.
    pub fn set_kicks(&mut self, notify: Notify) {
        match (self.event_idx, notify) {
            (true, Notify::Armed) => self.available_event().store(self.next_available, Ordering::Relaxed),
            // An event index that lies behind asks for nothing until the index wraps around.
            (true, Notify::Suppressed) => {}
            (false, Notify::Armed) => self.used_flags().store(0, Ordering::Relaxed),
            (false, Notify::Suppressed) => self.used_flags().store(USED_NO_NOTIFY, Ordering::Relaxed),
        }
        fence(Ordering::SeqCst);
    }
}

/// Hint that the cache line at `ptr` will be written soon. Any address is allowed: a prefetch never faults.
#[inline(always)]
pub fn prefetch_for_write(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHW has no architectural effect, whatever the address; processors without it treat it as a NOP. The
    // intrinsic would need the feature enabled for the whole build.
    unsafe {
        core::arch::asm!("prefetchw [{0}]", in(reg) ptr, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

/// Hint that the cache line at `ptr` is needed soon. Any address is allowed: a prefetch never faults.
#[inline(always)]
pub(crate) fn prefetch(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no architectural effect, whatever the address.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(ptr.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

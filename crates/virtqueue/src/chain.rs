use std::ptr;

use crate::memory::MemoryTable;
use crate::prefetch::prefetch_for_write;

/// Segments of one chain that are kept. Drivers exceed `seg_max`: virtio-win sends up to 515 data segments whatever it says.
/// So twice that many are served, with header and status, and all of it doubled for buffers that lie across two memory
/// regions.
pub const MAX_SEGMENTS: usize = 2 * (1026 + 2);

/// Bytes of all segments together.
#[inline(always)]
pub fn total_len(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// Copy `bytes` to the begin of `segments`, as far as there is room; segments outside guest memory are passed over.
///
/// # Safety
/// The memory table the segments came from must still be alive.
pub unsafe fn scatter(segments: &[Segment], mut bytes: &[u8]) {
    for segment in segments {
        let (now, rest) = bytes.split_at((segment.len as usize).min(bytes.len()));
        if !segment.ptr.is_null() {
            // SAFETY: the segment lies inside guest memory, which the caller keeps alive.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), segment.ptr, now.len()) };
        }
        bytes = rest;
    }
}

/// A piece of guest memory, as the host sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Null if the guest named an address outside its memory.
    pub ptr: *mut u8,
    pub len: u32,
}

impl Segment {
    const EMPTY: Self = Self { ptr: ptr::null_mut(), len: 0 };
}

/// One byte of guest memory to be written later, such as a status.
///
/// It stays valid as long as the [`MemoryTable`] it was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestByte(*mut u8);

impl GuestByte {
    /// A byte nobody needs; for table entries not in use.
    pub const fn dangling() -> Self {
        Self(ptr::null_mut())
    }

    /// Where it is, for the dirty log.
    pub fn address(self) -> *const u8 {
        self.0
    }

    /// Hint that the byte will be written soon.
    #[inline(always)]
    pub fn prefetch(self) {
        prefetch_for_write(self.0);
    }

    /// Write the byte.
    ///
    /// # Safety
    /// The memory table it came from must still be alive.
    #[inline(always)]
    pub unsafe fn set(self, value: u8) {
        // SAFETY: take_last_byte made it from a segment inside guest memory, which the caller keeps alive.
        unsafe { self.0.write_volatile(value) }
    }
}

/// The segments of one descriptor chain: readable ones first, then writable ones. Made once, filled for each request.
pub struct Chain {
    segments: Box<[Segment; MAX_SEGMENTS]>,
    /// Readable segments are `start..readable`, writable ones `readable..count`.
    start: usize,
    readable: usize,
    count: usize,
    /// Descriptors that were read for it. This and what follows are words of the machine, see [`crate::wide`].
    pub(crate) descriptors: usize,
    /// Segments there was no room for: of those behind `MAX_SEGMENTS - 1` only the last was kept.
    missed: usize,
    /// Index of the memory region found last: guests use one region for nearly everything.
    hint: usize,
}

impl Default for Chain {
    fn default() -> Self {
        Self {
            segments: Box::new([Segment::EMPTY; MAX_SEGMENTS]),
            start: 0,
            readable: 0,
            count: 0,
            descriptors: 0,
            missed: 0,
            hint: 0,
        }
    }
}

impl Chain {
    /// Where the chain begins; null if it is empty.
    #[inline(always)]
    pub fn begin(&self) -> *const u8 {
        self.segments[0].ptr
    }

    /// Device-readable segments, in order.
    #[inline(always)]
    pub fn readable(&self) -> &[Segment] {
        &self.segments[self.start..self.readable]
    }

    /// Device-writable segments, in order.
    #[inline(always)]
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..self.count]
    }

    /// How many descriptors were read to follow it: what it cost, whatever it holds.
    #[inline(always)]
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// True if it has more than `MAX_SEGMENTS` segments. Then only its last byte can be trusted to be what it says.
    #[inline(always)]
    pub fn overlong(&self) -> bool {
        self.missed > 0
    }

    #[inline(always)]
    pub(crate) fn clear(&mut self) {
        self.start = 0;
        self.count = 0;
        self.readable = 0;
        self.descriptors = 0;
        self.missed = 0;
    }

    /// Take the first `N` readable bytes off the chain; `None` if there are fewer or they lie outside guest memory.
    #[inline(always)]
    pub fn take_front<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0u8; N];
        let first = self.readable().first()?;
        if first.len as usize == N && !first.ptr.is_null() {
            // SAFETY: the segment lies inside guest memory; a guest that writes it meanwhile only changes the copy, which
            // is checked afterwards.
            unsafe { ptr::copy_nonoverlapping(first.ptr, bytes.as_mut_ptr(), N) };
            self.start += 1;
            return Some(bytes);
        }
        self.take_front_scattered(&mut bytes).then_some(bytes)
    }

    #[cold]
    fn take_front_scattered(&mut self, bytes: &mut [u8]) -> bool {
        let mut done = 0;
        while done < bytes.len() {
            if self.start == self.readable {
                return false;
            }
            let segment = &mut self.segments[self.start];
            if segment.ptr.is_null() {
                return false;
            }
            let n = (segment.len as usize).min(bytes.len() - done);
            // SAFETY: as in `take_front`; `n` is at most the segment's length, so the pointer behind stays in or at its end.
            unsafe {
                ptr::copy_nonoverlapping(segment.ptr, bytes[done..].as_mut_ptr(), n);
                segment.ptr = segment.ptr.add(n);
            }
            segment.len -= n as u32;
            done += n;
            if segment.len == 0 {
                self.start += 1;
            }
        }
        true
    }

    /// Take the last writable byte off the chain; `None` if there is none or it lies outside guest memory.
    #[inline(always)]
    pub fn take_last_byte(&mut self) -> Option<GuestByte> {
        if self.count == self.readable {
            return None;
        }
        let last = &mut self.segments[self.count - 1];
        if last.ptr.is_null() {
            return None;
        }
        last.len -= 1;
        // SAFETY: a segment is never empty, so its last byte lies inside guest memory.
        let byte = GuestByte(unsafe { last.ptr.add(last.len as usize) });
        if last.len == 0 {
            self.count -= 1;
        }
        Some(byte)
    }

    pub(crate) fn has_writable(&self) -> bool {
        self.count > self.readable
    }

    /// Append a guest buffer, split where it crosses into the next region.
    #[inline(always)]
    pub(crate) fn push(&mut self, memory: &MemoryTable, address: u64, len: u32, writable: bool) {
        if let Some((index, region)) = memory.find(address, self.hint) {
            let at = address - region.guest;
            if region.len - at >= u64::from(len) {
                self.hint = index;
                // SAFETY: the buffer lies inside the region, which is no longer than its mapping.
                let ptr = unsafe { region.mapping.as_ptr().add(at as usize) };
                return self.append(Segment { ptr, len }, writable);
            }
        }
        self.push_across(memory, address, len, writable)
    }

    #[cold]
    fn push_across(&mut self, memory: &MemoryTable, mut address: u64, mut len: u32, writable: bool) {
        while len > 0 {
            let Some((_, region)) = memory.find(address, self.hint) else {
                return self.append(Segment { ptr: ptr::null_mut(), len }, writable);
            };
            let at = address - region.guest;
            let piece = u64::from(len).min(region.len - at) as u32;
            // SAFETY: `at` is inside the region, which is no longer than its mapping.
            let ptr = unsafe { region.mapping.as_ptr().add(at as usize) };
            self.append(Segment { ptr, len: piece }, writable);
            len -= piece;
            // A region never wraps, so neither does the address behind it; at the very end of the address space there is
            // nothing left to find.
            address = region.guest + region.len;
        }
    }

    #[inline(always)]
    fn append(&mut self, segment: Segment, writable: bool) {
        if self.count == MAX_SEGMENTS {
            return self.replace_last(segment, writable);
        }
        self.segments[self.count] = segment;
        self.count += 1;
        if !writable {
            self.readable = self.count;
        }
    }

    /// The last segment holds the status byte, which the driver is owed whatever becomes of the rest.
    #[cold]
    fn replace_last(&mut self, segment: Segment, writable: bool) {
        self.missed += 1;
        self.segments[MAX_SEGMENTS - 1] = segment;
        self.readable = if writable { self.readable.min(MAX_SEGMENTS - 1) } else { MAX_SEGMENTS };
    }
}

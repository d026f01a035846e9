//! Descriptors: what the two ring layouts have in common.

use crate::chain::Chain;
use crate::error::RingError;
use crate::memory::MemoryTable;
use crate::prefetch::prefetch_for_write;
use crate::ring::MAX_RING_SIZE;
use crate::shared::get_u64;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Bytes of a descriptor in either layout.
pub(crate) const DESC_SIZE: u64 = 16;

/// The two words of a descriptor, each read once.
///
/// # Safety
/// Entry `index` is inside the table, which lies in a live mapping and is aligned to 8.
#[inline(always)]
pub(crate) unsafe fn read(table: *const u8, index: u16) -> (u64, u64) {
    // SAFETY: the caller's promise.
    unsafe {
        let at = table.add(DESC_SIZE as usize * usize::from(index));
        (get_u64(at), get_u64(at.add(8)))
    }
}

/// Append one buffer to the chain that began at `head`.
#[inline(always)]
pub(crate) fn append(
    chain: &mut Chain,
    memory: &MemoryTable,
    head: u16,
    address: u64,
    len: u32,
    flags: u16,
) -> Result<(), RingError> {
    let writable = flags & WRITE != 0;
    if !writable && chain.has_writable() {
        return Err(RingError::Order { head });
    }
    if len > 0 {
        chain.push(memory, address, len, writable);
    }
    Ok(())
}

/// Check a descriptor that names an indirect table (virtio 1.2, 2.7.5.3 and 2.8.7): one table for the whole chain, its
/// length a multiple of 16. A table may be longer than the ring: drivers size it by seg_max. Answers where it is and how
/// many entries it has.
///
/// `alone`: the descriptor is the first of its chain and not one of a table.
#[cold]
pub(crate) fn indirect_table(
    memory: &MemoryTable,
    negotiated: bool,
    head: u16,
    alone: Result<(), &'static str>,
    address: u64,
    len: u32,
) -> Result<(*mut u8, u16), RingError> {
    let fail = |why| Err(RingError::Indirect { head, why });
    if !negotiated {
        return fail("RING_INDIRECT_DESC was not negotiated");
    }
    if let Err(why) = alone {
        return fail(why);
    }
    let len = u64::from(len);
    if len == 0 || !len.is_multiple_of(DESC_SIZE) || len / DESC_SIZE > u64::from(MAX_RING_SIZE) {
        return fail("its length is no multiple of 16 from 16 to 524288");
    }
    match memory.translate(address, len) {
        Some(table) if (table as usize).is_multiple_of(8) => Ok((table, (len / DESC_SIZE) as u16)),
        Some(_) => fail("it is not aligned to 8 bytes"),
        None => fail("it is not inside guest memory"),
    }
}

/// Hint that the buffer at guest address `address` is needed soon: the header, and in drivers' usual layout the status byte
/// beside it, which will be written.
#[inline(always)]
pub(crate) fn prefetch_buffer(memory: &MemoryTable, address: u64) {
    if let Some((_, region)) = memory.find(address, 0) {
        prefetch_for_write(region.mapping.as_ptr().wrapping_add((address - region.guest) as usize));
    }
}

/// The 16 bytes of a buffer, if it has just that many: a guess at a request's header, for prefetching. They may change until
/// the chain is walked.
#[inline(always)]
pub(crate) fn glance(memory: &MemoryTable, address: u64, len: u32) -> Option<[u8; 16]> {
    let (_, region) = memory.find(address, 0)?;
    let at = address - region.guest;
    if len != 16 || region.len - at < 16 {
        return None;
    }
    // SAFETY: the 16 bytes lie inside the region, which is no longer than its mapping.
    Some(unsafe { region.mapping.as_ptr().add(at as usize).cast::<[u8; 16]>().read_unaligned() })
}

//! The dirty log: which pages of guest memory were written while a frontend migrates the guest (vhost-user, "Migration").

use std::sync::atomic::{fence, AtomicU8, Ordering};
use std::sync::Arc;

use ringstone_mapping::Mapping;

use crate::memory::MemoryTable;

/// Bytes that one bit stands for, whatever the size of the pages behind guest memory.
const LOG_PAGE: u64 = 4096;

/// A frontend's dirty bitmap: bit n of the little-endian bitmap is page n of guest physical memory.
pub struct DirtyLog {
    mapping: Arc<Mapping>,
}

impl DirtyLog {
    /// The bitmap that fills `mapping`.
    pub fn new(mapping: Arc<Mapping>) -> Self {
        Self { mapping }
    }

    /// Mark `len` bytes at host address `ptr` as written. To be called after the write: the frontend copies a page some time
    /// after it cleared the bit. Addresses outside guest memory are passed over.
    pub fn mark(&self, memory: &MemoryTable, ptr: *const u8, len: usize) {
        if let Some(guest) = memory.guest_address(ptr) {
            self.mark_guest(guest, len as u64);
        }
    }

    /// Mark `len` bytes at guest address `address` as written. Pages behind the end of the bitmap are passed over.
    pub fn mark_guest(&self, address: u64, len: u64) {
        let Some(last) = len.checked_sub(1) else { return };
        let bits = (self.mapping.len() as u64).saturating_mul(8);
        let first = address / LOG_PAGE;
        let end = (address.saturating_add(last) / LOG_PAGE).saturating_add(1).min(bits);
        // A set bit may be left alone only if the frontend, clearing it, comes after the write that it stands for.
        fence(Ordering::SeqCst);
        for page in first..end {
            // SAFETY: the page's byte lies inside the mapping, as `end` does; the frontend uses it atomically too.
            let byte = unsafe { &*self.mapping.as_ptr().add((page / 8) as usize).cast::<AtomicU8>() };
            let bit = 1u8 << (page % 8);
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }
}

//! The in-flight region: what a process after this one needs to go on where it was killed (vhost-user, "Inflight I/O
//! tracking").
//!
//! The region is memory shared with the frontend, which keeps it from one backend process to the next. It is written
//! while requests come and go and read only when a ring is set up: everything else about it is kept here as well, so
//! that nothing a frontend scribbles into it afterwards is ever looked at. What is read at set-up may be anything; each
//! index is checked, and content that contradicts itself stops the one device.

mod packed;
mod split;

use std::sync::Arc;

use ringstone_mapping::Mapping;

use crate::error::RingError;

pub(crate) use packed::{Copied, PackedInflight};
pub(crate) use split::SplitInflight;

/// The only version there is; 0 is a region nobody used yet.
const VERSION: u16 = 1;

// Fields that both layouts begin with.
const FEATURES: usize = 0;
const REGION_VERSION: usize = 8;
const DESC_NUM: usize = 10;

/// Bytes that the part of one queue is rounded up to.
const ALIGN: usize = 64;

/// One queue's part of the in-flight region. Keeps the mapping alive.
#[derive(Clone)]
pub struct InflightRegion {
    mapping: Arc<Mapping>,
    offset: usize,
    entries: u16,
    packed: bool,
}

impl InflightRegion {
    /// The part that begins `offset` bytes into the mapping; `None` if it does not lie inside it or is not aligned to 8.
    pub fn new(mapping: Arc<Mapping>, offset: usize, entries: u16, packed: bool) -> Option<Self> {
        let end = offset.checked_add(Self::len(entries, packed))?;
        let aligned = (mapping.as_ptr() as usize).wrapping_add(offset).is_multiple_of(8);
        (end <= mapping.len() && aligned).then_some(Self { mapping, offset, entries, packed })
    }

    /// Bytes for a queue of `entries`, a multiple of 64.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(entries: u16, packed: bool) -> usize {
        let (header, entry) =
            if packed { (packed::HEADER, packed::ENTRY) } else { (split::HEADER, split::ENTRY) };
        (header + entry * usize::from(entries)).next_multiple_of(ALIGN)
    }

    /// Where the part begins in the mapping, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    fn ptr(&self) -> *mut u8 {
        // SAFETY: `new` checked that the part lies inside the mapping.
        unsafe { self.mapping.as_ptr().add(self.offset) }
    }

    /// Check that it is of the ring's layout and at least as long.
    fn check(&self, size: u16, packed: bool) -> Result<(), RingError> {
        if self.packed != packed {
            return Err(RingError::InflightLayout);
        }
        if self.entries < size {
            return Err(RingError::InflightSize { entries: self.entries, size });
        }
        Ok(())
    }
}

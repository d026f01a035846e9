//! The device side of virtio 1.2 virtqueues, split and packed, in the guest's own memory.
//!
//! Enters: a [`RingSetup`]: a [`MemoryTable`] (where guest memory is mapped), the addresses of a ring, and what outlives
//! this process or watches it: an [`InflightRegion`], a [`DirtyLog`]. Leaves, through [`VirtRing`]: descriptor chains as
//! lists of host [`Segment`]s, and used entries written back. The buffers stay the guest's; nothing here copies them.
//! There is no system call, no clock and no allocation per request, so the whole crate can be fuzzed and replayed.
//!
//! A guest is hostile and runs while we read: every ring field is read once, with one atomic load, into a local and
//! checked there before it is used. The process may be killed at any time: what it stores is ordered such that the next
//! one finds, behind any store, which requests the driver still waits for; `crash_model` tries them all.

mod chain;
#[cfg(test)]
mod crash_model;
mod descriptor;
mod dirty;
mod error;
mod inflight;
mod memory;
mod packed;
mod prefetch;
mod ring;
mod shared;
mod split;
mod wide;

pub use chain::{scatter, total_len, Chain, GuestByte, Segment, MAX_SEGMENTS};
pub use dirty::DirtyLog;
pub use error::RingError;
pub use inflight::InflightRegion;
pub use memory::{MemoryRegion, MemoryTable};
pub use packed::PackedRing;
pub use prefetch::prefetch;
pub use ring::{Notify, RingAddresses, RingSetup, VirtRing, MAX_RING_SIZE};
pub use split::SplitRing;

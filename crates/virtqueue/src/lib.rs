//! The device side of virtio 1.2 split virtqueues, in the guest's own memory.
//!
//! Enters: a [`MemoryTable`] (where guest memory is mapped) and the addresses of a ring. Leaves: descriptor chains as
//! lists of host [`Segment`]s, and used entries written back. The buffers stay the guest's; nothing here copies them.
//! There is no system call, no clock and no allocation per request, so the whole crate can be fuzzed and replayed.
//!
//! A guest is hostile and runs while we read: every ring field is read once, with one atomic load, into a local and
//! checked there before it is used.

mod chain;
mod error;
mod memory;
mod split;

pub use chain::{scatter, total_len, Chain, GuestByte, Segment, MAX_SEGMENTS};
pub use error::RingError;
pub use memory::{MemoryRegion, MemoryTable};
pub use split::{Notify, RingAddresses, SplitRing, MAX_RING_SIZE};

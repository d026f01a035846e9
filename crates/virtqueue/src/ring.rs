//! What a queue needs of a ring, whichever layout the driver chose.

use std::sync::Arc;

use crate::chain::Chain;
use crate::dirty::DirtyLog;
use crate::error::RingError;
use crate::inflight::InflightRegion;
use crate::memory::MemoryTable;

/// virtio 1.2, 2.7 and 2.8.10.1: no ring has more entries.
pub const MAX_RING_SIZE: u16 = 32768;

/// Where the three parts of a ring are, in the frontend's virtual addresses (vhost-user `SET_VRING_ADDR`).
///
/// Of a packed ring these are the descriptor ring, the driver's event suppression area and the device's.
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

/// Everything needed to set a ring up.
pub struct RingSetup {
    pub memory: Arc<MemoryTable>,
    /// Entries.
    pub size: u32,
    pub addresses: RingAddresses,
    /// As in `SET_VRING_BASE`. Split: the next available index, 16 bits. Packed: bits 0 to 14 are the next available
    /// index, bit 15 its wrap counter, bits 16 to 30 the next used index, bit 31 its wrap counter.
    ///
    /// An in-flight region that was in use before knows better; then this is not looked at.
    pub base: u32,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
    /// This queue's part of the in-flight region.
    pub inflight: Option<InflightRegion>,
    /// `VHOST_F_LOG_ALL` was negotiated: what is written is marked here.
    pub log: Option<Arc<DirtyLog>>,
}

/// The device side of one virtqueue, owned by one reactor at a time.
///
/// The reactor is generic over this; nothing is called through a table.
pub trait VirtRing: Send {
    fn size(&self) -> u16;

    fn memory(&self) -> &Arc<MemoryTable>;

    fn log(&self) -> Option<&DirtyLog>;

    /// What `GET_VRING_BASE` answers once everything taken was used; coded as [`RingSetup::base`].
    fn base(&self) -> u32;

    /// Requests that a process before this one had taken and not completed, and that were not taken again yet.
    fn resubmitting(&self) -> u16;

    /// Requests that wait to be taken, those of the process before first. It may answer less than there are, but at
    /// least 1 if there are any, and at most the ring's size.
    ///
    /// # Errors
    /// The driver made more available than the ring holds.
    fn available(&mut self) -> Result<u16, RingError>;

    /// Follow the next waiting chain into `chain` without taking it. Only to be called if [`available`](Self::available)
    /// found one. Answers its head: the number, less than the ring's size, by which it is known while in flight (the head
    /// descriptor of a split ring, the buffer id of a packed one).
    ///
    /// # Errors
    /// Every malformed chain; see [`RingError`]. A buffer outside guest memory is no ring error: its segment is null.
    fn walk_next(&mut self, chain: &mut Chain) -> Result<u16, RingError>;

    /// Take the chain that [`walk_next`](Self::walk_next) showed. From now on it is in flight.
    fn take(&mut self);

    /// Write a used entry for `head`, of whose writable bytes `written` were written. The driver sees it at
    /// [`publish`](Self::publish).
    fn push_used(&mut self, head: u16, written: u32);

    /// Show the driver every used entry written so far.
    fn publish(&mut self);

    /// Whether the driver wants a call for what was published since the last time this was asked.
    fn wants_call(&mut self) -> bool;

    /// Ask the driver for kicks, or to spare them while we poll. After arming, the caller must look at
    /// [`available`](Self::available) once more before it sleeps.
    fn set_kicks(&mut self, notify: Notify);

    /// Bring near what the requests behind the next one need; `done` of a batch of `batch` were taken. Answers the 16
    /// header bytes of the one behind the next if they can be guessed; they may change until the chain is walked.
    fn prefetch_batch(&self, done: u16, batch: u16) -> Option<[u8; 16]>;

    /// Hint that the next request is about to be taken and is the only one. `guess` is the head taken last and `header`
    /// where it began: drivers often use again at once what they got back last. A wrong guess costs nothing.
    fn prefetch_lone(&self, guess: u16, header: *const u8);

    /// Hint that the next used entry will be written.
    fn prefetch_used(&self);
}

/// Check the size of a ring.
///
/// The specification lets packed rings have any size; every frontend there is uses powers of two for both.
pub(crate) fn check_size(size: u32) -> Result<u16, RingError> {
    if !(2..=u32::from(MAX_RING_SIZE)).contains(&size) || !size.is_power_of_two() {
        return Err(RingError::BadSize { size });
    }
    Ok(size as u16)
}

/// Host address of one part of a ring.
pub(crate) fn locate(
    memory: &MemoryTable,
    part: &'static str,
    address: u64,
    len: u64,
    align: u64,
) -> Result<*mut u8, RingError> {
    let ptr = memory.translate_user(address, len).ok_or(RingError::OutsideMemory { part, address, len })?;
    // Atomic access needs the host address aligned; mappings begin at the same offset in a page as the region.
    if !address.is_multiple_of(align) || !(ptr as u64).is_multiple_of(align) {
        return Err(RingError::Misaligned { part, address, align });
    }
    Ok(ptr)
}

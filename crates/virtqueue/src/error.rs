/// What is wrong with a ring. Each of these stops the one device: after it the ring's state cannot be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Ring sizes are powers of two from 2 to 32768 (virtio 1.2, 2.7).
    #[error("ring size {size} is not a power of two from 2 to 32768")]
    BadSize { size: u32 },
    /// A part of the ring is not inside one region of guest memory.
    #[error("the {part} at {address:#x} ({len} bytes) is not inside guest memory")]
    OutsideMemory { part: &'static str, address: u64, len: u64 },
    /// A part of the ring is not aligned as virtio 1.2, 2.7 demands.
    #[error("the {part} at {address:#x} is not aligned to {align} bytes")]
    Misaligned { part: &'static str, address: u64, align: u64 },
    /// The available index ran further ahead than the ring is long.
    #[error("available index {index} is more than {size} entries ahead of {seen}")]
    AvailableIndex { index: u16, seen: u16, size: u16 },
    /// A head or next field names a descriptor that the table does not have.
    #[error("descriptor {index} is outside a table of {size}")]
    DescriptorIndex { index: u16, size: u16 },
    /// A head was made available again before it was used.
    #[error("descriptor chain {head} was made available while it is still in flight")]
    HeadInFlight { head: u16 },
    /// A chain is longer than the table it lives in: it loops.
    #[error("descriptor chain {head} loops")]
    Loop { head: u16 },
    /// An indirect table that was not negotiated, is nested, empty, ragged, chained on or outside memory.
    #[error("indirect table of descriptor chain {head} is unusable: {why}")]
    Indirect { head: u16, why: &'static str },
    /// A device-readable descriptor after a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("descriptor chain {head} has a readable descriptor after a writable one")]
    Order { head: u16 },
    /// The base of a packed ring names an entry that the ring does not have.
    #[error("vring base {base:#010x} names an entry outside a packed ring of {size}")]
    Base { base: u32, size: u16 },
    /// A chain of a packed ring was asked for that the driver did not make available, or took back.
    #[error("descriptor {index} of the packed ring is not available")]
    NotAvailable { index: u16 },
    /// The driver made descriptors available that the device has not used yet.
    #[error("the chain at descriptor {index} of the packed ring runs into {size} descriptors still in use")]
    Overrun { index: u16, size: u16 },
    /// A buffer id that is not less than the ring's size: requests are known by it.
    #[error("buffer id {id} is outside a packed ring of {size}")]
    BufferId { id: u16, size: u16 },
    /// The in-flight region was laid out for the other kind of ring.
    #[error(
        "the in-flight region was laid out for the other ring layout; the frontend has to ask for a new one"
    )]
    InflightLayout,
    /// The in-flight region was made for a shorter ring.
    #[error(
        "the in-flight region has {entries} entries and the ring {size}; the frontend has to ask for it with the \
         queue size that it sets"
    )]
    InflightSize { entries: u16, size: u16 },
    /// The in-flight region says it is of a version other than 1.
    #[error("the in-flight region is of version {version}; only version 1 is known")]
    InflightVersion { version: u16 },
    /// The in-flight region contradicts itself: what was in flight cannot be told.
    #[error("the in-flight region is damaged: {why}; the guest has to reset the device")]
    InflightContent { why: &'static str },
}

//! Feature bits: virtio 1.2, sections 5.2.3 and 6.

/// Bit numbers.
pub mod feature {
    pub const SIZE_MAX: u32 = 1;
    pub const SEG_MAX: u32 = 2;
    pub const RO: u32 = 5;
    pub const BLK_SIZE: u32 = 6;
    pub const FLUSH: u32 = 9;
    pub const TOPOLOGY: u32 = 10;
    pub const CONFIG_WCE: u32 = 11;
    pub const MQ: u32 = 12;
    pub const DISCARD: u32 = 13;
    pub const WRITE_ZEROES: u32 = 14;
    pub const RING_INDIRECT_DESC: u32 = 28;
    pub const RING_EVENT_IDX: u32 = 29;
    pub const VERSION_1: u32 = 32;
    pub const RING_PACKED: u32 = 34;
}

/// What earlier releases offered as well, and drivers that took it may still have. QEMU 11.1 does not hand SIZE_MAX on to
/// guests, and would refuse one that got it from an older QEMU and migrates.
pub const FORMER_FEATURES: u64 = 1 << feature::SIZE_MAX;

/// The features that a disk offers (without the vhost-user bit, which is the session's).
pub fn device_features(read_only: bool, discard: bool, write_zeroes: bool) -> u64 {
    use feature::*;
    let mut bits = 0u64;
    for bit in [
        SEG_MAX,
        BLK_SIZE,
        FLUSH,
        TOPOLOGY,
        CONFIG_WCE,
        MQ,
        RING_INDIRECT_DESC,
        RING_EVENT_IDX,
        VERSION_1,
        RING_PACKED,
    ] {
        bits |= 1 << bit;
    }
    for (on, bit) in
        [(read_only, RO), (discard && !read_only, DISCARD), (write_zeroes && !read_only, WRITE_ZEROES)]
    {
        if on {
            bits |= 1 << bit;
        }
    }
    bits
}

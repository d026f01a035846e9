//! One vring as a frontend sets it up.

use std::os::fd::OwnedFd;

use ringstone_virtqueue::{RingAddresses, RingSetup};

/// The state of a vring between messages.
#[derive(Default)]
pub(crate) struct Vring {
    pub size: u32,
    pub addresses: Option<RingAddresses>,
    /// Where to go on, as SET_VRING_BASE codes it; `None`: at the begin.
    pub base: Option<u32>,
    pub enabled: bool,
    /// `Some(None)`: set, without a descriptor (the frontend polls).
    pub kick: Option<Option<OwnedFd>>,
    pub call: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
}

impl Vring {
    /// Stopped, as on a device reset. Notification descriptors other than the kick stay: the
    /// frontend owns them and may not send them again.
    pub fn reset(&mut self, enabled: bool) {
        self.kick = None;
        self.enabled = enabled;
    }

    /// The base to start with.
    pub fn start_at(&self, packed: bool) -> u32 {
        /// Both positions 0, both wrap counters 1 (virtio 1.2, 2.8.1).
        const PACKED_BEGIN: u32 = 0x8000_8000;
        self.base.unwrap_or(if packed { PACKED_BEGIN } else { 0 })
    }
}

/// All that is needed to run a vring.
pub struct VringSetup {
    pub packed: bool,
    /// The frontend gave an in-flight region, and it has no room for this ring.
    pub unnoted: bool,
    pub ring: RingSetup,
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
}

//! One vring as a frontend sets it up.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringstone_virtqueue::{MemoryTable, RingAddresses};

/// The state of a vring between messages.
#[derive(Default)]
pub(crate) struct Vring {
    pub size: u32,
    pub addresses: Option<RingAddresses>,
    /// Where to go on in the available ring.
    pub base: u16,
    pub enabled: bool,
    /// `Some(None)`: set, without a descriptor (the frontend polls).
    pub kick: Option<Option<OwnedFd>>,
    pub call: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
}

impl Vring {
    /// Back to the state after connecting, as on a device reset. Notification descriptors other than the kick stay: the
    /// frontend owns them and may not send them again.
    pub fn reset(&mut self, enabled: bool) {
        self.kick = None;
        self.base = 0;
        self.enabled = enabled;
    }
}

/// All that is needed to run a vring.
pub struct VringSetup {
    pub memory: Arc<MemoryTable>,
    pub size: u32,
    pub addresses: RingAddresses,
    pub base: u16,
    pub event_idx: bool,
    pub indirect: bool,
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
}

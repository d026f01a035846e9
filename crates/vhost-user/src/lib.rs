//! The backend's half of a vhost-user connection (QEMU's "Vhost-user Protocol").
//!
//! Enters: messages and file descriptors from a frontend's socket. Leaves: replies, and the description of each vring that
//! may run (ring, kick and call descriptors). A [`Session`] keeps the state between messages and makes no system call of
//! its own beyond mapping guest memory; a [`Connection`] reads and writes the socket without ever waiting for the peer, so
//! that one thread can serve every frontend of the host, hostile ones too.
//!
//! Before a message is applied, [`Session::needs_quiet`] names the vrings that must be at rest for it; whoever runs the
//! rings stops them, tells the session where they stopped, and applies the message then.

mod connection;
mod descriptor;
mod error;
mod inflight;
mod link;
mod log;
mod memory;
mod message;
mod reaper;
mod session;
mod state;
mod vring;

pub use connection::{notify_config_change, Connection, Incoming};
pub use error::SessionError;
pub use link::{Link, Message};
pub use message::{
    protocol, Header, Reply, Request, HEADER_LEN, MAX_CONFIG, MAX_FDS, MAX_MEMORY_SLOTS, MAX_PAYLOAD,
};
pub use reaper::{Reaped, Reaper};
pub use session::{Applied, DeviceModel, Effect, Quiet, Session};
pub use state::{Descriptors, InflightState, LogState, RegionState, SessionState, VringState};
pub use vring::VringSetup;

/// virtio feature bit 30 stands for "the protocol features can be asked for" in vhost-user.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// virtio feature bit 26 stands for "write what you change in guest memory into the dirty log".
pub const F_LOG_ALL: u64 = 1 << 26;

//! The virtio block device: virtio 1.2, section 5.2.
//!
//! Enters: a descriptor [`Chain`](ringstone_virtqueue::Chain) and the disk's [`Geometry`]. Leaves: a [`Request`] whose every
//! field was checked (range, length, direction, type), or the status byte that refuses it. The data segments stay where
//! they are in guest memory; this crate reads only the header and the discard range. No `unsafe` lives here.

mod config;
mod error;
mod features;
mod request;

pub use config::{ConfigSpace, Limits, CONFIG_SIZE, WRITEBACK_OFFSET};
pub use error::Refusal;
pub use features::{device_features, feature, FORMER_FEATURES};
pub use request::{glance, glance_read, parse, status, Geometry, Operation, Request, SERIAL_LEN};

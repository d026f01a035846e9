//! The drive under a volume: a file or block device, memory, an image of a Ceph cluster, a volume of a store, nothing at
//! all, or any of these made faulty for tests.
//!
//! Enters: byte ranges that were checked against the volume, and buffers in guest memory. A [`MappedDrive`] copies at
//! once; a [`FileDrive`] says how a request is to be put on the reactor's io_uring (descriptor, alignment, what the file
//! system can do), and the reactor owns the request from then on. Which of them a queue talks to is one match a batch, not
//! a virtual call a request.

use ringstone_rbd::Image;

mod backing;
mod error;
mod faulty;
mod file;
mod lock;
mod mapped;
mod presence;
mod store;

pub use backing::Backing;
use backing::Nothing;
pub use error::DriveError;
pub use faulty::{Fault, FaultDice, Faults};
pub use file::{lives_in_memory, Direct, FileDrive};
pub use mapped::{Discard, HugePages, MappedDrive, Outgrown};
pub use store::{new_seal, wrap_anew, Key, StoreDoor, StoreParts, StoreVolume};

/// A drive of one of the kinds a reactor knows.
pub enum Drive {
    Mapped(MappedDrive),
    File(FileDrive),
    Rbd(Image),
    Store(StoreVolume),
    /// Reads leave the buffer as it is and writes are dropped: what remains is the cost of the path itself.
    Null,
}

impl Drive {
    /// What is common to all kinds, for the control side.
    pub fn backing(&self) -> &dyn Backing {
        match self {
            Self::Mapped(mapped) => mapped,
            Self::File(file) => file,
            Self::Rbd(image) => image,
            Self::Store(volume) => volume,
            Self::Null => &Nothing,
        }
    }
}

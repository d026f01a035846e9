//! The drive under a volume: a file or block device, memory, an image of a Ceph cluster, nothing at all, or any of these made faulty for tests.
//!
//! Enters: byte ranges that were checked against the volume, and buffers in guest memory. A [`MappedDrive`] copies at once;
//! a [`FileDrive`] says how a request is to be put on the reactor's io_uring (descriptor, alignment, what the file system
//! can do), and the reactor owns the request from then on. Which of them a queue talks to is one match a batch, not a
//! virtual call a request.

use std::os::fd::BorrowedFd;

use ringstone_rbd::{Image, RbdError};

mod error;
mod faulty;
mod file;
mod lock;
mod mapped;

pub use error::DriveError;
pub use faulty::{Fault, FaultDice, Faults};
pub use file::{lives_in_memory, Direct, FileDrive};
pub use mapped::{HugePages, MappedDrive};

/// A drive of one of the kinds a reactor knows.
pub enum Drive {
    Mapped(MappedDrive),
    File(FileDrive),
    Rbd(Image),
    /// Reads leave the buffer as it is and writes are dropped: what remains is the cost of the path itself.
    Null,
}

impl Drive {
    /// Ranges can be deallocated and read as zeroes afterwards.
    pub fn can_discard(&self) -> bool {
        match self {
            Self::Mapped(_) | Self::Null | Self::Rbd(_) => true,
            Self::File(file) => file.can_punch(),
        }
    }

    /// The open file under the drive, if it has one.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Mapped(mapped) => Some(mapped.file()),
            Self::File(file) => Some(file.file()),
            Self::Rbd(_) | Self::Null => None,
        }
    }

    /// What storage across hosts knows this client by.
    pub fn client(&self) -> Option<&str> {
        match self {
            Self::Rbd(image) => Some(image.client()),
            Self::Mapped(_) | Self::File(_) | Self::Null => None,
        }
    }

    /// One line for a person.
    pub fn describe(&self) -> String {
        match self {
            Self::Mapped(mapped) => mapped.describe(),
            Self::File(file) => file.describe(),
            Self::Rbd(image) => format!("librbd, {}/{} as {}", image.pool(), image.name(), image.client()),
            Self::Null => "reads and writes do nothing".into(),
        }
    }

    /// Make the drive `size` bytes long. Only growing.
    ///
    /// # Errors
    /// The backing file is shorter than that.
    pub fn resize(&self, size: u64) -> Result<(), DriveError> {
        match self {
            Self::Mapped(mapped) => mapped.resize(size),
            Self::File(file) => file.check_len(size),
            Self::Rbd(image) => match image.size()? {
                have if have < size => {
                    Err(RbdError::TooShort { image: image.name().into(), have, want: size }.into())
                }
                _ => Ok(()),
            },
            Self::Null => Ok(()),
        }
    }
}

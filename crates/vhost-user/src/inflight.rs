//! The in-flight region: shared memory in which a backend notes what it works on, so that its successor can go on.
//!
//! This side makes the region and takes it back after a reconnect; the rings write to it from the recovery code on.
//! Layout: vhost-user, "Inflight I/O tracking", split virtqueue.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use ringstone_mapping::Mapping;

use crate::error::SessionError;
use crate::message::WireInflight;

/// `struct inflight_desc_split_region`: features, version, desc_num, last_batch_head, used_idx.
const REGION_HEADER: u64 = 16;
/// `struct inflight_desc_split`.
const DESCRIPTOR: u64 = 16;
/// Regions of the queues start on cache lines of their own.
const REGION_ALIGN: u64 = 64;

/// Bytes for one queue of `size` entries.
fn queue_region(size: u16) -> u64 {
    (REGION_HEADER + DESCRIPTOR * u64::from(size)).next_multiple_of(REGION_ALIGN)
}

/// A region in use. Dropping it unmaps it; the frontend keeps its descriptor for our successor.
pub(crate) struct Inflight {
    pub _mapping: Mapping,
}

impl Inflight {
    /// Make a region for GET_INFLIGHT_FD.
    pub fn create(queues: u16, queue_size: u16) -> Result<(WireInflight, OwnedFd), SessionError> {
        if queues == 0 || queue_size == 0 {
            return Err(SessionError::Inflight { why: "it has no queues or no entries" });
        }
        let len = queue_region(queue_size) * u64::from(queues);
        // SAFETY: a plain system call with a NUL-terminated name; the result is checked before it is owned.
        let fd = unsafe {
            let fd = libc::memfd_create(
                c"ringstone-inflight".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            );
            if fd < 0 {
                return Err(io::Error::last_os_error().into());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let file = File::from(fd);
        file.set_len(len)?;
        Ok((WireInflight { len, offset: 0, queues, queue_size }, file.into()))
    }

    /// Map the region that SET_INFLIGHT_FD hands over.
    pub fn open(wire: &WireInflight, fd: &OwnedFd, max_queues: u16) -> Result<Self, SessionError> {
        if wire.queues == 0 || wire.queues > max_queues {
            return Err(SessionError::Inflight { why: "it has more queues than the device, or none" });
        }
        if wire.len < queue_region(wire.queue_size) * u64::from(wire.queues) {
            return Err(SessionError::Inflight { why: "it is too short for its queues" });
        }
        let mapping = Mapping::new(fd.as_fd(), wire.offset, wire.len)
            .map_err(|_| SessionError::Inflight { why: "its descriptor cannot be mapped" })?;
        Ok(Self { _mapping: mapping })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_that_was_made_can_be_opened_and_a_short_one_not() {
        let (wire, fd) = Inflight::create(4, 128).unwrap();
        assert!(wire.len >= 4 * (16 + 16 * 128));
        assert!(Inflight::open(&wire, &fd, 4).is_ok());
        assert!(Inflight::open(&wire, &fd, 2).is_err());
        assert!(Inflight::open(&WireInflight { len: 64, ..wire }, &fd, 4).is_err());
        assert!(Inflight::open(&WireInflight { offset: u64::MAX, ..wire }, &fd, 4).is_err());
    }
}

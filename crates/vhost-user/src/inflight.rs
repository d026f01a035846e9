//! The in-flight region: shared memory in which a backend notes what it works on, so that its successor can go on.
//!
//! This side makes the region, takes it back after a reconnect and cuts it into the queues' parts; the rings write to them.
//! Layout: vhost-user, "Inflight I/O tracking".

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use ringstone_mapping::Mapping;
use ringstone_virtqueue::InflightRegion;

use crate::descriptor::memory;
use crate::error::SessionError;
use crate::message::WireInflight;
use crate::reaper::{Reaped, Reaper};

/// A region in use. The frontend keeps its descriptor for our successor.
pub(crate) struct Inflight {
    pub wire: WireInflight,
    pub file: Reaped<OwnedFd>,
    mapping: Arc<Mapping>,
}

impl Inflight {
    /// Make a region for GET_INFLIGHT_FD. All zeroes is a region that nobody has used (its version is 0).
    pub fn create(
        queues: u16,
        queue_size: u16,
        packed: bool,
    ) -> Result<(WireInflight, OwnedFd), SessionError> {
        if queues == 0 || queue_size == 0 {
            return Err(SessionError::Inflight { why: "it has no queues or no entries" });
        }
        let len = InflightRegion::len(queue_size, packed) as u64 * u64::from(queues);
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
    pub fn open(
        wire: WireInflight,
        file: Reaped<OwnedFd>,
        max_queues: u16,
        packed: bool,
        reaper: &Reaper,
    ) -> Result<Reaped<Self>, SessionError> {
        if wire.queues == 0 || wire.queues > max_queues {
            return Err(SessionError::Inflight { why: "it has more queues than the device, or none" });
        }
        if wire.len < InflightRegion::len(wire.queue_size, packed) as u64 * u64::from(wire.queues) {
            return Err(SessionError::Inflight { why: "it is too short for its queues" });
        }
        let file = memory(file, "in-flight region", reaper)?;
        let mapping = Mapping::new(file.as_fd(), wire.offset, wire.len)
            .map_err(|_| SessionError::Inflight { why: "its descriptor cannot be mapped" })?;
        Ok(reaper.hold(Self { wire, file, mapping: Arc::new(mapping) }))
    }

    pub fn poisoned(&self) -> bool {
        self.mapping.poisoned()
    }

    /// The part of queue `index`; `None` for a queue that the region was not made for, whose requests are not noted then.
    pub fn queue(&self, index: u16, packed: bool) -> Result<Option<InflightRegion>, SessionError> {
        if index >= self.wire.queues {
            return Ok(None);
        }
        let entries = self.wire.queue_size;
        let offset = InflightRegion::len(entries, packed) * usize::from(index);
        InflightRegion::new(self.mapping.clone(), offset, entries, packed)
            .map(Some)
            .ok_or(SessionError::Inflight { why: "it is too short for the rings that were negotiated" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_that_was_made_can_be_opened_and_a_short_one_not() {
        let reaper = crate::Reaper::default();
        for packed in [false, true] {
            let (wire, fd) = Inflight::create(4, 128, packed).unwrap();
            let open = |wire, max_queues| {
                Inflight::open(wire, reaper.hold(fd.try_clone().unwrap()), max_queues, packed, &reaper)
            };
            assert!(wire.len >= 4 * (16 + 16 * 128));
            assert!(open(wire, 2).is_err());
            assert!(open(WireInflight { len: 64, ..wire }, 4).is_err());
            assert!(open(WireInflight { offset: u64::MAX, ..wire }, 4).is_err());
            let region = open(wire, 4).unwrap();
            assert!(region.queue(3, packed).unwrap().is_some());
            assert!(region.queue(4, packed).unwrap().is_none());
        }
        // Made for split rings, used with packed ones: their parts are longer.
        let (wire, fd) = Inflight::create(1, 128, false).unwrap();
        assert!(Inflight::open(wire, reaper.hold(fd), 1, false, &reaper).unwrap().queue(0, true).is_err());
    }
}

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

/// Entries of a ring that each queue has room for, even where the frontend asks for fewer: the most that QEMU's virtio
/// devices set. QEMU 10.0 asks for as many as its `queue-size` says and then sets rings of 1024.
const ROOM: u16 = 1024;

/// A region in use. The frontend keeps its descriptor for our successor.
pub(crate) struct Inflight {
    pub wire: WireInflight,
    pub file: Reaped<OwnedFd>,
    mapping: Arc<Mapping>,
}

impl Inflight {
    /// Make a region for GET_INFLIGHT_FD. All zeroes is a region that nobody has used (its version is 0).
    ///
    /// The queues' parts lie as the specification has them, for rings of the size that was asked for. Behind them, for
    /// rings that turn out larger, lie parts of [`ROOM`] entries. So whoever knows only the former finds them in place.
    pub fn create(
        queues: u16,
        queue_size: u16,
        packed: bool,
    ) -> Result<(WireInflight, OwnedFd), SessionError> {
        if queues == 0 || queue_size == 0 {
            return Err(SessionError::Inflight { why: "it has no queues or no entries" });
        }
        let wire = WireInflight { len: 0, offset: 0, queues, queue_size };
        let len = parts(&wire, packed) + if queue_size < ROOM { large_parts(&wire, packed) } else { 0 };
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
        Ok((WireInflight { len, ..wire }, file.into()))
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
        if wire.len < parts(&wire, packed) {
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

    /// The part of queue `index`, for a ring of `size` entries; `None` where there is no room for it, and the ring's requests
    /// are not noted then.
    pub fn queue(&self, index: u16, size: u32, packed: bool) -> Option<InflightRegion> {
        if index >= self.wire.queues {
            return None;
        }
        let (begin, entries) = if size <= u32::from(self.wire.queue_size) {
            (0, self.wire.queue_size)
        } else if size <= u32::from(ROOM) {
            (parts(&self.wire, packed), ROOM)
        } else {
            return None;
        };
        let offset = begin as usize + InflightRegion::len(entries, packed) * usize::from(index);
        InflightRegion::new(self.mapping.clone(), offset, entries, packed)
    }
}

/// Bytes of all queues' parts, for rings of the size that was asked for.
fn parts(wire: &WireInflight, packed: bool) -> u64 {
    InflightRegion::len(wire.queue_size, packed) as u64 * u64::from(wire.queues)
}

/// Bytes of all queues' parts for larger rings.
fn large_parts(wire: &WireInflight, packed: bool) -> u64 {
    InflightRegion::len(ROOM, packed) as u64 * u64::from(wire.queues)
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
            assert!(region.queue(3, 128, packed).is_some());
            assert!(region.queue(4, 128, packed).is_none());
        }
        // Made for split rings, used with packed ones: their parts are longer.
        let (wire, fd) = Inflight::create(1, 1024, false).unwrap();
        let region = Inflight::open(wire, reaper.hold(fd), 1, false, &reaper).unwrap();
        assert!(region.queue(0, 1024, true).is_none());
    }

    #[test]
    fn rings_larger_than_asked_for_have_parts_of_their_own() {
        let reaper = crate::Reaper::default();
        for packed in [false, true] {
            let (wire, fd) = Inflight::create(3, 128, packed).unwrap();
            let region = Inflight::open(wire, reaper.hold(fd), 3, packed, &reaper).unwrap();
            let mut taken = Vec::new();
            for size in [128, 1024] {
                for index in 0..3 {
                    let part = region.queue(index, size, packed).unwrap();
                    let begin = part.offset() as u64;
                    taken.push(begin..begin + InflightRegion::len(size as u16, packed) as u64);
                }
            }
            // Where a process that knows no larger rings looks for them.
            assert_eq!(taken[2].start, 2 * InflightRegion::len(128, packed) as u64);
            assert!(taken.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!(taken.last().unwrap().end, wire.len);
            assert!(region.queue(0, 2048, packed).is_none());
        }
    }

    #[test]
    fn a_region_without_room_for_larger_rings_serves_those_it_was_made_for() {
        let reaper = crate::Reaper::default();
        let (wire, fd) = Inflight::create(2, 128, false).unwrap();
        let wire = WireInflight { len: parts(&wire, false), ..wire };
        let region = Inflight::open(wire, reaper.hold(fd), 2, false, &reaper).unwrap();
        assert!(region.queue(1, 128, false).is_some());
        assert!(region.queue(0, 256, false).is_none());
    }
}

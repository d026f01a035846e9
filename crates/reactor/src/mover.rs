//! Requests that need not wait for a drive.

use ringstone_blockdev::{MappedDrive, StoreVolume};
use ringstone_virtio_blk::{glance, glance_read, Operation, Request};
use ringstone_virtqueue::prefetch;

use crate::core::Shared;

/// How a kind of drive moves the data of a request that can be done at once. Chosen once a batch, so that the loop is
/// compiled for each kind.
pub(crate) trait Mover {
    /// `Some(succeeded)`, or `None` if the request needs a slot.
    fn move_now(&self, request: &Request, shared: &mut Shared) -> Option<bool>;

    /// The next request seems to begin with `header`.
    #[inline(always)]
    fn foresee(&self, _header: &[u8; 16]) {}
}

pub(crate) struct Inline<'a>(pub &'a MappedDrive);

impl Mover for Inline<'_> {
    #[inline(always)]
    fn move_now(&self, request: &Request, shared: &mut Shared) -> Option<bool> {
        if request.len > shared.quota.turn {
            return None;
        }
        shared.budget.copied(request.len);
        let mut at = request.offset;
        match request.operation {
            Operation::Read => {
                for segment in shared.chain.writable() {
                    // SAFETY: parse checked that the range is on the volume and every segment inside guest memory.
                    if unsafe { self.0.read(at, segment.ptr, segment.len as usize) }.is_err() {
                        return Some(false);
                    }
                    at += u64::from(segment.len);
                }
            }
            Operation::Write => {
                for segment in shared.chain.readable() {
                    // SAFETY: as above.
                    if unsafe { self.0.write(at, segment.ptr, segment.len as usize) }.is_err() {
                        return Some(false);
                    }
                    at += u64::from(segment.len);
                }
            }
            // Memory is as stable as it gets.
            Operation::Flush => {}
            _ => return None,
        }
        Some(true)
    }

    #[inline(always)]
    fn foresee(&self, header: &[u8; 16]) {
        /// Lines of the next block, brought near while this one is copied.
        const LINES: usize = 32;
        if let Some(offset) = glance_read(header) {
            self.0.prefetch::<LINES>(offset);
        }
    }
}

pub(crate) struct Nothing;

impl Mover for Nothing {
    #[inline(always)]
    fn move_now(&self, request: &Request, _shared: &mut Shared) -> Option<bool> {
        (request.operation != Operation::GetId).then_some(true)
    }
}

/// Requests go where the volume's map says. Of a large volume the map is in no cache, so the next request's word is fetched
/// while this one goes onto the io_uring.
pub(crate) struct Looked<'a>(pub &'a StoreVolume);

impl Mover for Looked<'_> {
    #[inline(always)]
    fn move_now(&self, _request: &Request, _shared: &mut Shared) -> Option<bool> {
        None
    }

    #[inline(always)]
    fn foresee(&self, header: &[u8; 16]) {
        if let Some(offset) = glance(header) {
            prefetch(self.0.word_at(offset));
        }
    }
}

pub(crate) struct Submitted;

impl Mover for Submitted {
    #[inline(always)]
    fn move_now(&self, _request: &Request, _shared: &mut Shared) -> Option<bool> {
        None
    }
}

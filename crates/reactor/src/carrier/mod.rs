//! How a kind of drive carries out a request that has a slot: one small interface, one file for each kind.
//!
//! A carrier begins the next step of a request, and either completes it ([`RingQueue::complete`], [`RingQueue::failed`]),
//! leaves it for a later turn, or has given it to somebody who answers with a completion
//! ([`RingQueue::completed`]). Which carrier a request has is a match, not a virtual call.

mod file;
mod mapped;
mod rbd;
mod store;

use ringstone_virtqueue::VirtRing;

pub(crate) use file::unwaited;

use crate::core::Shared;
use crate::queue::RingQueue;

/// What a pool type does on a reactor. `head` names the slot, which holds operation, range and data.
pub(crate) trait Carrier {
    /// Move the rest of a read's or write's data. A write that is completed is as durable as the volume promises.
    fn transfer<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared);

    /// Make durable all that was completed before.
    fn flush<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared);

    /// Deallocate the range; it reads as zeroes afterwards.
    fn discard<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared);

    /// Zero the range; it may be deallocated if `unmap`.
    fn write_zeroes<R: VirtRing>(
        &self,
        head: u16,
        unmap: bool,
        queue: &mut RingQueue<R>,
        shared: &mut Shared,
    );
}

/// Call `with(pointer, bytes before it, bytes)` for the pieces of the first `len` bytes of `iovecs`.
pub(crate) fn for_bytes(iovecs: &[libc::iovec], len: usize, mut with: impl FnMut(*mut u8, usize, usize)) {
    let mut done = 0;
    for iov in iovecs {
        let n = iov.iov_len.min(len - done);
        with(iov.iov_base.cast(), done, n);
        done += n;
        if done == len {
            return;
        }
    }
}

//! Requests in flight, one slot per ring entry: the head of a chain is the slot's index.

use ringstone_blockdev::Fault;
use ringstone_virtio_blk::Operation;
use ringstone_virtqueue::{GuestByte, Segment};

use crate::guests::Held;
use crate::pools::{Bounce, IovecBlock, Pools};

/// Segments of one system call at most: UIO_MAXIOV of Linux.
const IOV_MAX: usize = 1024;

/// A request that is not done yet.
pub(crate) struct Slot {
    pub busy: bool,
    pub operation: Operation,
    pub fault: Fault,
    pub status: GuestByte,
    /// Byte offset on the volume.
    pub offset: u64,
    /// Bytes to move (for a torn write less than the guest gave).
    pub len: u64,
    /// Bytes moved so far.
    pub done: u64,
    /// Bytes of the step that a drive has.
    pub under_way: u64,
    /// Bytes the guest gave: what a read tells the driver was written.
    pub asked: u64,
    /// The range is zeroed; what is under way is making that durable.
    pub syncing: bool,
    /// Byte of the drive that the step under way begins at, of a store's volume.
    pub place: u64,
    /// What the request holds of an epoch, with 1 added; 0: nothing. See `ringstone_store::Epochs`.
    pub epoch: u8,
    /// Clock tick at which it was found.
    pub started: u64,
    /// Zeroes are written from a buffer, as the file system cannot do it.
    pub zero_by_writing: bool,
    pub bounce: Option<Bounce>,
    /// The part of a long segment that is under way.
    pub(crate) cut: libc::iovec,
    pub(crate) segments: Segments,
}

pub(crate) enum Segments {
    None,
    One(libc::iovec),
    /// Remaining iovecs are `first..count` of a block.
    Many {
        block: IovecBlock,
        first: u16,
        count: u16,
    },
}

// SAFETY: a slot's iovecs point into guest memory that its queue keeps alive; slots move between threads only with it.
unsafe impl Send for Slot {}

impl Default for Slot {
    fn default() -> Self {
        Self {
            busy: false,
            operation: Operation::Flush,
            fault: Fault::None,
            status: GuestByte::dangling(),
            offset: 0,
            len: 0,
            done: 0,
            under_way: 0,
            asked: 0,
            syncing: false,
            place: 0,
            epoch: 0,
            started: 0,
            zero_by_writing: false,
            bounce: None,
            cut: libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 },
            segments: Segments::None,
        }
    }
}

impl Slot {
    /// Keep the data segments; false if there is no iovec block free now.
    pub fn set_segments(&mut self, segments: &[Segment], pools: &mut Pools) -> bool {
        self.segments = match segments {
            [] => Segments::None,
            [one] => Segments::One(iovec(one)),
            many => {
                let Some(block) = pools.take_block() else {
                    return false;
                };
                let iovecs = pools.block(&block);
                for (place, segment) in iovecs.iter_mut().zip(many) {
                    *place = iovec(segment);
                }
                Segments::Many { block, first: 0, count: many.len() as u16 }
            }
        };
        true
    }

    /// The data that is still to be moved.
    #[inline(always)]
    pub fn iovecs<'a>(&'a self, pools: &'a mut Pools) -> &'a [libc::iovec] {
        match &self.segments {
            Segments::None => &[],
            Segments::One(one) => std::slice::from_ref(one),
            Segments::Many { block, first, count } => {
                &pools.block(block)[usize::from(*first)..usize::from(*count)]
            }
        }
    }

    /// The data of the next step, at most `most` bytes of it, and how long that is.
    #[inline(always)]
    pub fn step<'a>(&'a mut self, most: u64, pools: &'a mut Pools) -> (&'a [libc::iovec], u64) {
        let left = self.len - self.done;
        if left > most || matches!(self.segments, Segments::Many { .. }) {
            return self.part(most, pools);
        }
        self.under_way = left;
        (self.iovecs(pools), left)
    }

    /// As many whole segments as fit, or a part of the first.
    #[inline]
    fn part<'a>(&'a mut self, most: u64, pools: &'a mut Pools) -> (&'a [libc::iovec], u64) {
        let iovecs = match &self.segments {
            Segments::None => return (&[], 0),
            Segments::One(one) => std::slice::from_ref(one),
            Segments::Many { block, first, count } => {
                &pools.block(block)[usize::from(*first)..usize::from(*count)]
            }
        };
        let mut len = 0;
        let fits = |iov: &&libc::iovec| {
            let fits = len + iov.iov_len as u64 <= most;
            len += if fits { iov.iov_len as u64 } else { 0 };
            fits
        };
        let whole = iovecs.iter().take(IOV_MAX).take_while(fits).count();
        if whole == 0 {
            self.under_way = most;
            self.cut = libc::iovec { iov_base: iovecs[0].iov_base, iov_len: most as usize };
            return (std::slice::from_ref(&self.cut), most);
        }
        self.under_way = len;
        (&iovecs[..whole], len)
    }

    /// Forget the data behind `len` bytes.
    pub fn truncate(&mut self, len: u64, pools: &mut Pools) {
        self.len = len;
        let mut left = len as usize;
        let mut cut = |iov: &mut libc::iovec| {
            iov.iov_len = iov.iov_len.min(left);
            left -= iov.iov_len;
            iov.iov_len > 0
        };
        match &mut self.segments {
            Segments::None => {}
            Segments::One(one) => {
                cut(one);
            }
            Segments::Many { block, first, count } => {
                let kept = pools.block(block)[usize::from(*first)..usize::from(*count)]
                    .iter_mut()
                    .map_while(|iov| cut(iov).then_some(()));
                *count = *first + kept.count() as u16;
            }
        }
    }

    /// `bytes` more were moved.
    pub fn advance(&mut self, mut bytes: usize, pools: &mut Pools) {
        self.done += bytes as u64;
        let skip = |iov: &mut libc::iovec, n: usize| {
            iov.iov_base = iov.iov_base.cast::<u8>().wrapping_add(n).cast();
            iov.iov_len -= n;
        };
        match &mut self.segments {
            Segments::None => {}
            Segments::One(one) => skip(one, bytes.min(one.iov_len)),
            Segments::Many { block, first, count } => {
                let iovecs = pools.block(block);
                while bytes > 0 && *first < *count {
                    let iov = &mut iovecs[usize::from(*first)];
                    let n = bytes.min(iov.iov_len);
                    skip(iov, n);
                    bytes -= n;
                    if iov.iov_len == 0 {
                        *first += 1;
                    }
                }
            }
        }
    }

    /// Give back what the slot holds, of which its guest has that much less, and mark it free.
    #[inline(always)]
    pub fn release(&mut self, pools: &mut Pools, held: &mut Held) {
        if let Segments::Many { block, .. } = std::mem::replace(&mut self.segments, Segments::None) {
            pools.give_block(block);
            held.blocks -= 1;
        }
        if let Some(bounce) = self.bounce.take() {
            pools.give_bounce(bounce);
            held.bounces -= 1;
        }
        self.busy = false;
    }
}

fn iovec(segment: &Segment) -> libc::iovec {
    libc::iovec { iov_base: segment.ptr.cast(), iov_len: segment.len as usize }
}

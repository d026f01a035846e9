//! Memory that the queues of one reactor share: iovec blocks for requests of many segments, bounce buffers for segments
//! that direct I/O cannot take, and a page of zeroes. All of it is taken once, at start; pages are touched when first used.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::ptr::NonNull;

use ringstone_virtqueue::MAX_SEGMENTS;

/// Requests of more than one segment in flight at one time in a reactor; a queue waits when they run out.
pub const BLOCKS: usize = 1024;
/// Bounced requests in flight at one time.
pub const BOUNCES: usize = 64;

/// Bytes of a bounce buffer, and of one step of a request that needs one: copied in some 10 us.
pub const BOUNCE_LEN: usize = 64 << 10;
/// Bytes of the buffer of zeroes.
pub const ZEROES_LEN: usize = 256 << 10;

/// A taken iovec block.
pub struct IovecBlock(u16);

/// A taken bounce buffer.
pub struct Bounce(u16);

/// See the module.
pub struct Pools {
    iovecs: Region,
    free_blocks: Vec<u16>,
    bounces: Region,
    free_bounces: Vec<u16>,
    zeroes: Region,
}

struct Region {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory owned by the region.
unsafe impl Send for Region {}

impl Region {
    fn new(len: usize) -> Self {
        // Page alignment serves every direct I/O alignment there is.
        let layout = Layout::from_size_align(len, 4096).unwrap_or(Layout::new::<[u8; 4096]>());
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else { std::alloc::handle_alloc_error(layout) };
        Self { base, layout }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

impl Pools {
    pub fn new() -> Self {
        Self {
            iovecs: Region::new(BLOCKS * MAX_SEGMENTS * size_of::<libc::iovec>()),
            free_blocks: (0..BLOCKS as u16).rev().collect(),
            bounces: Region::new(BOUNCES * BOUNCE_LEN),
            free_bounces: (0..BOUNCES as u16).rev().collect(),
            zeroes: Region::new(ZEROES_LEN),
        }
    }

    pub fn take_block(&mut self) -> Option<IovecBlock> {
        self.free_blocks.pop().map(IovecBlock)
    }

    pub fn give_block(&mut self, block: IovecBlock) {
        self.free_blocks.push(block.0);
    }

    pub fn block(&mut self, block: &IovecBlock) -> &mut [libc::iovec; MAX_SEGMENTS] {
        // SAFETY: a block's number is below BLOCKS and its taker is the only one to hold it; all-zero iovecs are valid.
        unsafe {
            &mut *self.iovecs.base.as_ptr().cast::<[libc::iovec; MAX_SEGMENTS]>().add(usize::from(block.0))
        }
    }

    pub fn take_bounce(&mut self) -> Option<Bounce> {
        self.free_bounces.pop().map(Bounce)
    }

    pub fn has_bounce(&self) -> bool {
        !self.free_bounces.is_empty()
    }

    pub fn give_bounce(&mut self, bounce: Bounce) {
        self.free_bounces.push(bounce.0);
    }

    /// The buffer's first byte; it is `BOUNCE_LEN` long.
    pub fn bounce(&self, bounce: &Bounce) -> *mut u8 {
        // SAFETY: a buffer's number is below BOUNCES.
        unsafe { self.bounces.base.as_ptr().add(usize::from(bounce.0) * BOUNCE_LEN) }
    }

    /// `ZEROES_LEN` bytes that nobody writes.
    pub fn zeroes(&self) -> *const u8 {
        self.zeroes.base.as_ptr()
    }
}

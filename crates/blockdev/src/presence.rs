//! Which chunks of a mapped drive have memory: a bit each.
//!
//! The bits stay where they are while the drive grows, since writers set them at any moment: room for all growth is reserved
//! when the drive is opened. It is address space; only words that are used take memory.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// Room is made for drives of so many bytes, or twice the drive's size if that is more: 32 MiB of addresses for chunks of 64 KiB.
const ROOM: u64 = 16 << 40;

/// See the module.
pub(crate) struct Presence {
    words: *mut AtomicU64,
    count: usize,
    chunk_shift: u32,
}

// SAFETY: the words are plain atomics in memory of our own, which lives as long as this.
unsafe impl Send for Presence {}
// SAFETY: as above.
unsafe impl Sync for Presence {}

impl Presence {
    /// No chunk has memory. Chunks are of `1 << chunk_shift` bytes; the drive has `size` bytes now.
    ///
    /// # Errors
    /// There is no address space.
    pub fn new(size: u64, chunk_shift: u32) -> io::Result<Self> {
        let bytes = size.saturating_mul(2).max(ROOM);
        let count = words_for(bytes, chunk_shift);
        // SAFETY: a new anonymous mapping; the result is checked.
        let words = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if words == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { words: words.cast(), count, chunk_shift })
    }

    /// Bytes that the drive may grow to.
    pub fn room(&self) -> u64 {
        (self.count as u64 * 64) << self.chunk_shift
    }

    pub fn chunk_shift(&self) -> u32 {
        self.chunk_shift
    }

    #[inline(always)]
    fn word(&self, chunk: u64) -> &AtomicU64 {
        let at = (chunk / 64) as usize;
        debug_assert!(at < self.count, "chunk {chunk}");
        // SAFETY: offsets were checked against the drive, which is never longer than `room`; all-zero words are valid.
        unsafe { &*self.words.add(at) }
    }

    #[inline(always)]
    pub fn has(&self, chunk: u64) -> bool {
        self.word(chunk).load(Ordering::Acquire) & (1 << (chunk % 64)) != 0
    }

    pub fn set(&self, chunk: u64) {
        self.word(chunk).fetch_or(1 << (chunk % 64), Ordering::AcqRel);
    }

    pub fn clear(&self, chunk: u64) {
        self.word(chunk).fetch_and(!(1 << (chunk % 64)), Ordering::AcqRel);
    }

    /// The bits of a drive of `size` bytes, in little-endian words of 64.
    pub fn to_bytes(&self, size: u64) -> Vec<u8> {
        let words = (0..words_for(size, self.chunk_shift) as u64).map(|at| self.word(at * 64));
        words.flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect()
    }

    /// Take over what [`to_bytes`](Self::to_bytes) of another process gave; false if it is not for a drive of `size` bytes.
    pub fn take_over(&self, size: u64, bytes: &[u8]) -> bool {
        let (words, rest) = bytes.as_chunks();
        if words.len() != words_for(size, self.chunk_shift) || !rest.is_empty() {
            return false;
        }
        for (at, word) in words.iter().enumerate() {
            self.word(at as u64 * 64).store(u64::from_le_bytes(*word), Ordering::Release);
        }
        true
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and nobody refers to it any more.
        unsafe { libc::munmap(self.words.cast(), self.count * 8) };
    }
}

fn words_for(bytes: u64, chunk_shift: u32) -> usize {
    bytes.div_ceil(1 << chunk_shift).div_ceil(64) as usize
}

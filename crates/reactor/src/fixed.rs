//! Guest memory registered with the io_uring, so that the kernel need not look its pages up for every request.
//!
//! Registering pins pages and takes the ring's lock, and forgetting lets them go, so either goes in slices, one a loop turn,
//! small enough that nobody notices; requests in slices that are not registered take the ordinary way. Nor does a reactor
//! ever unmap memory, which takes seconds for a large guest: it gives mappings back.

use std::sync::Arc;

use ringstone_mapping::Mapping;

use crate::uring::{Uring, MAX_FIXED};

/// Bytes registered in one turn: with 4 KiB pages about 50 us.
const SLICE_SMALL_PAGES: usize = 4 << 20;
/// With huge pages a slice costs next to nothing; the kernel takes 1 GiB at most.
const SLICE_HUGE_PAGES: usize = 512 << 20;

struct Entry {
    mapping: Arc<Mapping>,
    base: u32,
    slices: u32,
    ready: u32,
    shift: u32,
    /// It is being taken off the table, from its last slice on.
    leaving: bool,
}

/// What came to an end in a step.
pub enum Stepped {
    Registered(Registered),
    /// Nothing of it is registered any more.
    Forgotten(Arc<Mapping>),
}

/// The table of registered buffers of one reactor.
pub struct FixedBuffers {
    entries: Vec<Entry>,
    /// Which of the kernel's table places are taken.
    taken: Vec<bool>,
    usable: bool,
}

/// What became of a registration, told once.
pub struct Registered {
    pub mapping: Arc<Mapping>,
    pub bytes: u64,
    pub error: Option<std::io::Error>,
}

impl FixedBuffers {
    pub fn new(uring: &Uring) -> Self {
        let usable = uring.ring().submitter().register_buffers_sparse(MAX_FIXED).is_ok();
        Self { entries: Vec::new(), taken: vec![false; MAX_FIXED as usize], usable }
    }

    /// Plan to register all of `mapping`; [`step`](Self::step) does the work.
    pub fn add(&mut self, mapping: Arc<Mapping>) -> Result<(), Registered> {
        let slice = if mapping.page_size() > 4096 { SLICE_HUGE_PAGES } else { SLICE_SMALL_PAGES };
        let slices = mapping.len().div_ceil(slice);
        let free = self.taken.windows(slices.max(1)).position(|window| window.iter().all(|t| !t));
        match free.filter(|_| self.usable) {
            Some(base) => {
                self.taken[base..base + slices].fill(true);
                let entry = Entry {
                    mapping,
                    base: base as u32,
                    slices: slices as u32,
                    ready: 0,
                    shift: slice.trailing_zeros(),
                    leaving: false,
                };
                self.entries.push(entry);
                Ok(())
            }
            None => {
                let error = Some(std::io::Error::from_raw_os_error(libc::ENOSPC));
                Err(Registered { mapping, bytes: 0, error })
            }
        }
    }

    /// True while there is something to register or to forget.
    #[inline(always)]
    pub fn pending(&self) -> bool {
        !self.entries.is_empty() && self.entries.iter().any(|e| e.leaving || e.ready < e.slices)
    }

    /// Forget or register the next slice; answers when a mapping is done or cannot be done.
    pub fn step(&mut self, uring: &Uring) -> Option<Stepped> {
        if let Some(at) = self.entries.iter().position(|entry| entry.leaving) {
            return self.forget_slice(at, uring).map(Stepped::Forgotten);
        }
        self.register_slice(uring).map(Stepped::Registered)
    }

    fn register_slice(&mut self, uring: &Uring) -> Option<Registered> {
        let entry = self.entries.iter_mut().find(|e| e.ready < e.slices)?;
        let at = (entry.ready as usize) << entry.shift;
        let len = (1usize << entry.shift).min(entry.mapping.len() - at);
        let iovec = libc::iovec { iov_base: entry.mapping.as_ptr().wrapping_add(at).cast(), iov_len: len };
        // SAFETY: the range lies in the mapping, which the entry keeps alive until `remove` took it off the table.
        let result = unsafe {
            uring.ring().submitter().register_buffers_update(entry.base + entry.ready, &[iovec], None)
        };
        match result {
            Ok(()) => {
                entry.ready += 1;
                let done = entry.ready == entry.slices;
                done.then(|| Registered {
                    mapping: entry.mapping.clone(),
                    bytes: entry.mapping.len() as u64,
                    error: None,
                })
            }
            Err(error) => {
                let bytes = (entry.ready as u64) << entry.shift;
                entry.slices = entry.ready;
                Some(Registered { mapping: entry.mapping.clone(), bytes, error: Some(error) })
            }
        }
    }

    /// Plan to take `mapping` off the table; [`step`](Self::step) does the work. Requests in it must be done. `Err`: it is not
    /// there.
    pub fn remove(&mut self, mapping: Arc<Mapping>) -> Result<(), Arc<Mapping>> {
        match self.entries.iter_mut().find(|e| Arc::ptr_eq(&e.mapping, &mapping) && !e.leaving) {
            Some(entry) => {
                entry.leaving = true;
                Ok(())
            }
            None => Err(mapping),
        }
    }

    fn forget_slice(&mut self, at: usize, uring: &Uring) -> Option<Arc<Mapping>> {
        let entry = &mut self.entries[at];
        if let Some(last) = entry.ready.checked_sub(1) {
            let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
            // SAFETY: an empty iovec frees the place.
            let result = unsafe {
                uring.ring().submitter().register_buffers_update(entry.base + last, &[empty], None)
            };
            debug_assert!(result.is_ok(), "{result:?}");
            entry.ready = last;
            if last > 0 {
                return None;
            }
        }
        let entry = self.entries.swap_remove(at);
        let planned = entry.mapping.len().div_ceil(1usize << entry.shift);
        self.taken[entry.base as usize..entry.base as usize + planned].fill(false);
        Some(entry.mapping)
    }

    /// The registered buffer that holds all of a segment.
    #[inline(always)]
    pub fn find(&self, pointer: *const u8, len: usize) -> Option<u16> {
        for entry in self.entries.iter().filter(|entry| !entry.leaving) {
            let at = (pointer as usize).wrapping_sub(entry.mapping.as_ptr() as usize);
            if at < entry.mapping.len() {
                let slice = (at >> entry.shift) as u32;
                let last = ((at + len - 1) >> entry.shift) as u32;
                return (slice == last && slice < entry.ready).then_some((entry.base + slice) as u16);
            }
        }
        None
    }
}

//! Shared memory for payload: a memfd, on hugepages where there are any, mapped and touched before it is used.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{self, NonNull};

use crate::config::Hugepages;
use crate::LoadError;

const HUGE: usize = 2 << 20;
const SMALL: usize = 4096;

/// A mapped memfd. The mapping lives as long as this value.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    file: File,
    base: NonNull<u8>,
    len: usize,
    huge: bool,
}

// SAFETY: the mapping belongs to this value alone and is unmapped only by its drop; the pointer may move threads.
unsafe impl Send for SharedMemory {}
// SAFETY: shared access gives out the base address and the length only; dereferencing it is each user's own `unsafe`.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// At least `len` bytes, zeroed, every page present.
    pub(crate) fn new(len: usize, hugepages: Hugepages) -> Result<Self, LoadError> {
        let huge = match hugepages {
            Hugepages::Off => Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
            Hugepages::Auto | Hugepages::On => Self::map(len.next_multiple_of(HUGE), true),
        };
        match (huge, hugepages) {
            (Ok(memory), _) => Ok(memory),
            (Err(source), Hugepages::On) => Err(LoadError::Memory { bytes: len, source }),
            (Err(_), Hugepages::Auto | Hugepages::Off) => Self::map(len.next_multiple_of(SMALL), false)
                .map_err(|source| LoadError::Memory { bytes: len, source }),
        }
    }

    fn map(len: usize, huge: bool) -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC | if huge { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
        // SAFETY: the name is a NUL-terminated literal.
        let fd = unsafe { libc::memfd_create(c"ringstone-load".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64)?;
        // SAFETY: a fresh mapping of a file of `len` bytes that this value owns; no address is asked for.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(address.cast::<u8>()).ok_or(io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { file, base, len, huge })
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_huge(&self) -> bool {
        self.huge
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Address of `len` bytes at `offset`; panics when they do not lie within the memory.
    pub(crate) fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len).expect("an offset within the memory");
        assert!(end <= self.len, "{offset} + {len} is outside {} bytes of shared memory", self.len);
        // SAFETY: offset + len was checked to lie within the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Copies `bytes` to `offset`. The backend must not be working on them.
    pub(crate) fn store(&self, offset: usize, bytes: &[u8]) {
        let target = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; `bytes` is a borrow of other memory, since nothing hands out slices of this one.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    /// A copy of `len` bytes from `offset`. The backend must not be working on them.
    pub(crate) fn load(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.load_into(offset, &mut bytes);
        bytes
    }

    /// Copies as many bytes as `target` holds from `offset`. The backend must not be working on them.
    pub(crate) fn load_into(&self, offset: usize, target: &mut [u8]) {
        let source = self.at(offset, target.len());
        // SAFETY: `at` checked the range; `target` is other memory, since nothing hands out slices of this one.
        unsafe { ptr::copy_nonoverlapping(source, target.as_mut_ptr(), target.len()) };
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this base and length and is unmapped once, here.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pages_can_always_be_had_and_keep_what_is_stored() {
        let memory = SharedMemory::new(5000, Hugepages::Off).unwrap();
        assert_eq!((memory.len(), memory.is_huge()), (8192, false));
        memory.store(4000, b"across a page");
        assert_eq!(memory.load(4000, 13), b"across a page");
        assert_eq!(memory.load(0, 16), [0; 16]);
    }

    #[test]
    #[should_panic(expected = "outside 4096 bytes")]
    fn an_access_past_the_end_is_stopped() {
        SharedMemory::new(4096, Hugepages::Off).unwrap().load(4090, 7);
    }
}

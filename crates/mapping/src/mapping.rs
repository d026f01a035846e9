use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use crate::error::MappingError;
use crate::guard::Guard;

/// A `MAP_SHARED` read-write mapping of a file, guarded against truncation.
///
/// The bytes are shared with another process: they are only reached through raw pointers, never through references.
pub struct Mapping {
    base: NonNull<u8>,
    map_len: usize,
    /// From the page boundary that `mmap` needs to the byte asked for.
    lead: usize,
    len: usize,
    page_size: usize,
    guard: Option<Guard>,
}

// SAFETY: the mapping is plain shared memory; all access goes through raw pointers whose users answer for ordering.
unsafe impl Send for Mapping {}
// SAFETY: as above; &Mapping gives out nothing but addresses.
unsafe impl Sync for Mapping {}

/// The page size behind a file: the huge page size on hugetlbfs, else the system's.
pub fn page_size_of(fd: BorrowedFd<'_>) -> usize {
    const HUGETLBFS_MAGIC: libc::__fsword_t = 0x958458f6;
    // SAFETY: fstatfs fills the zeroed struct for a valid descriptor; sysconf has no preconditions.
    unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(fd.as_raw_fd(), &mut stat) == 0 && stat.f_type == HUGETLBFS_MAGIC {
            return stat.f_bsize as usize;
        }
        libc::sysconf(libc::_SC_PAGESIZE) as usize
    }
}

impl Mapping {
    /// Map `len` bytes from `offset` of `fd`. The offset need not be page aligned.
    ///
    /// # Errors
    /// A range that is empty, wraps or ends behind the file; no free guard slot; what `mmap` says.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, MappingError> {
        let end =
            offset.checked_add(len).filter(|_| len > 0).ok_or(MappingError::BadRange { offset, len })?;
        let file_len = file_len(fd)?;
        if file_len < end {
            return Err(MappingError::FileTooShort { offset, len, file_len });
        }
        let page_size = page_size_of(fd);
        let lead = (offset % page_size as u64) as usize;
        let map_len = usize::try_from(len)
            .ok()
            .and_then(|len| len.checked_add(lead))
            .and_then(|len| len.checked_next_multiple_of(page_size))
            .ok_or(MappingError::BadRange { offset, len })?;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                (offset - lead as u64) as libc::off_t,
            )
        };
        let Some(base) = NonNull::new(address.cast::<u8>()).filter(|_| address != libc::MAP_FAILED) else {
            return Err(MappingError::last("mmap"));
        };
        let mut mapping = Self { base, map_len, lead, len: len as usize, page_size, guard: None };
        mapping.guard = Some(Guard::new(address as usize, map_len)?);
        // SAFETY: advice on our own mapping; guest and volume content has no place in a core dump.
        unsafe { libc::madvise(address, map_len, libc::MADV_DONTDUMP) };
        Ok(mapping)
    }

    /// The first byte asked for.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: lead is smaller than map_len.
        unsafe { self.base.as_ptr().add(self.lead) }
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes of the pages that back it.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Ask for transparent huge pages, where the administrator allows them for shared memory.
    pub fn prefer_huge_pages(&self) {
        // SAFETY: advice on our own mapping; where it is not taken, small pages do as well.
        unsafe { libc::madvise(self.base.as_ptr().cast(), self.map_len, libc::MADV_HUGEPAGE) };
    }

    /// True once the file was cut behind the mapping: what is read from then on is zeroes and what is written is lost.
    #[inline]
    pub fn poisoned(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::poisoned)
    }

    /// The NUMA nodes of `samples` pages spread over the mapping; none for a page that has no memory yet, or where the
    /// kernel does not say.
    pub fn nodes(&self, samples: usize) -> Vec<Option<u32>> {
        let step = (self.map_len / samples.max(1)).max(self.page_size);
        let pages: Vec<*mut libc::c_void> = (0..self.map_len)
            .step_by(step)
            .take(samples)
            .map(|at| self.base.as_ptr().wrapping_add(at).cast())
            .collect();
        let mut status = vec![-libc::ENOENT; pages.len()];
        // SAFETY: move_pages without target nodes only asks; both arrays are `pages.len()` long.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                pages.len(),
                pages.as_ptr(),
                std::ptr::null::<libc::c_int>(),
                status.as_mut_ptr(),
                0,
            )
        };
        status.iter().map(|node| u32::try_from(*node).ok().filter(|_| rc == 0)).collect()
    }

    /// Allocate the pages of a range now, so that touching them later cannot fail for want of space.
    ///
    /// # Errors
    /// What `MADV_POPULATE_WRITE` says: `EFAULT` or `ENOMEM` when the file system or the memory is full.
    pub fn populate(&self, offset: usize, len: usize) -> Result<(), MappingError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(MappingError::BadRange { offset: offset as u64, len: len as u64 });
        }
        let start = (self.lead + offset) / self.page_size * self.page_size;
        let end = (self.lead + offset + len).next_multiple_of(self.page_size).min(self.map_len);
        // SAFETY: the range lies inside our own mapping.
        let rc = unsafe {
            libc::madvise(self.base.as_ptr().add(start).cast(), end - start, libc::MADV_POPULATE_WRITE)
        };
        if rc != 0 {
            return Err(MappingError::last("MADV_POPULATE_WRITE"));
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First: another thread may map something at this address as soon as it is free, and its faults are not ours.
        self.guard = None;
        // SAFETY: we own the mapping and nothing points into it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.map_len) };
    }
}

/// Length in bytes.
fn file_len(fd: BorrowedFd<'_>) -> Result<u64, MappingError> {
    // SAFETY: fstat fills the zeroed struct for a valid descriptor.
    let stat = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(fd.as_raw_fd(), &mut stat) != 0 {
            return Err(MappingError::last("fstat"));
        }
        stat
    };
    Ok(stat.st_size.max(0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_range_behind_the_end_of_the_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        assert!(matches!(Mapping::new(file.as_fd(), 4096, 8192), Err(MappingError::FileTooShort { .. })));
        assert!(matches!(Mapping::new(file.as_fd(), 0, 0), Err(MappingError::BadRange { .. })));
        assert!(matches!(Mapping::new(file.as_fd(), u64::MAX, 2), Err(MappingError::BadRange { .. })));
    }

    #[test]
    fn an_offset_inside_a_page_points_at_that_byte() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.set_len(12288).unwrap();
        file.write_at(b"x", 5000).unwrap();
        let mapping = Mapping::new(file.as_fd(), 5000, 100).unwrap();
        // SAFETY: inside the mapping.
        assert_eq!(unsafe { mapping.as_ptr().read() }, b'x');
    }

    /// A frontend that truncates its memory file must not take the process down.
    #[test]
    fn truncation_poisons_the_mapping_and_nothing_else() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let other = tempfile::tempfile().unwrap();
        other.set_len(4096).unwrap();
        let mapping = Mapping::new(file.as_fd(), 0, 1 << 20).unwrap();
        let bystander = Mapping::new(other.as_fd(), 0, 4096).unwrap();
        // SAFETY: inside the mappings; the second access faults and is mended by the guard.
        unsafe {
            mapping.as_ptr().write_volatile(7);
            assert!(!mapping.poisoned());
            file.set_len(0).unwrap();
            assert_eq!(mapping.as_ptr().add(8192).read_volatile(), 0);
            mapping.as_ptr().add(8192).write_volatile(1);
            bystander.as_ptr().write_volatile(3);
        }
        assert!(mapping.poisoned());
        assert!(!bystander.poisoned());
        let mut count = 0u64;
        // SAFETY: reads eight bytes into a live local.
        let n = unsafe { libc::read(crate::guard::poison_event().as_raw_fd(), (&raw mut count).cast(), 8) };
        assert_eq!((n, count >= 1), (8, true));
    }
}

//! A volume in memory: a file on tmpfs or hugetlbfs, or an anonymous one, mapped and copied from and to.
//!
//! The file stays thin. A bit per chunk says whether the chunk has memory; a chunk without reads as zeroes and is never
//! touched, and gets its memory with one system call before its first write, so that a full file system is an I/O error
//! and not a SIGBUS. Concurrent discards and writes of one chunk may end either way, as on any disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::Mutex;

use ringstone_mapping::Mapping;

use crate::error::DriveError;
use crate::lock::lock;
use crate::presence::Presence;

/// Whether an anonymous volume uses huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Where enough of them are free.
    Auto,
    On,
    Off,
}

/// Bytes that get their memory together where pages are small: one system call for 16 first writes, a few microseconds.
const SMALL_CHUNK: usize = 64 << 10;

/// A drive in memory.
pub struct MappedDrive {
    file: File,
    path: Option<PathBuf>,
    page_size: usize,
    present: Presence,
    /// What reactors copy from and to. Growth replaces it; see [`Outgrown`].
    mapping: AtomicPtr<Mapping>,
    /// Held by whoever replaces the mapping, or looks at it from outside a reactor.
    growing: Mutex<()>,
}

/// What a drive has outgrown: a reactor may be using it until it has begun another turn. Whoever grew the drive keeps it until
/// all of them have.
#[must_use = "dropping it at once takes memory away under a reactor"]
pub struct Outgrown {
    _mapping: Box<Mapping>,
}

/// A range that is to be deallocated, as (offset, length) in bytes. The ends are shorter than a chunk each, which is 1 GiB
/// where pages are so large: too long for one turn of a reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    head: (u64, u64),
    tail: (u64, u64),
    /// Chunks that give their memory back.
    pub whole: Option<(u64, u64)>,
}

impl Discard {
    /// What is still to be zeroed without a gap after `done` bytes of the ends were; `None` when both are.
    pub fn ragged(&self, done: u64) -> Option<(u64, u64)> {
        let piece = |(offset, len): (u64, u64), done: u64| (done < len).then(|| (offset + done, len - done));
        piece(self.head, done).or_else(|| piece(self.tail, done - self.head.1))
    }
}

impl MappedDrive {
    /// Map the file at `path`, which must live on tmpfs or hugetlbfs to make sense.
    ///
    /// # Errors
    /// It cannot be opened, is shorter than `size`, or somebody else has it.
    pub fn open(path: &Path, size: u64, read_only: bool) -> Result<Self, DriveError> {
        let fail = |source| DriveError::Open { path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(fail)?;
        lock(&file, path, read_only)?;
        let have = file.metadata().map_err(fail)?.len();
        if have < size {
            return Err(DriveError::TooShort { path: path.to_owned(), have, want: size });
        }
        Self::from_file(file, Some(path.to_owned()), size)
    }

    /// The drive of a process that hands it over: its own open file, with the lock on it, and which chunks have memory
    /// (as [`presence`](Self::presence) says; `None`: the file is asked).
    ///
    /// # Errors
    /// It is shorter than `size` or cannot be mapped.
    pub fn adopt(
        file: File,
        path: Option<PathBuf>,
        size: u64,
        presence: Option<&[u8]>,
    ) -> Result<Self, DriveError> {
        let name = path.clone().unwrap_or_default();
        let have = file.metadata().map_err(|source| DriveError::Open { path: name.clone(), source })?.len();
        if have < size {
            return Err(DriveError::TooShort { path: name, have, want: size });
        }
        Self::over(file, path, size, presence)
    }

    /// Which chunks have memory, a bit each in little-endian words of 64, for a process that takes the drive over. Nobody
    /// may be writing meanwhile.
    pub fn presence(&self) -> Vec<u8> {
        let _still = self.growing.lock().unwrap_or_else(|e| e.into_inner());
        self.present.to_bytes(self.mapping().len() as u64)
    }

    /// Memory without a name: its content goes with the drive. Huge pages are taken at once, small ones when written.
    ///
    /// # Errors
    /// No memory, or no huge pages where they were demanded.
    pub fn anonymous(size: u64, huge: HugePages) -> Result<Self, DriveError> {
        if huge != HugePages::Off {
            match Self::memfd(size, libc::MFD_HUGETLB)
                .and_then(|drive| drive.populate_all(size).map(|()| drive))
            {
                Ok(drive) => return Ok(drive),
                Err(error) if huge == HugePages::On => {
                    let source = match error {
                        DriveError::NoMemory { source, .. } => source,
                        other => io::Error::other(other),
                    };
                    return Err(DriveError::NoHugePages { want: size, source });
                }
                // Auto: small pages will do.
                Err(_) => {}
            }
        }
        Self::memfd(size, 0)
    }

    fn memfd(size: u64, flags: libc::c_uint) -> Result<Self, DriveError> {
        let fail = |source| DriveError::NoMemory { want: size, source };
        // SAFETY: a plain system call with a NUL-terminated name; the result is checked before it becomes a File.
        let file = unsafe {
            let fd = libc::memfd_create(c"ringstone-volume".as_ptr(), flags | libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(fail(io::Error::last_os_error()));
            }
            File::from_raw_fd(fd)
        };
        let page = ringstone_mapping::page_size_of(file.as_fd()) as u64;
        file.set_len(size.next_multiple_of(page)).map_err(fail)?;
        Self::from_file(file, None, size).map_err(|error| fail(io::Error::other(error)))
    }

    fn from_file(file: File, path: Option<PathBuf>, size: u64) -> Result<Self, DriveError> {
        Self::over(file, path, size, None)
    }

    fn over(
        file: File,
        path: Option<PathBuf>,
        size: u64,
        presence: Option<&[u8]>,
    ) -> Result<Self, DriveError> {
        let mapping = Mapping::new(file.as_fd(), 0, size)?;
        mapping.prefer_huge_pages();
        let page_size = mapping.page_size();
        let chunk_shift = page_size.max(SMALL_CHUNK).trailing_zeros();
        let present =
            Presence::new(size, chunk_shift).map_err(|source| DriveError::NoMemory { want: size, source })?;
        if !presence.is_some_and(|bytes| present.take_over(size, bytes)) {
            find_data(&file, size, &present);
        }
        let mapping = AtomicPtr::new(Box::into_raw(Box::new(mapping)));
        Ok(Self { file, path, page_size, present, mapping, growing: Mutex::new(()) })
    }

    #[inline(always)]
    fn mapping(&self) -> &Mapping {
        // SAFETY: the pointer comes from a Box. A mapping that growth has replaced lives on in its `Outgrown` until every
        // reactor has begun another turn, and everybody else holds `growing`.
        unsafe { &*self.mapping.load(Ordering::Acquire) }
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Bytes of the file.
    pub(crate) fn len(&self) -> Result<u64, DriveError> {
        let fail = |source| DriveError::Open { path: self.path.clone().unwrap_or_default(), source };
        Ok(self.file.metadata().map_err(fail)?.len())
    }

    pub fn describe(&self) -> String {
        let page = self.page_size;
        let pages = if page > 4096 { format!("{} MiB pages", page >> 20) } else { "4 KiB pages".into() };
        match &self.path {
            Some(_) => format!("mapped file in memory, {pages}"),
            None => format!("anonymous memory, {pages}"),
        }
    }

    fn populate_all(&self, size: u64) -> Result<(), DriveError> {
        self.mapping()
            .populate(0, size as usize)
            .map_err(|error| DriveError::NoMemory { want: size, source: io::Error::other(error) })?;
        (0..size.div_ceil(self.chunk())).for_each(|chunk| self.present.set(chunk));
        Ok(())
    }

    /// Map `size` bytes; a file of somebody else's is that long already. Writers go on meanwhile: the bits of what has memory
    /// stay where they are, and both mappings show the same file.
    ///
    /// # Errors
    /// There is no memory, the file is shorter, or nobody thought of a drive of that size.
    pub(crate) fn grow(&self, size: u64) -> Result<Outgrown, DriveError> {
        let _one_at_a_time = self.growing.lock().unwrap_or_else(|e| e.into_inner());
        if size > self.present.room() {
            let source = io::Error::other(format!("open it anew to go beyond {} bytes", self.present.room()));
            return Err(DriveError::NoMemory { want: size, source });
        }
        if self.path.is_none() {
            self.file
                .set_len(size.next_multiple_of(self.page_size as u64))
                .map_err(|source| DriveError::NoMemory { want: size, source })?;
        }
        let mapping = Mapping::new(self.file.as_fd(), 0, size)?;
        mapping.prefer_huge_pages();
        // What was the last chunk had memory up to the old end.
        let last = (self.mapping().len() as u64 - 1) >> self.present.chunk_shift();
        if self.present.has(last) {
            self.populate(&mapping, last)?;
        }
        let before = self.mapping.swap(Box::into_raw(Box::new(mapping)), Ordering::AcqRel);
        // SAFETY: it came from a Box and is nowhere else any more.
        Ok(Outgrown { _mapping: unsafe { Box::from_raw(before) } })
    }

    fn chunk(&self) -> u64 {
        1 << self.present.chunk_shift()
    }

    /// Give chunk `index` its memory, as far as it is mapped.
    fn populate(&self, mapping: &Mapping, index: u64) -> Result<(), DriveError> {
        let start = (index << self.present.chunk_shift()) as usize;
        let len = (self.chunk() as usize).min(mapping.len() - start);
        mapping.populate(start, len)?;
        Ok(())
    }

    /// Copy `len` bytes at `offset` to `to`.
    ///
    /// # Errors
    /// The file was cut behind the mapping.
    ///
    /// # Safety
    /// `to` must be valid for `len` bytes of writes, and the range inside the drive.
    #[inline(always)]
    pub unsafe fn read(&self, offset: u64, to: *mut u8, len: usize) -> Result<(), DriveError> {
        let mapping = self.mapping();
        // SAFETY: the caller's promise.
        unsafe {
            self.each_chunk(mapping, offset, len, |from, at, n, present| {
                if present {
                    std::ptr::copy_nonoverlapping(from, to.add(at), n);
                } else {
                    std::ptr::write_bytes(to.add(at), 0, n);
                }
                Ok(())
            })
        }?;
        sound(mapping)
    }

    /// Copy `len` bytes from `from` to `offset`.
    ///
    /// # Errors
    /// There is no memory for the chunk, or the file was cut behind the mapping.
    ///
    /// # Safety
    /// `from` must be valid for `len` bytes of reads, and the range inside the drive.
    #[inline(always)]
    pub unsafe fn write(&self, offset: u64, from: *const u8, len: usize) -> Result<(), DriveError> {
        let mapping = self.mapping();
        // SAFETY: the caller's promise.
        unsafe {
            self.each_chunk(mapping, offset, len, |to, at, n, present| {
                if !present {
                    self.make_present(mapping, offset + at as u64)?;
                }
                std::ptr::copy_nonoverlapping(from.add(at), to, n);
                Ok(())
            })
        }?;
        sound(mapping)
    }

    /// Bring the first `LINES` cache lines of a range near; wrong offsets do no harm. The processor's own prefetcher takes
    /// over from there.
    #[inline(always)]
    pub fn prefetch<const LINES: usize>(&self, offset: u64) {
        #[cfg(target_arch = "x86_64")]
        {
            let first = self.mapping().as_ptr().wrapping_add(offset as usize);
            for line in 0..LINES {
                // SAFETY: a prefetch has no architectural effect, whatever the address.
                unsafe {
                    let at = first.wrapping_add(64 * line).cast();
                    core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(at);
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = offset;
    }

    /// What deallocating a range comes to: zeroes at its ragged ends, and the whole chunks between them.
    pub fn plan_discard(&self, offset: u64, len: u64) -> Discard {
        let chunk = self.chunk();
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(chunk), end / chunk * chunk);
        if first >= last {
            return Discard { head: (offset, len), tail: (end, 0), whole: None };
        }
        Discard {
            head: (offset, first - offset),
            tail: (last, end - last),
            whole: Some((first, last - first)),
        }
    }

    /// Forget the whole chunks of a discard: they read as zeroes from here on, and the caller submits a
    /// `FALLOC_FL_PUNCH_HOLE` for them.
    ///
    /// # Errors
    /// The file was cut behind the mapping.
    pub fn forget(&self, (offset, len): (u64, u64)) -> Result<(), DriveError> {
        let chunk = self.chunk();
        (offset / chunk..(offset + len) / chunk).for_each(|index| self.present.clear(index));
        sound(self.mapping())
    }

    /// Zero a range; chunks without memory are zero already.
    ///
    /// # Errors
    /// The file was cut behind the mapping.
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), DriveError> {
        let mapping = self.mapping();
        // SAFETY: the range was checked against the volume, which is no longer than the drive.
        unsafe {
            self.each_chunk(mapping, offset, len as usize, |to, _, n, present| {
                if present {
                    std::ptr::write_bytes(to, 0, n);
                }
                Ok(())
            })
        }?;
        sound(mapping)
    }

    /// Call `with(pointer, done so far, bytes, present)` for each piece of a range that lies in one chunk.
    ///
    /// # Safety
    /// The range must lie inside the drive.
    #[inline(always)]
    unsafe fn each_chunk(
        &self,
        mapping: &Mapping,
        offset: u64,
        len: usize,
        mut with: impl FnMut(*mut u8, usize, usize, bool) -> Result<(), DriveError>,
    ) -> Result<(), DriveError> {
        let shift = self.present.chunk_shift();
        let chunk = 1usize << shift;
        let mut done = 0;
        while done < len {
            let at = offset as usize + done;
            let n = (chunk - (at & (chunk - 1))).min(len - done);
            let present = self.present.has((at >> shift) as u64);
            // SAFETY: inside the drive, hence inside the mapping.
            let pointer = unsafe { mapping.as_ptr().add(at) };
            with(pointer, done, n, present)?;
            done += n;
        }
        Ok(())
    }

    /// Give the chunk at `offset` its memory.
    #[cold]
    fn make_present(&self, mapping: &Mapping, offset: u64) -> Result<(), DriveError> {
        let index = offset >> self.present.chunk_shift();
        self.populate(mapping, index)?;
        self.present.set(index);
        Ok(())
    }
}

impl Drop for MappedDrive {
    fn drop(&mut self) {
        // SAFETY: made by Box::into_raw, freed once, and nobody holds the drive any more.
        drop(unsafe { Box::from_raw(*self.mapping.get_mut()) });
    }
}

#[inline(always)]
fn sound(mapping: &Mapping) -> Result<(), DriveError> {
    if mapping.poisoned() {
        return Err(DriveError::Poisoned);
    }
    Ok(())
}

/// Mark the chunks that hold data from an earlier life of the file.
fn find_data(file: &File, size: u64, present: &Presence) {
    let shift = present.chunk_shift();
    let mut at = 0i64;
    loop {
        // SAFETY: plain system calls on a valid descriptor.
        let data = unsafe { libc::lseek(file.as_raw_fd(), at, libc::SEEK_DATA) };
        if data < 0 || data as u64 >= size {
            return;
        }
        // SAFETY: as above.
        let hole = unsafe { libc::lseek(file.as_raw_fd(), data, libc::SEEK_HOLE) };
        let end = if hole > data { (hole as u64).min(size) } else { size };
        (data as u64 >> shift..=(end - 1) >> shift).for_each(|chunk| present.set(chunk));
        at = end as i64;
    }
}

#[cfg(test)]
mod tests;

//! A regular file or block device driven by io_uring.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::DriveError;
use crate::lock::{lock, Lock};

/// Whether to go past the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direct {
    /// O_DIRECT where the file system takes it.
    Auto,
    On,
    Off,
}

/// An open file or block device and what it can do.
pub struct FileDrive {
    file: File,
    path: PathBuf,
    direct: bool,
    block_device: bool,
    /// Alignment of buffer addresses and of segment lengths that direct I/O needs; 1 without it.
    memory_align: u32,
    offset_align: u32,
    punch: bool,
    fuse: bool,
    /// Cleared by the first request that the file system refuses.
    zero_range: AtomicBool,
    lock: Lock,
}

impl FileDrive {
    /// Open `path` for a volume of `size` bytes and blocks of `block_size`.
    ///
    /// # Errors
    /// It is missing, of the wrong type, too short, or cannot do direct I/O with that block size.
    pub fn open(
        path: &Path,
        size: u64,
        block_size: u32,
        read_only: bool,
        direct: Direct,
    ) -> Result<Self, DriveError> {
        let fail = |source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) => DriveError::InUse { path: path.to_owned() },
            _ => DriveError::Open { path: path.to_owned(), source },
        };
        let kind = std::fs::metadata(path).map_err(fail)?.file_type();
        // The kernel lets one O_EXCL opener have a block device, and none while it is mounted.
        let exclusive = if kind.is_block_device() && !read_only { libc::O_EXCL } else { 0 };
        let open = |flags| {
            // O_NONBLOCK: opening a FIFO by mistake must not hang. It goes once the file is open.
            OpenOptions::new()
                .read(true)
                .write(!read_only)
                .custom_flags(flags | exclusive | libc::O_CLOEXEC | libc::O_NONBLOCK)
                .open(path)
        };
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DriveError::WrongType { path: path.to_owned() });
        }
        let (file, direct) = match direct {
            Direct::Off => (open(0).map_err(fail)?, false),
            Direct::On => (
                open(libc::O_DIRECT)
                    .map_err(|source| DriveError::NoDirect { path: path.to_owned(), source })?,
                true,
            ),
            Direct::Auto => match open(libc::O_DIRECT) {
                Ok(file) => (file, true),
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (open(0).map_err(fail)?, false),
                Err(e) => return Err(fail(e)),
            },
        };
        Self::over(file, path, size, block_size, read_only, direct)
    }

    /// One that is only looked at, whoever has it open.
    ///
    /// # Errors
    /// It is missing or of the wrong type.
    pub fn look(path: &Path) -> Result<Self, DriveError> {
        let fail = |source| DriveError::Open { path: path.to_owned(), source };
        let kind = std::fs::metadata(path).map_err(fail)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DriveError::WrongType { path: path.to_owned() });
        }
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(fail)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            direct: false,
            block_device: kind.is_block_device(),
            memory_align: 1,
            offset_align: 1,
            punch: false,
            fuse: true,
            zero_range: AtomicBool::new(false),
            lock: Lock::Unavailable,
        })
    }

    /// The drive of a process that hands it over: its own open file, with the lock or the claim on it.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn adopt(
        file: File,
        path: &Path,
        size: u64,
        block_size: u32,
        read_only: bool,
    ) -> Result<Self, DriveError> {
        // SAFETY: a plain system call on a descriptor that we own.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        let direct = flags >= 0 && flags & libc::O_DIRECT != 0;
        Self::over(file, path, size, block_size, read_only, direct)
    }

    fn over(
        file: File,
        path: &Path,
        size: u64,
        block_size: u32,
        read_only: bool,
        direct: bool,
    ) -> Result<Self, DriveError> {
        let open = |source| DriveError::Open { path: path.to_owned(), source };
        let kind = file.metadata().map_err(open)?;
        block(&file).map_err(open)?;
        let block_device = kind.file_type().is_block_device();
        let (memory_align, offset_align) = if direct { alignment(&file, block_device) } else { (1, 1) };
        if offset_align > block_size {
            return Err(DriveError::BlockSize { path: path.to_owned(), needed: offset_align, block_size });
        }
        let mut drive = Self {
            fuse: is_fuse(&file),
            file,
            path: path.to_owned(),
            direct,
            block_device,
            memory_align,
            offset_align,
            punch: false,
            zero_range: AtomicBool::new(true),
            lock: Lock::Unavailable,
        };
        drive.lock = lock(&drive.file, path, read_only)?;
        drive.check_len(size)?;
        drive.punch = !read_only && drive.probe_punch();
        Ok(drive)
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A buffer can go to the drive in place.
    #[inline(always)]
    pub fn takes(&self, ptr: *const u8, len: usize) -> bool {
        (ptr as usize & (self.memory_align as usize - 1)) | (len & (self.offset_align as usize - 1)) == 0
    }

    pub fn can_punch(&self) -> bool {
        self.punch
    }

    /// A write with RWF_DSYNC is durable when it is done; otherwise it takes a sync.
    #[inline(always)]
    pub fn honours_dsync(&self) -> bool {
        !self.fuse
    }

    /// Whoever asks for a read or write is kept until that is done, unless it is asked to be done by another thread: the
    /// kernel takes files of FUSE for some that do not keep it waiting, and waits for direct I/O (seen with Linux 6.18).
    #[inline(always)]
    pub fn keeps_waiting(&self) -> bool {
        self.fuse
    }

    /// Ranges can be zeroed and stay allocated.
    pub fn can_zero_range(&self) -> bool {
        self.zero_range.load(Ordering::Relaxed)
    }

    /// The file system does not know FALLOC_FL_ZERO_RANGE.
    pub fn zero_range_refused(&self) {
        self.zero_range.store(false, Ordering::Relaxed);
    }

    pub fn describe(&self) -> String {
        let kind = if self.block_device { "block device" } else { "file" };
        let mode = if self.direct { "O_DIRECT" } else { "through the page cache" };
        let lock = match self.lock {
            Lock::Held => "",
            Lock::Unavailable => ", not locked as its file system has no locks",
        };
        format!("{kind}, io_uring, {mode}{lock}")
    }

    pub(crate) fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    pub(crate) fn as_file(&self) -> &File {
        &self.file
    }

    /// What offsets and lengths must be multiples of.
    pub fn offset_align(&self) -> u32 {
        self.offset_align
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file or device.
    pub fn length(&self) -> Result<u64, DriveError> {
        let fail = |source| DriveError::Open { path: self.path.clone(), source };
        // The end of a block device is found by seeking; the offset is not used by anybody else.
        (&self.file).seek(SeekFrom::End(0)).map_err(fail)
    }

    fn check_len(&self, want: u64) -> Result<(), DriveError> {
        let have = self.length()?;
        if have < want {
            return Err(DriveError::TooShort { path: self.path.clone(), have, want });
        }
        Ok(())
    }

    /// Ask the file system whether it can punch holes, on a range behind the end of the file where nothing is harmed.
    fn probe_punch(&self) -> bool {
        if self.block_device {
            // The kernel zeroes by itself where the drive cannot; a refusal is dealt with request by request.
            return true;
        }
        let end = self.file.metadata().map_or(0, |m| m.size()).next_multiple_of(1 << 20);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: a plain system call on our descriptor; KEEP_SIZE and a range behind the end leave the content alone.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, end as libc::off_t, 4096) == 0 }
    }
}

/// From here on I/O on the file is done, however long that takes. Without O_NONBLOCK io_uring hands to a thread what a device or
/// filesystem cannot do at once, such as a device mapper's target that knows no REQ_NOWAIT; with it, it answers EAGAIN for ever.
fn block(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: plain system calls on a descriptor that we own.
    let done = unsafe {
        match libc::fcntl(fd, libc::F_GETFL) {
            -1 => -1,
            flags => libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK),
        }
    };
    match done {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// True for a file of a FUSE filesystem. Where that has its files opened for direct I/O, as virtiofsd and others may, the
/// kernel passes a write on without the sync that RWF_DSYNC asks for (seen with Linux 6.18).
fn is_fuse(file: &File) -> bool {
    const FUSE: libc::__fsword_t = 0x6573_5546;
    // SAFETY: fstatfs fills the zeroed struct for a valid descriptor.
    unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        libc::fstatfs(file.as_raw_fd(), &mut stat) == 0 && stat.f_type == FUSE
    }
}

/// Memory and offset alignment of direct I/O: statx tells since Linux 6.1, else the logical block size.
fn alignment(file: &File, block_device: bool) -> (u32, u32) {
    // SAFETY: statx fills the zeroed struct for a valid descriptor and an empty path.
    let (rc, stat) = unsafe {
        let mut stat: libc::statx = std::mem::zeroed();
        let rc =
            libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &mut stat);
        (rc, stat)
    };
    if rc == 0
        && stat.stx_mask & libc::STATX_DIOALIGN != 0
        && stat.stx_dio_offset_align.is_power_of_two()
        && stat.stx_dio_mem_align.is_power_of_two()
    {
        return (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    }
    if block_device {
        let mut size: libc::c_int = 0;
        const BLKSSZGET: libc::c_ulong = 0x1268;
        // SAFETY: BLKSSZGET writes one int.
        if unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut size) } == 0 && size >= 512 {
            return (size as u32, size as u32);
        }
    }
    (512, 512)
}

/// True if a path lies on a file system that lives in memory (tmpfs, hugetlbfs), where mapping beats any I/O.
pub fn lives_in_memory(path: &Path) -> io::Result<bool> {
    const TMPFS: libc::__fsword_t = 0x0102_1994;
    const HUGETLBFS: libc::__fsword_t = 0x9584_58f6;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    // SAFETY: fstatfs fills the zeroed struct for a valid descriptor.
    unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(file.as_raw_fd(), &mut stat) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(matches!(stat.f_type, TMPFS | HUGETLBFS) && file.metadata()?.is_file())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_a_short_and_a_wrong_file_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| FileDrive::open(path, 1 << 20, 512, false, Direct::Auto).err().unwrap();
        assert!(matches!(open(&dir.path().join("missing")), DriveError::Open { .. }));
        assert!(matches!(open(dir.path()), DriveError::WrongType { .. }));
        let short = dir.path().join("short");
        std::fs::write(&short, [0u8; 512]).unwrap();
        assert!(matches!(open(&short), DriveError::TooShort { have: 512, .. }));
    }

    #[test]
    fn a_file_has_one_writer_or_many_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0u8; 1 << 20]).unwrap();
        let open = |read_only| FileDrive::open(&path, 1 << 20, 4096, read_only, Direct::Off);
        let writer = open(false).unwrap();
        assert!(matches!(open(false), Err(DriveError::InUse { .. })));
        assert!(matches!(open(true), Err(DriveError::InUse { .. })));
        drop(writer);
        let _readers = (open(true).unwrap(), open(true).unwrap());
        assert!(matches!(open(false), Err(DriveError::InUse { .. })));
    }

    /// With it io_uring answers EAGAIN for ever where a device cannot be asked without waiting: a store on a target of the device
    /// mapper had its reactor ask again and again.
    #[test]
    fn an_open_drive_is_not_non_blocking() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let drive = FileDrive::open(file.path(), 0, 512, false, Direct::Auto).unwrap();
        // SAFETY: a plain system call on a descriptor that the drive has open.
        let flags = unsafe { libc::fcntl(drive.fd(), libc::F_GETFL) };
        assert_eq!(flags & libc::O_NONBLOCK, 0);
        assert_eq!(flags & libc::O_DIRECT != 0, drive.direct);
    }

    #[test]
    fn opening_leaves_the_content_the_length_and_the_allocation_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7u8; 1 << 20]).unwrap();
        let blocks = std::fs::metadata(&path).unwrap().blocks();
        let drive = FileDrive::open(&path, 1 << 20, 4096, false, Direct::Auto).unwrap();
        drop(drive);
        assert_eq!(std::fs::metadata(&path).unwrap().blocks(), blocks);
        assert_eq!(std::fs::read(&path).unwrap(), vec![7u8; 1 << 20]);
    }
}

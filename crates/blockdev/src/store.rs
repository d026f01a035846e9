//! A volume of a store: a map that says where its blocks are, and the keeper that is asked for all else.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use ringstone_rbd::Completions;
use ringstone_store::{Answer, Block, Command, Map, Medium, Run, Shared, StoreError, Sums, BLOCK};

use crate::backing::Backing;
use crate::error::DriveError;
use crate::file::FileDrive;

/// The control side's way to a keeper, wherever that runs.
pub trait StoreDoor: Send + Sync {
    /// Have a command carried out, and wait for that.
    ///
    /// # Errors
    /// What the keeper says, or that it is gone.
    fn call(&self, command: Command) -> Result<Answer, StoreError>;

    /// Have a command carried out, and wait for nothing.
    fn post(&self, command: Command);
}

/// See the module.
pub struct StoreVolume {
    drive: Arc<FileDrive>,
    inbox: Arc<Completions>,
    door: Arc<dyn StoreDoor>,
    name: String,
    /// The keeper's name for it while it is open.
    id: u32,
    map: Arc<Map>,
    /// Of a volume whose blocks have checksums.
    sums: Option<Arc<Sums>>,
    shared: Arc<Shared>,
}

/// A store that is open, as its volumes need it.
#[derive(Clone)]
pub struct StoreParts {
    pub drive: Arc<FileDrive>,
    /// Requests for the keeper.
    pub inbox: Arc<Completions>,
    pub door: Arc<dyn StoreDoor>,
    pub shared: Arc<Shared>,
}

impl StoreVolume {
    /// Open volume `name` for `size` bytes and blocks of `block_size`.
    ///
    /// # Errors
    /// There is none, it is smaller, or the drive's blocks are larger.
    pub fn open(parts: &StoreParts, name: &str, size: u64, block_size: u32) -> Result<Self, DriveError> {
        let needed = parts.drive.offset_align();
        if needed > block_size {
            return Err(DriveError::BlockSize { path: parts.drive.path().to_owned(), needed, block_size });
        }
        let Answer::Opened { volume, map, size: have, seal, sums } =
            parts.door.call(Command::Open { name: name.into(), cipher: None })?
        else {
            return Err(StoreError::Closed.into());
        };
        let StoreParts { drive, inbox, door, shared } = parts.clone();
        let this = Self { drive, inbox, door, name: name.into(), id: volume, map, sums, shared };
        if !seal.key.is_empty() {
            return Err(StoreError::NoKey(name.into()).into());
        }
        match have < size {
            true => Err(DriveError::TooShort { path: this.place(), have, want: size }),
            false => Ok(this),
        }
    }

    pub fn drive(&self) -> &FileDrive {
        &self.drive
    }

    pub fn inbox(&self) -> &Arc<Completions> {
        &self.inbox
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    /// What blocks that were read have to be; all writes go by way of the keeper then.
    #[inline(always)]
    pub fn sums(&self) -> Option<&Sums> {
        self.sums.as_deref()
    }

    /// What is to be prefetched before byte `offset` is looked for; null for nothing. Any offset may be asked.
    #[inline(always)]
    pub fn word_at(&self, offset: u64) -> *const u8 {
        self.map.word_at(offset)
    }

    /// Where the bytes from `offset` on are, up to `len` of them.
    #[inline(always)]
    pub fn read(&self, offset: u64, len: u64) -> Run {
        self.map.read(offset, len)
    }

    /// Where they can be written in place.
    #[inline(always)]
    pub fn write(&self, offset: u64, len: u64) -> Option<Run> {
        self.map.write(offset, len)
    }

    /// Making the drive durable is not enough: the keeper has to say that it was.
    #[inline(always)]
    pub fn flush_is_the_keepers(&self) -> bool {
        // Acquire: who was answered for a change sees that there is one.
        self.shared.unmarked.load(Ordering::Acquire)
    }
}

impl Drop for StoreVolume {
    fn drop(&mut self) {
        self.door.post(Command::Close { volume: self.id });
    }
}

impl Backing for StoreVolume {
    fn kind(&self) -> &'static str {
        "store"
    }

    /// The store's catalog knows how large the volume is, and gets to know before the volume grows.
    fn capacity(&self) -> Result<u64, DriveError> {
        Ok(i64::MAX as u64)
    }

    fn sync(&self) -> io::Result<()> {
        self.door.call(Command::Flush).map(drop).map_err(io::Error::other)
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn place(&self) -> PathBuf {
        self.drive.path().join(&self.name)
    }

    fn describe(&self) -> String {
        format!("store on a {}", self.drive.describe())
    }
}

/// The bytes of blocks.
fn bytes(blocks: &[Block]) -> &[u8] {
    // SAFETY: a block is 4096 plain bytes, and the slice is borrowed for as long.
    unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast(), blocks.len() * BLOCK as usize) }
}

/// As [`bytes`], to be written.
fn bytes_mut(blocks: &mut [Block]) -> &mut [u8] {
    // SAFETY: as above; any bytes are a block.
    unsafe { std::slice::from_raw_parts_mut(blocks.as_mut_ptr().cast(), blocks.len() * BLOCK as usize) }
}

impl Medium for FileDrive {
    fn size(&self) -> io::Result<u64> {
        self.length().map_err(io::Error::other)
    }

    fn read(&self, offset: u64, into: &mut [Block]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self.as_file(), bytes_mut(into), offset)
    }

    fn write(&self, offset: u64, from: &[Block]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self.as_file(), bytes(from), offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.sync_data()
    }
}

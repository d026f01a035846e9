//! A volume of a store: a map that says where its blocks are, and the keeper that is asked for all else.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use ringstone_cipher::{CipherError, PoolKey, VolumeKey, Xts};
use ringstone_rbd::Completions;
use ringstone_store::{Answer, Block, Command, Map, Medium, Run, Seal, Shared, StoreError, Sums, BLOCK};

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
    /// Of a volume whose blocks are encrypted.
    cipher: Option<Arc<Xts>>,
    shared: Arc<Shared>,
}

/// What an encrypted volume is opened with.
pub enum Key {
    /// There is none, and the volume must not need one.
    None,
    /// The key that wrapped the volume's, which is beside the volume.
    Pool(PoolKey),
    /// The volume's own, from a process that had it open.
    Volume(VolumeKey),
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

impl StoreParts {
    /// The key of volume `name` as it is wrapped; empty if its blocks are not encrypted.
    fn wrapped_key(&self, name: &str) -> Result<Vec<u8>, DriveError> {
        let Answer::Volumes(found) = self.door.call(Command::List { name: Some(name.into()) })? else {
            return Err(StoreError::Closed.into());
        };
        let volume = found.into_iter().next().ok_or_else(|| StoreError::NoVolume(name.into()))?;
        Ok(volume.key)
    }
}

/// What the blocks of volume `name` are encrypted with; None if they are not.
fn cipher_of(name: &str, wrapped: &[u8], key: &Key) -> Result<Option<Arc<Xts>>, DriveError> {
    let wrong = |source| DriveError::Key { volume: name.into(), source };
    let key = match key {
        _ if wrapped.is_empty() => return Ok(None),
        Key::None => return Err(StoreError::NoKey(name.into()).into()),
        Key::Pool(pool) => pool.unwrap(wrapped).map_err(wrong)?,
        Key::Volume(key) => key.clone(),
    };
    Ok(Some(Arc::new(Xts::new(key).map_err(wrong)?)))
}

/// The seal of a new volume.
///
/// # Errors
/// OpenSSL fails.
pub fn new_seal(integrity: bool, key: Option<&PoolKey>) -> Result<Seal, DriveError> {
    let key = key.map(|pool| pool.wrap(&VolumeKey::draw()?)).transpose()?;
    Ok(Seal { integrity, key: key.unwrap_or_default() })
}

/// Have `to` wrap the keys of all volumes that it has not wrapped. Returns how many were wrapped anew. It may be done again after
/// it was interrupted.
///
/// # Errors
/// None of `from` has wrapped a volume's key, or the store fails; some volumes may have the new one then.
pub fn wrap_anew(door: &dyn StoreDoor, from: &[PoolKey], to: &PoolKey) -> Result<usize, DriveError> {
    let mut count = 0;
    loop {
        let Answer::Volumes(mut volumes) = door.call(Command::List { name: None })? else {
            return Err(StoreError::Closed.into());
        };
        volumes.retain(|volume| !volume.key.is_empty() && !to.has_wrapped(&volume.key));
        // All are looked at before one is changed.
        let keys = volumes.iter().map(|volume| wrapped_anew(&volume.name, &volume.key, from, to));
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() {
            return Ok(count);
        }
        for (volume, key) in volumes.into_iter().zip(keys) {
            match door.call(Command::SetKey { volume: volume.name, from: volume.key, key }) {
                Ok(_) => count += 1,
                Err(StoreError::NoVolume(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Clones may have been made of those that had the old one.
    }
}

fn wrapped_anew(volume: &str, key: &[u8], from: &[PoolKey], to: &PoolKey) -> Result<Vec<u8>, DriveError> {
    let wrong = |source| DriveError::Key { volume: volume.into(), source };
    let pool = from.iter().find(|pool| pool.has_wrapped(key)).ok_or(wrong(CipherError::WrongKey))?;
    pool.unwrap(key).and_then(|key| to.wrap(&key)).map_err(wrong)
}

impl StoreVolume {
    /// Open volume `name` for `size` bytes and blocks of `block_size`.
    ///
    /// # Errors
    /// There is none, it is smaller, the drive's blocks are larger, or `key` is not what it needs.
    pub fn open(
        parts: &StoreParts,
        name: &str,
        size: u64,
        block_size: u32,
        key: &Key,
    ) -> Result<Self, DriveError> {
        let needed = parts.drive.offset_align();
        if needed > block_size {
            return Err(DriveError::BlockSize { path: parts.drive.path().to_owned(), needed, block_size });
        }
        let wrapped = parts.wrapped_key(name)?;
        let cipher = cipher_of(name, &wrapped, key)?;
        let for_keeper = cipher.clone().map(|cipher| cipher as Arc<dyn ringstone_store::Cipher>);
        let Answer::Opened { volume, map, size: have, seal, sums } =
            parts.door.call(Command::Open { name: name.into(), cipher: for_keeper })?
        else {
            return Err(StoreError::Closed.into());
        };
        let StoreParts { drive, inbox, door, shared } = parts.clone();
        let this = Self { drive, inbox, door, name: name.into(), id: volume, map, sums, cipher, shared };
        // Somebody may have made another volume of this name meanwhile, to which the cipher must do nothing.
        if seal.key != wrapped {
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

    /// How blocks are encrypted.
    #[inline(always)]
    pub fn cipher(&self) -> Option<&Xts> {
        self.cipher.as_deref()
    }

    /// Blocks are not on the drive as the guest sees them, or have to be checked.
    #[inline(always)]
    pub fn is_sealed(&self) -> bool {
        self.sums.is_some() || self.cipher.is_some()
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

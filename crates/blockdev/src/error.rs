use std::io;
use std::path::PathBuf;

use ringstone_cipher::CipherError;
use ringstone_mapping::MappingError;
use ringstone_rbd::RbdError;
use ringstone_store::StoreError;

/// Why a drive could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    #[error("cannot open {path}: {source}; check that it exists and that you may read and write it")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is in use by another process (or mounted); stop that first")]
    InUse { path: PathBuf },
    #[error("cannot lock {path}: {source}; mend the file system's locks (on NFS its lock service), as without one two could write to it")]
    Lock { path: PathBuf, source: io::Error },
    #[error("{path} is neither a regular file nor a block device; give one of these")]
    WrongType { path: PathBuf },
    #[error("{path} holds {have} bytes but the volume has {want}; make it longer first")]
    TooShort { path: PathBuf, have: u64, want: u64 },
    #[error("{path} needs blocks of {needed} bytes but the volume has {block_size}; make the volume with a block size of {needed}, or open it with direct I/O off")]
    BlockSize { path: PathBuf, needed: u32, block_size: u32 },
    #[error("{path} does not take direct I/O: {source}; open it with direct I/O set to auto or off")]
    NoDirect { path: PathBuf, source: io::Error },
    #[error("there are not enough free huge pages for {want} bytes ({source}); raise vm.nr_hugepages or set hugepages to auto")]
    NoHugePages { want: u64, source: io::Error },
    #[error(
        "cannot get {want} bytes of memory for the volume: {source}; free memory or make the volume smaller"
    )]
    NoMemory { want: u64, source: io::Error },
    #[error(transparent)]
    Mapping(#[from] MappingError),
    #[error(transparent)]
    Rbd(#[from] RbdError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("volume {volume:?} is encrypted, and {source}")]
    Key { volume: String, source: CipherError },
    #[error(transparent)]
    Cipher(#[from] CipherError),
    #[error("the file behind the volume was cut while it was in use")]
    Poisoned,
}

//! Errors of the store.

use thiserror::Error;

/// What may go wrong with a store as a whole, or with what is asked of it.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The drive cannot be read or written.
    #[error("the drive cannot be {what} at byte {offset}: {source}")]
    Drive { what: &'static str, offset: u64, source: std::io::Error },
    /// There is no superblock of ours.
    #[error("there is no store here: neither place of the superblock holds one. Check the path, or make one with `ringstone pool create --type store`")]
    NoStore,
    /// Made by another release.
    #[error(
        "the store has format {version}, and this release knows format {known}; use the release that made it"
    )]
    Version { version: u32, known: u32 },
    /// The drive has become shorter.
    #[error("the store takes {needed} bytes of its drive, which has {have}; give it back its length")]
    Truncated { needed: u64, have: u64 },
    /// What must be there is not, or is not what was written.
    #[error("the store is damaged: {what} at byte {offset}. Look with `ringstone store check`; restore from a backup or a replica what it names")]
    Damaged { what: String, offset: u64 },
    /// Too small, or extents of an impossible size.
    #[error("a store cannot be made like this: {0}")]
    Impossible(String),
    /// No place is left.
    #[error("the store is full: {free} bytes are free. Delete volumes or snapshots, or grow the drive")]
    Full { free: u64 },
    /// The catalog's area is full.
    #[error("the store has no room for the description of more volumes and snapshots; delete some")]
    CatalogFull,
    #[error("the store has no volume {0:?}")]
    NoVolume(String),
    #[error("the store has a volume {0:?} already")]
    VolumeExists(String),
    #[error("volume {volume:?} has no snapshot {snapshot:?}")]
    NoSnapshot { volume: String, snapshot: String },
    #[error("volume {volume:?} has a snapshot {snapshot:?} already")]
    SnapshotExists { volume: String, snapshot: String },
    #[error(
        "snapshot {snapshot:?} of volume {volume:?} has given up blocks already, so its deletion goes on"
    )]
    Deleted { volume: String, snapshot: String },
    /// Something still stands on it.
    #[error("snapshot {snapshot:?} of volume {volume:?} has clones: {clones}. Flatten or delete them first")]
    HasClones { volume: String, snapshot: String, clones: String },
    #[error("volume {volume:?} has snapshots: {snapshots}. Delete them first")]
    HasSnapshots { volume: String, snapshots: String },
    #[error("volume {0:?} is in use; detach it first")]
    InUse(String),
    #[error("volume {0:?} is encrypted, and it was opened without its key")]
    NoKey(String),
    #[error("volume {volume:?} is being {what}; try again when that has ended")]
    Busy { volume: String, what: &'static str },
    #[error(
        "requests of volume {0:?} did not end within 10 s, so no snapshot was made; see what its drive does"
    )]
    Slow(String),
    #[error("volume {0:?} was not cloned, so there is nothing to copy")]
    NoParent(String),
    #[error("a name has 1 to {most} bytes, not {len}")]
    Name { len: usize, most: usize },
    #[error("a volume cannot shrink from {now} to {size} bytes")]
    Shrink { now: u64, size: u64 },
    #[error("a volume has 1 to {most} bytes here, not {size}")]
    Size { size: u64, most: u64 },
    /// The journal cannot be written: nothing changes in maps any more.
    #[error(
        "the store's journal could not be written ({0}), so it takes no changes until it is opened again"
    )]
    Failed(std::io::Error),
    #[error(
        "the store is still the process's that hands it over, or could not be taken from it; open it again"
    )]
    NotPossessed,
    #[error("the store is being closed")]
    Closed,
}

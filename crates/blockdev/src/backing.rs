//! What every pool type does for a volume as a whole: one small interface, of the control side alone. A type's constructor
//! opens one, for an owner's epoch where hosts share it, and dropping it closes it.
//!
//! What a type does with requests is the reactor's `Carrier`, which is chosen by a match; the two are all that a new type
//! of pool writes in the engine.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use ringstone_rbd::Image;

use crate::error::DriveError;
use crate::file::FileDrive;
use crate::mapped::{MappedDrive, Outgrown};

/// A volume's drive as the control side sees it.
pub trait Backing {
    /// As descriptions and reports name the type.
    fn kind(&self) -> &'static str;

    /// Bytes that a volume on it may have.
    ///
    /// # Errors
    /// It cannot be asked.
    fn capacity(&self) -> Result<u64, DriveError>;

    /// Whoever manages the pool has made it longer: go on with `size` bytes. What comes back is to be kept until every reactor
    /// has begun another turn.
    ///
    /// # Errors
    /// It is shorter than that.
    fn resize(&self, size: u64) -> Result<Option<Outgrown>, DriveError> {
        let have = self.capacity()?;
        if have < size {
            return Err(DriveError::TooShort { path: self.place(), have, want: size });
        }
        Ok(None)
    }

    /// Make durable all that was completed. It may take as long as the medium likes.
    ///
    /// # Errors
    /// What the medium says: what was written may be lost.
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    /// Ranges can be deallocated and read as zeroes afterwards.
    fn can_discard(&self) -> bool;

    /// The open file under it, if it has one.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What storage across hosts knows this client by.
    fn client(&self) -> Option<&str> {
        None
    }

    /// Where it is, as a person would write it.
    fn place(&self) -> PathBuf;

    /// One line for a person.
    fn describe(&self) -> String;
}

impl Backing for MappedDrive {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn capacity(&self) -> Result<u64, DriveError> {
        self.len()
    }

    fn resize(&self, size: u64) -> Result<Option<Outgrown>, DriveError> {
        self.grow(size).map(Some)
    }

    fn place(&self) -> PathBuf {
        self.path().map(Path::to_owned).unwrap_or_default()
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(Self::file(self))
    }

    fn describe(&self) -> String {
        Self::describe(self)
    }
}

impl Backing for FileDrive {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn capacity(&self) -> Result<u64, DriveError> {
        self.length()
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn can_discard(&self) -> bool {
        self.can_punch()
    }

    fn place(&self) -> PathBuf {
        self.path().to_owned()
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(Self::file(self))
    }

    fn describe(&self) -> String {
        Self::describe(self)
    }
}

impl Backing for Image {
    fn kind(&self) -> &'static str {
        "rbd"
    }

    fn capacity(&self) -> Result<u64, DriveError> {
        Ok(self.size()?)
    }

    fn place(&self) -> PathBuf {
        Path::new(self.pool()).join(self.name())
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn client(&self) -> Option<&str> {
        Some(Self::client(self))
    }

    fn describe(&self) -> String {
        format!("librbd, {}/{} as {}", self.pool(), self.name(), Self::client(self))
    }
}

/// What is under a volume of a `null` pool.
pub(crate) struct Nothing;

impl Backing for Nothing {
    fn kind(&self) -> &'static str {
        "null"
    }

    fn capacity(&self) -> Result<u64, DriveError> {
        Ok(u64::MAX)
    }

    fn place(&self) -> PathBuf {
        PathBuf::new()
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn describe(&self) -> String {
        "reads and writes do nothing".into()
    }
}

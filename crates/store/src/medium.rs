//! The drive, for what is done before and after requests are served: making, opening and checking a store.

use std::io;

use crate::error::StoreError;
use crate::format::{zeroed, Block};
use crate::io::{Action, Data, Io};

/// Reads and writes that wait. Offsets and lengths are multiples of 4096.
pub trait Medium {
    /// Bytes.
    ///
    /// # Errors
    /// It cannot be asked.
    fn size(&self) -> io::Result<u64>;

    /// # Errors
    /// It cannot be read there.
    fn read(&self, offset: u64, into: &mut [Block]) -> io::Result<()>;

    /// # Errors
    /// It cannot be written there.
    fn write(&self, offset: u64, from: &[Block]) -> io::Result<()>;

    /// Make all that was written durable.
    ///
    /// # Errors
    /// It cannot be.
    fn flush(&self) -> io::Result<()>;
}

pub(crate) fn read(medium: &dyn Medium, offset: u64, blocks: usize) -> Result<Box<[Block]>, StoreError> {
    let mut into = zeroed(blocks);
    read_into(medium, offset, &mut into)?;
    Ok(into)
}

pub(crate) fn read_into(medium: &dyn Medium, offset: u64, into: &mut [Block]) -> Result<(), StoreError> {
    medium.read(offset, into).map_err(|source| StoreError::Drive { what: "read", offset, source })
}

pub(crate) fn write(medium: &dyn Medium, offset: u64, from: &[Block]) -> Result<(), StoreError> {
    medium.write(offset, from).map_err(|source| StoreError::Drive { what: "written", offset, source })
}

pub(crate) fn flush(medium: &dyn Medium) -> Result<(), StoreError> {
    medium.flush().map_err(|source| StoreError::Drive { what: "flushed", offset: 0, source })
}

/// Do what a keeper wants while it serves nobody.
pub(crate) fn carry_out(medium: &dyn Medium, io: &mut Io) -> io::Result<()> {
    match (io.action, &mut io.data) {
        (Action::Read, Data::Own(buffer)) => medium.read(io.offset, buffer),
        (Action::Write { durable }, Data::Own(buffer)) => {
            medium.write(io.offset, buffer)?;
            if durable {
                medium.flush()
            } else {
                Ok(())
            }
        }
        (Action::Flush, _) => medium.flush(),
        _ => Err(io::Error::other("a guest's request, and there are no guests")),
    }
}

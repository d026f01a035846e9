//! What is on the drive, to the byte: docs/formats/store.md. All numbers are little-endian.

mod bytes;
mod journal;
mod page;
mod superblock;

pub use bytes::{zeroed, Block, Reader, Writer};
pub use journal::{JournalBlock, JournalHead, Record, RECORDS_LEN};
pub use page::{Entry, Kind, Page};
pub use superblock::Superblock;

//! What is on the drive, to the byte: docs/formats/store.md. All numbers are little-endian.

mod bytes;
mod journal;
mod page;
mod sums;
mod superblock;
#[cfg(test)]
mod vectors;

pub use bytes::{zeroed, Block, Reader, Writer};
pub use journal::{JournalBlock, JournalHead, Record, SlotSums, RECORDS_LEN, SLOT_RECORD_LEN};
pub use page::{Entry, Kind, Page, SumPages};
pub use sums::SumsPage;
pub use superblock::Superblock;

/// Generations, incarnations and numbers of the journal go up to here, so that no sum of a few overflows. At a million a second
/// they last for 146,000 years; a block that has a higher one is not ours.
pub const MOST_NUMBER: u64 = 1 << 62;

//! The checksum of each block that a volume with integrity has: CRC-32C of the 4096 bytes as they are on the drive.
//!
//! Four bytes a block are kept in memory, for a page of 1008 blocks at a time where any of them has one: 1 GiB for each TiB. Every
//! reactor reads; the keeper alone changes.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::OnceLock;

use crate::format::Block;
use crate::geometry::{Extents, Zone, BLOCK, ENTRIES_PER_PAGE, MOST_ZONES, SUMS_PER_PAGE};
use crate::segmented::Segmented;

/// See the module.
pub struct Sums {
    extents: Extents,
    zones: [OnceLock<Place>; MOST_ZONES],
    pages: Segmented<OnceLock<Box<[AtomicU32]>>>,
}

/// Of a zone.
struct Place {
    /// Bytes of its extents.
    data: u64,
    end: u64,
    /// Entries of all pages of the table before it, used or not.
    base: u64,
}

impl Sums {
    pub fn new(extents: Extents) -> Self {
        Self { extents, zones: [const { OnceLock::new() }; MOST_ZONES], pages: Segmented::default() }
    }

    pub fn learn(&self, zones: &[Zone]) {
        let mut pages = 0;
        for (place, zone) in self.zones.iter().zip(zones) {
            place.get_or_init(|| Place {
                data: zone.data,
                end: zone.data + (u64::from(zone.extents) << self.extents.shift),
                base: pages * u64::from(ENTRIES_PER_PAGE),
            });
            pages += u64::from(zone.pages());
        }
    }

    /// The number of the block at byte `at` of the drive, which is in an extent. Blocks of an extent, and extents that lie together,
    /// have numbers that follow each other.
    #[inline]
    fn number(&self, at: u64) -> Option<u64> {
        let zone = self.zones.iter().map_while(OnceLock::get).find(|zone| at < zone.end)?;
        let block = at.checked_sub(zone.data)? / BLOCK;
        Some(zone.base * u64::from(self.extents.blocks()) + block)
    }

    fn word(&self, number: u64) -> Option<&AtomicU32> {
        let page = self.pages.get((number / SUMS_PER_PAGE) as u32).and_then(OnceLock::get)?;
        Some(&page[(number % SUMS_PER_PAGE) as usize])
    }

    /// The checksum that the block at byte `at` of the drive has to have. None if nothing is known of it.
    #[inline]
    pub fn at(&self, at: u64) -> Option<u32> {
        let word = self.word(self.number(at)?)?;
        Some(word.load(Ordering::Relaxed))
    }

    /// The first of `blocks`, which were read from byte `at` of the drive on, that has not the checksum that it has to have.
    pub fn first_bad(&self, at: u64, blocks: &[Block]) -> Option<usize> {
        (at..)
            .step_by(BLOCK as usize)
            .zip(blocks)
            .position(|(at, block)| self.at(at) != Some(checksum(&block.0)))
    }

    /// The block at byte `at` has this one from here on. Returns the page that it is on.
    pub fn set(&self, at: u64, sum: u32) -> Option<u32> {
        let number = self.number(at)?;
        let page = (number / SUMS_PER_PAGE) as u32;
        self.page_words(page)[(number % SUMS_PER_PAGE) as usize].store(sum, Ordering::Relaxed);
        Some(page)
    }

    fn page_words(&self, page: u32) -> &[AtomicU32] {
        self.pages.make(page).get_or_init(|| (0..SUMS_PER_PAGE).map(|_| AtomicU32::new(0)).collect())
    }

    /// All of page `page`.
    pub fn page(&self, page: u32) -> Vec<u32> {
        self.page_words(page).iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }

    /// Page `page` was read from the drive.
    pub fn load(&self, page: u32, sums: &[u32]) {
        self.page_words(page).iter().zip(sums).for_each(|(word, sum)| word.store(*sum, Ordering::Relaxed));
    }
}

/// Of the bytes of a block.
#[inline]
pub fn checksum(block: &[u8]) -> u32 {
    crc32c::crc32c(block)
}

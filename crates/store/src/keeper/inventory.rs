//! What a store says of itself on the drive, for a scrub: superblocks, the catalog, the table, and pages of checksums.
//!
//! The keeper has all of it in memory. So what a scrub finds wrong is written anew, by two checkpoints: each of them writes the
//! copies that the other one does not. The journal is left out, as it is being written.

use std::collections::BTreeSet;

use super::Keeper;
use crate::format::{Block, Page, SumsPage, Superblock};
use crate::geometry::{BLOCK, SUPERBLOCKS};

/// Something to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Superblock(u8),
    /// The copy that counts.
    Catalog,
    Page {
        page: u32,
        copy: u8,
    },
    /// Page `page` of checksums, if there is one: the copy that counts.
    Sums {
        page: u32,
    },
}

/// Pages to be written anew.
#[derive(Default)]
pub(super) struct Mending {
    /// Checkpoints to come.
    left: u8,
    pages: BTreeSet<u32>,
    sums: BTreeSet<u32>,
}

impl Mending {
    pub fn is_due(&self) -> bool {
        self.left > 0
    }
}

impl Item {
    pub fn first() -> Self {
        Self::Superblock(0)
    }
}

impl Keeper {
    /// Byte of the drive, bytes.
    pub(super) fn place_of_item(&self, item: Item) -> (u64, u64) {
        let layout = self.layout();
        match item {
            Item::Superblock(copy) => (SUPERBLOCKS[usize::from(copy)], BLOCK),
            Item::Catalog => {
                let len = u64::from(self.superblock.catalog_bytes).next_multiple_of(BLOCK).max(BLOCK);
                (layout.catalog_copy(self.superblock.catalog_copy), len)
            }
            Item::Page { page, copy } => {
                let (zone, in_zone, _) = layout.page(page);
                (zone.page_at(in_zone, copy), BLOCK)
            }
            Item::Sums { page } => {
                let each = layout.extents.sum_pages();
                let copy = self.slots.sums(page / each).second >> (page % each) & 1;
                (layout.sum_page_at(page, copy as u8), BLOCK)
            }
        }
    }

    fn item_behind(&self, item: Item) -> Option<Item> {
        let pages = self.layout().pages();
        match item {
            Item::Superblock(0) => Some(Item::Superblock(1)),
            Item::Superblock(_) => Some(Item::Catalog),
            Item::Catalog => Some(Item::Page { page: 0, copy: 0 }),
            Item::Page { page, copy: 0 } => Some(Item::Page { page, copy: 1 }),
            Item::Page { page, .. } => self.sums_from(page, 0).or(self.page_from(page + 1, pages)),
            Item::Sums { page } => {
                let each = self.layout().extents.sum_pages();
                let of = page / each;
                self.sums_from(of, page % each + 1).or(self.page_from(of + 1, pages))
            }
        }
    }

    fn page_from(&self, page: u32, pages: u32) -> Option<Item> {
        (page < pages).then_some(Item::Page { page, copy: 0 })
    }

    /// The next page of checksums of page `page` of the table.
    fn sums_from(&self, page: u32, first: u32) -> Option<Item> {
        let each = self.layout().extents.sum_pages();
        let mut written = self.slots.sums(page).iter();
        written.find(|(n, _)| *n >= first).map(|(n, _)| Item::Sums { page: page * each + n })
    }

    /// An item was read, and no checkpoint ended meanwhile.
    pub(super) fn judge_item(&mut self, item: Item, at: u64, blocks: &[Block], result: Result<(), i32>) {
        let next = self.item_behind(item);
        let Some(scrub) = &mut self.scrub else { return };
        scrub.item = next;
        scrub.info.blocks += if result.is_ok() { blocks.len() as u64 } else { 0 };
        let what = match result {
            Ok(()) if self.is_item_sound(item, blocks) => return,
            Ok(()) => "is not what was written there".to_owned(),
            Err(errno) => format!("cannot be read: {}", std::io::Error::from_raw_os_error(errno)),
        };
        match item {
            Item::Page { page, .. } => drop(self.mending.pages.insert(page)),
            Item::Sums { page } => drop(self.mending.sums.insert(page)),
            Item::Superblock(_) | Item::Catalog => {}
        }
        self.mending.left = 2;
        let name = match item {
            Item::Superblock(_) => "the superblock",
            Item::Catalog => "the catalog of volumes and snapshots",
            Item::Page { .. } => "a page of the table",
            Item::Sums { .. } => "a page of checksums",
        };
        let fault = format!("{name} at byte {at} of the drive {what}; it is written anew, from memory");
        self.events.push_back(fault.clone());
        if let Some(scrub) = &mut self.scrub {
            scrub.info.mended += 1;
        }
        self.note_fault(fault);
    }

    /// Copies that do not count may hold anything.
    fn is_item_sound(&self, item: Item, blocks: &[Block]) -> bool {
        let uuid = &self.superblock.uuid;
        match item {
            Item::Superblock(copy) if SUPERBLOCKS[usize::from(copy)] != self.superblock.at() => true,
            Item::Superblock(_) => match Superblock::decode(&blocks[0].0) {
                Ok(Some(found)) => found.uuid == *uuid && found.generation == self.superblock.generation,
                _ => false,
            },
            Item::Catalog => {
                let bytes: Vec<u8> = blocks.iter().flat_map(|block| block.0).collect();
                let len = self.superblock.catalog_bytes as usize;
                crc32c::crc32c(&bytes[..len]) == self.superblock.catalog_crc
            }
            Item::Page { page, copy } if self.slots.copy(page) != copy => true,
            Item::Page { page, .. } => Page::generation(uuid, page, &blocks[0].0)
                .is_some_and(|generation| generation <= self.superblock.table_generation),
            Item::Sums { page } => SumsPage::decode(uuid, page, &blocks[0].0).is_some(),
        }
    }

    /// A checkpoint begins.
    pub(super) fn mend_pages(&mut self) {
        let Some(left) = self.mending.left.checked_sub(1) else { return };
        self.mending.left = left;
        self.mending.pages.iter().for_each(|page| self.slots.set_dirty(*page));
        self.mending.sums.iter().for_each(|page| self.slots.set_dirty_sums(*page));
        if left == 0 {
            self.mending = Mending::default();
        }
    }
}

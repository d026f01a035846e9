//! What every slot holds, which pages of the table differ from the drive, and how many extents each layer has.

use std::collections::BTreeMap;

use crate::format::{Entry, Kind};
use crate::geometry::{Layout, ENTRIES_PER_PAGE};

/// A bit each.
#[derive(Clone, Default)]
pub struct Bits(Vec<u64>);

impl Bits {
    pub fn resize(&mut self, len: u32) {
        self.0.resize(len.div_ceil(64) as usize, 0);
    }

    pub fn get(&self, n: u32) -> bool {
        self.0[(n / 64) as usize] >> (n % 64) & 1 == 1
    }

    pub fn set(&mut self, n: u32, value: bool) {
        let word = &mut self.0[(n / 64) as usize];
        *word = *word & !(1 << (n % 64)) | u64::from(value) << (n % 64);
    }

    /// Take all that are set.
    pub fn drain(&mut self) -> Vec<u32> {
        let mut all = Vec::new();
        for (n, word) in self.0.iter_mut().enumerate() {
            let mut rest = std::mem::take(word);
            while rest != 0 {
                all.push(n as u32 * 64 + rest.trailing_zeros());
                rest &= rest - 1;
            }
        }
        all
    }
}

/// See the module.
pub struct Slots {
    entries: Vec<Entry>,
    dirty: Bits,
    /// Which copy of each page counts on the drive.
    copies: Bits,
    /// Extents and tombstones by layer.
    of_layer: BTreeMap<u32, (u64, u64)>,
}

impl Slots {
    pub fn new(layout: &Layout) -> Self {
        let mut this = Self {
            entries: Vec::new(),
            dirty: Bits::default(),
            copies: Bits::default(),
            of_layer: BTreeMap::new(),
        };
        this.grow(layout);
        this
    }

    pub fn grow(&mut self, layout: &Layout) {
        self.entries.resize(layout.slots() as usize, Entry::default());
        self.dirty.resize(layout.pages());
        self.copies.resize(layout.pages());
    }

    pub fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    pub fn get(&self, slot: u32) -> Entry {
        self.entries[slot as usize]
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Entry)> {
        self.entries
            .iter()
            .enumerate()
            .map(|(slot, entry)| (slot as u32, entry))
            .filter(|(_, e)| e.kind != Kind::Free)
    }

    /// As [`iter`](Self::iter), of `slots` only.
    pub fn range(&self, slots: std::ops::Range<u32>) -> impl Iterator<Item = (u32, &Entry)> {
        let first = slots.start;
        let entries = &self.entries[slots.start as usize..slots.end as usize];
        entries
            .iter()
            .enumerate()
            .map(move |(n, e)| (first + n as u32, e))
            .filter(|(_, e)| e.kind != Kind::Free)
    }

    /// The entries of a page, from slot `first` on.
    pub fn page(&self, first: u32, end: u32) -> &[Entry] {
        &self.entries[first as usize..end.min(first + ENTRIES_PER_PAGE) as usize]
    }

    pub fn set(&mut self, layout: &Layout, slot: u32, entry: Entry) {
        self.load(slot, entry);
        self.dirty.set(layout.page_of(slot), true);
    }

    /// As [`set`](Self::set), where the page on the drive says the same.
    pub fn load(&mut self, slot: u32, entry: Entry) {
        let before = std::mem::replace(&mut self.entries[slot as usize], entry);
        for (entry, by) in [(before, u64::MAX), (entry, 1)] {
            if entry.kind != Kind::Free {
                let (data, zero) = self.of_layer.entry(entry.layer).or_default();
                let count = if entry.kind == Kind::Data { data } else { zero };
                *count = count.wrapping_add(by);
            }
        }
    }

    /// Extents that a layer has.
    pub fn extents_of(&self, layer: u32) -> u64 {
        self.of_layer.get(&layer).map_or(0, |counts| counts.0)
    }

    /// Extents and tombstones that a layer has.
    pub fn counts_of(&self, layer: u32) -> (u64, u64) {
        self.of_layer.get(&layer).copied().unwrap_or_default()
    }

    pub fn set_dirty(&mut self, page: u32) {
        self.dirty.set(page, true);
    }

    pub fn take_dirty(&mut self) -> Vec<u32> {
        self.dirty.drain()
    }

    pub fn copy(&self, page: u32) -> u8 {
        self.copies.get(page).into()
    }

    pub fn set_copy(&mut self, page: u32, copy: u8) {
        self.copies.set(page, copy != 0);
    }
}

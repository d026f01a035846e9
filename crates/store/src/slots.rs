//! What every slot holds, which pages of the table differ from the drive, and how many extents each layer has.
//!
//! An entry has 16 bytes, and a large drive has many. So entries are kept in chunks, and a chunk that is not being changed in the
//! smallest form that says the same: most of a drive is whole extents in order, of which a chunk has a few bytes.

use std::collections::BTreeMap;

use crate::chunk::{Chunk, CHUNK};
use crate::format::{Entry, Kind, SumPages};
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
    chunks: Vec<Chunk>,
    len: u32,
    dirty: Bits,
    /// Which copy of each page counts on the drive.
    copies: Bits,
    /// For each page of the table, its pages of checksums on the drive.
    sums: Vec<SumPages>,
    /// How many there can be.
    sum_pages: u32,
    dirty_sums: Bits,
    /// Extents and tombstones by layer.
    of_layer: BTreeMap<u32, (u64, u64)>,
}

impl Slots {
    pub fn new(layout: &Layout) -> Self {
        let mut this = Self {
            chunks: Vec::new(),
            len: 0,
            dirty: Bits::default(),
            copies: Bits::default(),
            sums: Vec::new(),
            sum_pages: layout.extents.sum_pages(),
            dirty_sums: Bits::default(),
            of_layer: BTreeMap::new(),
        };
        this.grow(layout);
        this
    }

    pub fn grow(&mut self, layout: &Layout) {
        self.len = layout.slots();
        self.chunks.resize_with(self.len.div_ceil(CHUNK) as usize, Chunk::default);
        self.dirty.resize(layout.pages());
        self.copies.resize(layout.pages());
        self.sums.resize(layout.pages() as usize, SumPages::default());
        self.dirty_sums.resize(layout.pages() * self.sum_pages);
    }

    pub fn len(&self) -> u32 {
        self.len
    }

    pub fn get(&self, slot: u32) -> Entry {
        self.chunks[(slot / CHUNK) as usize].get(slot % CHUNK)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, Entry)> + '_ {
        self.range(0..self.len)
    }

    /// As [`iter`](Self::iter), of `slots` only.
    pub fn range(&self, slots: std::ops::Range<u32>) -> impl Iterator<Item = (u32, Entry)> + '_ {
        let chunks = slots.start / CHUNK..slots.end.div_ceil(CHUNK);
        let taken = chunks.filter(|n| !self.chunks[*n as usize].is_free());
        taken
            .flat_map(move |n| (n * CHUNK).max(slots.start)..(n * CHUNK + CHUNK).min(slots.end))
            .map(|slot| (slot, self.get(slot)))
            .filter(|(_, entry)| entry.kind != Kind::Free)
    }

    /// The entries of a page, from slot `first` on.
    pub fn page(&self, first: u32, end: u32) -> Vec<Entry> {
        (first..end.min(first + ENTRIES_PER_PAGE)).map(|slot| self.get(slot)).collect()
    }

    pub fn set(&mut self, layout: &Layout, slot: u32, entry: Entry) {
        let before = self.chunks[(slot / CHUNK) as usize].set(slot % CHUNK, entry);
        self.count(before, u64::MAX);
        self.count(entry, 1);
        self.dirty.set(layout.page_of(slot), true);
    }

    /// What a page of the table says of slots that are free, from slot `first` on.
    pub fn load(&mut self, first: u32, entries: &[Entry]) {
        for same in entries.chunk_by(|a, b| (a.kind, a.layer) == (b.kind, b.layer)) {
            self.count(same[0], same.len() as u64);
        }
        let (mut at, mut rest) = (first, entries);
        while !rest.is_empty() {
            let (here, more) = rest.split_at(rest.len().min((CHUNK - at % CHUNK) as usize));
            self.chunks[(at / CHUNK) as usize].put(at % CHUNK, here);
            (at, rest) = (at + here.len() as u32, more);
        }
    }

    /// These slots are not expected to change soon.
    pub fn pack(&mut self, first: u32, end: u32) {
        let chunks = (first / CHUNK) as usize..end.min(self.len).div_ceil(CHUNK) as usize;
        self.chunks[chunks].iter_mut().for_each(Chunk::pack);
    }

    fn count(&mut self, entry: Entry, by: u64) {
        if entry.kind != Kind::Free {
            let (data, zero) = self.of_layer.entry(entry.layer).or_default();
            let count = if entry.kind == Kind::Data { data } else { zero };
            *count = count.wrapping_add(by);
        }
    }

    /// Extents that a layer has.
    pub fn extents_of(&self, layer: u32) -> u64 {
        self.of_layer.get(&layer).map_or(0, |counts| counts.0)
    }

    pub fn set_dirty(&mut self, page: u32) {
        self.dirty.set(page, true);
    }

    pub fn take_dirty(&mut self) -> Vec<u32> {
        self.dirty.drain()
    }

    /// A page of checksums differs from the drive.
    pub fn set_dirty_sums(&mut self, page: u32) {
        self.dirty_sums.set(page, true);
        self.dirty.set(page / self.sum_pages, true);
    }

    pub fn take_dirty_sums(&mut self) -> Vec<u32> {
        self.dirty_sums.drain()
    }

    /// The pages of checksums that a page of the table has on the drive.
    pub fn sums(&self, page: u32) -> SumPages {
        self.sums[page as usize]
    }

    pub fn set_sums(&mut self, page: u32, sums: SumPages) {
        self.sums[page as usize] = sums;
    }

    /// The copy of a page of checksums that is not the one that counts.
    pub fn other_copy_of_sums(&self, page: u32) -> u8 {
        let (sums, bit) = (self.sums(page / self.sum_pages), page % self.sum_pages);
        u8::from(sums.written >> bit & 1 == 1 && sums.second >> bit & 1 == 0)
    }

    pub fn copy(&self, page: u32) -> u8 {
        self.copies.get(page).into()
    }

    pub fn set_copy(&mut self, page: u32, copy: u8) {
        self.copies.set(page, copy != 0);
    }
}

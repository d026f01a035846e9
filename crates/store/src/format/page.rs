//! A page of the table: what some slots hold.

use super::bytes::{Block, Reader, Writer};
use super::MOST_NUMBER;
use crate::geometry::ENTRIES_PER_PAGE;

const MAGIC: u32 = 0x4750_5352;
const HEADER: usize = 64;
/// Bytes of an entry.
pub const ENTRY: usize = 16;
/// Where the number of entries is.
const COUNT: usize = 36;

/// What a slot is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    #[default]
    Free = 0,
    /// The slot's extent holds the granules in `mask` of extent `vextent` of the layer.
    Data = 1,
    /// The granules in `mask` of `count` extents from `vextent` on read as zeroes, whatever older layers say.
    Zero = 2,
}

/// What one slot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub layer: u32,
    pub vextent: u32,
    pub count: u32,
    pub mask: u16,
    pub kind: Kind,
}

impl Entry {
    pub fn data(layer: u32, vextent: u32, mask: u16) -> Self {
        Self { layer, vextent, count: 1, mask, kind: Kind::Data }
    }

    pub fn zero(layer: u32, vextent: u32, count: u32, mask: u16) -> Self {
        Self { layer, vextent, count, mask, kind: Kind::Zero }
    }

    pub fn encode(&self, out: &mut Writer) {
        out.u32(self.layer);
        out.u32(self.vextent);
        out.u32(self.count);
        out.u16(self.mask);
        out.u16(self.kind as u16);
    }

    /// None where the bytes end or the kind is not known.
    pub fn decode(from: &mut Reader) -> Option<Self> {
        let (layer, vextent, count, mask) = (from.u32()?, from.u32()?, from.u32()?, from.u16()?);
        let kind = match from.u16()? {
            // Whatever else the bytes say: a free slot has nothing.
            0 => return Some(Self::default()),
            1 => Kind::Data,
            2 => Kind::Zero,
            _ => return None,
        };
        Some(Self { layer, vextent, count, mask, kind })
    }
}

/// Which pages of checksums there are for what a page of the table describes, a bit for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SumPages {
    /// Those that were written,
    pub written: u64,
    /// and whose second copy counts.
    pub second: u64,
}

impl SumPages {
    /// Copy `copy` of number `n` counts.
    pub fn set(&mut self, n: u32, copy: u8) {
        self.written |= 1 << n;
        self.second = self.second & !(1 << n) | u64::from(copy) << n;
    }

    /// Those that were written, each with the copy that counts.
    pub fn iter(self) -> impl Iterator<Item = (u32, u8)> {
        (0..64).filter(move |n| self.written >> n & 1 == 1).map(move |n| (n, (self.second >> n & 1) as u8))
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    pub number: u32,
    pub generation: u64,
    pub sums: SumPages,
    pub entries: Vec<Entry>,
}

impl Page {
    pub fn encode(&self, uuid: &[u8; 16], block: &mut Block) {
        let Self { number, generation, sums, entries } = self;
        debug_assert!(entries.len() <= ENTRIES_PER_PAGE as usize);
        let mut out = Writer(Vec::with_capacity(4096));
        out.u32(MAGIC);
        out.u32(0);
        out.0.extend_from_slice(uuid);
        out.u64(*generation);
        out.u32(*number);
        out.u32(entries.len() as u32);
        out.u64(sums.written);
        out.u64(sums.second);
        out.0.resize(HEADER, 0);
        entries.iter().for_each(|entry| entry.encode(&mut out));
        block.0.fill(0);
        block.0[..out.0.len()].copy_from_slice(&out.0);
        let crc = crc32c::crc32c(&block.0);
        block.0[4..8].copy_from_slice(&crc.to_le_bytes());
    }

    /// The generation; None if it is no sound page of this store with this number.
    pub fn generation(uuid: &[u8; 16], number: u32, block: &[u8; 4096]) -> Option<u64> {
        let mut from = Reader(block);
        let magic = from.u32()?;
        let crc = from.u32()?;
        if magic != MAGIC || from.bytes16()? != *uuid || checksum(block) != crc {
            return None;
        }
        let generation = from.u64()?;
        (from.u32()? == number && generation <= MOST_NUMBER).then_some(generation)
    }

    /// The generation that a page of this store with this number says it has, sound or not.
    pub fn claimed(uuid: &[u8; 16], number: u32, block: &[u8; 4096]) -> Option<u64> {
        let mut from = Reader(block);
        let (magic, _) = (from.u32()?, from.u32()?);
        let is_ours = magic == MAGIC && from.bytes16()? == *uuid;
        let generation = from.u64()?;
        (is_ours && from.u32()? == number && generation <= MOST_NUMBER).then_some(generation)
    }

    /// None if it is no sound page of this store with this number.
    pub fn decode(uuid: &[u8; 16], number: u32, block: &[u8; 4096]) -> Option<Self> {
        let generation = Self::generation(uuid, number, block)?;
        let mut from = Reader(&block[COUNT..]);
        let count = from.u32()? as usize;
        let sums = SumPages { written: from.u64()?, second: from.u64()? };
        if count > ENTRIES_PER_PAGE as usize {
            return None;
        }
        let mut from = Reader(&block[HEADER..HEADER + count * ENTRY]);
        let entries = (0..count).map(|_| Entry::decode(&mut from)).collect::<Option<_>>()?;
        Some(Self { number, generation, sums, entries })
    }
}

/// Of a block whose own checksum is in bytes 4 to 8.
pub(super) fn checksum(block: &[u8; 4096]) -> u32 {
    let crc = crc32c::crc32c(&block[..4]);
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &[0; 4]), &block[8..])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A first write adds its granules to those that the slot has, which of a free one are none, whatever a drive says.
    #[test]
    fn a_free_slot_has_nothing() {
        let mut out = Writer::default();
        Entry { kind: Kind::Free, ..Entry::data(3, 7, 0x800) }.encode(&mut out);
        assert_eq!(Entry::decode(&mut Reader(&out.0)), Some(Entry::default()));
    }

    #[test]
    fn it_comes_back_as_it_went_and_nowhere_else() {
        let uuid = *b"0123456789abcdef";
        let entries: Vec<Entry> = (0..ENTRIES_PER_PAGE)
            .map(|n| if n % 3 == 0 { Entry::zero(n, 7, 9, 3) } else { Entry::data(1, n, 0xffff) })
            .collect();
        let mut block = Block::default();
        let sums = SumPages { written: 7, second: 2 };
        let page = Page { number: 5, generation: 11, sums, entries };
        page.encode(&uuid, &mut block);
        assert_eq!(Page::decode(&uuid, 5, &block.0), Some(page));
        assert_eq!(Page::decode(&uuid, 6, &block.0), None);
        assert_eq!(Page::decode(&[0; 16], 5, &block.0), None);
        block.0[4095] ^= 1;
        assert_eq!(Page::decode(&uuid, 5, &block.0), None);
    }
}

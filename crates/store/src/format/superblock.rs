//! The superblock: where everything is, and which checkpoint counts.

use super::bytes::{Block, Reader, Writer};
use super::MOST_NUMBER;
use crate::error::StoreError;
use crate::geometry::{Extents, Layout, Zone, BLOCK, MOST_ZONES, SUPERBLOCKS};
use crate::mutants::{self, Mutant};

pub const MAGIC: &[u8; 8] = b"RSTSTORE";
/// Of the format.
pub const VERSION: u32 = 2;
const CRC_AT: usize = 4092;
const GENERATION_AT: usize = 48;
/// What a store of any size has of these: a drive says what it likes, and memory is taken by it.
const MOST_JOURNAL_BLOCKS: u32 = 65536;
const MOST_CATALOG_LEN: u64 = 16 << 20;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub uuid: [u8; 16],
    /// Each writing has the next; the copy with the higher one counts.
    pub generation: u64,
    /// Each opener has the next.
    pub incarnation: u64,
    /// The journal's number from which on blocks are the latest opener's.
    pub began: u64,
    /// The boot of the host in which it was opened last: if it is still that one, no power was lost.
    pub boot: [u8; 16],
    /// Table pages up to this generation count.
    pub table_generation: u64,
    /// Replay begins at this number of the journal,
    pub replay_from: u64,
    /// with blocks of this incarnation,
    pub replay_incarnation: u64,
    /// and must reach this one: the checkpoint may hold what blocks before it say.
    pub covered: u64,
    /// Which copy of the catalog counts, its bytes and their CRC-32C.
    pub catalog_copy: u8,
    pub catalog_bytes: u32,
    pub catalog_crc: u32,
    pub layout: Layout,
}

impl Superblock {
    /// Another opener has it from here on, whose first block of the journal is `next`.
    pub(crate) fn take_possession(&mut self, next: u64, boot: [u8; 16]) {
        self.generation += 1;
        self.incarnation += 1;
        self.began = next;
        // What was replayed is made durable before this is written. It must not be dropped later: what it freed is given out
        // again.
        if !mutants::is(Mutant::DropReplayed) {
            self.covered = next;
        }
        self.boot = boot;
    }

    /// Where this generation of it goes.
    pub(crate) fn at(&self) -> u64 {
        SUPERBLOCKS[(self.generation % 2) as usize]
    }

    pub fn encode(&self) -> Block {
        let mut out = Writer(Vec::with_capacity(4096));
        out.0.extend_from_slice(MAGIC);
        out.u32(VERSION);
        out.u32(self.layout.extents.bytes() as u32);
        out.0.extend_from_slice(&self.uuid);
        out.0.extend_from_slice(&self.boot);
        for number in [
            self.generation,
            self.incarnation,
            self.began,
            self.table_generation,
            self.replay_from,
            self.replay_incarnation,
            self.covered,
            self.layout.size,
            self.layout.journal_at,
            self.layout.catalog_at,
            self.layout.catalog_len,
        ] {
            out.u64(number);
        }
        out.u32(self.layout.journal_blocks);
        out.u32(self.catalog_bytes);
        out.u32(self.catalog_crc);
        out.u16(u16::from(self.catalog_copy));
        out.u16(self.layout.zones.len() as u16);
        for zone in &self.layout.zones {
            out.u64(zone.table);
            out.u64(zone.sums);
            out.u64(zone.data);
            out.u32(zone.first);
            out.u32(zone.extents);
            out.u32(zone.tombs);
            out.u32(0);
        }
        let mut block = Block::default();
        block.0[..out.0.len()].copy_from_slice(&out.0);
        let crc = crc32c::crc32c(&block.0[..CRC_AT]);
        block.0[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// `None` if it is no sound superblock of ours.
    ///
    /// # Errors
    /// It is one of another format.
    pub fn decode(block: &[u8; 4096]) -> Result<Option<Self>, StoreError> {
        let mut from = Reader(block);
        if from.take(8) != Some(MAGIC) || crc32c::crc32c(&block[..CRC_AT]).to_le_bytes() != block[CRC_AT..] {
            return Ok(None);
        }
        match from.u32() {
            Some(VERSION) => {}
            Some(version) => return Err(StoreError::Version { version, known: VERSION }),
            None => return Ok(None),
        }
        Ok(Self::rest(&mut from).filter(Self::is_sound))
    }

    /// The generation that a superblock says it has, sound or not.
    pub(crate) fn claimed(block: &[u8; 4096]) -> Option<u64> {
        let mut from = Reader(block);
        let is_ours = from.take(8)? == MAGIC && from.u32()? == VERSION;
        from.take(GENERATION_AT - 12)?;
        from.u64().filter(|_| is_ours)
    }

    fn rest(from: &mut Reader) -> Option<Self> {
        let extents = Extents::new(u64::from(from.u32()?)).ok()?;
        let (uuid, boot) = (from.bytes16()?, from.bytes16()?);
        let mut next = || from.u64();
        let generation = next()?;
        let (incarnation, began) = (next()?, next()?);
        let (table_generation, replay_from, replay_incarnation, covered) =
            (next()?, next()?, next()?, next()?);
        let (size, journal_at, catalog_at, catalog_len) = (next()?, next()?, next()?, next()?);
        let (journal_blocks, catalog_bytes, catalog_crc) = (from.u32()?, from.u32()?, from.u32()?);
        let catalog_copy = from.u16()? as u8;
        let count = usize::from(from.u16()?);
        let mut zones = Vec::new();
        for _ in 0..count.min(MOST_ZONES + 1) {
            let (table, sums, data) = (from.u64()?, from.u64()?, from.u64()?);
            let (first, extents, tombs, _) = (from.u32()?, from.u32()?, from.u32()?, from.u32()?);
            zones.push(Zone { table, sums, data, first, extents, tombs });
        }
        let layout = Layout { extents, size, journal_at, journal_blocks, catalog_at, catalog_len, zones };
        Some(Self {
            uuid,
            generation,
            incarnation,
            began,
            boot,
            table_generation,
            replay_from,
            replay_incarnation,
            covered,
            catalog_copy,
            catalog_bytes,
            catalog_crc,
            layout,
        })
    }

    /// Whether what it says can be: a drive is not trusted, even where its checksums are right.
    fn is_sound(&self) -> bool {
        let layout = &self.layout;
        let inside = |at: u64, len: u64| {
            at.checked_add(len).is_some_and(|end| at.is_multiple_of(BLOCK) && end <= layout.size)
        };
        let numbers = [
            self.generation,
            self.incarnation,
            self.began,
            self.table_generation,
            self.replay_from,
            self.replay_incarnation,
            self.covered,
        ];
        let mut first = 0u32;
        numbers.iter().all(|number| *number <= MOST_NUMBER)
            && self.replay_from <= self.covered
            && layout.size <= i64::MAX as u64
            && self.catalog_copy < 2
            && u64::from(self.catalog_bytes) <= layout.catalog_len
            && (64..=MOST_JOURNAL_BLOCKS).contains(&layout.journal_blocks)
            && inside(layout.journal_at, u64::from(layout.journal_blocks) * BLOCK)
            && layout.catalog_len <= MOST_CATALOG_LEN
            && layout.catalog_len.is_multiple_of(BLOCK)
            && inside(layout.catalog_at, 2 * layout.catalog_len)
            && (1..=MOST_ZONES).contains(&layout.zones.len())
            && layout.zones.iter().all(|zone| {
                let Some(slots) = zone.extents.checked_add(zone.tombs) else { return false };
                let next = first.checked_add(slots);
                let sound = zone.first == first
                    && next.is_some_and(|next| next < u32::MAX)
                    && zone.extents > 0
                    && zone.tombs == Zone::tombs_for(zone.extents)
                    && inside(zone.table, 2 * u64::from(zone.pages()) * BLOCK)
                    && inside(zone.sums, 2 * zone.sum_pages(layout.extents) * BLOCK)
                    && inside(zone.data, u64::from(zone.extents) << layout.extents.shift);
                first = next.unwrap_or(u32::MAX);
                sound
            })
            && self.is_disjoint()
    }

    /// No two parts of the store lie on the same bytes. Each is known to end within it.
    fn is_disjoint(&self) -> bool {
        let layout = &self.layout;
        let mut parts: Vec<(u64, u64)> = SUPERBLOCKS.iter().map(|at| (*at, BLOCK)).collect();
        parts.push((layout.journal_at, u64::from(layout.journal_blocks) * BLOCK));
        parts.push((layout.catalog_at, 2 * layout.catalog_len));
        for zone in &layout.zones {
            parts.push((zone.table, 2 * u64::from(zone.pages()) * BLOCK));
            parts.push((zone.sums, 2 * zone.sum_pages(layout.extents) * BLOCK));
            parts.push((zone.data, u64::from(zone.extents) << layout.extents.shift));
        }
        parts.sort_unstable();
        parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn example() -> Superblock {
        Superblock {
            uuid: *b"0123456789abcdef",
            generation: 7,
            incarnation: 3,
            began: 40,
            boot: *b"fedcba9876543210",
            table_generation: 5,
            replay_from: 33,
            replay_incarnation: 2,
            covered: 35,
            catalog_copy: 1,
            catalog_bytes: 77,
            catalog_crc: 0x1234_5678,
            layout: Layout::new(64 << 20, 64 << 10).unwrap().grown(96 << 20).unwrap(),
        }
    }

    #[test]
    fn it_comes_back_as_it_went() {
        let superblock = example();
        assert_eq!(Superblock::decode(&superblock.encode().0).unwrap(), Some(superblock));
    }

    #[test]
    fn each_flipped_bit_is_found() {
        let block = example().encode();
        for bit in 0..4096 * 8 {
            let mut bad = block.clone();
            bad.0[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(Superblock::decode(&bad.0), Ok(None)), "bit {bit}");
        }
    }

    #[test]
    fn another_format_is_told_apart_from_none() {
        let mut block = example().encode();
        block.0[8] = 3;
        let crc = crc32c::crc32c(&block.0[..CRC_AT]);
        block.0[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        assert!(matches!(Superblock::decode(&block.0), Err(StoreError::Version { version: 3, known: 2 })));
    }

    #[test]
    fn a_zone_beyond_the_store_is_no_superblock() {
        let mut superblock = example();
        superblock.layout.zones[1].extents += 1 << 20;
        assert_eq!(Superblock::decode(&superblock.encode().0).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_is_no_superblock_however_right_its_checksum() {
        let spoil: [fn(&mut Superblock); 8] = [
            |one| one.generation = u64::MAX,
            |one| one.replay_from = u64::MAX - 5,
            |one| one.covered = one.replay_from - 1,
            |one| one.layout.journal_blocks = 1 << 20,
            |one| one.layout.catalog_len = 17 << 20,
            |one| one.layout.zones[0].tombs += 1,
            |one| one.layout.zones[1].table = one.layout.zones[0].data,
            |one| one.layout.journal_at = 4096 * 127,
        ];
        for (n, spoil) in spoil.iter().enumerate() {
            let mut superblock = example();
            spoil(&mut superblock);
            assert_eq!(Superblock::decode(&superblock.encode().0).unwrap(), None, "{n}");
        }
    }
}

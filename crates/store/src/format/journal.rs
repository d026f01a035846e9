//! A block of the journal: what changed, in the order in which it counts.

use super::bytes::{Block, Reader, Writer};
use super::page::{checksum, Entry, ENTRY};
use super::MOST_NUMBER;
use crate::catalog::Change;

const MAGIC: u32 = 0x4c4a_5352;
const HEADER: usize = 64;
/// Bytes for records in a block.
pub const RECORDS_LEN: usize = 4096 - HEADER;
/// Bytes of a record of a slot.
pub const SLOT_RECORD_LEN: usize = 1 + 4 + ENTRY;
const SLOT: u8 = 1;
const CHANGE: u8 = 2;
const SUMS: u8 = 3;
const IN_PLACE: u8 = 1;
const LAST: u16 = 1;

/// What a block says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalHead {
    /// Its running number, which says where it lies too.
    pub seq: u64,
    /// The opener that wrote it, and the first number that this one wrote.
    pub incarnation: u64,
    pub began: u64,
    /// Blocks before this one were durable, with all they speak of, when this was written.
    pub marked: u64,
    /// What was written in place for blocks before this one was durable.
    pub settled: u64,
    /// It ends a group: blocks count only when the last of their group is there.
    pub last: bool,
}

/// Checksums of blocks of a slot's extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSums {
    pub slot: u32,
    /// The first block.
    pub first: u16,
    /// The blocks are about to be written where they are: until that is settled they hold what they held before, or this, or torn
    /// parts of both. Else they were written before the record was.
    pub in_place: bool,
    pub sums: Vec<u32>,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// What a slot holds from here on.
    Slot(u32, Entry),
    Change(Change),
    Sums(SlotSums),
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalBlock {
    pub head: JournalHead,
    pub records: Vec<Record>,
}

impl JournalBlock {
    /// Append what stands for `slot` holding `entry`.
    pub fn put_slot(out: &mut Writer, slot: u32, entry: &Entry) {
        out.u8(SLOT);
        out.u32(slot);
        entry.encode(out);
    }

    pub fn put_change(out: &mut Writer, change: &Change) {
        out.u8(CHANGE);
        change.encode(out);
    }

    pub fn put_sums(out: &mut Writer, sums: &SlotSums) {
        out.u8(SUMS);
        out.u8(if sums.in_place { IN_PLACE } else { 0 });
        out.u32(sums.slot);
        out.u16(sums.first);
        out.u16(sums.sums.len() as u16);
        sums.sums.iter().for_each(|sum| out.u32(*sum));
    }

    /// `records`: at most [`RECORDS_LEN`] bytes made by `put_slot`, `put_change` and `put_sums`.
    pub fn encode(uuid: &[u8; 16], head: &JournalHead, records: &[u8], block: &mut Block) {
        debug_assert!(records.len() <= RECORDS_LEN);
        block.0.fill(0);
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            block.0[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC.to_le_bytes());
        put(&[0; 4]);
        put(&uuid[..8]);
        for number in [head.seq, head.incarnation, head.began, head.marked] {
            put(&number.to_le_bytes());
        }
        put(&(records.len() as u16).to_le_bytes());
        put(&(if head.last { LAST } else { 0 }).to_le_bytes());
        put(&head.settled.to_le_bytes());
        block.0[HEADER..HEADER + records.len()].copy_from_slice(records);
        let crc = crc32c::crc32c(&block.0);
        block.0[4..8].copy_from_slice(&crc.to_le_bytes());
    }

    /// None if it is no sound block of this store's journal.
    pub fn decode(uuid: &[u8; 16], block: &[u8; 4096]) -> Option<Self> {
        let mut from = Reader(block);
        let magic = from.u32()?;
        let crc = from.u32()?;
        if magic != MAGIC || from.take(8)? != &uuid[..8] || checksum(block) != crc {
            return None;
        }
        let (seq, incarnation, began, marked) = (from.u64()?, from.u64()?, from.u64()?, from.u64()?);
        let (len, flags, settled) = (usize::from(from.u16()?), from.u16()?, from.u64()?);
        if [seq, incarnation, began, marked, settled].iter().any(|number| *number > MOST_NUMBER) {
            return None;
        }
        let mut from = Reader(block.get(HEADER..HEADER + len)?);
        let mut records = Vec::new();
        while !from.0.is_empty() {
            records.push(match from.u8()? {
                SLOT => Record::Slot(from.u32()?, Entry::decode(&mut from)?),
                CHANGE => Record::Change(Change::decode(&mut from)?),
                SUMS => Record::Sums(SlotSums::decode(&mut from)?),
                _ => return None,
            });
        }
        let head = JournalHead { seq, incarnation, began, marked, settled, last: flags & LAST != 0 };
        Some(Self { head, records })
    }
}

impl SlotSums {
    fn decode(from: &mut Reader) -> Option<Self> {
        let in_place = from.u8()? & IN_PLACE != 0;
        let (slot, first, count) = (from.u32()?, from.u16()?, from.u16()?);
        let sums = (0..count).map(|_| from.u32()).collect::<Option<_>>()?;
        Some(Self { slot, first, in_place, sums })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{Seal, Volume};

    #[test]
    fn it_comes_back_as_it_went() {
        let uuid = *b"0123456789abcdef";
        let volume = Volume {
            id: 4,
            name: "root".into(),
            size: 1 << 30,
            live: 5,
            origin: 0,
            created_s: 1_700_000_000,
            seal: Seal { integrity: true, key: vec![1, 2, 3] },
        };
        let mut out = Writer::default();
        JournalBlock::put_slot(&mut out, 9, &Entry::data(5, 77, 1));
        JournalBlock::put_change(&mut out, &Change::Volume(volume.clone()));
        let sums = SlotSums { slot: 8, first: 15, in_place: true, sums: vec![7] };
        JournalBlock::put_sums(&mut out, &sums);
        let head = JournalHead { seq: 12, incarnation: 3, began: 10, marked: 11, settled: 9, last: true };
        let mut block = Block::default();
        JournalBlock::encode(&uuid, &head, &out.0, &mut block);
        let read = JournalBlock::decode(&uuid, &block.0).unwrap();
        assert_eq!(read.head, head);
        let records = [
            Record::Slot(9, Entry::data(5, 77, 1)),
            Record::Change(Change::Volume(volume)),
            Record::Sums(sums),
        ];
        assert_eq!(read.records, records);
        block.0[70] ^= 4;
        assert_eq!(JournalBlock::decode(&uuid, &block.0), None);
    }
}

//! Making a store, and opening one: the superblock, the table, the catalog, and what the journal says since.

use std::collections::BTreeMap;

use crate::catalog::Catalog;
use crate::error::StoreError;
use crate::format::{
    zeroed, Block, Entry, JournalBlock, JournalHead, Kind, Page, Record, SlotSums, SumPages, SumsPage,
    Superblock,
};
use crate::geometry::{Layout, BLOCK, ENTRIES_PER_PAGE, SUPERBLOCKS};
use crate::medium::{flush, read, read_into, write, Medium};
use crate::mutants::{self, Mutant};
use crate::settle::Doubts;
use crate::slots::Slots;
use crate::sums::Sums;

/// Blocks read or written at once.
const AT_ONCE: u32 = 256;

/// Make a store on `medium`. Whatever was there is gone.
///
/// # Errors
/// The drive is too small or fails; there is no store then.
pub fn format(medium: &dyn Medium, layout: &Layout, uuid: [u8; 16]) -> Result<(), StoreError> {
    for at in SUPERBLOCKS {
        write(medium, at, &zeroed(1))?;
    }
    flush(medium)?;
    let superblock = Superblock {
        uuid,
        generation: 1,
        incarnation: 0,
        began: 1,
        boot: [0; 16],
        table_generation: 1,
        replay_from: 1,
        replay_incarnation: 0,
        covered: 1,
        catalog_copy: 0,
        catalog_bytes: 0,
        catalog_crc: crc32c::crc32c(&[]),
        layout: layout.clone(),
    };
    write_table(medium, &superblock)?;
    flush(medium)?;
    write(medium, SUPERBLOCKS[1], &[superblock.encode()])?;
    flush(medium)
}

/// Write the first copy of all pages, all of them empty.
fn write_table(medium: &dyn Medium, superblock: &Superblock) -> Result<(), StoreError> {
    let mut number = 0;
    let empty = vec![Entry::default(); ENTRIES_PER_PAGE as usize];
    for zone in &superblock.layout.zones {
        let mut page = 0;
        while page < zone.pages() {
            let count = AT_ONCE.min(zone.pages() - page);
            let mut blocks = zeroed(count as usize);
            for block in &mut blocks {
                let generation = superblock.table_generation;
                let page = Page { number, generation, sums: SumPages::default(), entries: empty.clone() };
                page.encode(&superblock.uuid, block);
                number += 1;
            }
            write(medium, zone.page_at(page, 0), &blocks)?;
            page += count;
        }
    }
    Ok(())
}

/// The superblock that counts.
///
/// # Errors
/// There is none, it is a later format's, or the drive is shorter than it says.
pub fn superblock(medium: &dyn Medium) -> Result<Superblock, StoreError> {
    let size = medium.size().map_err(|source| StoreError::Drive { what: "measured", offset: 0, source })?;
    let mut found: Option<Superblock> = None;
    let mut failed = None;
    for at in SUPERBLOCKS {
        if at + BLOCK > size {
            continue;
        }
        match read(medium, at, 1).and_then(|block| Superblock::decode(&block[0].0)) {
            Ok(Some(one)) if found.as_ref().is_none_or(|found| one.generation > found.generation) => {
                found = Some(one)
            }
            Ok(_) => {}
            Err(error) => failed = Some(error),
        }
    }
    // A place that cannot be read may hold the newer one.
    let found = match (found, failed) {
        (_, Some(error)) => return Err(error),
        (None, None) => return Err(StoreError::NoStore),
        (Some(found), None) => found,
    };
    if size < found.layout.size {
        return Err(StoreError::Truncated { needed: found.layout.size, have: size });
    }
    Ok(found)
}

/// A store as the drive has it.
pub struct Recovered {
    pub superblock: Superblock,
    pub slots: Slots,
    pub catalog: Catalog,
    pub sums: Sums,
    /// Blocks that were being written in place when power was lost, and that hold neither what they held nor what they were to hold:
    /// bytes of the drive.
    pub torn: Vec<u64>,
    /// Checksums are not what the journal says that counts, and are to be in a checkpoint before anything is written to it.
    pub unsettled: bool,
    /// The next block of the journal.
    pub next: u64,
    /// The highest generation of any page, valid or not.
    pub highest_generation: u64,
    /// Blocks of the journal that were dropped, as they were not durable when power was lost.
    pub dropped: u64,
}

/// Read all that there is, and change nothing. `boot`: the host's present boot.
///
/// # Errors
/// There is no store, or it is damaged.
pub fn recover(medium: &dyn Medium, boot: [u8; 16]) -> Result<Recovered, StoreError> {
    let superblock = superblock(medium)?;
    let mut slots = Slots::new(&superblock.layout);
    let highest_generation = read_table(medium, &superblock, &mut slots)?;
    let sums = Sums::new(superblock.layout.extents);
    sums.learn(&superblock.layout.zones);
    read_sums(medium, &superblock, &slots, &sums)?;
    let mut doubts = Doubts::default();
    let mut catalog = read_catalog(medium, &superblock)?;
    let mut replay = Replay::read(medium, &superblock)?;
    let end = if superblock.boot == boot { replay.end } else { replay.durable };
    let counts = replay.groups.iter().take_while(|(group_end, _)| *group_end <= end).count();
    let mut groups = std::mem::take(&mut replay.groups);
    let dropped = groups.split_off(counts);
    for (_, records) in groups {
        for (seq, record) in records {
            match record {
                Record::Slot(slot, _) if slot >= slots.len() => {
                    return Err(damaged(format!("the journal names slot {slot}, which is not there"), 0));
                }
                Record::Slot(slot, entry) => slots.set(&superblock.layout, slot, entry),
                Record::Change(change) => catalog.apply(change),
                Record::Sums(record) => {
                    let layout = &superblock.layout;
                    if !is_sound(layout, &record) {
                        return Err(damaged(format!("the journal has checksums of slot {}", record.slot), 0));
                    }
                    doubts.replay(&record, replay.is_settled(seq), layout, &sums, &mut slots);
                }
            }
        }
    }
    if let Some(fault) = catalog.fault() {
        return Err(damaged(fault, superblock.layout.catalog_at));
    }
    let most = u64::from(u32::MAX) << superblock.layout.extents.shift;
    if let Some(volume) = catalog.volumes.values().find(|volume| volume.size > most) {
        let what = format!("volume {:?} has {} bytes, more than there can be", volume.name, volume.size);
        return Err(damaged(what, superblock.layout.catalog_at));
    }
    for (slot, entry) in slots.iter() {
        if let Some(fault) = fault_of(&superblock.layout, &catalog, slot, &entry) {
            let (zone, page, _) = superblock.layout.page(superblock.layout.page_of(slot));
            return Err(damaged(format!("slot {slot} {fault}"), zone.page_at(page, 0)));
        }
    }
    let late = dropped.into_iter().flat_map(|(_, records)| records).chain(replay.late);
    for (_, record) in late {
        match record {
            Record::Sums(record) if record.in_place && is_sound(&superblock.layout, &record) => {
                doubts.suspect(&record, &superblock.layout, &sums);
            }
            _ => {}
        }
    }
    let unsettled = superblock.boot != boot && !doubts.is_empty();
    let torn = doubts.settle(medium, &superblock.layout, &catalog, &sums, &mut slots)?;
    let dropped = replay.end - end;
    Ok(Recovered {
        superblock,
        slots,
        catalog,
        sums,
        torn,
        unsettled,
        next: end,
        highest_generation,
        dropped,
    })
}

/// It names blocks of an extent that there is.
fn is_sound(layout: &Layout, record: &SlotSums) -> bool {
    let end = usize::from(record.first) + record.sums.len();
    layout.place(record.slot).is_some() && end <= layout.extents.blocks() as usize
}

/// Why a slot cannot hold what it says.
fn fault_of(layout: &Layout, catalog: &Catalog, slot: u32, entry: &Entry) -> Option<String> {
    if !catalog.layers.contains_key(&entry.layer) {
        return Some(format!("is of layer {}, which is not there", entry.layer));
    }
    if entry.kind == Kind::Data && layout.place(slot).is_none() {
        return Some("holds data and has no place for it".into());
    }
    if entry.mask & !layout.extents.full() != 0 || entry.mask == 0 {
        return Some(format!("has granules {:#x}", entry.mask));
    }
    let is_run = entry.kind == Kind::Zero && entry.mask == layout.extents.full();
    if entry.count != 1 && !is_run || entry.count == 0 || entry.vextent.checked_add(entry.count).is_none() {
        return Some(format!("speaks of {} extents from {} on", entry.count, entry.vextent));
    }
    None
}

fn damaged(what: String, offset: u64) -> StoreError {
    StoreError::Damaged { what, offset }
}

/// Fill `slots` from the newest copy of each page that counts. Returns the highest generation seen.
fn read_table(medium: &dyn Medium, superblock: &Superblock, slots: &mut Slots) -> Result<u64, StoreError> {
    let layout = &superblock.layout;
    let mut highest = superblock.table_generation;
    let mut copies = [zeroed(AT_ONCE as usize), zeroed(AT_ONCE as usize)];
    let mut number = 0;
    for zone in &layout.zones {
        let mut page = 0;
        while page < zone.pages() {
            let count = AT_ONCE.min(zone.pages() - page);
            for (copy, into) in (0..).zip(&mut copies) {
                read_into(medium, zone.page_at(page, copy), &mut into[..count as usize])?;
            }
            for n in 0..count {
                highest = highest.max(load_page(superblock, slots, number + n, &copies, n as usize)?);
            }
            number += count;
            page += count;
        }
    }
    Ok(highest)
}

fn load_page(
    superblock: &Superblock,
    slots: &mut Slots,
    number: u32,
    copies: &[Box<[Block]>; 2],
    at: usize,
) -> Result<u64, StoreError> {
    let (zone, in_zone, first) = superblock.layout.page(number);
    let block = |copy: u8| &copies[usize::from(copy)][at].0;
    let generations = [0, 1].map(|copy| Page::generation(&superblock.uuid, number, block(copy)));
    let highest = generations.into_iter().flatten().max().unwrap_or(0);
    let mut both = [0, 1];
    both.sort_by_key(|copy| std::cmp::Reverse(generations[usize::from(*copy)]));
    let counts =
        |copy: &u8| generations[usize::from(*copy)].is_some_and(|g| g <= superblock.table_generation);
    let mut newest_first = both.into_iter().filter(counts);
    let decoded = |copy| Page::decode(&superblock.uuid, number, block(copy)).map(|page| (copy, page));
    let Some((copy, page)) = newest_first.find_map(decoded) else {
        return Err(damaged(
            format!("both copies of page {number} of the table are bad"),
            zone.page_at(in_zone, 0),
        ));
    };
    let other = 1 - copy;
    let claimed =
        Page::claimed(&superblock.uuid, number, block(other)).filter(|claimed| *claimed > page.generation);
    if claimed.is_some_and(|claimed| claimed <= superblock.table_generation) {
        // What the table said since is lost, and volumes would have what they had long ago.
        let what = format!("the newer copy of page {number} of the table is bad");
        return Err(damaged(what, zone.page_at(in_zone, other)));
    }
    let each = superblock.layout.extents.sum_pages();
    if page.sums.iter().any(|(n, _)| n >= each) {
        let what = format!("page {number} of the table tells of checksums that cannot be");
        return Err(damaged(what, zone.page_at(in_zone, copy)));
    }
    let there = page.entries.len().min((zone.first + zone.slots() - first) as usize);
    slots.load(first, &page.entries[..there]);
    slots.set_copy(number, copy);
    slots.set_sums(number, page.sums);
    if claimed.is_some() || highest > superblock.table_generation {
        // A checkpoint that did not end has written the other copy, or a part of it. It must not count one day, or seem to have
        // counted, because generations went on.
        slots.set_dirty(number);
    }
    Ok(highest)
}

/// Fill `sums` from the pages that the table says there are.
fn read_sums(
    medium: &dyn Medium,
    superblock: &Superblock,
    slots: &Slots,
    sums: &Sums,
) -> Result<(), StoreError> {
    let layout = &superblock.layout;
    let each = layout.extents.sum_pages();
    let of_table = |page: u32| slots.sums(page).iter().map(move |(n, copy)| (page * each + n, copy));
    let mut pages = (0..layout.pages()).flat_map(of_table).peekable();
    let mut blocks = zeroed(AT_ONCE as usize);
    while let Some((first, copy)) = pages.next() {
        let at = layout.sum_page_at(first, copy);
        let mut count = 1;
        while count < AT_ONCE {
            let next = at + u64::from(count) * BLOCK;
            let follows =
                |(page, copy): &(u32, u8)| *page == first + count && layout.sum_page_at(*page, *copy) == next;
            if pages.next_if(follows).is_none() {
                break;
            }
            count += 1;
        }
        let blocks = &mut blocks[..count as usize];
        read_into(medium, at, blocks)?;
        for (number, block) in (first..).zip(blocks.iter()) {
            let page = SumsPage::decode(&superblock.uuid, number, &block.0).ok_or_else(|| {
                damaged(format!("page {number} of checksums is bad"), at + u64::from(number - first) * BLOCK)
            })?;
            sums.load(number, &page.sums);
        }
    }
    Ok(())
}

fn read_catalog(medium: &dyn Medium, superblock: &Superblock) -> Result<Catalog, StoreError> {
    let at = superblock.layout.catalog_copy(superblock.catalog_copy);
    let len = superblock.catalog_bytes as usize;
    let blocks = read(medium, at, len.div_ceil(BLOCK as usize))?;
    let bytes: Vec<u8> = blocks.iter().flat_map(|block| block.0).take(len).collect();
    let bad = || damaged("the catalog of volumes and snapshots is not what was written".into(), at);
    if crc32c::crc32c(&bytes) != superblock.catalog_crc {
        return Err(bad());
    }
    Catalog::decode(&bytes).ok_or_else(bad)
}

/// What the journal says since the checkpoint.
struct Replay {
    /// Groups of records, each with the number behind its last block; each record with the number of its own.
    groups: Vec<(u64, Vec<(u64, Record)>)>,
    /// Records that are in no whole group, or behind a gap.
    late: Vec<(u64, Record)>,
    /// Behind the last whole group.
    end: u64,
    /// What is before this was durable, whatever happened to power.
    durable: u64,
    /// For openers by the first number that they wrote: what they wrote in place for their records before this one was durable.
    settled: BTreeMap<u64, u64>,
}

impl Replay {
    /// A later opener may have found that something was not written, and knows nothing of what is under way.
    fn settle(&mut self, head: &JournalHead) {
        let settled = self.settled.entry(head.began).or_default();
        *settled = head.settled.max(*settled);
    }

    /// What was written in place for the record with this number is there.
    fn is_settled(&self, seq: u64) -> bool {
        self.settled.range(..=seq).next_back().is_some_and(|(_, settled)| seq < *settled)
    }

    fn read(medium: &dyn Medium, superblock: &Superblock) -> Result<Self, StoreError> {
        let layout = &superblock.layout;
        let mut ring = Ring { medium, superblock, chunk: None };
        let (groups, late) = (Vec::new(), Vec::new());
        let mut this = Self {
            groups,
            late,
            end: superblock.replay_from,
            durable: superblock.covered,
            settled: BTreeMap::new(),
        };
        let mut incarnation = superblock.replay_incarnation;
        let mut seq = superblock.replay_from;
        let mut group = Vec::new();
        while seq < superblock.replay_from + u64::from(layout.journal_blocks) {
            if seq == superblock.began {
                incarnation = superblock.incarnation;
            }
            let Some(block) = ring.block(seq)?.filter(|block| {
                let head = &block.head;
                // A later opener's first block is where the one before it left off.
                head.incarnation == incarnation
                    || head.incarnation > incarnation && head.began == seq
                    || mutants::is(Mutant::StaleIncarnation)
            }) else {
                break;
            };
            incarnation = block.head.incarnation;
            this.durable = this.durable.max(block.head.marked);
            this.settle(&block.head);
            group.extend(block.records.into_iter().map(|record| (seq, record)));
            seq += 1;
            if block.head.last {
                this.groups.push((seq, std::mem::take(&mut group)));
                this.end = seq;
            }
        }
        this.late = group;
        // Blocks are under way together, so a later one may be there without this one. Its mark is no less true, and one that says
        // that this block was durable proves that it was there.
        for later in seq + 1..superblock.replay_from + u64::from(layout.journal_blocks) {
            let block = ring.block(later)?.filter(|block| block.head.incarnation >= incarnation);
            let Some(block) = block else { continue };
            let marked = block.head.marked;
            if marked > seq {
                let at = layout.journal_block(seq);
                return Err(damaged(
                    format!("block {seq} of the journal is missing, and block {later} is there"),
                    at,
                ));
            }
            this.durable = this.durable.max(marked);
            this.settle(&block.head);
            this.late.extend(block.records.into_iter().map(|record| (later, record)));
        }
        if this.end < this.durable {
            let at = layout.journal_block(this.end);
            return Err(damaged(format!("block {} of the journal is missing", this.end), at));
        }
        Ok(this)
    }
}

/// Reads the journal in large pieces.
struct Ring<'a> {
    medium: &'a dyn Medium,
    superblock: &'a Superblock,
    /// The first block's position, and blocks.
    chunk: Option<(u64, Box<[Block]>)>,
}

impl Ring<'_> {
    fn block(&mut self, seq: u64) -> Result<Option<JournalBlock>, StoreError> {
        let layout = &self.superblock.layout;
        let position = seq % u64::from(layout.journal_blocks);
        let first = position / u64::from(AT_ONCE) * u64::from(AT_ONCE);
        if self.chunk.as_ref().is_none_or(|chunk| chunk.0 != first) {
            let count = u64::from(AT_ONCE).min(u64::from(layout.journal_blocks) - first);
            self.chunk = Some((first, read(self.medium, layout.journal_at + first * BLOCK, count as usize)?));
        }
        let Some((first, blocks)) = &self.chunk else { return Ok(None) };
        let block = JournalBlock::decode(&self.superblock.uuid, &blocks[(position - first) as usize].0);
        Ok(block.filter(|block| block.head.seq == seq))
    }
}

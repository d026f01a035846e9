//! The table, the catalog and the superblock: what the journal said, where it is not needed any more.
//!
//! Pages that changed are written to their other copy while requests go on, so a page may say more than the journal did when the
//! checkpoint began. That is no harm: records are absolute, so replay from there makes the same of it. Before the superblock says
//! that the copies count, a flush makes them durable, with the data that they speak of.

use std::collections::BTreeMap;

use super::{Keeper, Running};
use crate::error::StoreError;
use crate::format::{zeroed, Block, Page, SumsPage, Superblock};
use crate::geometry::BLOCK;
use crate::io::{errno, Action, Data, Io, Purpose};
use crate::mutants::{self, Mutant};

/// Pages written at one time.
const UNDER_WAY: usize = 16;
/// Nanoseconds until one that failed is tried again.
const AGAIN_NS: u64 = 1_000_000_000;

pub(super) struct Checkpoint {
    /// The superblock that ends it.
    next: Superblock,
    waiting: Vec<u32>,
    /// Pages of checksums that wait,
    waiting_sums: Vec<u32>,
    /// and all of them with the copy that they are written to, which pages of the table tell of.
    sums: BTreeMap<u32, u8>,
    under_way: usize,
    /// Pages and the copy that they were written to.
    written: Vec<(u32, u8)>,
    stage: Stage,
    failed: bool,
    /// When the superblock is written again.
    again: Option<u64>,
}

#[derive(PartialEq, Eq)]
enum Stage {
    Pages,
    Catalog,
    Flush,
    Superblock,
}

impl Keeper {
    pub(super) fn run_checkpoint(&mut self) {
        if self.checkpoint.is_none() {
            if !self.is_checkpoint_due() || self.now < self.checkpoint_after {
                return;
            }
            self.begin_checkpoint();
        }
        self.write_pages();
        if let Some(checkpoint) = &mut self.checkpoint {
            if checkpoint.again.take_if(|at| *at <= self.now).is_some() {
                self.write_superblock();
            }
        }
    }

    pub(super) fn is_checkpoint_due(&self) -> bool {
        let (used, all) = self.journal.used();
        // Requests are not the only ones that wait for room.
        let has_work = used > all / 2 || self.mending.is_due();
        let due = has_work && !self.paused || !self.journal.has_room() || self.wants_checkpoint();
        // Who gave up closing writes nothing more.
        let closed = self.closing && self.running.is_none();
        due && !closed && self.failed.is_none() && self.possessed
    }

    fn begin_checkpoint(&mut self) {
        self.mend_pages();
        self.highest_generation += 1;
        let mut next = self.superblock.clone();
        // The one that takes possession has its generation already.
        next.generation += u64::from(self.possessed);
        next.table_generation = self.highest_generation;
        // What is being written in place may have its old checksum yet, which the journal alone tells apart from the new one.
        next.replay_from = match mutants::is(Mutant::ForgetInPlace) {
            true => self.journal.committed(),
            false => self.ended_in_place(),
        };
        next.replay_incarnation = self.journal.incarnation();
        next.catalog_copy = 1 - next.catalog_copy;
        let waiting_sums = self.slots.take_dirty_sums();
        let copy = |page: &u32| (*page, self.slots.other_copy_of_sums(*page));
        self.checkpoint = Some(Checkpoint {
            next,
            sums: waiting_sums.iter().map(copy).collect(),
            waiting_sums,
            waiting: self.slots.take_dirty(),
            under_way: 0,
            written: Vec::new(),
            stage: Stage::Pages,
            failed: false,
            again: None,
        });
    }

    fn write_pages(&mut self) {
        while let Some(io) = self.next_page() {
            self.out.push_back(io);
        }
        let Some(checkpoint) = &self.checkpoint else { return };
        if checkpoint.stage == Stage::Pages && checkpoint.under_way == 0 {
            match checkpoint.failed {
                true => self.end_checkpoint(false),
                false => self.write_catalog(),
            }
        }
    }

    /// The next page to be written, if there is one and one may go out.
    fn next_page(&mut self) -> Option<Io> {
        let checkpoint = self.checkpoint.as_mut()?;
        if checkpoint.stage != Stage::Pages || checkpoint.under_way == UNDER_WAY || checkpoint.failed {
            return None;
        }
        let layout = &checkpoint.next.layout;
        let mut block = zeroed(1);
        if let Some(page) = checkpoint.waiting_sums.pop() {
            let copy = checkpoint.sums.get(&page).copied().unwrap_or(0);
            let sums = SumsPage { number: page, sums: self.sums.page(page) };
            sums.encode(&checkpoint.next.uuid, &mut block[0]);
            checkpoint.under_way += 1;
            return Some(page_write(layout.sum_page_at(page, copy), block, Purpose::SumsPage));
        }
        let page = checkpoint.waiting.pop()?;
        let (zone, in_zone, first) = layout.page(page);
        let other = u8::from(!mutants::is(Mutant::PageOverOnlyCopy));
        let copy = self.slots.copy(page) ^ other;
        let entries = self.slots.page(first, zone.first + zone.slots());
        self.slots.pack(first, first + entries.len() as u32);
        let generation = checkpoint.next.table_generation;
        let mut sums = self.slots.sums(page);
        checkpoint.new_sums(page).for_each(|(n, copy)| sums.set(n, copy));
        Page { number: page, generation, sums, entries }.encode(&checkpoint.next.uuid, &mut block[0]);
        checkpoint.under_way += 1;
        Some(page_write(zone.page_at(in_zone, copy), block, Purpose::Page { page, copy }))
    }

    fn write_catalog(&mut self) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        checkpoint.stage = Stage::Catalog;
        let bytes = self.catalog.encode();
        checkpoint.next.catalog_bytes = bytes.len() as u32;
        checkpoint.next.catalog_crc = crc32c::crc32c(&bytes);
        let mut blocks = zeroed(bytes.len().div_ceil(BLOCK as usize).max(1));
        for (block, chunk) in blocks.iter_mut().zip(bytes.chunks(BLOCK as usize)) {
            block.0[..chunk.len()].copy_from_slice(chunk);
        }
        let offset = checkpoint.next.layout.catalog_copy(checkpoint.next.catalog_copy);
        self.out.push_back(Io {
            action: Action::Write { durable: false },
            offset,
            len: blocks.len() as u64 * BLOCK,
            data: Data::Own(blocks),
            purpose: Purpose::Catalog,
        });
    }

    /// Something that the checkpoint asked for, at byte `offset` of the drive, is done.
    pub(super) fn checkpointed(&mut self, purpose: Purpose, offset: u64, result: Result<(), i32>) {
        if let Err(errno) = result {
            self.checkpoint_failed(offset, errno);
        }
        let Some(checkpoint) = &mut self.checkpoint else { return };
        if result.is_err() {
            if purpose == Purpose::Superblock && self.possessed && !self.closing {
                // It may be on the drive all the same, and count. So what it names stays as it is until it is there for certain.
                checkpoint.again = Some(self.now + AGAIN_NS);
                return;
            }
            checkpoint.failed = true;
        }
        match purpose {
            Purpose::Page { page, copy } => {
                checkpoint.under_way -= 1;
                // Written or not: the copy is to be overwritten before it may count.
                checkpoint.written.push((page, copy));
                self.write_pages();
            }
            Purpose::SumsPage => {
                checkpoint.under_way -= 1;
                self.write_pages();
            }
            _ if checkpoint.failed => self.end_checkpoint(false),
            Purpose::Catalog if mutants::is(Mutant::NoFlushBeforeSuperblock) => {
                checkpoint.next.covered = self.journal.committed();
                self.write_superblock();
            }
            Purpose::Catalog => {
                checkpoint.stage = Stage::Flush;
                // Pages may hold what records before this one say, and the flush covers their data.
                checkpoint.next.covered = self.journal.committed();
                self.out.push_back(Io {
                    action: Action::Flush,
                    offset: 0,
                    len: 0,
                    data: Data::None,
                    purpose: Purpose::CheckpointFlush,
                });
            }
            Purpose::CheckpointFlush => self.write_superblock(),
            _ => self.end_checkpoint(true),
        }
    }

    /// Say so, once until one is written. Who closes the store waits no longer: the journal has all that a checkpoint would.
    fn checkpoint_failed(&mut self, offset: u64, errno: i32) {
        let error = || std::io::Error::from_raw_os_error(errno);
        if !std::mem::replace(&mut self.checkpoint_troubled, true) {
            let error = error();
            self.events.push_back(format!("a checkpoint could not be written: {error}; it is tried again"));
        }
        if let Some((number, _)) = self.running.take_if(|(_, running)| matches!(running, Running::Closing)) {
            let error = StoreError::Drive { what: "written", offset, source: error() };
            self.answers.push_back((number, Err(error)));
        }
    }

    fn write_superblock(&mut self) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        checkpoint.stage = Stage::Superblock;
        let io = superblock_write(&checkpoint.next, Purpose::Superblock);
        self.out.push_back(io);
    }

    /// What was replayed may be in the drive's cache only; the superblock must not become durable before it.
    pub(super) fn possess(&mut self) {
        self.out.push_back(Io {
            action: Action::Flush,
            offset: 0,
            len: 0,
            data: Data::None,
            purpose: Purpose::PossessionFlush,
        });
    }

    pub(super) fn write_possession(&mut self, result: Result<(), i32>) {
        if let Err(errno) = result {
            return self.command_failed(errno);
        }
        if self.checkpoint_first {
            // The journal goes on where the last records that count end, and overwrites what those behind say was being written.
            self.begin_checkpoint();
            return self.write_pages();
        }
        self.out.push_back(superblock_write(&self.superblock, Purpose::Possession));
    }

    pub(super) fn possession_written(&mut self, result: Result<(), i32>) {
        match result {
            Ok(()) => {
                self.possessed = true;
                self.command_flushed(Ok(()));
            }
            Err(errno) => self.command_failed(errno),
        }
    }

    fn end_checkpoint(&mut self, succeeded: bool) {
        let Some(checkpoint) = self.checkpoint.take() else { return };
        self.checkpoint_troubled &= !succeeded;
        if !succeeded {
            let pages = checkpoint.written.iter().map(|(page, _)| *page).chain(checkpoint.waiting);
            pages.for_each(|page| self.slots.set_dirty(page));
            checkpoint.sums.keys().for_each(|page| self.slots.set_dirty_sums(*page));
            self.checkpoint_after = self.now + AGAIN_NS;
            if !self.possessed {
                self.command_failed(errno::EIO);
            }
            return;
        }
        for (page, copy) in &checkpoint.written {
            self.slots.set_copy(*page, *copy);
            let mut sums = self.slots.sums(*page);
            checkpoint.new_sums(*page).for_each(|(n, copy)| sums.set(n, copy));
            self.slots.set_sums(*page, sums);
        }
        // The store may have grown meanwhile, of which the next checkpoint tells.
        let zones = checkpoint.next.layout.zones.len();
        let layout = self.superblock.layout.clone();
        self.superblock = Superblock { layout, ..checkpoint.next };
        self.journal.release(self.superblock.replay_from, self.superblock.covered);
        self.update_unmarked();
        let throttled = std::mem::take(&mut self.throttled);
        self.requests.extend(throttled);
        match self.possessed {
            true => self.command_checkpointed(zones),
            false => self.possession_written(Ok(())),
        }
    }
}

impl Checkpoint {
    /// Of a page of the table: its pages of checksums that are written, and the copies.
    fn new_sums(&self, page: u32) -> impl Iterator<Item = (u32, u8)> + '_ {
        let each = self.next.layout.extents.sum_pages();
        self.sums.range(page * each..(page + 1) * each).map(move |(one, copy)| (one % each, *copy))
    }
}

fn page_write(offset: u64, block: Box<[Block]>, purpose: Purpose) -> Io {
    Io { action: Action::Write { durable: false }, offset, len: BLOCK, data: Data::Own(block), purpose }
}

fn superblock_write(superblock: &Superblock, purpose: Purpose) -> Io {
    let mut block = zeroed(1);
    block[0] = superblock.encode();
    Io {
        action: Action::Write { durable: true },
        offset: superblock.at(),
        len: BLOCK,
        data: Data::Own(block),
        purpose,
    }
}

#[cfg(test)]
mod tests {
    use crate::io::RequestKind;
    use crate::testing::Calm;
    use crate::{Command, StoreError};

    const EXTENT: u64 = 16 << 10;

    /// A gateway that was told to stop waited for ever for a drive that had gone.
    #[test]
    fn a_store_is_closed_although_its_checkpoint_cannot_be_written() {
        for superblock in [false, true] {
            let mut store = Calm::new(64 << 20, EXTENT);
            let (volume, _) = store.volume("one", 64 * EXTENT);
            store.request(volume, RequestKind::Write, 0, 4 * EXTENT);
            store.ask(Command::Close { volume }).unwrap();
            let layout = store.keeper.layout();
            let table = layout.zones[0].table..layout.zones[0].data;
            store.refuses = if superblock { 0..layout.journal_at } else { table };
            let error = store.ask(Command::Shutdown).map(drop).unwrap_err();
            assert!(matches!(error, StoreError::Drive { what: "written", .. }), "{error}");
            while store.turn() {}
            assert!(store.keeper.is_idle() && !store.keeper.needs_turns());
            let events: Vec<_> = std::iter::from_fn(|| store.keeper.next_event()).collect();
            assert_eq!(events.len(), 1, "{events:?}");
        }
    }

    #[test]
    fn a_checkpoint_that_fails_is_told_once_and_tried_again() {
        let mut store = Calm::new(64 << 20, EXTENT);
        store.refuses = 0..store.keeper.layout().journal_at;
        store.keeper.command(9, Command::Grow { size: 128 << 20 });
        let told = |store: &mut Calm| std::iter::from_fn(|| store.keeper.next_event()).count();
        // Some seconds, as each turn is a microsecond.
        for _ in 0..3_000_000 {
            store.turn();
        }
        assert_eq!(told(&mut store), 1);
        store.refuses = 0..0;
        while store.keeper.next_answer().is_none() {
            store.turn();
        }
        assert_eq!(told(&mut store), 0);
    }
}

//! The table, the catalog and the superblock: what the journal said, where it is not needed any more.
//!
//! Pages that changed are written to their other copy while requests go on, so a page may say more than the journal did when the
//! checkpoint began. That is no harm: records are absolute, so replay from there makes the same of it. Before the superblock says
//! that the copies count, a flush makes them durable, with the data that they speak of.

use super::Keeper;
use crate::format::{zeroed, Page, Superblock};
use crate::geometry::BLOCK;
use crate::io::{Action, Data, Io, Purpose};
use crate::mutants::{self, Mutant};

/// Pages written at one time.
const UNDER_WAY: usize = 16;
/// Nanoseconds until one that failed is tried again.
const AGAIN_NS: u64 = 1_000_000_000;

pub(super) struct Checkpoint {
    /// The superblock that ends it.
    next: Superblock,
    waiting: Vec<u32>,
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
        let due = used > all / 2 && !self.paused || !self.journal.has_room() || self.wants_checkpoint();
        due && self.failed.is_none() && self.possessed
    }

    fn begin_checkpoint(&mut self) {
        self.highest_generation += 1;
        let mut next = self.superblock.clone();
        next.generation += 1;
        next.table_generation = self.highest_generation;
        next.replay_from = self.journal.committed();
        next.replay_incarnation = self.journal.incarnation();
        next.catalog_copy = 1 - next.catalog_copy;
        self.checkpoint = Some(Checkpoint {
            next,
            waiting: self.slots.take_dirty(),
            under_way: 0,
            written: Vec::new(),
            stage: Stage::Pages,
            failed: false,
            again: None,
        });
    }

    fn write_pages(&mut self) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        while checkpoint.stage == Stage::Pages && checkpoint.under_way < UNDER_WAY && !checkpoint.failed {
            let Some(page) = checkpoint.waiting.pop() else { break };
            let (zone, in_zone, first) = checkpoint.next.layout.page(page);
            let other = u8::from(!mutants::is(Mutant::PageOverOnlyCopy));
            let copy = self.slots.copy(page) ^ other;
            let mut block = zeroed(1);
            let entries = self.slots.page(first, zone.first + zone.slots());
            self.slots.pack(first, first + entries.len() as u32);
            Page::encode(
                &checkpoint.next.uuid,
                page,
                checkpoint.next.table_generation,
                &entries,
                &mut block[0],
            );
            checkpoint.under_way += 1;
            self.out.push_back(Io {
                action: Action::Write { durable: false },
                offset: zone.page_at(in_zone, copy),
                len: BLOCK,
                data: Data::Own(block),
                purpose: Purpose::Page { page, copy },
            });
        }
        if checkpoint.stage == Stage::Pages && checkpoint.under_way == 0 {
            match checkpoint.failed {
                true => self.end_checkpoint(false),
                false => self.write_catalog(),
            }
        }
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

    /// Something that the checkpoint asked for is done.
    pub(super) fn checkpointed(&mut self, purpose: Purpose, result: Result<(), i32>) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        if let Err(errno) = result {
            let error = std::io::Error::from_raw_os_error(errno);
            self.events.push_back(format!("a checkpoint could not be written: {error}; it is tried again"));
            if purpose == Purpose::Superblock {
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
        if !succeeded {
            let pages = checkpoint.written.iter().map(|(page, _)| *page).chain(checkpoint.waiting);
            pages.for_each(|page| self.slots.set_dirty(page));
            self.checkpoint_after = self.now + AGAIN_NS;
            return;
        }
        for (page, copy) in &checkpoint.written {
            self.slots.set_copy(*page, *copy);
        }
        // The store may have grown meanwhile, of which the next checkpoint tells.
        let zones = checkpoint.next.layout.zones.len();
        let layout = self.superblock.layout.clone();
        self.superblock = Superblock { layout, ..checkpoint.next };
        self.journal.release(self.superblock.replay_from, self.superblock.covered);
        self.update_unmarked();
        let throttled = std::mem::take(&mut self.throttled);
        self.requests.extend(throttled);
        self.command_checkpointed(zones);
    }
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

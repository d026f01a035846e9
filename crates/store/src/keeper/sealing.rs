//! Blocks that have checksums or are encrypted on their way to the drive and back.
//!
//! The guest's bytes are copied before anything is made of them: it may change its memory while the drive reads it, and then the
//! drive would hold what the checksum does not fit. All writes of a volume with integrity come here. One that goes to a new place
//! takes its checksums into the record that makes it count. One in place has them in the journal, durably, before it begins, so
//! that a crash leaves a block that was being written apart from one that is rotten.

use std::sync::Arc;

use super::operations::{Merge, Operation, Stage};
use super::{Commit, Keeper, Then};
use crate::cipher::Cipher;
use crate::format::{zeroed, Block, Entry, Kind, SlotSums};
use crate::geometry::{Layout, BLOCK};
use crate::io::{errno, Action, Data, Io, Purpose, Request, RequestKind};
use crate::map::Run;
use crate::mutants::{self, Mutant};
use crate::sums::checksum;

/// Bytes that a step takes at most: they are copied and sealed in one turn.
pub(super) const MOST_SEALED: u64 = 256 << 10;
/// In-place writes after which a flush says that they are done: as many are looked at after a crash.
const MOST_UNSETTLED: u32 = 1024;

/// How the blocks of a step are sealed.
#[derive(Clone)]
pub(super) struct Sealing {
    pub integrity: bool,
    pub cipher: Option<Arc<dyn Cipher>>,
    /// Number in the volume of the first block.
    pub first: u64,
    /// They are the live layer's, and stay where they are.
    pub in_place: bool,
}

/// What is being written in place.
pub(super) struct Overwrite {
    /// The journal's block that says so.
    seq: u64,
    pub at: u64,
    pub sums: Vec<u32>,
}

/// Whole blocks at the begin of a range: 0 if it begins or ends within the first.
fn whole_blocks(request: &Request, len: u64) -> u64 {
    match request.offset.is_multiple_of(BLOCK) {
        true => len.min(MOST_SEALED) / BLOCK * BLOCK,
        false => 0,
    }
}

impl Keeper {
    /// How the blocks of `volume` from byte `offset` on are sealed; None if they are not.
    pub(super) fn sealing(&self, volume: u32, offset: u64) -> Option<Sealing> {
        let seal = &self.catalog.volumes.get(&volume)?.seal;
        if seal.is_none() {
            return None;
        }
        let cipher = self.open.get(&volume).and_then(|open| open.cipher.clone());
        Some(Sealing { integrity: seal.integrity, cipher, first: offset / BLOCK, in_place: false })
    }

    /// It was opened by somebody who has no key, only to be looked at.
    pub(super) fn is_locked(&self, volume: u32) -> bool {
        let has_key = self.catalog.volumes.get(&volume).is_some_and(|volume| !volume.seal.key.is_empty());
        has_key && self.open.get(&volume).is_some_and(|open| open.cipher.is_none())
    }

    /// Bytes of one extent that the live layer has at byte `at`, which are written there.
    pub(super) fn seal_in_place(&mut self, request: Request, at: u64, len: u64, sealing: Sealing) {
        let extents = self.extents();
        let vextent = (request.offset >> extents.shift) as u32;
        if self.blocks(&request, vextent) {
            return;
        }
        let len = len.min(extents.bytes() - request.offset % extents.bytes());
        let sealing = Sealing { in_place: true, ..sealing };
        let zeroes = matches!(request.kind, RequestKind::Zero { .. });
        let whole = whole_blocks(&request, len);
        let bytes = if whole > 0 { whole } else { len.min(BLOCK - request.offset % BLOCK) };
        if whole == 0 && !sealing.integrity && !self.has_to_itself(&request) {
            return;
        }
        let mut operation = self.step(request, bytes, vec![vextent], Vec::new(), Commit::default());
        operation.sealing = Some(sealing);
        if whole == 0 {
            let within = request.offset % BLOCK;
            let (start, place) = (within as usize, at - within);
            let merge = match zeroes {
                true => Merge::Zeroes { at: start, len: bytes },
                false => Merge::Guest { at: start, len: bytes },
            };
            operation.stage = Stage::Merge { merge, from: place, to: place };
            return self.begin(operation, |id| read(id, place, zeroed(1)));
        }
        operation.stage = Stage::Write { to: at };
        let buffer = zeroed((whole / BLOCK) as usize);
        match zeroes {
            true => {
                let id = self.enter(operation);
                self.write_buffer(id, at, buffer);
            }
            false => self.begin(operation, |id| fill(id, &request, whole, buffer)),
        }
    }

    /// Begin to write whole blocks of the guest's to byte `at`, where they are not yet.
    pub(super) fn begin_write(&mut self, mut operation: Operation, request: &Request, at: u64, len: u64) {
        match operation.sealing {
            None => self.begin(operation, |id| super::requests::guest_write(id, request, at, len)),
            Some(_) => {
                operation.stage = Stage::Write { to: at };
                let buffer = zeroed((len / BLOCK) as usize);
                self.begin(operation, |id| fill(id, request, len, buffer));
            }
        }
    }

    /// The buffer of step `id` is complete and goes to byte `to`: seal it. None if the journal comes first.
    pub(super) fn seal(&mut self, id: u32, to: u64, mut buffer: Box<[Block]>) -> Option<Box<[Block]>> {
        let is_doubtful = self.may_come_back(to);
        let layout = &self.superblock.layout;
        let operation = self.operations[id as usize].as_mut()?;
        let Some(sealing) = &operation.sealing else { return Some(buffer) };
        if let Some(cipher) = &sealing.cipher {
            cipher.encrypt(sealing.first, &mut buffer);
        }
        if !sealing.integrity {
            return Some(buffer);
        }
        if !sealing.in_place {
            operation.commit.sums = sums_of(layout, to, &buffer, false);
        }
        if !sealing.in_place && !is_doubtful || mutants::is(Mutant::DataBeforeIntent) {
            return Some(buffer);
        }
        let sums = sums_of(layout, to, &buffer, true);
        operation.stage = Stage::Intend { to, buffer };
        let commit = Commit { sums, durable: true, then: Then::Operation(id), ..Commit::default() };
        match self.failed {
            Some(errno) => self.finish(id, Err(errno)),
            None => self.record(commit),
        }
        None
    }

    /// After a loss of power the block at byte `at` may count as it was before: it was given up, its slot was not, and nothing says
    /// durably that it was.
    fn may_come_back(&self, at: u64) -> bool {
        let given_up = self.layout().slot_at(at).and_then(|(slot, _)| self.given_up.get(&slot));
        given_up.is_some_and(|seq| *seq >= self.journal.marked())
    }

    /// Block `seq` of the journal says what `slot` holds from here on.
    pub(super) fn note_given_up(&mut self, slot: u32, entry: &Entry, seq: u64) {
        let before = self.slots.get(slot);
        if entry.kind == Kind::Data && before.mask & !entry.mask != 0 {
            if self.given_up.len() >= MOST_GIVEN_UP {
                let marked = self.journal.marked();
                self.given_up.retain(|_, seq| *seq >= marked);
            }
            self.given_up.insert(slot, seq);
        }
    }

    /// The journal says, in block `seq`, what step `id` is about to write to byte `to`.
    pub(super) fn overwrite(&mut self, id: u32, seq: u64, to: u64, buffer: Box<[Block]>) {
        let Some(operation) = self.operations[id as usize].as_mut() else { return };
        let sums = buffer.iter().map(|block| checksum(&block.0)).collect();
        operation.overwrite = Some(Overwrite { seq, at: to, sums });
        *self.in_place.entry(seq).or_default() += 1;
        self.unsettled += 1;
        if self.unsettled > MOST_UNSETTLED {
            self.flushing.wait_once();
        }
        operation.stage = Stage::Record;
        self.out.push_back(write(id, to, buffer));
    }

    /// What a step wrote in place is there, or not.
    pub(super) fn end_overwrite(&mut self, overwrite: &Overwrite, succeeded: bool) {
        if let Some(count) = self.in_place.get_mut(&overwrite.seq) {
            *count -= 1;
            if *count == 0 {
                self.in_place.remove(&overwrite.seq);
            }
        }
        if succeeded {
            self.set_sums(overwrite.at, &overwrite.sums);
        }
    }

    pub(super) fn set_sums(&mut self, at: u64, sums: &[u32]) {
        for (at, sum) in (at..).step_by(BLOCK as usize).zip(sums) {
            self.sums.set(at, *sum).into_iter().for_each(|page| self.slots.set_dirty_sums(page));
        }
    }

    /// Records before this number speak of nothing that is being written in place.
    pub(super) fn ended_in_place(&self) -> u64 {
        let oldest = self.in_place.first_key_value().map(|(seq, _)| *seq);
        oldest.unwrap_or(u64::MAX).min(self.journal.committed())
    }

    /// Blocks that were read from byte `from` have their checksums; then they are decrypted.
    pub(super) fn unseal(&mut self, id: u32, from: u64, buffer: &mut [Block]) -> Result<(), i32> {
        let Some(operation) = self.operations[id as usize].as_ref() else { return Ok(()) };
        let Some(sealing) = &operation.sealing else { return Ok(()) };
        if sealing.integrity {
            if let Some(bad) = self.sums.first_bad(from, buffer) {
                let (volume, block) = (operation.volume, sealing.first + bad as u64);
                let at = from + bad as u64 * BLOCK;
                let name = self.catalog.volumes.get(&volume).map_or("", |volume| &volume.name);
                self.report_block(&format!("volume {name:?}"), block * BLOCK, at, NOT_AS_WRITTEN);
                return Err(errno::EIO);
            }
        }
        if let Some(cipher) = &sealing.cipher {
            cipher.decrypt(sealing.first, buffer);
        }
        Ok(())
    }

    /// Tell of the block at byte `byte` of a volume or snapshot, byte `at` of the drive, unless it was told of.
    pub(super) fn report_block(&mut self, whose: &str, byte: u64, at: u64, what: &str) -> String {
        let fault = format!("the block at byte {byte} of {whose}, byte {at} of the drive, {what}");
        if self.bad.len() < MOST_BAD && self.bad.insert(at) {
            self.events.push_back(fault.clone());
        }
        fault
    }

    /// A read that its reactor could not do by itself: of parts of blocks, or of blocks that were being written.
    pub(super) fn plan_read(&mut self, request: Request) {
        let extents = self.extents();
        let vextent = (request.offset >> extents.shift) as u32;
        if self.blocks(&request, vextent) {
            return;
        }
        let Some(open) = self.open.get(&request.volume) else { return self.gone(&request) };
        let start = request.offset / BLOCK * BLOCK;
        let most = (request.offset + request.len).next_multiple_of(BLOCK) - start;
        let most = most.min(MOST_SEALED).min(extents.bytes() - start % extents.bytes());
        let run = open.map.read(start, most);
        let (Run::At { len, .. } | Run::Zero { len }) = run;
        let skip = request.offset - start;
        let bytes = (len - skip).min(request.len);
        let mut operation = self.step(request, bytes, vec![vextent], Vec::new(), Commit::default());
        operation.sealing = self.sealing(request.volume, start);
        let buffer = zeroed(len.div_ceil(BLOCK) as usize);
        match run {
            Run::At { at, .. } => {
                operation.stage = Stage::Check { from: at };
                self.begin(operation, |id| read(id, at, buffer));
            }
            Run::Zero { .. } => {
                operation.stage = Stage::Give;
                self.begin(operation, |id| give(id, &request, bytes, skip as usize, buffer));
            }
        }
    }

    /// The blocks of a read are here.
    pub(super) fn give_blocks(&mut self, id: u32, from: u64, mut buffer: Box<[Block]>) {
        if let Err(errno) = self.unseal(id, from, &mut buffer) {
            return self.finish(id, Err(errno));
        }
        let Some(operation) = self.operations[id as usize].as_mut() else { return };
        operation.stage = Stage::Give;
        let (Some(request), bytes) = (operation.request, operation.bytes) else { return };
        let skip = (request.offset % BLOCK) as usize;
        self.out.push_back(give(id, &request, bytes, skip, buffer));
    }
}

/// Slots with granules that were given up, after which it is seen which of them are so durably.
const MOST_GIVEN_UP: usize = 4096;
/// Of a block that has not its checksum.
pub(super) const NOT_AS_WRITTEN: &str =
    "is not what was written there; it cannot be read until it is written anew";
/// Places of bad blocks that are told of by themselves.
const MOST_BAD: usize = 1000;

/// The checksums of blocks at byte `at` of the drive, by slot.
pub(super) fn sums_of(layout: &Layout, at: u64, blocks: &[Block], in_place: bool) -> Vec<SlotSums> {
    let sums: Vec<u32> = blocks.iter().map(|block| checksum(&block.0)).collect();
    slot_sums(layout, at, &sums, in_place)
}

/// `sums` of blocks at byte `at` of the drive, by slot.
pub(super) fn slot_sums(layout: &Layout, mut at: u64, sums: &[u32], in_place: bool) -> Vec<SlotSums> {
    let mut all: Vec<SlotSums> = Vec::new();
    let mut rest = sums;
    while let (false, Some((slot, within))) = (rest.is_empty(), layout.slot_at(at)) {
        let most = (layout.extents.bytes() - within) / BLOCK;
        let (here, more) = rest.split_at(rest.len().min(most as usize));
        all.push(SlotSums { slot, first: (within / BLOCK) as u16, in_place, sums: here.to_vec() });
        at += here.len() as u64 * BLOCK;
        rest = more;
    }
    all
}

pub(super) fn read(id: u32, at: u64, buffer: Box<[Block]>) -> Io {
    Io {
        action: Action::Read,
        offset: at,
        len: buffer.len() as u64 * BLOCK,
        data: Data::Own(buffer),
        purpose: Purpose::Operation(id),
    }
}

fn write(id: u32, at: u64, buffer: Box<[Block]>) -> Io {
    Io { action: Action::Write { durable: false }, ..read(id, at, buffer) }
}

/// Copy the first `len` bytes of the request's data into `buffer`.
fn fill(id: u32, request: &Request, len: u64, buffer: Box<[Block]>) -> Io {
    let action = Action::Fill { token: request.token, skip: 0, at: 0 };
    Io { action, offset: 0, len, data: Data::Own(buffer), purpose: Purpose::Operation(id) }
}

/// Copy `len` bytes of `buffer`, from its byte `at` on, to the begin of the request's memory.
fn give(id: u32, request: &Request, len: u64, at: usize, buffer: Box<[Block]>) -> Io {
    let action = Action::Give { token: request.token, at };
    Io { action, offset: 0, len, data: Data::Own(buffer), purpose: Purpose::Operation(id) }
}

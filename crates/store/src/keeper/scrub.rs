//! Reading all that is in use, so that what has rotted is found before somebody needs it.
//!
//! First comes what the store says of itself (`inventory.rs`), then what the extents hold, in the order of the drive. Nobody is
//! kept waiting while a part is read. A block in it may be written meanwhile, moved or given up, and what was read of it then fits
//! no checksum. So a block that does not fit is read once more, by itself, with its extent locked. Only if its slot holds the same
//! layer's extent before and after that, the block is bad.

use std::collections::{HashSet, VecDeque};

use super::{Keeper, Running};
use crate::error::StoreError;
use crate::format::{zeroed, Block, Entry, Kind};
use crate::geometry::BLOCK;
use crate::io::{Action, Data, Io, Purpose};
use crate::mutants::{self, Mutant};
use crate::sums::checksum;

use super::inventory::Item;
use super::sealing::NOT_AS_WRITTEN;

/// Bytes of a read: their checksums are taken in one turn, which is some 10 us.
const MOST: u64 = 128 << 10;
/// Nanoseconds that a scrub which was held up may catch up on.
const CREDIT_NS: u64 = 20_000_000;
/// While guests keep the keeper busy a scrub has this part of its rate.
const BUSY_SHARE: u64 = 4;
/// Faults that are told one by one.
const MOST_FAULTS: usize = 100;
/// The owner of its locks.
const SCRUB: u32 = u32::MAX - 1;

/// How far a scrub is, or how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubInfo {
    /// Seconds since 1970.
    pub started_s: u64,
    /// Bytes in a second.
    pub rate: u64,
    /// Bytes of extents in use: all when it began, and those that it has been through.
    pub total: u64,
    pub done: u64,
    /// Blocks of 4096 bytes that were read, and of these the ones that have checksums.
    pub blocks: u64,
    pub verified: u64,
    /// Blocks that are not what was written,
    pub bad: u64,
    /// and those that the drive cannot read.
    pub unreadable: u64,
    /// Faults in what the store says of itself, which were mended from memory.
    pub mended: u64,
    /// The first of all these, as sentences.
    pub faults: Vec<String>,
    /// None: it runs.
    pub end: Option<ScrubEnd>,
    /// Seconds since 1970.
    pub ended_s: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrubEnd {
    /// It has been through all.
    Done,
    Cancelled,
    /// The store was closed, or its journal could not be written.
    Stopped,
}

/// See the module.
pub(super) struct Scrub {
    pub info: ScrubInfo,
    began: u64,
    /// The next of what the store says of itself; None: all of that was read.
    pub item: Option<Item>,
    /// The next slot, and the granule in it.
    at: u32,
    granule: u32,
    /// Bytes of the drive of blocks to be read once more.
    again: VecDeque<u64>,
    reading: Option<Reading>,
    /// Layers whose blocks have checksums; None: layers have changed since it was asked.
    pub sealed: Option<HashSet<u32>>,
    cancelled: bool,
    /// When the next read may begin, and when it does though guests are busy.
    next: u64,
    late: u64,
}

/// What is being read.
enum Reading {
    Item { item: Item, generation: u64 },
    Extents { held: u8 },
    Again { held: u8, slot: u32, entry: Entry, lock: Option<(u32, u32)> },
}

enum Found {
    /// Byte of the drive, bytes.
    Run(u64, u64),
    NotYet,
    Nothing,
}

impl Keeper {
    /// Begin a scrub, or have the one that runs go on with another rate.
    pub(super) fn begin_scrub(&mut self, rate: u64, started_s: u64) -> Result<ScrubInfo, StoreError> {
        if !self.possessed {
            return Err(StoreError::NotPossessed);
        }
        if let Some(errno) = self.failed {
            return Err(StoreError::Failed(std::io::Error::from_raw_os_error(errno)));
        }
        let rate = rate.max(1);
        let (total, now) = (self.figures().used, self.now);
        let scrub = self.scrub.get_or_insert_with(|| Scrub {
            info: ScrubInfo { started_s, total, ..ScrubInfo::default() },
            began: now,
            item: Some(Item::first()),
            at: 0,
            granule: 0,
            again: VecDeque::new(),
            reading: None,
            sealed: None,
            cancelled: false,
            next: now,
            late: now,
        });
        scrub.info.rate = rate;
        (scrub.next, scrub.late) = (scrub.next.min(now), scrub.late.min(now));
        Ok(scrub.info.clone())
    }

    pub(super) fn cancel_scrub(&mut self) {
        if let Some(scrub) = &mut self.scrub {
            scrub.cancelled = true;
            if scrub.reading.is_none() {
                self.end_scrub(ScrubEnd::Cancelled);
            }
        }
    }

    /// The scrub that runs, or else the last one since the store was opened.
    pub fn scrub_info(&self) -> Option<ScrubInfo> {
        self.scrub.as_ref().map(|scrub| &scrub.info).or(self.scrubbed.as_ref()).cloned()
    }

    fn end_scrub(&mut self, end: ScrubEnd) {
        let Some(Scrub { mut info, began, .. }) = self.scrub.take() else { return };
        info.end = Some(end);
        info.ended_s = info.started_s + (self.now - began) / 1_000_000_000;
        if end == ScrubEnd::Done {
            info.total = info.done;
        }
        self.scrubbed = Some(info);
    }

    /// True if it has to look further in the next turn.
    pub(super) fn run_scrub(&mut self) -> bool {
        let Some(scrub) = self.scrub.as_ref().filter(|scrub| scrub.reading.is_none()) else { return false };
        if self.closing || self.failed.is_some() {
            self.end_scrub(ScrubEnd::Stopped);
            return false;
        }
        let due = if self.is_busy() { scrub.late } else { scrub.next };
        if !self.may_work() || self.now < due {
            return false;
        }
        if let Some(at) = scrub.again.front().copied() {
            self.read_block_again(at);
            return false;
        }
        if let Some(item) = scrub.item {
            // Pages of what is being added are nowhere yet.
            if !matches!(self.running, Some((_, Running::Growing { .. }))) {
                let generation = self.superblock.generation;
                let (at, len) = self.place_of_item(item);
                self.begin_reading(at, len, Reading::Item { item, generation });
            }
            return false;
        }
        match self.next_run() {
            Found::Run(at, len) => {
                let held = self.reader.hold();
                self.begin_reading(at, len, Reading::Extents { held });
            }
            Found::NotYet => return true,
            Found::Nothing => self.end_scrub(ScrubEnd::Done),
        }
        false
    }

    /// Guests have something under way here.
    fn is_busy(&self) -> bool {
        self.operations.len() > self.free_operations.len() || self.journal.pending() > 0
    }

    /// The next bytes that are in use, as far as they lie together.
    fn next_run(&mut self) -> Found {
        let extents = self.extents();
        let Some(scrub) = &mut self.scrub else { return Found::Nothing };
        let layout = &self.superblock.layout;
        let mut run: Option<(u64, u64)> = None;
        while scrub.at < self.slots.len() {
            if self.looks == 0 {
                return run.map_or(Found::NotYet, |(at, len)| Found::Run(at, len));
            }
            let end = scrub.at.saturating_add(self.looks).min(self.slots.len());
            let used = self.slots.range(scrub.at..end).find(|(_, entry)| entry.kind == Kind::Data);
            let next = used.map_or(end, |(slot, _)| slot);
            self.looks -= (next - scrub.at).min(self.looks);
            if next > scrub.at {
                (scrub.at, scrub.granule) = (next, 0);
            }
            let Some((slot, entry)) = used else { continue };
            let rest = u32::from(entry.mask) >> scrub.granule;
            let place = layout.place(slot).filter(|_| rest != 0);
            let Some(place) = place else {
                self.looks = self.looks.saturating_sub(1);
                (scrub.at, scrub.granule) = (slot + 1, 0);
                scrub.info.done += extents.bytes();
                continue;
            };
            let first = scrub.granule + rest.trailing_zeros();
            let at = place + (u64::from(first) << extents.granule_shift);
            let (start, before) = run.unwrap_or((at, 0));
            let room = (MOST - before) >> extents.granule_shift;
            let count = u64::from((rest >> rest.trailing_zeros()).trailing_ones()).min(room);
            if start + before != at || count == 0 {
                break;
            }
            scrub.granule = first + count as u32;
            run = Some((start, before + (count << extents.granule_shift)));
        }
        run.map_or(Found::Nothing, |(at, len)| Found::Run(at, len))
    }

    /// Read the block at byte `at` once more. Whoever is writing it has its extent locked, and comes first.
    fn read_block_again(&mut self, at: u64) {
        let Some((slot, entry)) = self.holder(at) else { return self.forget_doubt() };
        let lock = self.volume_of(Some(entry.layer)).map(|volume| (volume, entry.vextent));
        if !mutants::is(Mutant::ScrubUnlocked) {
            if lock.is_some_and(|lock| self.locks.contains_key(&lock)) {
                return;
            }
            self.locks.extend(lock.map(|lock| (lock, SCRUB)));
        }
        let held = self.reader.hold();
        self.begin_reading(at, BLOCK, Reading::Again { held, slot, entry, lock });
    }

    fn forget_doubt(&mut self) {
        if let Some(scrub) = &mut self.scrub {
            scrub.again.pop_front();
        }
    }

    /// The slot that has the block at byte `at` in use, and what it holds.
    fn holder(&self, at: u64) -> Option<(u32, Entry)> {
        let (slot, within) = self.layout().slot_at(at)?;
        let entry = self.slots.get(slot);
        let granule = within >> self.extents().granule_shift;
        (entry.kind == Kind::Data && entry.mask >> granule & 1 == 1).then_some((slot, entry))
    }

    fn begin_reading(&mut self, offset: u64, len: u64, reading: Reading) {
        let credit = if self.is_busy() { 0 } else { CREDIT_NS };
        let Some(scrub) = &mut self.scrub else { return };
        scrub.reading = Some(reading);
        let takes = (u128::from(len) * 1_000_000_000 / u128::from(scrub.info.rate)) as u64;
        scrub.next = scrub.next.max(self.now.saturating_sub(credit)).saturating_add(takes);
        scrub.late = scrub.next.saturating_add(takes.saturating_mul(BUSY_SHARE - 1));
        self.out.push_back(Io {
            action: Action::Read,
            offset,
            len,
            data: Data::Own(zeroed((len / BLOCK) as usize)),
            purpose: Purpose::Scrub,
        });
    }

    /// What was read is here.
    pub(super) fn scrub_read(&mut self, io: Io, result: Result<(), i32>) {
        let Some(scrub) = &mut self.scrub else { return };
        let Some(reading) = scrub.reading.take() else { return };
        let Data::Own(blocks) = io.data else { return };
        match reading {
            Reading::Item { item, generation } => {
                // A checkpoint may have ended, and the next one begun to write there.
                if self.superblock.generation == generation {
                    self.judge_item(item, io.offset, &blocks, result);
                }
            }
            Reading::Extents { held } => {
                self.reader.end(&self.epochs, held);
                match result {
                    Ok(()) => self.judge(io.offset, &blocks),
                    // Somewhere in it: one block after another tells.
                    Err(_) => self.doubt((0..blocks.len() as u64).map(|n| io.offset + n * BLOCK)),
                }
            }
            Reading::Again { held, slot, entry, lock } => {
                self.reader.end(&self.epochs, held);
                if let Some(lock) = lock.filter(|lock| self.locks.get(lock) == Some(&SCRUB)) {
                    self.locks.remove(&lock);
                    self.unblock(SCRUB);
                }
                // Otherwise it has become another layer's, which may write there: look who has it, and read it again.
                let same = self.slots.get(slot);
                if same.layer == entry.layer && same.vextent == entry.vextent {
                    self.judge_again(io.offset, &entry, &blocks[0], result);
                }
            }
        }
        if self.scrub.as_ref().is_some_and(|scrub| scrub.cancelled) {
            self.end_scrub(ScrubEnd::Cancelled);
        }
    }

    fn doubt(&mut self, places: impl Iterator<Item = u64>) {
        if let Some(scrub) = &mut self.scrub {
            scrub.again.extend(places);
        }
    }

    /// Count blocks that were read from byte `at` on; read those again that do not fit.
    fn judge(&mut self, at: u64, blocks: &[Block]) {
        let sealed = self.sealed_layers();
        let mut doubtful = Vec::new();
        let mut verified = 0;
        for (at, block) in (at..).step_by(BLOCK as usize).zip(blocks) {
            if self.holder(at).is_some_and(|(_, entry)| sealed.contains(&entry.layer)) {
                verified += 1;
                if self.sums.at(at) != Some(checksum(&block.0)) {
                    doubtful.push(at);
                }
            }
        }
        let Some(scrub) = &mut self.scrub else { return };
        scrub.sealed = Some(sealed);
        scrub.info.blocks += (blocks.len() - doubtful.len()) as u64;
        scrub.info.verified += verified - doubtful.len() as u64;
        scrub.again.extend(doubtful);
    }

    fn sealed_layers(&mut self) -> HashSet<u32> {
        let known = self.scrub.as_mut().and_then(|scrub| scrub.sealed.take());
        known.unwrap_or_else(|| self.catalog.layers_with_integrity())
    }

    /// The block at byte `at` was read by itself while nobody could write it.
    fn judge_again(&mut self, at: u64, entry: &Entry, block: &Block, result: Result<(), i32>) {
        self.forget_doubt();
        if self.holder(at).is_none() {
            return;
        }
        let sealed = self.sealed_layers();
        let is_sealed = sealed.contains(&entry.layer);
        let fits = !is_sealed || self.sums.at(at) == Some(checksum(&block.0));
        let Some(scrub) = &mut self.scrub else { return };
        scrub.sealed = Some(sealed);
        scrub.info.blocks += u64::from(result.is_ok());
        scrub.info.verified += u64::from(is_sealed && result.is_ok());
        let what = match result {
            Ok(()) if fits => return,
            Ok(()) => {
                scrub.info.bad += 1;
                NOT_AS_WRITTEN.to_owned()
            }
            Err(errno) => {
                scrub.info.unreadable += 1;
                format!("cannot be read: {}", std::io::Error::from_raw_os_error(errno))
            }
        };
        let within = at - self.place(self.layout().slot_at(at).map_or(0, |(slot, _)| slot));
        let byte = (u64::from(entry.vextent) << self.extents().shift) + within;
        let whose = self.catalog.whose(entry.layer);
        let fault = self.report_block(&whose, byte, at, &what);
        self.note_fault(fault);
    }

    pub(super) fn note_fault(&mut self, fault: String) {
        if let Some(scrub) = &mut self.scrub {
            if scrub.info.faults.len() < MOST_FAULTS {
                scrub.info.faults.push(fault);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RequestKind;
    use crate::testing::Calm;
    use crate::{Command, Run, StoreError};

    const EXTENT: u64 = 16 << 10;
    const FAST: u64 = 1 << 40;

    type Chosen = fn(&Keeper) -> Item;

    fn place(store: &Calm, volume: u32, at: u64) -> u64 {
        match store.keeper.open[&volume].map.read(at, BLOCK) {
            Run::At { at, .. } => at,
            Run::Zero { .. } => panic!("nothing is at {at}"),
        }
    }

    fn scrub(store: &mut Calm, rate: u64) -> ScrubInfo {
        store.ask(Command::Scrub { rate, started_s: 100 }).unwrap();
        loop {
            store.turn();
            let info = store.keeper.scrub_info().expect("a scrub");
            if info.end.is_some() {
                return info;
            }
        }
    }

    fn events(store: &mut Calm) -> Vec<String> {
        std::iter::from_fn(|| store.keeper.next_event()).collect()
    }

    /// A volume with checksums that has 8 extents, 2 of them of its snapshot alone; and one without that has 40.
    fn store() -> (Calm, u32, u32) {
        let mut store = Calm::new(64 << 20, EXTENT);
        let (sealed, _) = store.volume_with("sealed", 16 * EXTENT, true);
        store.request(sealed, RequestKind::Write, 0, 6 * EXTENT);
        store.snapshot("sealed", "old");
        store.request(sealed, RequestKind::Write, 0, 2 * EXTENT);
        let (plain, _) = store.volume("plain", 100 * EXTENT);
        store.request(plain, RequestKind::Write, 0, 40 * EXTENT);
        (store, sealed, plain)
    }

    #[test]
    fn it_finds_the_blocks_that_have_rotted_and_no_others() {
        let (mut store, sealed, plain) = store();
        let clean = scrub(&mut store, FAST);
        assert_eq!((clean.end, clean.faults.len()), (Some(ScrubEnd::Done), 0));
        assert_eq!((clean.verified, clean.done, clean.total), (32, 48 * EXTENT, 48 * EXTENT));
        let live = place(&store, sealed, BLOCK);
        let frozen = place(&store, sealed, 4 * EXTENT + 3 * BLOCK);
        for at in [live, frozen, place(&store, plain, 0)] {
            store.memory.rot(at);
        }
        let found = scrub(&mut store, FAST);
        let expected = [
            format!("the block at byte 4096 of volume \"sealed\", byte {live} of the drive, {NOT_AS_WRITTEN}"),
            format!(
                "the block at byte 77824 of snapshot \"old\" of volume \"sealed\", byte {frozen} of the drive, {NOT_AS_WRITTEN}"
            ),
        ];
        let mut faults = found.faults.clone();
        faults.sort();
        assert_eq!(faults, expected);
        assert_eq!((found.bad, found.unreadable, found.verified), (2, 0, 32));
        let mut told = events(&mut store);
        told.sort();
        assert_eq!(told, expected);
        assert!(store.keeper.locks.is_empty());
        // Of one that is known nothing more is told; it counts all the same.
        assert_eq!(scrub(&mut store, FAST).bad, 2);
        assert!(events(&mut store).is_empty());
        store.request(sealed, RequestKind::Write, 0, EXTENT);
        assert_eq!(scrub(&mut store, FAST).bad, 1);
    }

    #[test]
    fn a_volume_that_is_made_meanwhile_is_held_against_its_checksums_too() {
        let (mut store, _, _) = store();
        // Slow enough to be at its begin still.
        store.ask(Command::Scrub { rate: 1 << 24, started_s: 100 }).unwrap();
        while store.keeper.scrub_info().is_none_or(|info| info.verified == 0) {
            store.turn();
        }
        let (late, _) = store.volume_with("late", 16 * EXTENT, true);
        store.request(late, RequestKind::Write, 0, 4 * EXTENT);
        let info = scrub(&mut store, FAST);
        assert_eq!((info.verified, info.faults), (48, vec![]));
    }

    #[test]
    fn a_sector_that_cannot_be_read_is_found_without_checksums() {
        let (mut store, _, plain) = store();
        let all = scrub(&mut store, FAST).blocks;
        let at = place(&store, plain, 17 * EXTENT + BLOCK);
        store.memory.spoil(at);
        let found = scrub(&mut store, FAST);
        assert_eq!((found.bad, found.unreadable, found.verified), (0, 1, 32));
        let byte = 17 * EXTENT + BLOCK;
        let begin =
            format!("the block at byte {byte} of volume \"plain\", byte {at} of the drive, cannot be read: ");
        assert!(found.faults[0].starts_with(&begin), "{:?}", found.faults);
        assert_eq!(found.blocks, all - 1, "all others were read");
    }

    /// It has all that in memory, so nothing is lost, as it would be with the next opening.
    #[test]
    fn what_the_store_says_of_itself_is_mended() {
        let (mut store, ..) = store();
        // A checkpoint, so that pages of checksums are there.
        store.ask(Command::Shutdown).unwrap();
        store.keeper = crate::begin(&store.memory, [1; 16], Default::default()).unwrap();
        let items: [(Chosen, &str); 6] = [
            (|keeper| Item::Superblock(u8::from(keeper.superblock.at() != 0)), "the superblock"),
            (|_| Item::Catalog, "the catalog of volumes and snapshots"),
            (|keeper| Item::Page { page: 0, copy: keeper.slots.copy(0) }, "a page of the table"),
            (|_| Item::Sums { page: 0 }, "a page of checksums"),
            // The copy that does not count has to be readable too, or the store could not be opened.
            (|keeper| Item::Page { page: 1, copy: 1 - keeper.slots.copy(1) }, "a page of the table"),
            (|keeper| Item::Page { page: 1, copy: keeper.slots.copy(1) }, "a page of the table"),
        ];
        for (n, (item, name)) in items.into_iter().enumerate() {
            let (at, _) = store.keeper.place_of_item(item(&store.keeper));
            match n {
                4 | 5 => store.memory.spoil(at),
                _ => store.memory.rot(at),
            }
            let found = scrub(&mut store, FAST);
            assert_eq!((found.mended, found.bad, found.unreadable), (1, 0, 0), "{:?}", found.faults);
            assert!(found.faults[0].starts_with(&format!("{name} at byte {at} of the drive ")));
            while store.turn() || !store.keeper.is_idle() {}
            assert_eq!(scrub(&mut store, FAST).mended, 0);
        }
        store.keeper = crate::begin(&store.memory, [2; 16], Default::default()).unwrap();
        let opened = store.opened("sealed").0;
        store.request(opened, RequestKind::Read, 0, 16 * EXTENT);
        assert_eq!(scrub(&mut store, FAST).verified, 32);
    }

    #[test]
    fn it_keeps_to_its_rate_and_gives_way_to_guests() {
        let (mut store, sealed, _) = store();
        let bytes = |info: &ScrubInfo| info.blocks * BLOCK;
        let begun = store.now;
        let info = scrub(&mut store, 16 << 20);
        let takes = (bytes(&info) * 1_000_000_000) >> 24;
        let took = store.now - begun;
        assert!((takes - CREDIT_NS..takes + 10_000_000).contains(&took), "{took} ns in place of {takes}");
        // A step of a guest's that does not end.
        let request = crate::Request {
            token: 9,
            volume: sealed,
            kind: RequestKind::Write,
            offset: 8 * EXTENT,
            len: EXTENT,
            durable: false,
        };
        store.keeper.submit(request);
        store.keeper.turn(store.now);
        let held: Vec<Io> = std::iter::from_fn(|| store.keeper.next_io()).collect();
        let begun = store.now;
        let busy = scrub(&mut store, 16 << 20);
        assert!(store.now - begun > 3 * took, "{} ns", store.now - begun);
        assert_eq!(busy.blocks, info.blocks);
        held.into_iter().for_each(|io| store.keeper.completed(io, Ok(())));
    }

    #[test]
    fn it_ends_when_it_is_told_to_and_with_the_store() {
        let (mut store, ..) = store();
        store.ask(Command::Scrub { rate: 4096, started_s: 100 }).unwrap();
        let Ok(crate::Answer::Scrub(Some(info))) = store.ask(Command::Scrub { rate: 8192, started_s: 200 })
        else {
            panic!("it goes on")
        };
        assert_eq!((info.started_s, info.rate, info.end), (100, 8192, None));
        assert!(!store.keeper.is_idle() && store.keeper.needs_turns());
        store.ask(Command::CancelScrub).unwrap();
        assert_eq!(store.keeper.scrub_info().unwrap().end, Some(ScrubEnd::Cancelled));
        while store.turn() {}
        store.ask(Command::Scrub { rate: 4096, started_s: 300 }).unwrap();
        store.ask(Command::Shutdown).unwrap();
        assert_eq!(store.keeper.scrub_info().unwrap().end, Some(ScrubEnd::Stopped));
        assert!(matches!(store.ask(Command::Scrub { rate: 1, started_s: 1 }), Err(StoreError::Closed)));
    }

    #[test]
    fn no_turn_looks_at_more_than_its_share() {
        let (mut store, ..) = store();
        store.ask(Command::Scrub { rate: FAST, started_s: 1 }).unwrap();
        store.keeper.set_looks(7);
        let (mut at, mut turns) = (0, 0);
        while let Some(scrub) = &store.keeper.scrub {
            assert!(scrub.at - at <= 7 + (MOST / EXTENT) as u32, "{} slots", scrub.at - at);
            (at, turns) = (scrub.at, turns + 1);
            store.turn();
        }
        assert!(turns > store.keeper.slots.len() / 16, "{turns} turns");
        assert_eq!(store.keeper.scrub_info().unwrap().verified, 32);
    }
}

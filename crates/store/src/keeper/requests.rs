//! What guests ask: which step comes next, and what it changes.
//!
//! A step does the begin of a request, as far as it is of one kind; whoever asked comes again with the rest. A write is one of
//! these: granules that the live layer has, in place; a part of a granule, read from where it was and written whole to where it
//! will be; whole granules, from the guest's memory to where they will be.

use std::collections::VecDeque;

use super::flushing::Waiter;
use super::operations::{Merge, Operation, Stage};
use super::sealing::MOST_SEALED;
use super::{Commit, Edit, Keeper, MapChange, FULL_WAIT_NS};
use crate::format::{zeroed, Entry};
use crate::geometry::BLOCK;
use crate::io::{errno, Action, Data, Io, Purpose, Request, RequestKind, ZEROES};
use crate::map::{Part, Parts, Run};
use crate::mutants::{self, Mutant};

/// Extents that a write takes in one step.
const EXTENTS_PER_STEP: u32 = 64;
/// Slots that a step changes at most, so that its records fit into one block.
const CHANGES_PER_STEP: usize = 128;
/// Extents that a step looks at when it unmaps.
const LOOKS_PER_STEP: u32 = 8192;

/// Some granules of an extent.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub vextent: u32,
    pub mask: u16,
}

impl Keeper {
    /// Begin the next step of `request`, or have it wait.
    pub(super) fn plan(&mut self, request: Request) {
        match request.kind {
            RequestKind::Flush => return self.flushing.wait(Waiter::Request(request.token)),
            RequestKind::Read if self.is_locked(request.volume) => return self.refuse(&request, errno::EIO),
            RequestKind::Read => return self.plan_read(request),
            RequestKind::Write | RequestKind::Zero { .. } => {}
        }
        if let Some(errno) = self.failed.or((!self.possessed).then_some(errno::EIO)) {
            return self.refuse(&request, errno);
        }
        let open = self.open.get_mut(&request.volume).filter(|open| open.users > 0);
        let Some(open) = open else { return self.gone(&request) };
        if let Some(parked) = &mut open.parked {
            return parked.push(request);
        }
        if self.is_locked(request.volume) {
            return self.refuse(&request, errno::EIO);
        }
        if !self.journal.has_room() {
            return self.throttled.push_back(request);
        }
        let Some(open) = self.open.get(&request.volume) else { return };
        // While reactors may not write in place, the keeper may.
        let in_place = open.map.owned(request.offset, request.len, open.tag);
        let sealing = self.sealing(request.volume, request.offset);
        match (request.kind, in_place) {
            (RequestKind::Write | RequestKind::Zero { unmap: false }, Some(Run::At { at, len }))
                if sealing.is_some() =>
            {
                let Some(sealing) = sealing else { return };
                self.seal_in_place(request, at, len, sealing)
            }
            (RequestKind::Write, Some(Run::At { at, len })) => self.write_in_place(request, at, len),
            (RequestKind::Zero { unmap: false }, Some(Run::At { at, len })) => {
                self.zero_in_place(request, at, len)
            }
            (RequestKind::Write, _) => self.plan_granules(request),
            (RequestKind::Zero { .. }, _) => self.plan_zeroes(request, in_place),
            (RequestKind::Flush | RequestKind::Read, _) => {}
        }
    }

    /// Wait for whoever has locked `vextent`. False if nobody has.
    pub(super) fn blocks(&mut self, request: &Request, vextent: u32) -> bool {
        match self.locks.get(&(request.volume, vextent)) {
            Some(owner) => {
                self.blocked.entry(*owner).or_default().push(*request);
                true
            }
            None => false,
        }
    }

    fn write_in_place(&mut self, request: Request, at: u64, len: u64) {
        self.in_place(request, len, |id, len| guest_write(id, &request, at, len));
    }

    fn zero_in_place(&mut self, request: Request, at: u64, len: u64) {
        self.in_place(request, len.min(ZEROES), |id, len| Io {
            action: Action::Write { durable: false },
            offset: at,
            len,
            data: Data::Zeroes,
            purpose: Purpose::Operation(id),
        });
    }

    /// Bytes of one extent, which is locked: a discard beside it must not free the place while they are on their way.
    fn in_place(&mut self, request: Request, len: u64, io: impl FnOnce(u32, u64) -> Io) {
        let extents = self.extents();
        let vextent = (request.offset >> extents.shift) as u32;
        if self.blocks(&request, vextent) {
            return;
        }
        let len = len.min(extents.bytes() - request.offset % extents.bytes());
        let operation = self.step(request, len, vec![vextent], Vec::new(), Commit::default());
        self.begin(operation, |id| io(id, len));
    }

    /// A write whose first granule is not the live layer's.
    fn plan_granules(&mut self, request: Request) {
        let extents = self.extents();
        let first = (request.offset >> extents.shift) as u32;
        if self.blocks(&request, first) {
            return;
        }
        let granule = extents.granule();
        let before = request.offset % granule;
        if before != 0 || request.len < granule {
            let len = request.len.min(granule - before);
            let merge = Merge::Guest { at: before as usize, len };
            return self.merge_granule(request, merge, len);
        }
        let Some(open) = self.open.get(&request.volume) else { return };
        let parts = open.map.parts(first);
        if let Some(part) = live_part(&parts, open.tag) {
            let within = request.offset % extents.bytes();
            let most = extents.bytes() - within;
            let foreign = run_of(owned(&parts, open.tag), (within / granule) as u32, extents.granules());
            let len = (u64::from(foreign) * granule).min(most).min(request.len / granule * granule);
            let piece = Piece { vextent: first, mask: extents.mask(within, len) };
            let at = self.place(part.slot()) + within;
            let commit = self.put(request.volume, &[piece], part.slot());
            let operation = self.step(request, len, vec![first], Vec::new(), commit);
            return self.begin_write(operation, &request, at, len);
        }
        self.write_new(request, first);
    }

    /// Bytes of a request that one step takes at most.
    fn most_at_once(&self, request: &Request) -> u64 {
        let is_sealed =
            self.catalog.volumes.get(&request.volume).is_some_and(|volume| !volume.seal.is_none());
        if is_sealed {
            request.len.min(MOST_SEALED)
        } else {
            request.len
        }
    }

    /// Whole granules of extents of which the live layer has none.
    fn write_new(&mut self, request: Request, first: u32) {
        let extents = self.extents();
        let granule = extents.granule();
        let Some(open) = self.open.get(&request.volume) else { return };
        let within = request.offset % extents.bytes();
        let whole = self.most_at_once(&request) / granule * granule;
        let mut count = 1;
        while count < EXTENTS_PER_STEP
            && u64::from(count) * extents.bytes() < within + whole
            && !self.locks.contains_key(&(request.volume, first + count))
            && live_part(&open.map.parts(first + count), open.tag).is_none()
        {
            count += 1;
        }
        let Some((slot, count)) = self.allocator.take(count) else { return self.starve(request) };
        let len = whole.min(u64::from(count) * extents.bytes() - within);
        let pieces: Vec<Piece> = (0..count)
            .map(|n| {
                let start = if n == 0 { within } else { 0 };
                let end = (within + len - u64::from(n) * extents.bytes()).min(extents.bytes());
                Piece { vextent: first + n, mask: extents.mask(start, end - start) }
            })
            .collect();
        let at = self.place(slot) + within;
        let commit = self.put(request.volume, &pieces, slot);
        let locked = pieces.iter().map(|piece| piece.vextent).collect();
        let operation = self.step(request, len, locked, (slot..slot + count).collect(), commit);
        self.begin_write(operation, &request, at, len);
    }

    /// A part of a granule that is not the live layer's: the whole of it gets a place there.
    fn merge_granule(&mut self, request: Request, merge: Merge, bytes: u64) {
        let extents = self.extents();
        let vextent = (request.offset >> extents.shift) as u32;
        let within = request.offset % extents.bytes() / extents.granule() * extents.granule();
        let piece = Piece { vextent, mask: extents.mask(within, 1) };
        let Some((slot, taken)) = self.slot_for(request.volume, vextent) else { return self.starve(request) };
        let commit = self.put(request.volume, &[piece], slot);
        let to = self.place(slot) + within;
        let mut operation = self.step(request, bytes, vec![vextent], taken, commit);
        let Some(open) = self.open.get(&request.volume) else { return };
        let granule = extents.granule();
        let start = request.offset / granule * granule;
        operation.sealing = self.sealing(request.volume, start);
        let buffer = zeroed((granule / BLOCK) as usize);
        match open.map.read(start, granule) {
            Run::At { at, .. } => {
                operation.stage = Stage::Merge { merge, from: at, to };
                self.begin(operation, |id| Io {
                    action: Action::Read,
                    offset: at,
                    len: granule,
                    data: Data::Own(buffer),
                    purpose: Purpose::Operation(id),
                })
            }
            // Nothing there: the request's bytes go among zeroes, if it brings any.
            Run::Zero { .. } => {
                let (at, len) = match merge {
                    Merge::Guest { at, len } => (at, len),
                    Merge::Zeroes { .. } | Merge::Copy => (0, 0),
                };
                operation.stage = Stage::Write { to };
                self.begin(operation, |id| Io {
                    action: Action::Fill { token: request.token, skip: 0, at },
                    offset: 0,
                    len,
                    data: Data::Own(buffer),
                    purpose: Purpose::Operation(id),
                });
            }
        }
    }

    /// The live layer's slot for an extent, or one that is taken for it.
    pub(super) fn slot_for(&mut self, volume: u32, vextent: u32) -> Option<(u32, Vec<u32>)> {
        let open = self.open.get(&volume)?;
        match live_part(&open.map.parts(vextent), open.tag) {
            Some(part) => Some((part.slot(), Vec::new())),
            None => self.allocator.take(1).map(|(slot, _)| (slot, vec![slot])),
        }
    }

    pub(super) fn place(&self, slot: u32) -> u64 {
        let place = self.layout().place(slot);
        debug_assert!(place.is_some(), "slot {slot} has no place");
        place.unwrap_or(0)
    }

    /// `pieces` are in slots from `slot` on, one each.
    pub(super) fn put(&self, volume: u32, pieces: &[Piece], slot: u32) -> Commit {
        let layer = self.catalog.volumes.get(&volume).map_or(0, |volume| volume.live);
        let mut commit = Commit::default();
        for (slot, piece) in (slot..).zip(pieces) {
            let before = self.slots.get(slot).mask;
            commit.slots.push((slot, Entry::data(layer, piece.vextent, before | piece.mask)));
            commit.maps.push(MapChange {
                volume,
                vextent: piece.vextent,
                edit: Edit::Put { slot, mask: piece.mask },
            });
        }
        commit
    }

    /// A step of `request` from its begin.
    pub(super) fn step(
        &self,
        request: Request,
        bytes: u64,
        locked: Vec<u32>,
        taken: Vec<u32>,
        commit: Commit,
    ) -> Operation {
        Operation {
            request: Some(request),
            volume: request.volume,
            bytes,
            locked,
            taken,
            commit,
            stage: Stage::Record,
            held: 0,
            sealing: self.sealing(request.volume, request.offset),
            overwrite: None,
        }
    }

    /// Zeroes; `in_place`: where the first of them could be written in place.
    fn plan_zeroes(&mut self, request: Request, in_place: Option<Run>) {
        let extents = self.extents();
        let granule = extents.granule();
        let before = request.offset % granule;
        let Some(open) = self.open.get(&request.volume) else { return };
        if before == 0 && request.len >= granule {
            return self.unmap(request);
        }
        let len = request.len.min(granule - before);
        if let Some(Run::At { at, .. }) = in_place {
            return match self.sealing(request.volume, request.offset) {
                Some(sealing) => self.seal_in_place(request, at, len, sealing),
                None => self.zero_in_place(request, at, len),
            };
        }
        match open.map.read(request.offset, len) {
            // Nothing to do, but what made it zero may have to be made durable.
            Run::Zero { .. } => {
                let operation = self.step(request, len, Vec::new(), Vec::new(), Commit::default());
                self.begin_record(operation);
            }
            Run::At { .. } => {
                if !self.blocks(&request, (request.offset >> extents.shift) as u32) {
                    self.merge_granule(request, Merge::Zeroes { at: before as usize, len }, len);
                }
            }
        }
    }

    /// Whole granules that are nowhere from here on. The first is not the live layer's, or may be unmapped too.
    fn unmap(&mut self, request: Request) {
        let extents = self.extents();
        let mut end = (request.offset + request.len) / extents.granule() * extents.granule();
        let mut last = ((end - 1) >> extents.shift) as u32;
        let first = (request.offset >> extents.shift) as u32;
        let Some(open) = self.open.get(&request.volume) else { return };
        let layer = self.catalog.volumes.get(&request.volume).map_or(0, |volume| volume.live);
        let needs_tombs = self.catalog.parent(layer) != 0 && !mutants::is(Mutant::NoTombstone);
        let (map, tag) = (open.map.clone(), open.tag);
        let (mut commit, mut locked, mut taken) = (Commit::default(), Vec::new(), Vec::new());
        let mut at = first;
        let mut looks = 0;
        let mut stop = None;
        while at <= last {
            let Some(vextent) = map.next_mapped(at, last + 1) else { break };
            looks += 1;
            if looks > LOOKS_PER_STEP || commit.slots.len() >= CHANGES_PER_STEP {
                stop = Some(vextent);
                break;
            }
            at = vextent + 1;
            let start = u64::from(vextent) << extents.shift;
            let from = request.offset.max(start);
            let mut mask = extents.mask(from - start, end.min(start + extents.bytes()) - from);
            let parts = map.parts(vextent);
            let owned = owned(&parts, tag) & mask;
            if request.kind == (RequestKind::Zero { unmap: false }) && owned != 0 {
                // These keep their place: the step that begins with them writes zeroes there, and this one ends before them.
                let before = owned.trailing_zeros();
                mask &= !(u16::MAX << before);
                (end, last) = (start + (u64::from(before) << extents.granule_shift), vextent);
            }
            let hit = parts.mask() & mask;
            if hit == 0 {
                continue;
            }
            if self.locks.contains_key(&(request.volume, vextent)) {
                if vextent == first || commit.slots.is_empty() && locked.is_empty() {
                    self.blocks(&request, vextent);
                    return;
                }
                stop = Some(vextent);
                break;
            }
            if needs_tombs && !self.entomb(&request, layer, vextent, hit, &mut commit, &mut taken) {
                stop = Some(vextent);
                break;
            }
            for part in parts.iter().filter(|part| part.tag() == tag && part.mask() & mask != 0) {
                commit.slots.push((part.slot(), self.without(part.slot(), mask)));
            }
            commit.maps.push(MapChange { volume: request.volume, vextent, edit: Edit::Remove { mask: hit } });
            locked.push(vextent);
        }
        let until = stop.map_or(end, |vextent| (u64::from(vextent) << extents.shift).max(request.offset));
        let bytes = until - request.offset;
        if bytes == 0 {
            return self.starve(request);
        }
        let operation = self.step(request, bytes, locked, taken, commit);
        self.begin_record(operation);
    }

    /// Have the layer say that these granules are zeroes, whatever older ones say. False if there is no slot for that.
    fn entomb(
        &mut self,
        request: &Request,
        layer: u32,
        vextent: u32,
        mask: u16,
        commit: &mut Commit,
        taken: &mut Vec<u32>,
    ) -> bool {
        let full = self.extents().full();
        let Some(open) = self.open.get_mut(&request.volume) else { return false };
        let near = open.tombs.range_mut(..=vextent).next_back();
        if let Some((start, (slot, count, has))) = near {
            if vextent - *start < *count {
                if *has & mask == mask {
                    return true;
                }
                if *count == 1 {
                    *has |= mask;
                    commit.slots.push((*slot, Entry::zero(layer, vextent, 1, *has)));
                    return true;
                }
            } else if vextent - *start == *count && *has == full && mask == full {
                // The one before goes on, by a change of this step where there is one already.
                *count += 1;
                let entry = Entry::zero(layer, *start, *count, full);
                match commit.slots.iter_mut().find(|(changed, _)| changed == slot) {
                    Some(change) => change.1 = entry,
                    None => commit.slots.push((*slot, entry)),
                }
                return true;
            }
        }
        let Some(slot) = self.allocator.take_tomb() else { return false };
        taken.push(slot);
        commit.slots.push((slot, Entry::zero(layer, vextent, 1, mask)));
        if let Some(open) = self.open.get_mut(&request.volume) {
            open.tombs.insert(vextent, (slot, 1, mask));
        }
        true
    }

    /// No place is free: wait for one, and have what was freed become usable.
    fn starve(&mut self, request: Request) {
        let until = self.until.get(&request.token).copied().unwrap_or(self.now + FULL_WAIT_NS);
        self.starved.push_back((request, until));
        if !self.retired_slots.is_empty() {
            self.flushing.wait(Waiter::Nobody);
        }
    }

    /// Requests that have waited for room long enough are told so.
    pub(super) fn give_up_waiting(&mut self) {
        if self.starved.iter().all(|(_, until)| *until > self.now) {
            return;
        }
        let (over, rest): (VecDeque<_>, _) =
            self.starved.drain(..).partition(|(_, until)| *until <= self.now);
        self.starved = rest;
        over.iter().for_each(|(request, _)| self.refuse(request, errno::ENOSPC));
    }
}

pub(super) fn guest_write(id: u32, request: &Request, at: u64, len: u64) -> Io {
    Io {
        action: Action::Write { durable: false },
        offset: at,
        len,
        data: Data::Guest { token: request.token, skip: 0 },
        purpose: Purpose::Operation(id),
    }
}

/// A part of the live layer.
fn live_part(parts: &Parts, tag: u16) -> Option<Part> {
    parts.iter().copied().find(|part| part.tag() == tag)
}

/// Granules that the live layer has.
fn owned(parts: &Parts, tag: u16) -> u16 {
    parts.iter().filter(|part| part.tag() == tag).fold(0, |mask, part| mask | part.mask())
}

/// How many granules from `first` on are not in `mask`.
fn run_of(mask: u16, first: u32, granules: u32) -> u32 {
    (u32::from(mask) >> first).trailing_zeros().min(granules - first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Calm, WRITTEN};

    const EXTENT: u64 = 64 << 10;

    /// A guest that zeroes without unmapping wants its next writes there to need no place: they were unmapped all the same where
    /// the range began in front of them.
    #[test]
    fn zeroes_that_keep_places_keep_all_of_the_live_layer() {
        let mut store = Calm::new(64 << 20, EXTENT);
        let (volume, map) = store.volume("a", 4 * EXTENT);
        store.request(volume, RequestKind::Write, 0, EXTENT / 4);
        store.snapshot("a", "s");
        store.request(volume, RequestKind::Write, EXTENT / 4, EXTENT / 4);
        store.request(volume, RequestKind::Write, 2 * EXTENT, EXTENT);
        let placed = |at: u64| match map.write(at, BLOCK) {
            Some(Run::At { at, .. }) => Some(at),
            _ => None,
        };
        let owned = [EXTENT / 4, EXTENT / 2 - BLOCK, 2 * EXTENT, 3 * EXTENT - BLOCK];
        let before = owned.map(placed);
        assert!(before.iter().all(|place| place.is_some_and(|at| store.memory.byte(at) == WRITTEN)));
        store.request(volume, RequestKind::Zero { unmap: false }, 0, 4 * EXTENT);
        assert_eq!(owned.map(placed), before);
        assert!(before.iter().flatten().all(|place| store.memory.byte(*place) == 0));
        assert_eq!(map.read(0, EXTENT / 4), Run::Zero { len: EXTENT / 4 }, "the snapshot's is unmapped");
        store.request(volume, RequestKind::Zero { unmap: true }, 0, 4 * EXTENT);
        assert_eq!(map.read(0, 4 * EXTENT), Run::Zero { len: 4 * EXTENT });
    }

    /// Whoever asked has to be answered, and a place that was taken to be of use.
    #[test]
    fn zeroes_merged_into_a_hole_are_written_and_answered() {
        let mut store = Calm::new(64 << 20, EXTENT);
        let (volume, map) = store.volume("a", EXTENT);
        let kind = RequestKind::Zero { unmap: false };
        let request = Request { token: 3, volume, kind, offset: 512, len: 512, durable: false };
        store.keeper.merge_granule(request, Merge::Zeroes { at: 512, len: 512 }, 512);
        while store.turn() {}
        assert_eq!(store.keeper.next_done().map(|done| (done.token, done.result)), Some((3, Ok(512))));
        assert!(matches!(map.write(0, BLOCK), Some(Run::At { at, .. }) if store.memory.byte(at) == 0));
        assert!(store.keeper.locks.is_empty());
    }
}

//! The map of a volume that is opened, made of what its layers hold, some of it in each turn.
//!
//! Meanwhile layers may be reaped: a slot goes to the layer that stands on its own, with what that one does not say itself, or is
//! free. So a slot counts with what it holds when its turn comes, and among those of the layer that it has then: that one is
//! newer, and its turn is still to come. Whatever of older layers it covers, it covers in either of them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::commands::{Answer, Running};
use super::{Keeper, Open};
use crate::catalog::Volume;
use crate::format::{Entry, Kind};
use crate::map::{Map, NodeNames, Part, Sought, FROZEN};
use crate::mutants::{self, Mutant};

/// What it costs to change an extent of a map, in looks at a slot.
const CHANGE: u32 = 4;
/// And a page of the map, whose memory has to be cleared.
const PAGE: u32 = 128;

/// Slots whose memory is given back at one time: to unmap all of a large volume's takes milliseconds.
const GIVEN_BACK: usize = 1 << 16;

/// What is to be done with the volume when it is open.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    Serve,
    Flatten,
}

/// A volume on its way to be open.
pub(super) struct Opening {
    volume: u32,
    purpose: Purpose,
    /// Of each layer, how many stand on it: none on the live one.
    depths: HashMap<u32, usize>,
    /// The next slot to look at.
    at: u32,
    /// Slots by depth: tombstones, and data, which counts over tombstones of the same layer. Oldest layers go first. Of a layer
    /// that is alone nothing is kept here.
    found: Vec<[Vec<u32>; 2]>,
    /// The tombstone that is being applied: from this extent on, up to that one, these granules.
    tomb: Option<(u32, u32, u16)>,
}

impl Keeper {
    /// Open volume `id`, or open it once more. None: command `number` is answered when that is done.
    pub(super) fn open_volume(&mut self, number: u64, id: u32, purpose: Purpose) -> Option<Answer> {
        if let Some(open) = self.open.get_mut(&id) {
            open.users += 1;
            return self.opened(number, id, purpose);
        }
        let live = self.catalog.volumes.get(&id).map_or(0, |volume| volume.live);
        let map = Arc::new(Map::new(self.extents(), self.places.clone()));
        let tag = map.live();
        if self.failed.is_some() {
            map.hold();
        }
        // From here on what is reaped goes into the map too.
        let (names, tombs) = (NodeNames::default(), BTreeMap::new());
        self.open.insert(
            id,
            Open { map, names, cipher: None, tag, users: 0, tombs, busy: 0, parked: None, exclusive: None },
        );
        let chain = self.catalog.chain(live);
        let depths: HashMap<u32, usize> =
            chain.iter().enumerate().map(|(depth, layer)| (*layer, depth)).collect();
        let found = vec![Default::default(); chain.len()];
        let opening = Opening { volume: id, purpose, depths, at: 0, found, tomb: None };
        self.running = Some((number, Running::Opening(Box::new(opening))));
        None
    }

    /// Go on, as far as one turn goes.
    pub(super) fn go_on_opening(&mut self, number: u64, mut opening: Box<Opening>) {
        if !self.find_slots(&mut opening) || !self.apply_found(&mut opening) {
            self.running = Some((number, Running::Opening(opening)));
            return;
        }
        if let Some(open) = self.open.get_mut(&opening.volume) {
            open.users = 1;
        }
        let answer = self.opened(number, opening.volume, opening.purpose);
        self.answers.extend(answer.map(|answer| (number, Ok(answer))));
    }

    /// The volume is open.
    fn opened(&mut self, number: u64, id: u32, purpose: Purpose) -> Option<Answer> {
        match purpose {
            Purpose::Serve => {
                let map = self.open.get(&id)?.map.clone();
                let Volume { size, seal, .. } = self.catalog.volumes.get(&id)?.clone();
                let sums = seal.integrity.then(|| self.sums.clone());
                Some(Answer::Opened { volume: id, map, size, seal, sums })
            }
            Purpose::Flatten => {
                self.begin_flatten(number, id);
                None
            }
        }
    }

    /// Look for slots of the volume's layers. True when all were looked at.
    fn find_slots(&mut self, opening: &mut Opening) -> bool {
        let Some(open) = self.open.get_mut(&opening.volume) else { return true };
        let (start, alone) = (opening.at, opening.depths.len() == 1);
        let mut end = start.saturating_add(self.looks).min(self.slots.len());
        let mut pages = 0;
        for (slot, entry) in self.slots.range(start..end) {
            if slot - start + pages >= self.looks {
                end = slot;
                break;
            }
            let Some(depth) = opening.depths.get(&entry.layer) else { continue };
            if !alone {
                opening.found[*depth][usize::from(entry.kind == Kind::Data)].push(slot);
            } else if entry.kind == Kind::Data {
                // The usual case, of which nothing has to be sorted. Tombstones that are left from an older layer hide nothing
                // any more, and must not hide what was written since.
                pages += open.page_cost(entry.vextent);
                open.put(Part::new(slot, entry.mask, open.tag), entry.vextent);
            }
        }
        self.looks = self.looks.saturating_sub(end - start + pages);
        opening.at = end;
        end == self.slots.len()
    }

    /// Make the map of the slots that were found. True when all of them are in it.
    fn apply_found(&mut self, opening: &mut Opening) -> bool {
        while self.looks > 0 {
            if let Some((at, end, mask)) = opening.tomb {
                opening.tomb = self.apply_tomb(opening.volume, at, end, mask);
                continue;
            }
            let Some((depth, slot)) = opening.next() else { return true };
            self.looks -= 1;
            let entry = self.slots.get(slot);
            match opening.depths.get(&entry.layer) {
                // It is free, or another volume's since.
                None if !mutants::is(Mutant::OpenReused) => {}
                None => opening.tomb = self.apply_slot(opening.volume, depth, slot, &entry),
                Some(now) if *now < depth && !mutants::is(Mutant::OpenAsFound) => {
                    opening.found[*now][usize::from(entry.kind == Kind::Data)].push(slot);
                }
                Some(now) => opening.tomb = self.apply_slot(opening.volume, *now, slot, &entry),
            }
        }
        opening.tomb.is_none() && opening.found.iter().flatten().all(Vec::is_empty)
    }

    /// What comes back is a tombstone, with the extents that it hides.
    fn apply_slot(&mut self, volume: u32, depth: usize, slot: u32, entry: &Entry) -> Option<(u32, u32, u16)> {
        let open = self.open.get_mut(&volume)?;
        match entry.kind {
            Kind::Data => {
                self.looks = self.looks.saturating_sub(CHANGE + open.page_cost(entry.vextent));
                let tag = if depth == 0 { open.tag } else { FROZEN };
                open.put(Part::new(slot, entry.mask, tag), entry.vextent);
                None
            }
            Kind::Zero => {
                if depth == 0 {
                    open.tombs.insert(entry.vextent, (slot, entry.count, entry.mask));
                }
                Some((entry.vextent, entry.vextent + entry.count, entry.mask))
            }
            Kind::Free => None,
        }
    }

    /// Take `mask` away from extents from `at` on. What comes back is what is left to do.
    fn apply_tomb(&mut self, volume: u32, at: u32, end: u32, mask: u16) -> Option<(u32, u32, u16)> {
        let open = self.open.get_mut(&volume)?;
        match open.map.seek_mapped(at, end, &mut self.looks) {
            Sought::Nothing => None,
            Sought::NotYet(at) => Some((at, end, mask)),
            Sought::At(vextent) => {
                self.looks = self.looks.saturating_sub(CHANGE);
                let mut parts = open.map.parts(vextent);
                parts.remove(mask);
                let node = open.map.publish(&mut open.names, vextent, &parts);
                node.into_iter().for_each(|node| open.names.give(node));
                Some((vextent + 1, end, mask))
            }
        }
    }

    /// One user less.
    pub(super) fn close_volume(&mut self, id: u32) {
        let Some(open) = self.open.get_mut(&id) else { return };
        open.users -= 1;
        if open.users == 0 {
            self.open.remove(&id);
            self.retired_nodes.retain(|retired| retired.what.0 != id);
        }
    }
}

impl Open {
    /// What memory for an extent's page of the map costs, in looks.
    fn page_cost(&self, vextent: u32) -> u32 {
        if self.map.has_page(vextent) {
            0
        } else {
            PAGE
        }
    }

    /// Nobody reads the map yet, so what this replaces is free at once.
    fn put(&mut self, part: Part, vextent: u32) {
        if self.map.publish_first(vextent, part) {
            return;
        }
        let mut parts = self.map.parts(vextent);
        parts.put(part);
        let node = self.map.publish(&mut self.names, vextent, &parts);
        node.into_iter().for_each(|node| self.names.give(node));
    }
}

impl Opening {
    /// The next slot to be applied, and the depth at which it was found.
    fn next(&mut self) -> Option<(usize, u32)> {
        while let Some([tombs, data]) = self.found.last_mut() {
            let slots = if tombs.is_empty() { data } else { tombs };
            if let Some(slot) = slots.pop() {
                if slots.len().is_multiple_of(GIVEN_BACK) {
                    slots.shrink_to_fit();
                }
                return Some((self.found.len() - 1, slot));
            }
            self.found.pop();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RequestKind;
    use crate::keeper::LOOKS;
    use crate::testing::Calm;
    use crate::{Command, Run};

    const EXTENT: u64 = 16 << 10;
    const EXTENTS: u64 = 1800;
    const VOLUME: u64 = EXTENTS * EXTENT;

    /// A store of some 4000 slots with a volume of one layer, and one with tombstones and data in two.
    fn store() -> Calm {
        let mut store = Calm::new(64 << 20, EXTENT);
        let (one, _) = store.volume("one", VOLUME);
        store.request(one, RequestKind::Write, 0, EXTENTS / 2 * EXTENT);
        let (two, _) = store.volume("two", VOLUME);
        store.request(two, RequestKind::Write, 0, EXTENTS / 2 * EXTENT);
        store.snapshot("two", "s");
        store.request(two, RequestKind::Zero { unmap: true }, 0, 40 * EXTENT);
        store.request(two, RequestKind::Write, 20 * EXTENT, 400 * EXTENT);
        for volume in [one, two] {
            store.ask(Command::Close { volume }).unwrap();
        }
        store
    }

    /// Extents of the volume under way that its map has.
    fn mapped(keeper: &Keeper, volume: u32) -> u32 {
        let map = &keeper.open[&volume].map;
        let all = std::iter::successors(map.next_mapped(0, u32::MAX), |at| map.next_mapped(at + 1, u32::MAX));
        all.count() as u32
    }

    /// Other guests wait for a turn to end, and a large store took one for up to a second.
    #[test]
    fn no_turn_of_an_opening_looks_at_more_than_its_share() {
        let mut store = store();
        for name in ["one", "two"] {
            store.keeper.command(7, Command::Open { name: name.into(), cipher: None });
            let (mut at, mut had, mut turns) = (0, 0, 0);
            loop {
                assert!(store.turn(), "it goes on without an event");
                let Some((_, Running::Opening(opening))) = &store.keeper.running else { break };
                let has = mapped(&store.keeper, opening.volume);
                let (looked, changed) = (opening.at - at, has.abs_diff(had));
                let sorted = if opening.depths.len() > 1 { CHANGE * changed } else { 0 };
                assert!(looked + sorted <= LOOKS + CHANGE, "{looked} slots and {changed} extents");
                assert!(changed <= LOOKS);
                (at, had, turns) = (opening.at, has, turns + 1);
            }
            assert!(turns >= store.keeper.slots.len() / LOOKS, "{turns} turns");
            let answer = store.keeper.next_answer();
            let Some((7, Ok(Answer::Opened { map, .. }))) = answer else { panic!("{name} is not open") };
            assert!(matches!(map.read(30 * EXTENT, EXTENT), Run::At { .. }));
            let hidden = matches!(map.read(0, 20 * EXTENT), Run::Zero { len } if len == 20 * EXTENT);
            assert_eq!(hidden, name == "two");
        }
    }

    #[test]
    fn no_turn_of_a_diff_or_a_flatten_looks_at_more_than_its_share() {
        let mut store = store();
        let (volume, from) = ("two".to_owned(), Some("s".to_owned()));
        store.keeper.command(8, Command::Diff { volume, from, to: None });
        let mut at = 0;
        for turns in 0.. {
            assert!(store.turn());
            let looked = match &store.keeper.running {
                Some((_, Running::Comparing(comparing))) => comparing.at(),
                _ => {
                    assert!(turns >= store.keeper.slots.len() / LOOKS);
                    break;
                }
            };
            assert!(looked - at <= LOOKS);
            at = looked;
        }
        let Some((8, Ok(Answer::Ranges(ranges)))) = store.keeper.next_answer() else { panic!("no ranges") };
        assert_eq!(ranges.sorted(), [(0, 420 * EXTENT)]);

        let (volume, snapshot) = ("two".to_owned(), Some("s".to_owned()));
        store.ask(Command::Clone { volume, snapshot, name: "clone".into(), created_s: 3 }).unwrap();
        store.ask(Command::Flatten { volume: "clone".into() }).unwrap();
        while store.turn() {}
        // All is its own, and a flatten that looks again finds nothing.
        let (clone, _) = store.opened("clone");
        store.keeper.begin_flatten(9, clone);
        store.keeper.looks = LOOKS / 2;
        assert!(store.keeper.run_flatten(), "there is more to look at");
        assert_eq!(store.keeper.looks, 0);
        let mut turns = || {
            store.keeper.looks = LOOKS;
            store.keeper.run_flatten()
        };
        assert!(turns() && !turns(), "it has {EXTENTS} extents");
    }

    /// It is not its guest's before it is whole.
    #[test]
    fn nothing_is_written_to_a_volume_on_its_way_to_be_open() {
        let mut store = store();
        store.keeper.command(7, Command::Open { name: "two".into(), cipher: None });
        store.turn();
        let Some((_, Running::Opening(opening))) = &store.keeper.running else { panic!("it is open") };
        let volume = opening.volume;
        let kind = RequestKind::Write;
        store.keeper.submit(crate::Request { token: 5, volume, kind, offset: 0, len: 4096, durable: false });
        store.turn();
        assert_eq!(store.keeper.next_done().map(|done| done.result), Some(Err(crate::errno::ENODEV)));
    }

    /// A guest discarded an extent whose slot had not been looked at, and wrote it to one that had been. It has differed all the time.
    #[test]
    fn a_diff_has_what_moves_while_it_is_looked_for() {
        let mut store = Calm::new(64 << 20, EXTENT);
        let (early, _) = store.volume("early", 8 * EXTENT);
        store.request(early, RequestKind::Write, 0, 8 * EXTENT);
        let (volume, map) = store.volume("late", 8 * EXTENT);
        store.request(volume, RequestKind::Write, 0, EXTENT);
        store.ask(Command::Close { volume: early }).unwrap();
        store.ask(Command::Delete { name: "early".into() }).unwrap();
        while store.turn() || !store.keeper.is_idle() {}
        store.ask(Command::Flush).unwrap();
        while store.turn() || store.keeper.has_to_recycle() {}
        // What is given out next begins at the first slot again.
        let rest = store.keeper.allocator.free() - 8;
        assert_eq!(store.keeper.allocator.take(rest as u32), Some((9, rest as u32)));
        let place = map.read(0, EXTENT);
        store.keeper.set_looks(8);
        store.keeper.command(7, Command::Diff { volume: "late".into(), from: None, to: None });
        store.turn();
        store.keeper.set_looks(0);
        store.request(volume, RequestKind::Zero { unmap: true }, 0, EXTENT);
        store.request(volume, RequestKind::Write, 0, EXTENT);
        let (Run::At { at: before, .. }, Run::At { at, .. }) = (place, map.read(0, EXTENT)) else { panic!() };
        assert!(at < before, "from {before} to {at}");
        store.keeper.set_looks(LOOKS);
        while store.turn() {}
        let Some((7, Ok(Answer::Ranges(ranges)))) = store.keeper.next_answer() else { panic!("no ranges") };
        assert_eq!(ranges.sorted(), [(0, EXTENT)]);
    }
}

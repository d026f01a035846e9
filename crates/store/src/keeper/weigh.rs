//! What deleting a snapshot would free, counted in steps.
//!
//! The blocks of a snapshot's layer that the layer on top of it says itself are nobody's without the snapshot; the others become that
//! layer's. So an extent is free when all that it has is covered. Guests that write meanwhile may change what is already counted.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::commands::{Answer, Running};
use super::Keeper;
use crate::error::StoreError;
use crate::format::{Entry, Kind};

/// Under way.
pub(super) struct Weighing {
    /// Names of snapshots, and their layers; None: what cannot be deleted.
    snapshots: Vec<(String, Option<u32>)>,
    /// Layers whose extents are looked at, by the only layer on top of each.
    below: HashMap<u32, u32>,
    /// Granules in slots of these layers that nothing on top is known to cover, by layer, extent of the volume and slot.
    bare: BTreeMap<(u32, u32, u32), u16>,
    /// Extents that are free without the layer.
    free: HashMap<u32, u64>,
    gathered: bool,
    /// The next slot to look at.
    at: u32,
    /// What covers granules of a run of extents, and was not held against all of them.
    covering: Option<Covering>,
}

struct Covering {
    layer: u32,
    vextent: u32,
    end: u32,
    mask: u16,
}

impl Keeper {
    /// Begin to count what each snapshot of `volume` would free.
    pub(super) fn weigh(&mut self, number: u64, volume: &str) -> Result<(), StoreError> {
        let volume = self.volume(volume)?.id;
        let (mut snapshots, mut below, mut free) = (Vec::new(), HashMap::new(), HashMap::new());
        for snapshot in self.catalog.snapshots_of(volume) {
            let layer = snapshot.layer;
            let may_go = self.catalog.clones_of(snapshot.id).is_empty();
            snapshots.push((snapshot.name.clone(), may_go.then_some(layer)));
            let mut on_top = self.catalog.children(layer);
            match (on_top.next(), on_top.next()) {
                _ if !may_go => {}
                (None, _) => drop(free.insert(layer, self.slots.extents_of(layer))),
                (Some(child), None) => drop(below.insert(child, layer)),
                // What several stand on stays for all of them.
                (Some(_), Some(_)) => {}
            }
        }
        let bare = BTreeMap::new();
        let weighing = Weighing { snapshots, below, bare, free, gathered: false, at: 0, covering: None };
        self.running = Some((number, Running::Weighing(Box::new(weighing))));
        Ok(())
    }

    /// Go on, as far as one turn goes.
    pub(super) fn go_on_weighing(&mut self, number: u64, mut weighing: Box<Weighing>) {
        while self.looks > 0 && weighing.at < self.slots.len() {
            match weighing.gathered {
                false => self.gather(&mut weighing),
                true => self.hold_against(&mut weighing),
            }
        }
        if weighing.at < self.slots.len() || weighing.covering.is_some() || !weighing.gathered {
            if weighing.at == self.slots.len() && !weighing.gathered {
                (weighing.gathered, weighing.at) = (true, 0);
            }
            self.running = Some((number, Running::Weighing(weighing)));
            return;
        }
        let bare = weighing.bare.iter().filter(|(_, bare)| **bare == 0);
        bare.for_each(|((layer, ..), _)| *weighing.free.entry(*layer).or_default() += 1);
        let (Weighing { snapshots, free, .. }, extent) = (*weighing, self.extents().bytes());
        let bytes = |layer: u32| free.get(&layer).copied().unwrap_or(0) * extent;
        let found = snapshots.into_iter().map(|(name, layer)| (name, layer.map(bytes))).collect();
        self.answers.push_back((number, Ok(Answer::Reclaimable(found))));
    }

    /// Note what the layers have.
    fn gather(&mut self, weighing: &mut Weighing) {
        let end = weighing.at.saturating_add(self.looks).min(self.slots.len());
        let layers: HashSet<u32> = weighing.below.values().copied().collect();
        for (slot, entry) in self.slots.range(weighing.at..end) {
            if entry.kind == Kind::Data && layers.contains(&entry.layer) {
                weighing.bare.insert((entry.layer, entry.vextent, slot), entry.mask);
            }
        }
        self.looks -= end - weighing.at;
        weighing.at = end;
    }

    /// Take away what the layers on top cover.
    fn hold_against(&mut self, weighing: &mut Weighing) {
        if weighing.covering.is_none() {
            let end = weighing.at.saturating_add(self.looks).min(self.slots.len());
            let on_top = |layer: &u32| weighing.below.get(layer).copied();
            let mut found = self.slots.range(weighing.at..end);
            let next = found.find_map(|(slot, entry)| on_top(&entry.layer).map(|layer| (slot, layer, entry)));
            let looked = next.as_ref().map_or(end, |(slot, ..)| slot + 1);
            self.looks -= looked - weighing.at;
            weighing.at = looked;
            weighing.covering = next.map(|(_, layer, Entry { vextent, count, mask, .. })| Covering {
                layer,
                vextent,
                end: vextent.saturating_add(count.max(1)),
                mask,
            });
        }
        let Some(covering) = weighing.covering.take() else { return };
        let Covering { layer, vextent, end, mask } = covering;
        let mut bare = weighing.bare.range_mut((layer, vextent, 0)..(layer, end, 0));
        while self.looks > 0 {
            let Some((_, bare)) = bare.next() else { return };
            self.looks -= 1;
            *bare &= !mask;
        }
        weighing.covering = bare.next().map(|((_, vextent, _), bare)| {
            *bare &= !mask;
            Covering { layer, vextent: *vextent, end, mask }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RequestKind;
    use crate::testing::Calm;
    use crate::Command;

    const EXTENT: u64 = 16 << 10;

    fn reclaimable(store: &mut Calm) -> Vec<(String, Option<u64>)> {
        let Ok(Answer::Reclaimable(found)) = store.ask(Command::Reclaimable { volume: "v".into() }) else {
            panic!("not weighed")
        };
        found.into_iter().map(|(name, bytes)| (name, bytes.map(|bytes| bytes / EXTENT))).collect()
    }

    /// What is told is what a deletion then frees, for each of them.
    #[test]
    fn what_is_told_is_what_a_deletion_frees() {
        for name in ["first", "second", "third"] {
            let mut store = Calm::new(64 << 20, EXTENT);
            let (volume, _) = store.volume("v", 64 * EXTENT);
            store.request(volume, RequestKind::Write, 0, 10 * EXTENT);
            store.snapshot("v", "first");
            // Two extents anew, a part of a third, and three discarded.
            store.request(volume, RequestKind::Write, 0, 2 * EXTENT + EXTENT / 4);
            store.request(volume, RequestKind::Zero { unmap: true }, 5 * EXTENT, 3 * EXTENT);
            store.snapshot("v", "second");
            store.request(volume, RequestKind::Write, EXTENT, EXTENT);
            store.snapshot("v", "third");
            let told = reclaimable(&mut store);
            let told: HashMap<&str, u64> =
                told.iter().map(|(name, extents)| (name.as_str(), extents.unwrap())).collect();
            assert_eq!(told, HashMap::from([("first", 5), ("second", 1), ("third", 0)]));
            let before = store.keeper.figures().used;
            store.ask(Command::DeleteSnapshot { volume: "v".into(), name: name.into() }).unwrap();
            while store.turn() || store.keeper.has_to_recycle() {}
            store.ask(Command::Flush).unwrap();
            while store.turn() || store.keeper.has_to_recycle() {}
            assert_eq!((before - store.keeper.figures().used) / EXTENT, told[name], "{name}");
        }
    }

    #[test]
    fn what_clones_stand_on_frees_nothing() {
        let mut store = Calm::new(64 << 20, EXTENT);
        let (volume, _) = store.volume("v", 64 * EXTENT);
        store.request(volume, RequestKind::Write, 0, 4 * EXTENT);
        store.snapshot("v", "s");
        store.request(volume, RequestKind::Write, 0, 4 * EXTENT);
        let (name, snapshot) = ("clone".to_owned(), Some("s".to_owned()));
        store.ask(Command::Clone { volume: "v".into(), snapshot, name, created_s: 3 }).unwrap();
        assert_eq!(reclaimable(&mut store), [("s".to_owned(), None)]);
        store.ask(Command::Delete { name: "clone".into() }).unwrap();
        while store.turn() || !store.keeper.is_idle() {}
        assert_eq!(reclaimable(&mut store), [("s".to_owned(), Some(4))]);
    }
}

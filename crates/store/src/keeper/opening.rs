//! The map of a volume that is opened, made of what its layers hold.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{Keeper, Open};
use crate::format::{Entry, Kind};
use crate::map::{Map, NodeNames, Part, FROZEN};

impl Keeper {
    /// Open volume `id`, or open it once more.
    pub(super) fn open_volume(&mut self, id: u32) -> Option<Arc<Map>> {
        if let Some(open) = self.open.get_mut(&id) {
            open.users += 1;
            return Some(open.map.clone());
        }
        let live = self.catalog.volumes.get(&id)?.live;
        let map = Arc::new(Map::new(self.extents(), self.places.clone()));
        let tag = map.live();
        if self.failed.is_some() {
            map.hold();
        }
        let mut names = NodeNames::default();
        let mut tombs = BTreeMap::new();
        self.for_layers(live, |depth, slot, entry| match entry.kind {
            Kind::Data => {
                let part = Part::new(slot, entry.mask, if depth == 0 { tag } else { FROZEN });
                if map.publish_first(entry.vextent, part) {
                    return;
                }
                let mut parts = map.parts(entry.vextent);
                parts.put(part);
                // Nobody reads the map yet, so what it replaces is free at once.
                let node = map.publish(&mut names, entry.vextent, &parts);
                node.into_iter().for_each(|node| names.give(node));
            }
            Kind::Zero => {
                if depth == 0 {
                    tombs.insert(entry.vextent, (slot, entry.count, entry.mask));
                }
                let end = entry.vextent + entry.count;
                let mut at = entry.vextent;
                while let Some(vextent) = map.next_mapped(at, end) {
                    let mut parts = map.parts(vextent);
                    parts.remove(entry.mask);
                    let node = map.publish(&mut names, vextent, &parts);
                    node.into_iter().for_each(|node| names.give(node));
                    at = vextent + 1;
                }
            }
            Kind::Free => {}
        });
        self.open.insert(
            id,
            Open { map: map.clone(), names, cipher: None, tag, users: 1, tombs, busy: 0, parked: None },
        );
        Some(map)
    }

    /// Call `with` (depth, slot, entry) for all that the chain of layers from `live` on holds: oldest layer first, of each its
    /// tombstones and then its data, as data counts over tombstones of the same layer.
    fn for_layers(&self, live: u32, mut with: impl FnMut(usize, u32, &Entry)) {
        let chain = self.catalog.chain(live);
        if let [only] = chain[..] {
            // The usual case, of which nothing has to be sorted. Tombstones that are left from an older layer hide nothing
            // any more, and must not hide what was written since.
            let data = self.slots.iter().filter(|(_, entry)| entry.layer == only && entry.kind == Kind::Data);
            return data.for_each(|(slot, entry)| with(0, slot, &entry));
        }
        let depths: HashMap<u32, usize> =
            chain.iter().enumerate().map(|(depth, layer)| (*layer, depth)).collect();
        let mut of_depth: Vec<[Vec<u32>; 2]> = vec![Default::default(); chain.len()];
        for (slot, entry) in self.slots.iter() {
            if let Some(depth) = depths.get(&entry.layer) {
                of_depth[*depth][usize::from(entry.kind == Kind::Data)].push(slot);
            }
        }
        for (depth, slots) in of_depth.iter().enumerate().rev() {
            slots.iter().flatten().for_each(|slot| with(depth, *slot, &self.slots.get(*slot)));
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

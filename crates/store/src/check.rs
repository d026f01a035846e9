//! What in a store cannot be.

use std::collections::BTreeMap;

use crate::format::Kind;
use crate::recovery::Recovered;

/// Every fault in what was read, as sentences: granules of a layer that are in two places, layers that belong to nothing, extents
/// behind the end of their volume.
pub fn check(store: &Recovered) -> Vec<String> {
    let mut faults = Vec::new();
    let mut has: BTreeMap<(u32, u32), u16> = BTreeMap::new();
    let mut longest: BTreeMap<u32, u64> = BTreeMap::new();
    let volumes = store.catalog.volumes.values().map(|volume| (volume.live, volume.size));
    let snapshots = store.catalog.snapshots.values().map(|snapshot| (snapshot.layer, snapshot.size));
    for (layer, size) in volumes.chain(snapshots) {
        for one in store.catalog.chain(layer) {
            let longest = longest.entry(one).or_default();
            *longest = size.max(*longest);
        }
    }
    let shift = store.superblock.layout.extents.shift;
    for (slot, entry) in store.slots.iter() {
        if entry.kind != Kind::Data {
            continue;
        }
        let before = has.entry((entry.layer, entry.vextent)).or_default();
        if *before & entry.mask != 0 {
            let twice = *before & entry.mask;
            faults.push(format!(
                "extent {} of layer {} has granules {twice:#x} in two places",
                entry.vextent, entry.layer
            ));
        }
        *before |= entry.mask;
        let end = longest.get(&entry.layer).copied();
        if end.is_some_and(|end| u64::from(entry.vextent) << shift >= end) {
            faults.push(format!("slot {slot} is of extent {}, behind the end of its volume", entry.vextent));
        }
    }
    faults
}

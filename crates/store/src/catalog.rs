//! What exists: volumes, snapshots, and the layers that they are made of.
//!
//! A *layer* is what was written to a volume between two snapshots. A volume's newest is *live*; a snapshot names the one that
//! it closed. Each layer but the oldest has a parent, which says what it does not. A layer that is neither live nor named by a
//! snapshot is *nameless*: without children it goes, with one child it is merged into that, and with more it stays.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::format::{Reader, Writer};

/// Bytes of a name.
pub const NAME_MAX: usize = 128;
const INTEGRITY: u8 = 1;

/// What is done to a volume's blocks on their way to the drive. Its snapshots and clones have the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seal {
    /// Each block has a checksum.
    pub integrity: bool,
    /// The volume's key, wrapped by one that the store never sees; empty: blocks are not encrypted. At most 255 bytes.
    pub key: Vec<u8>,
}

impl Seal {
    /// Blocks go to the drive as the guest gave them, and nothing is kept beside them.
    pub fn is_none(&self) -> bool {
        !self.integrity && self.key.is_empty()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub id: u32,
    pub name: String,
    /// Bytes.
    pub size: u64,
    pub live: u32,
    /// The snapshot that it was cloned from; 0: none, or it was flattened.
    pub origin: u32,
    /// Seconds since 1970.
    pub created_s: u64,
    pub seal: Seal,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: u32,
    pub volume: u32,
    pub name: String,
    pub layer: u32,
    /// Bytes of the volume when it was made.
    pub size: u64,
    pub created_s: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    pub id: u32,
    /// 0: none.
    pub parent: u32,
}

/// One change of the catalog. All are absolute: to make one twice is to make it once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Volume(Volume),
    NoVolume(u32),
    Snapshot(Snapshot),
    NoSnapshot(u32),
    Layer(Layer),
    NoLayer(u32),
    /// Ids below this one were given out.
    Next(u32),
}

impl Change {
    pub fn encode(&self, out: &mut Writer) {
        match self {
            Self::Volume(volume) => {
                out.u8(1);
                out.u32(volume.id);
                out.u64(volume.size);
                out.u32(volume.live);
                out.u32(volume.origin);
                out.u64(volume.created_s);
                out.text(&volume.name);
                out.u8(if volume.seal.integrity { INTEGRITY } else { 0 });
                out.bytes(&volume.seal.key);
            }
            Self::NoVolume(id) => {
                out.u8(2);
                out.u32(*id);
            }
            Self::Snapshot(snapshot) => {
                out.u8(3);
                out.u32(snapshot.id);
                out.u32(snapshot.volume);
                out.u32(snapshot.layer);
                out.u64(snapshot.size);
                out.u64(snapshot.created_s);
                out.text(&snapshot.name);
            }
            Self::NoSnapshot(id) => {
                out.u8(4);
                out.u32(*id);
            }
            Self::Layer(layer) => {
                out.u8(5);
                out.u32(layer.id);
                out.u32(layer.parent);
            }
            Self::NoLayer(id) => {
                out.u8(6);
                out.u32(*id);
            }
            Self::Next(next) => {
                out.u8(7);
                out.u32(*next);
            }
        }
    }

    pub fn decode(from: &mut Reader) -> Option<Self> {
        Some(match from.u8()? {
            1 => {
                let (id, size, live) = (from.u32()?, from.u64()?, from.u32()?);
                let (origin, created_s) = (from.u32()?, from.u64()?);
                let name = from.text()?;
                let seal = Seal { integrity: from.u8()? & INTEGRITY != 0, key: from.bytes()?.to_vec() };
                Self::Volume(Volume { id, size, live, origin, created_s, name, seal })
            }
            2 => Self::NoVolume(from.u32()?),
            3 => {
                let (id, volume, layer) = (from.u32()?, from.u32()?, from.u32()?);
                let (size, created_s) = (from.u64()?, from.u64()?);
                Self::Snapshot(Snapshot { id, volume, layer, size, created_s, name: from.text()? })
            }
            4 => Self::NoSnapshot(from.u32()?),
            5 => Self::Layer(Layer { id: from.u32()?, parent: from.u32()? }),
            6 => Self::NoLayer(from.u32()?),
            7 => Self::Next(from.u32()?),
            _ => return None,
        })
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalog {
    pub volumes: BTreeMap<u32, Volume>,
    pub snapshots: BTreeMap<u32, Snapshot>,
    pub layers: BTreeMap<u32, Layer>,
    pub next: u32,
}

impl Default for Catalog {
    fn default() -> Self {
        Self { volumes: BTreeMap::new(), snapshots: BTreeMap::new(), layers: BTreeMap::new(), next: 1 }
    }
}

impl Catalog {
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Volume(volume) => drop(self.volumes.insert(volume.id, volume)),
            Change::NoVolume(id) => drop(self.volumes.remove(&id)),
            Change::Snapshot(snapshot) => drop(self.snapshots.insert(snapshot.id, snapshot)),
            Change::NoSnapshot(id) => drop(self.snapshots.remove(&id)),
            Change::Layer(layer) => drop(self.layers.insert(layer.id, layer)),
            Change::NoLayer(id) => drop(self.layers.remove(&id)),
            Change::Next(next) => self.next = self.next.max(next),
        }
    }

    /// As changes that make it from nothing.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        Change::Next(self.next).encode(&mut out);
        self.layers.values().for_each(|layer| Change::Layer(*layer).encode(&mut out));
        self.volumes.values().for_each(|volume| Change::Volume(volume.clone()).encode(&mut out));
        self.snapshots.values().for_each(|snapshot| Change::Snapshot(snapshot.clone()).encode(&mut out));
        out.0
    }

    /// None if the bytes are no catalog.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut catalog = Self::default();
        let mut from = Reader(bytes);
        while !from.0.is_empty() {
            catalog.apply(Change::decode(&mut from)?);
        }
        Some(catalog)
    }

    /// What in it cannot be: names twice, ids that were not given out, layers that are not there, that have themselves as
    /// ancestors, or that are live and something else too.
    pub fn fault(&self) -> Option<String> {
        let mut names = BTreeSet::new();
        let mut live = BTreeSet::new();
        for volume in self.volumes.values() {
            let name = &volume.name;
            if !names.insert((0, name)) || !(1..=NAME_MAX).contains(&name.len()) {
                return Some(format!("two volumes are called {name:?}, or it is no name"));
            }
            if !self.layers.contains_key(&volume.live) || !live.insert(volume.live) {
                return Some(format!("volume {name:?} has no layer {} of its own", volume.live));
            }
            if !(1..=i64::MAX as u64).contains(&volume.size) {
                return Some(format!("volume {name:?} has {} bytes", volume.size));
            }
        }
        for snapshot in self.snapshots.values() {
            let name = &snapshot.name;
            if !names.insert((snapshot.volume, name)) || !(1..=NAME_MAX).contains(&name.len()) {
                return Some(format!("two snapshots of a volume are called {name:?}, or it is no name"));
            }
            if !self.volumes.contains_key(&snapshot.volume) || !self.layers.contains_key(&snapshot.layer) {
                return Some(format!("snapshot {name:?} has no volume or no layer"));
            }
            if live.contains(&snapshot.layer) {
                return Some(format!("snapshot {name:?} is of a layer that is written to"));
            }
            if !(1..=i64::MAX as u64).contains(&snapshot.size) {
                return Some(format!("snapshot {name:?} has {} bytes", snapshot.size));
            }
        }
        let ids = self.volumes.keys().chain(self.snapshots.keys()).chain(self.layers.keys());
        if let Some(id) = ids.into_iter().find(|id| **id == 0 || **id >= self.next) {
            return Some(format!("id {id} was never given out"));
        }
        self.fault_of_layers(&live)
    }

    fn fault_of_layers(&self, live: &BTreeSet<u32>) -> Option<String> {
        // Each layer is passed once, however long the chains are.
        let mut sound = BTreeSet::new();
        for start in self.layers.values() {
            let mut passed = BTreeSet::new();
            let mut at = start;
            while at.parent != 0 && !sound.contains(&at.id) {
                if !passed.insert(at.id) {
                    return Some(format!("layer {} is its own ancestor", at.id));
                }
                if live.contains(&at.parent) {
                    return Some(format!("layer {} stands on one that is written to", at.id));
                }
                let Some(parent) = self.layers.get(&at.parent) else {
                    return Some(format!("layer {} has no parent {}", at.id, at.parent));
                };
                at = parent;
            }
            sound.extend(passed);
        }
        None
    }

    pub fn take_id(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }

    pub fn volume(&self, name: &str) -> Option<&Volume> {
        self.volumes.values().find(|volume| volume.name == name)
    }

    /// Oldest first.
    pub fn snapshots_of(&self, volume: u32) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values().filter(move |snapshot| snapshot.volume == volume)
    }

    pub fn snapshot(&self, volume: u32, name: &str) -> Option<&Snapshot> {
        self.snapshots_of(volume).find(|snapshot| snapshot.name == name)
    }

    pub fn parent(&self, layer: u32) -> u32 {
        self.layers.get(&layer).map_or(0, |layer| layer.parent)
    }

    /// The layer and its ancestors, newest first. Longer than there are layers if it runs in a circle.
    pub fn chain(&self, layer: u32) -> Vec<u32> {
        let mut chain = Vec::new();
        let mut at = layer;
        while at != 0 && chain.len() <= self.layers.len() {
            chain.push(at);
            at = self.parent(at);
        }
        chain
    }

    /// Layers whose blocks have checksums.
    pub fn layers_with_integrity(&self) -> HashSet<u32> {
        let mut layers = HashSet::new();
        let snapshots = self.snapshots.values().map(|snapshot| (snapshot.volume, snapshot.layer));
        for (volume, layer) in self.volumes.values().map(|volume| (volume.id, volume.live)).chain(snapshots) {
            if self.volumes.get(&volume).is_some_and(|volume| volume.seal.integrity) {
                let mut at = layer;
                // Whoever was there has been at its ancestors too.
                while at != 0 && layers.insert(at) {
                    at = self.parent(at);
                }
            }
        }
        layers
    }

    /// Who reads what a layer holds, for a person: the volume of which it is the live layer, the snapshot that closed it, or one of
    /// those that stand on it.
    pub fn whose(&self, layer: u32) -> String {
        let of_snapshot = |one: &Snapshot| {
            let volume = self.volumes.get(&one.volume).map_or("", |volume| &volume.name);
            format!("snapshot {:?} of volume {volume:?}", one.name)
        };
        let of_volume = |one: &Volume| format!("volume {:?}", one.name);
        let (volumes, snapshots) = (|| self.volumes.values(), || self.snapshots.values());
        volumes()
            .find(|one| one.live == layer)
            .map(of_volume)
            .or_else(|| snapshots().find(|one| one.layer == layer).map(of_snapshot))
            .or_else(|| snapshots().find(|one| self.chain(one.layer).contains(&layer)).map(of_snapshot))
            .or_else(|| volumes().find(|one| self.chain(one.live).contains(&layer)).map(of_volume))
            .unwrap_or_else(|| "a volume or snapshot that was deleted".into())
    }

    pub fn children(&self, layer: u32) -> impl Iterator<Item = u32> + '_ {
        self.layers.values().filter(move |one| one.parent == layer).map(|one| one.id)
    }

    /// The nameless layers that can go, with the child that takes what is left of them.
    pub fn reapable(&self) -> Vec<(u32, Option<u32>)> {
        let mut children: BTreeMap<u32, (usize, u32)> = BTreeMap::new();
        for layer in self.layers.values() {
            let entry = children.entry(layer.parent).or_default();
            *entry = (entry.0 + 1, layer.id);
        }
        let named: BTreeSet<u32> = (self.volumes.values().map(|volume| volume.live))
            .chain(self.snapshots.values().map(|snapshot| snapshot.layer))
            .collect();
        let nameless = self.layers.keys().filter(|id| !named.contains(id));
        nameless
            .filter_map(|id| match children.get(id) {
                None => Some((*id, None)),
                Some((1, child)) => Some((*id, Some(*child))),
                Some(_) => None,
            })
            .collect()
    }

    /// Names of volumes that were cloned from it and still read from it.
    pub fn clones_of(&self, snapshot: u32) -> Vec<&str> {
        let clones = self.volumes.values().filter(|volume| volume.origin == snapshot);
        clones.map(|volume| volume.name.as_str()).collect()
    }

    /// The volume and the snapshot that this one was cloned from.
    pub fn origin_of(&self, volume: &Volume) -> Option<(&Volume, &Snapshot)> {
        let snapshot = self.snapshots.get(&volume.origin)?;
        Some((self.volumes.get(&snapshot.volume)?, snapshot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog() -> Catalog {
        let mut catalog = Catalog::default();
        for (id, parent) in [(1, 0), (2, 1), (3, 2), (4, 2)] {
            catalog.apply(Change::Layer(Layer { id, parent }));
        }
        let volume = |id, name: &str, live, origin| Volume {
            id,
            name: name.into(),
            size: 1,
            live,
            origin,
            created_s: 0,
            seal: Seal { integrity: id == 10, key: vec![id as u8; 3] },
        };
        catalog.apply(Change::Volume(volume(10, "a", 3, 0)));
        catalog.apply(Change::Volume(volume(11, "b", 4, 21)));
        for (id, layer, name) in [(20, 1, "old"), (21, 2, "new")] {
            let snapshot = Snapshot { id, volume: 10, layer, name: name.into(), size: 1, created_s: 0 };
            catalog.apply(Change::Snapshot(snapshot));
        }
        catalog.apply(Change::Next(22));
        catalog
    }

    #[test]
    fn it_comes_back_as_it_went() {
        let catalog = catalog();
        assert_eq!(Catalog::decode(&catalog.encode()), Some(catalog));
        assert_eq!(Catalog::decode(&[9]), None);
    }

    #[test]
    fn nameless_layers_go_when_at_most_one_stands_on_them() {
        let mut catalog = catalog();
        assert_eq!(catalog.reapable(), []);
        assert_eq!(catalog.clones_of(21), ["b"]);
        assert_eq!(catalog.origin_of(&catalog.volumes[&11]).map(|(_, one)| one.id), Some(21));
        assert_eq!(catalog.origin_of(&catalog.volumes[&10]), None);
        catalog.apply(Change::NoSnapshot(20));
        assert_eq!(catalog.reapable(), [(1, Some(2))]);
        catalog.apply(Change::NoSnapshot(21));
        assert_eq!(catalog.reapable(), [(1, Some(2))], "two stand on layer 2");
        catalog.apply(Change::NoVolume(11));
        assert_eq!(catalog.reapable(), [(1, Some(2)), (4, None)]);
    }

    #[test]
    fn faults_are_told() {
        assert_eq!(catalog().fault(), None);
        let mut looped = catalog();
        looped.apply(Change::Layer(Layer { id: 1, parent: 2 }));
        assert!(looped.fault().unwrap().contains("ancestor"));
        let spoiled = |change: Change| {
            let mut spoiled = catalog();
            spoiled.apply(change);
            spoiled.fault().unwrap()
        };
        assert!(spoiled(Change::Layer(Layer { id: 22, parent: 0 })).contains("never given out"));
        assert!(spoiled(Change::Layer(Layer { id: 5, parent: 3 })).contains("stands on"));
        let twice = Volume { name: "b".into(), ..catalog().volumes[&10].clone() };
        assert!(spoiled(Change::Volume(twice)).contains("called \"b\""));
        let shared = Volume { live: 4, ..catalog().volumes[&10].clone() };
        assert!(spoiled(Change::Volume(shared)).contains("of its own"));
        let written = Snapshot { layer: 3, ..catalog().snapshots[&20].clone() };
        assert!(spoiled(Change::Snapshot(written)).contains("written to"));
        let mut orphan = catalog();
        orphan.apply(Change::NoLayer(1));
        assert!(orphan.fault().unwrap().contains("no layer") || orphan.fault().unwrap().contains("parent"));
    }
}

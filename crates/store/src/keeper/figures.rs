//! How much there is of what.

use super::Keeper;
use crate::catalog::Volume;

/// Bytes of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    pub size: u64,
    /// Of extents.
    pub capacity: u64,
    /// In extents that something is in.
    pub used: u64,
    /// Sum of the volumes' sizes.
    pub promised: u64,
    /// In layers that go.
    pub reclaiming: u64,
}

/// A volume as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    pub name: String,
    pub size: u64,
    pub created_s: u64,
    /// Bytes in extents of its own since its latest snapshot.
    pub own: u64,
    /// Bytes in extents of older layers that it reads from, its snapshots' among them.
    pub inherited: u64,
    /// `volume`, `snapshot` that it was cloned from.
    pub origin: Option<(String, String)>,
    pub open: bool,
    /// Its blocks have checksums.
    pub integrity: bool,
    /// Its key as it is wrapped; empty: its blocks are not encrypted.
    pub key: Vec<u8>,
    pub snapshots: Vec<SnapshotInfo>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    pub name: String,
    /// Bytes of the volume when it was made.
    pub size: u64,
    pub created_s: u64,
    /// Bytes in extents that were written between the snapshot before and this one.
    pub own: u64,
}

impl Keeper {
    pub fn figures(&self) -> Figures {
        let extent = self.extents().bytes();
        let layout = self.layout();
        let taken = layout.capacity() - self.allocator.free() - self.retired_extents();
        let reclaiming =
            self.catalog.reapable().iter().map(|(layer, _)| self.slots.extents_of(*layer)).sum::<u64>();
        Figures {
            size: layout.size,
            capacity: layout.capacity() * extent,
            used: taken * extent,
            promised: self.catalog.volumes.values().fold(0, |sum, volume| sum.saturating_add(volume.size)),
            reclaiming: reclaiming * extent,
        }
    }

    pub fn volumes(&self) -> Vec<VolumeInfo> {
        self.catalog.volumes.values().map(|volume| self.info(volume)).collect()
    }

    pub(super) fn info(&self, volume: &Volume) -> VolumeInfo {
        let extent = self.extents().bytes();
        let of = |layer: u32| self.slots.extents_of(layer) * extent;
        VolumeInfo {
            name: volume.name.clone(),
            size: volume.size,
            created_s: volume.created_s,
            own: of(volume.live),
            inherited: self.catalog.chain(volume.live).iter().skip(1).map(|layer| of(*layer)).sum(),
            origin: self
                .catalog
                .origin_of(volume)
                .map(|(of, snapshot)| (of.name.clone(), snapshot.name.clone())),
            open: self.open.contains_key(&volume.id),
            integrity: volume.seal.integrity,
            key: volume.seal.key.clone(),
            snapshots: self
                .catalog
                .snapshots_of(volume.id)
                .map(|snapshot| SnapshotInfo {
                    name: snapshot.name.clone(),
                    size: snapshot.size,
                    created_s: snapshot.created_s,
                    own: of(snapshot.layer),
                })
                .collect(),
        }
    }
}

//! Snapshots on their way out: how far that is, and back again while nothing of them is gone.
//!
//! A deletion is durable at once, and what only the snapshot kept is given up behind that (`reap.rs`). Until the first of it is, the
//! layer is as it was, and may have its name back. Deletions are known in memory alone: an opener finds layers without a name.

use std::collections::HashSet;

use super::commands::Answer;
use super::Keeper;
use crate::catalog::{Change, Snapshot};
use crate::error::StoreError;
use crate::mutants::{self, Mutant};

/// A deleted snapshot whose blocks are not all free, or its neighbour's.
struct Deletion {
    snapshot: Snapshot,
    /// Extents of its layer when it was deleted.
    extents: u64,
    begun: bool,
}

#[derive(Default)]
pub(super) struct Deletions {
    all: Vec<Deletion>,
    /// Layers that get their name back with a record that is under way.
    kept: HashSet<u32>,
}

/// As a list shows it. Bytes of extents that it had, and that are still its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletionInfo {
    pub name: String,
    pub total: u64,
    pub left: u64,
}

impl Deletions {
    /// Something of the layer is about to be given up.
    pub fn begin(&mut self, layer: u32) {
        let of_layer = self.all.iter_mut().filter(|one| one.snapshot.layer == layer);
        of_layer.for_each(|one| one.begun = true);
    }

    pub fn is_kept(&self, layer: u32) -> bool {
        self.kept.contains(&layer)
    }
}

impl Keeper {
    /// `snapshot` is about to be deleted.
    pub(super) fn note_deletion(&mut self, snapshot: Snapshot) {
        let extents = self.slots.extents_of(snapshot.layer);
        self.deletions.kept.remove(&snapshot.layer);
        let catalog = &self.catalog;
        self.deletions.all.retain(|one| {
            let is_under_way = catalog.layers.contains_key(&one.snapshot.layer);
            is_under_way && one.snapshot.id != snapshot.id
        });
        self.deletions.all.push(Deletion { snapshot, extents, begun: false });
    }

    pub(super) fn deletions_of(&self, volume: u32) -> Vec<DeletionInfo> {
        let extent = self.extents().bytes();
        let of_volume = self.deletions.all.iter().filter(|one| self.is_deleted(volume, one));
        let info = |one: &Deletion| DeletionInfo {
            name: one.snapshot.name.clone(),
            total: one.extents * extent,
            left: self.slots.extents_of(one.snapshot.layer).min(one.extents) * extent,
        };
        of_volume.map(info).collect()
    }

    fn is_deleted(&self, volume: u32, one: &Deletion) -> bool {
        let Snapshot { id, volume: of, layer, .. } = one.snapshot;
        of == volume && self.catalog.layers.contains_key(&layer) && !self.catalog.snapshots.contains_key(&id)
    }

    /// Give a deleted snapshot its name back.
    pub(super) fn keep_snapshot(
        &mut self,
        number: u64,
        volume: String,
        name: String,
    ) -> Result<Option<Answer>, StoreError> {
        let id = self.volume(&volume)?.id;
        if self.catalog.snapshot(id, &name).is_some() {
            return Err(StoreError::SnapshotExists { volume, snapshot: name });
        }
        let named = |one: &&Deletion| self.is_deleted(id, one) && one.snapshot.name == name;
        let Some(deletion) = self.deletions.all.iter().rev().find(named) else {
            return Err(StoreError::NoSnapshot { volume, snapshot: name });
        };
        if deletion.begun && !mutants::is(Mutant::KeepBegun) {
            return Err(StoreError::Deleted { volume, snapshot: name });
        }
        let snapshot = deletion.snapshot.clone();
        let layer = snapshot.layer;
        // Where the catalog has no room for the name the deletion goes on.
        let answer = self.change(number, vec![Change::Snapshot(snapshot)])?;
        self.deletions.kept.insert(layer);
        self.leave_layer(layer);
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RequestKind;
    use crate::testing::Calm;
    use crate::Command;

    const EXTENT: u64 = 16 << 10;

    /// Volume `v` with snapshots `old` and `new`, each with four extents that it alone has.
    fn store() -> Calm {
        let mut store = Calm::new(64 << 20, EXTENT);
        let (volume, _) = store.volume("v", 64 * EXTENT);
        for name in ["old", "new"] {
            store.request(volume, RequestKind::Write, 0, 4 * EXTENT);
            store.snapshot("v", name);
        }
        store.request(volume, RequestKind::Write, 0, 4 * EXTENT);
        store
    }

    fn delete(store: &mut Calm, snapshot: &str) {
        let (volume, name) = ("v".to_owned(), snapshot.to_owned());
        store.ask(Command::DeleteSnapshot { volume, name }).unwrap();
    }

    fn keep(store: &mut Calm, snapshot: &str) -> Result<Answer, StoreError> {
        store.ask(Command::KeepSnapshot { volume: "v".into(), name: snapshot.into() })
    }

    /// Names of the snapshots, and of those on their way out with the extents that these had and have.
    fn seen(store: &Calm) -> (Vec<String>, Vec<(String, u64, u64)>) {
        let info = store.keeper.volumes().remove(0);
        let deleting = info.deleting.into_iter();
        (
            info.snapshots.into_iter().map(|one| one.name).collect(),
            deleting.map(|one| (one.name, one.total / EXTENT, one.left / EXTENT)).collect(),
        )
    }

    #[test]
    fn a_deletion_is_seen_until_all_is_free() {
        let mut store = store();
        delete(&mut store, "old");
        let (names, deleting) = seen(&store);
        assert_eq!((names, deleting), (vec!["new".to_owned()], vec![("old".to_owned(), 4, 4)]));
        while store.turn() || !store.keeper.is_idle() {}
        assert_eq!(seen(&store), (vec!["new".to_owned()], vec![]));
        assert!(matches!(keep(&mut store, "old"), Err(StoreError::NoSnapshot { .. })));
    }

    #[test]
    fn a_deletion_that_has_freed_nothing_is_taken_back() {
        let mut store = store();
        let before = store.keeper.figures();
        delete(&mut store, "old");
        assert_eq!(seen(&store).0, ["new"]);
        keep(&mut store, "old").unwrap();
        while store.turn() || !store.keeper.is_idle() {}
        assert_eq!(seen(&store), (vec!["old".to_owned(), "new".to_owned()], vec![]));
        assert_eq!(store.keeper.figures(), before);
        assert!(matches!(keep(&mut store, "old"), Err(StoreError::SnapshotExists { .. })));
        // It can go again.
        delete(&mut store, "old");
        while store.turn() || !store.keeper.is_idle() {}
        assert_eq!(store.keeper.figures().used, before.used - 4 * EXTENT);
    }

    #[test]
    fn a_deletion_that_has_begun_is_not_taken_back() {
        let mut store = store();
        delete(&mut store, "old");
        while !store.keeper.deletions.all.iter().any(|one| one.begun) {
            store.turn();
        }
        assert_eq!(seen(&store).1.len(), 1, "it has not ended");
        assert!(matches!(keep(&mut store, "old"), Err(StoreError::Deleted { .. })));
    }
}

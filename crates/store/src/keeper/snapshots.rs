//! Snapshots: writes wait for a moment, and go on in the next layer.

use super::commands::{check_name, Answer, Running};
use super::Keeper;
use crate::catalog::{Change, Layer, Snapshot, Volume};
use crate::error::StoreError;
use crate::map::TAG_MAX;
use crate::mutants::{self, Mutant};

/// Nanoseconds that requests under way may hold a snapshot up, and it those that come.
const HOLD_NS: u64 = 10_000_000_000;

impl Keeper {
    pub(super) fn snapshot(
        &mut self,
        number: u64,
        volumes: &[String],
        name: &str,
        created_s: u64,
    ) -> Result<Option<Answer>, StoreError> {
        check_name(name)?;
        let mut sources = Vec::new();
        for volume in volumes {
            let source = self.volume(volume)?;
            if self.catalog.snapshot(source.id, name).is_some() {
                return Err(StoreError::SnapshotExists { volume: volume.clone(), snapshot: name.into() });
            }
            self.may_snapshot(&source)?;
            if sources.iter().all(|other: &Volume| other.id != source.id) {
                sources.push(source);
            }
        }
        let mut changes = Vec::new();
        for source in &sources {
            let (next, closed) = self.next_layer(source);
            let id = self.catalog.take_id();
            let (volume, name, size) = (source.id, name.into(), source.size);
            changes.push(Change::Snapshot(Snapshot { id, volume, name, layer: closed, size, created_s }));
            changes.extend(next);
        }
        self.hold(number, sources.iter().map(|source| source.id).collect(), changes)
    }

    pub(super) fn may_snapshot(&self, volume: &Volume) -> Result<(), StoreError> {
        self.refuse_flattening(volume)?;
        match self.open.get(&volume.id) {
            // Tags begin anew when it is opened.
            Some(open) if open.tag == TAG_MAX => Err(StoreError::InUse(volume.name.clone())),
            _ => Ok(()),
        }
    }

    /// The changes that close a volume's live layer, and the layer.
    pub(super) fn next_layer(&mut self, volume: &Volume) -> (Vec<Change>, u32) {
        let layer = Layer { id: self.catalog.take_id(), parent: volume.live };
        (vec![Change::Layer(layer), Change::Volume(Volume { live: layer.id, ..volume.clone() })], volume.live)
    }

    /// Have writes of these volumes wait, and make the changes when those under way have ended.
    pub(super) fn hold(
        &mut self,
        number: u64,
        volumes: Vec<u32>,
        changes: Vec<Change>,
    ) -> Result<Option<Answer>, StoreError> {
        for id in &volumes {
            if let Some(open) = self.open.get_mut(id) {
                open.map.hold();
                open.parked = Some(Vec::new());
            }
        }
        let epoch = self.epochs.now();
        self.epochs.advance();
        let until = self.now + HOLD_NS;
        self.running = Some((number, Running::Holding { volumes, epoch, until, changes }));
        Ok(None)
    }

    pub(super) fn go_on_holding(
        &mut self,
        number: u64,
        volumes: Vec<u32>,
        epoch: u64,
        until: u64,
        changes: Vec<Change>,
    ) {
        let open = || volumes.iter().filter_map(|id| self.open.get(id));
        let rest = open().next().is_none() || open().all(|open| open.busy == 0) && self.epochs.passed(epoch);
        if rest {
            if let Err(error) = self.record_command(number, changes, volumes.clone()) {
                self.release(&volumes, false);
                self.answers.push_back((number, Err(error)));
            }
            return;
        }
        if self.now >= until || self.failed.is_some() {
            let names =
                volumes.iter().filter_map(|id| self.catalog.volumes.get(id)).map(|one| one.name.clone());
            let name = names.collect::<Vec<_>>().join(", ");
            self.release(&volumes, false);
            self.answers.push_back((number, Err(StoreError::Slow(name))));
            return;
        }
        self.epochs.advance();
        self.running = Some((number, Running::Holding { volumes, epoch, until, changes }));
    }

    /// Writes go on: to the next layer, or as before.
    pub(super) fn release(&mut self, volumes: &[u32], next: bool) {
        for id in volumes {
            let Some(open) = self.open.get_mut(id) else { continue };
            if next {
                open.tag += u16::from(!mutants::is(Mutant::SameLayerAfterSnapshot));
                open.tombs.clear();
            }
            if self.failed.is_none() && open.is_shared() {
                open.map.set_live(open.tag);
            }
            self.requests.extend(open.parked.take().unwrap_or_default());
        }
    }
}

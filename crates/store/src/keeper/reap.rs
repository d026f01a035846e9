//! Layers that nobody names any more: freed, or merged into the only layer that stands on them.
//!
//! Each step leaves every volume and snapshot with the content that it had, so a crash between two of them costs nothing: what is
//! left is reaped after the next opening. Data moves before tombstones, since of one layer data counts over tombstones.

use std::collections::{BTreeMap, HashMap};

use super::{Commit, Edit, Keeper, MapChange, Then, JOB};
use crate::catalog::{Change, Layer};
use crate::format::{Entry, Kind};
use crate::mutants::{self, Mutant};

/// Slots looked at in a turn.
const LOOKS: u32 = 4096;
/// Slots changed in a step: what one block of the journal takes.
const CHANGES: usize = 128;

pub(super) struct Reap {
    layer: u32,
    /// Who gets what is left of it.
    child: Option<u32>,
    phase: Phase,
    at: u32,
    /// A step is on its way into the journal.
    recording: bool,
    /// Granules of single extents that the child says itself,
    covered: HashMap<u32, u16>,
    /// and of runs of them: extents and granules by the first.
    runs: BTreeMap<u32, (u32, u16)>,
    /// Slots whose extent was being changed.
    deferred: Vec<u32>,
    locked: Vec<(u32, u32)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// See what the child says itself.
    Cover,
    Data,
    Tombs,
    Drop,
}

impl Keeper {
    pub(super) fn run_reap(&mut self) {
        if !self.may_work() || self.is_ending_flatten() {
            return;
        }
        if self.reap.is_none() {
            if !self.maybe_reapable {
                return;
            }
            let mut nameless = self.catalog.reapable().into_iter();
            let Some((layer, child)) = nameless.find(|(layer, _)| !self.deletions.is_kept(*layer)) else {
                self.maybe_reapable = false;
                return;
            };
            if self.journal.marked() < self.named && !mutants::is(Mutant::ReapBeforeMark) {
                // What the child gets is soon overwritten in place. The snapshot or volume that had it too must not come back.
                return self.flushing.wait_once();
            }
            self.reap = Some(Reap {
                layer,
                child,
                phase: if child.is_some() { Phase::Cover } else { Phase::Data },
                at: 0,
                recording: false,
                covered: HashMap::new(),
                runs: BTreeMap::new(),
                deferred: Vec::new(),
                locked: Vec::new(),
            });
        }
        // Guests come first: the journal is theirs while they have something for it.
        if self.reap.as_ref().is_none_or(|reap| reap.recording)
            || self.journal.pending() > 0
            || !self.journal.has_room()
        {
            return;
        }
        let Some(mut reap) = self.reap.take() else { return };
        match reap.phase {
            Phase::Cover => self.cover(&mut reap),
            Phase::Data => self.move_slots(&mut reap, Kind::Data, Phase::Tombs),
            Phase::Tombs => self.move_slots(&mut reap, Kind::Zero, Phase::Drop),
            Phase::Drop => self.drop_layer(&mut reap),
        }
        self.reap = Some(reap);
    }

    fn cover(&self, reap: &mut Reap) {
        let end = (reap.at + LOOKS).min(self.slots.len());
        for (_, entry) in self.slots.range(reap.at..end) {
            if Some(entry.layer) == reap.child {
                reap.note(&entry);
            }
        }
        reap.at = end;
        if end == self.slots.len() {
            (reap.phase, reap.at) = (Phase::Data, 0);
        }
    }

    /// Begin nothing with the layer, of which nothing was given up yet: it gets its name back.
    pub(super) fn leave_layer(&mut self, layer: u32) {
        if self.reap.as_ref().is_some_and(|reap| reap.layer == layer) {
            self.reap = None;
        }
    }

    /// Slots of one kind go to the child, or are free.
    fn move_slots(&mut self, reap: &mut Reap, kind: Kind, next: Phase) {
        self.deletions.begin(reap.layer);
        let end = (reap.at + LOOKS).min(self.slots.len());
        let live_in = self.volume_of(reap.child);
        let has_parent = self.catalog.parent(reap.layer) != 0;
        let mut commit = Commit { then: Then::Reap, ..Commit::default() };
        let deferred = std::mem::take(&mut reap.deferred);
        let found = self.slots.range(reap.at..end).filter(|(_, e)| e.layer == reap.layer && e.kind == kind);
        let candidates: Vec<u32> = deferred.into_iter().chain(found.map(|(slot, _)| slot)).collect();
        let mut stopped = None;
        for slot in candidates {
            let entry = self.slots.get(slot);
            if entry.layer != reap.layer || entry.kind != kind {
                continue;
            }
            if commit.slots.len() == CHANGES {
                // Go on with this slot in the next step; deferred ones come again by themselves.
                match slot >= reap.at && slot < end {
                    true => {
                        stopped = Some(slot);
                        break;
                    }
                    false => reap.deferred.push(slot),
                }
                continue;
            }
            let Some(child) = reap.child else {
                commit.slots.push((slot, Entry::default()));
                continue;
            };
            if kind == Kind::Zero {
                let entry = if has_parent { Entry { layer: child, ..entry } } else { Entry::default() };
                commit.slots.push((slot, entry));
                continue;
            }
            if let Some(volume) = live_in {
                if self.locks.contains_key(&(volume, entry.vextent)) {
                    reap.deferred.push(slot);
                    continue;
                }
                reap.locked.push((volume, entry.vextent));
            }
            let covered = if mutants::is(Mutant::MergeCovered) { 0 } else { reap.covered_at(entry.vextent) };
            let rest = entry.mask & !covered;
            match rest {
                0 => commit.slots.push((slot, Entry::default())),
                rest => {
                    commit.slots.push((slot, Entry { layer: child, mask: rest, ..entry }));
                    if let Some(volume) = live_in {
                        let edit = Edit::Retag { slot, layer: child };
                        commit.maps.push(MapChange { volume, vextent: entry.vextent, edit });
                    }
                }
            }
        }
        reap.at = stopped.unwrap_or(end);
        if reap.at == self.slots.len() && reap.deferred.is_empty() && stopped.is_none() {
            (reap.phase, reap.at) = (next, 0);
        }
        if !commit.slots.is_empty() {
            for lock in &reap.locked {
                self.locks.insert(*lock, JOB);
            }
            reap.recording = true;
            self.record(commit);
        }
    }

    /// The volume whose live layer this is. It may be opened at any moment, so its extents are locked even if it is not.
    pub(super) fn volume_of(&self, layer: Option<u32>) -> Option<u32> {
        let volume = self.catalog.volumes.values().find(|volume| Some(volume.live) == layer);
        volume.map(|volume| volume.id)
    }

    fn drop_layer(&mut self, reap: &mut Reap) {
        let mut catalog = vec![Change::NoLayer(reap.layer)];
        let child = reap.child.filter(|child| self.catalog.parent(*child) == reap.layer);
        if let Some(child) = child {
            catalog.insert(0, Change::Layer(Layer { id: child, parent: self.catalog.parent(reap.layer) }));
        }
        reap.recording = true;
        self.record(Commit { catalog, then: Then::Reap, ..Commit::default() });
    }

    pub(super) fn reap_committed(&mut self) {
        let Some(reap) = &mut self.reap else { return };
        reap.recording = false;
        let locked = std::mem::take(&mut reap.locked);
        if reap.phase == Phase::Drop && !self.catalog.layers.contains_key(&reap.layer) {
            self.reap = None;
        }
        self.unlock_reaped(locked);
    }

    /// The journal cannot be written.
    pub(super) fn reap_failed(&mut self) {
        if let Some(reap) = self.reap.take() {
            self.unlock_reaped(reap.locked);
        }
    }

    fn unlock_reaped(&mut self, locked: Vec<(u32, u32)>) {
        for lock in locked {
            self.locks.remove(&lock);
        }
        self.unblock(JOB);
    }

    /// A slot holds something else now.
    pub(super) fn note_for_reap(&mut self, entry: &Entry) {
        if let Some(reap) = &mut self.reap {
            if Some(entry.layer) == reap.child {
                reap.note(entry);
            }
        }
    }
}

impl Reap {
    fn note(&mut self, entry: &Entry) {
        match entry.count {
            1 => *self.covered.entry(entry.vextent).or_default() |= entry.mask,
            count => {
                let run = self.runs.entry(entry.vextent).or_insert((0, 0));
                *run = (count.max(run.0), entry.mask | run.1);
            }
        }
    }

    fn covered_at(&self, vextent: u32) -> u16 {
        let single = self.covered.get(&vextent).copied().unwrap_or(0);
        // Runs of one layer do not overlap, but one may begin within what another said before it grew.
        let runs = self.runs.range(..=vextent).rev();
        runs.filter(|(start, (count, _))| vextent - **start < *count)
            .fold(single, |mask, (_, (_, more))| mask | more)
    }
}

//! What an operator asks. One command is carried out after another; each counts as a whole, and is durable when it is answered.

use std::sync::Arc;

use super::flushing::Waiter;
use super::{Commit, Keeper, Then};
use crate::catalog::{Change, Layer, Seal, Snapshot, Volume, NAME_MAX};
use crate::cipher::Cipher;
use crate::error::StoreError;
use crate::map::Map;
use crate::sums::Sums;

use super::diff::{Comparing, Ranges};
use super::figures::{Figures, VolumeInfo};
use super::opening::{Opening, Purpose};
use super::scrub::ScrubInfo;
use super::weigh::Weighing;

/// Ids are never given out twice, and a command may take many.
const MOST_IDS: u32 = u32::MAX - (1 << 24);

/// `created_s`: seconds since 1970.
#[derive(Clone, Debug)]
pub enum Command {
    Create {
        name: String,
        size: u64,
        created_s: u64,
        seal: Seal,
    },
    /// It must not be open, and have no snapshots.
    Delete {
        name: String,
    },
    Resize {
        name: String,
        size: u64,
    },
    /// Of all these volumes at one point.
    Snapshot {
        volumes: Vec<String>,
        name: String,
        created_s: u64,
    },
    DeleteSnapshot {
        volume: String,
        name: String,
    },
    /// Take back the deletion of a snapshot, of which nothing was given up yet.
    KeepSnapshot {
        volume: String,
        name: String,
    },
    /// What deleting each of the volume's snapshots, alone, would free.
    Reclaimable {
        volume: String,
    },
    /// It must not be open.
    Revert {
        volume: String,
        name: String,
    },
    /// Of a snapshot, or of the volume as it is now.
    Clone {
        volume: String,
        snapshot: Option<String>,
        name: String,
        created_s: u64,
    },
    /// The volume's key is wrapped as `key` from here on, if it is `from` now.
    SetKey {
        volume: String,
        from: Vec<u8>,
        key: Vec<u8>,
    },
    /// Copy what it reads from others. Answered when that is done.
    Flatten {
        volume: String,
    },
    /// `cipher`: of a volume that has a key; without it nothing can be written through the keeper.
    Open {
        name: String,
        cipher: Option<Arc<dyn Cipher>>,
    },
    /// As often as it was opened, and with no request under way.
    Close {
        volume: u32,
    },
    /// Of all volumes, or of the one of this name if there is one.
    List {
        name: Option<String>,
    },
    Figures,
    /// What differs between two snapshots; `None`: nothing, and the volume as it is now.
    Diff {
        volume: String,
        from: Option<String>,
        to: Option<String>,
    },
    /// Read all that is in use, `rate` bytes in a second, and hold it against its checksums. One that runs goes on, at this rate.
    /// Answered at once.
    Scrub {
        rate: u64,
        started_s: u64,
    },
    CancelScrub,
    /// How far the scrub is that runs, or how the last one ended.
    ScrubStatus,
    /// The drive has this many bytes now.
    Grow {
        size: u64,
    },
    /// Make durable what was answered.
    Flush,
    /// The store is this opener's from here on, and nobody else's.
    Possess,
    /// Write a checkpoint, and take nothing any more.
    Shutdown,
}

#[derive(Clone)]
pub enum Answer {
    Done,
    Opened {
        volume: u32,
        map: Arc<Map>,
        size: u64,
        seal: Seal,
        /// Of a volume whose blocks have checksums.
        sums: Option<Arc<Sums>>,
    },
    Volumes(Vec<VolumeInfo>),
    Figures(Figures),
    Ranges(Ranges),
    /// Snapshots' names, and bytes; None: it has clones, so that it cannot be deleted.
    Reclaimable(Vec<(String, Option<u64>)>),
    /// None: there was no scrub since the store was opened.
    Scrub(Option<ScrubInfo>),
}

/// Where a command is.
pub(super) enum Running {
    Opening(Box<Opening>),
    Comparing(Box<Comparing>),
    Weighing(Box<Weighing>),
    /// Until requests of these volumes have ended, or the time is up.
    Holding {
        volumes: Vec<u32>,
        epoch: u64,
        until: u64,
        changes: Vec<Change>,
    },
    Recording {
        held: Vec<u32>,
    },
    Flushing,
    /// Until a checkpoint has written this many zones.
    Growing {
        zones: usize,
    },
    Closing,
}

impl Keeper {
    pub(super) fn run_commands(&mut self) {
        // Commands describe volumes anew as they are now, and the end of a flatten is about to change one.
        if self.is_ending_flatten() {
            return;
        }
        loop {
            match self.running.take() {
                Some((number, Running::Holding { volumes, epoch, until, changes })) => {
                    self.go_on_holding(number, volumes, epoch, until, changes);
                    if matches!(self.running, Some((_, Running::Holding { .. }))) {
                        return;
                    }
                }
                Some((number, Running::Opening(opening))) => {
                    self.go_on_opening(number, opening);
                    if self.running.is_some() {
                        return;
                    }
                }
                Some((number, Running::Comparing(comparing))) => {
                    self.go_on_comparing(number, comparing);
                    if self.running.is_some() {
                        return;
                    }
                }
                Some((number, Running::Weighing(weighing))) => {
                    self.go_on_weighing(number, weighing);
                    if self.running.is_some() {
                        return;
                    }
                }
                Some(running) => {
                    self.running = Some(running);
                    return;
                }
                None => {
                    let Some((number, command)) = self.commands.pop_front() else { return };
                    let started = match (self.closing, self.failed) {
                        (true, _) => Err(StoreError::Closed),
                        (false, Some(errno)) if command.changes() => {
                            Err(StoreError::Failed(std::io::Error::from_raw_os_error(errno)))
                        }
                        (false, None) if command.changes() && !self.possessed && !command.possesses() => {
                            Err(StoreError::NotPossessed)
                        }
                        (false, None) if command.changes() && self.catalog.next > MOST_IDS => {
                            Err(StoreError::CatalogFull)
                        }
                        _ => self.start(number, command),
                    };
                    match started {
                        Ok(None) => {}
                        Ok(Some(answer)) => self.answers.push_back((number, Ok(answer))),
                        Err(error) => self.answers.push_back((number, Err(error))),
                    }
                }
            }
        }
    }

    /// None: it is under way.
    fn start(&mut self, number: u64, command: Command) -> Result<Option<Answer>, StoreError> {
        match command {
            Command::Create { name, size, created_s, seal } => {
                self.check_new(&name)?;
                self.check_size(size)?;
                let layer = Layer { id: self.catalog.take_id(), parent: 0 };
                let id = self.catalog.take_id();
                let volume = Volume { id, name, size, live: layer.id, origin: 0, created_s, seal };
                self.change(number, vec![Change::Layer(layer), Change::Volume(volume)])
            }
            Command::Delete { name } => {
                let volume = self.closed(&name)?;
                let snapshots: Vec<&str> =
                    self.catalog.snapshots_of(volume.id).map(|one| one.name.as_str()).collect();
                if !snapshots.is_empty() {
                    return Err(StoreError::HasSnapshots { volume: name, snapshots: snapshots.join(", ") });
                }
                self.change(number, vec![Change::NoVolume(volume.id)])
            }
            Command::Resize { name, size } => {
                let volume = self.volume(&name)?;
                self.check_size(size)?;
                if size < volume.size {
                    return Err(StoreError::Shrink { now: volume.size, size });
                }
                self.change(number, vec![Change::Volume(Volume { size, ..volume })])
            }
            Command::Snapshot { volumes, name, created_s } => {
                self.snapshot(number, &volumes, &name, created_s)
            }
            Command::DeleteSnapshot { volume, name } => {
                let snapshot = self.snapshot_of(&volume, &name)?;
                let clones = self.catalog.clones_of(snapshot.id);
                if !clones.is_empty() {
                    return Err(StoreError::HasClones { volume, snapshot: name, clones: clones.join(", ") });
                }
                let answer = self.change(number, vec![Change::NoSnapshot(snapshot.id)])?;
                self.note_deletion(snapshot);
                Ok(answer)
            }
            Command::KeepSnapshot { volume, name } => self.keep_snapshot(number, volume, name),
            Command::Reclaimable { volume } => self.weigh(number, &volume).map(|()| None),
            Command::Revert { volume, name } => {
                let snapshot = self.snapshot_of(&volume, &name)?;
                let volume = self.closed(&volume)?;
                let layer = Layer { id: self.catalog.take_id(), parent: snapshot.layer };
                self.change(
                    number,
                    vec![Change::Layer(layer), Change::Volume(Volume { live: layer.id, ..volume })],
                )
            }
            Command::Clone { volume, snapshot: Some(snapshot), name, created_s } => {
                self.check_new(&name)?;
                let snapshot = self.snapshot_of(&volume, &snapshot)?;
                let seal = self.volume(&volume)?.seal;
                let layer = Layer { id: self.catalog.take_id(), parent: snapshot.layer };
                let id = self.catalog.take_id();
                let clone = Volume {
                    id,
                    name,
                    size: snapshot.size,
                    live: layer.id,
                    origin: snapshot.id,
                    created_s,
                    seal,
                };
                self.change(number, vec![Change::Layer(layer), Change::Volume(clone)])
            }
            Command::Clone { volume, snapshot: None, name, created_s } => {
                self.check_new(&name)?;
                let source = self.volume(&volume)?;
                self.may_snapshot(&source)?;
                let (mut changes, closed) = self.next_layer(&source);
                let layer = Layer { id: self.catalog.take_id(), parent: closed };
                let id = self.catalog.take_id();
                let Volume { size, seal, .. } = source.clone();
                let clone = Volume { id, name, size, live: layer.id, origin: 0, created_s, seal };
                changes.extend([Change::Layer(layer), Change::Volume(clone)]);
                self.hold(number, vec![source.id], changes)
            }
            Command::SetKey { volume, from, key } => {
                let volume = self.volume(&volume)?;
                if volume.seal.key != from {
                    return Ok(Some(Answer::Done));
                }
                let seal = Seal { key, ..volume.seal };
                self.change(number, vec![Change::Volume(Volume { seal, ..volume })])
            }
            Command::Flatten { volume } => self.flatten(number, &volume),
            Command::Open { name, cipher } => {
                let Volume { id, seal, .. } = self.volume(&name)?;
                let answer = self.open_volume(number, id, Purpose::Serve);
                if let (Some(open), false) = (self.open.get_mut(&id), seal.key.is_empty()) {
                    open.cipher = cipher.or(open.cipher.take());
                }
                Ok(answer)
            }
            Command::Close { volume } => {
                let busy = self.open.get(&volume).filter(|open| open.users == 1 && open.busy > 0);
                if let (Some(_), Some(volume)) = (busy, self.catalog.volumes.get(&volume)) {
                    return Err(StoreError::InUse(volume.name.clone()));
                }
                self.close_volume(volume);
                Ok(Some(Answer::Done))
            }
            Command::Possess => {
                self.running = Some((number, Running::Flushing));
                self.possess();
                Ok(None)
            }
            Command::Flush => {
                self.running = Some((number, Running::Flushing));
                self.flushing.wait(Waiter::Command);
                Ok(None)
            }
            Command::List { name: None } => Ok(Some(Answer::Volumes(self.volumes()))),
            Command::List { name: Some(name) } => {
                let found = self.catalog.volume(&name).map(|volume| self.info(volume));
                Ok(Some(Answer::Volumes(found.into_iter().collect())))
            }
            Command::Figures => Ok(Some(Answer::Figures(self.figures()))),
            Command::Diff { volume, from, to } => self.compare(number, &volume, from, to).map(|()| None),
            Command::Scrub { rate, started_s } => {
                self.begin_scrub(rate, started_s).map(|info| Some(Answer::Scrub(Some(info))))
            }
            Command::CancelScrub => {
                self.cancel_scrub();
                Ok(Some(Answer::Scrub(self.scrub_info())))
            }
            Command::ScrubStatus => Ok(Some(Answer::Scrub(self.scrub_info()))),
            Command::Grow { size } => {
                let grown = self.layout().grown(size)?;
                let before = self.layout().pages();
                self.superblock.layout = grown;
                self.slots.grow(&self.superblock.layout);
                (before..self.layout().pages()).for_each(|page| self.slots.set_dirty(page));
                self.running = Some((number, Running::Growing { zones: self.layout().zones.len() }));
                Ok(None)
            }
            Command::Shutdown if !self.possessed => Ok(Some(Answer::Done)),
            Command::Shutdown => {
                self.closing = true;
                self.stop_flattening();
                if let Some(errno) = self.failed {
                    return Err(StoreError::Failed(std::io::Error::from_raw_os_error(errno)));
                }
                self.running = Some((number, Running::Closing));
                Ok(None)
            }
        }
    }

    pub(super) fn volume(&self, name: &str) -> Result<Volume, StoreError> {
        self.catalog.volume(name).cloned().ok_or_else(|| StoreError::NoVolume(name.into()))
    }

    /// A volume that nobody has open or works on.
    fn closed(&self, name: &str) -> Result<Volume, StoreError> {
        let volume = self.volume(name)?;
        self.refuse_flattening(&volume)?;
        match self.open.contains_key(&volume.id) {
            true => Err(StoreError::InUse(name.into())),
            false => Ok(volume),
        }
    }

    pub(super) fn snapshot_of(&self, volume: &str, name: &str) -> Result<Snapshot, StoreError> {
        let id = self.volume(volume)?.id;
        let missing = || StoreError::NoSnapshot { volume: volume.into(), snapshot: name.into() };
        self.catalog.snapshot(id, name).cloned().ok_or_else(missing)
    }

    fn check_new(&self, name: &str) -> Result<(), StoreError> {
        check_name(name)?;
        match self.catalog.volume(name) {
            Some(_) => Err(StoreError::VolumeExists(name.into())),
            None => Ok(()),
        }
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        let most = (u64::from(u32::MAX) << self.extents().shift).min(i64::MAX as u64);
        match (1..=most).contains(&size) {
            true => Ok(()),
            false => Err(StoreError::Size { size, most }),
        }
    }

    /// Have the catalog say this, all of it at once.
    pub(super) fn change(&mut self, number: u64, changes: Vec<Change>) -> Result<Option<Answer>, StoreError> {
        self.record_command(number, changes, Vec::new())?;
        Ok(None)
    }

    pub(super) fn record_command(
        &mut self,
        number: u64,
        changes: Vec<Change>,
        held: Vec<u32>,
    ) -> Result<(), StoreError> {
        // Each change is below 512 bytes.
        let most = self.catalog.encode().len() + changes.len() * 512;
        if most as u64 > self.layout().catalog_len {
            return Err(StoreError::CatalogFull);
        }
        let mut catalog = changes;
        catalog.push(Change::Next(self.catalog.next));
        self.record(Commit { catalog, then: Then::Command, ..Commit::default() });
        self.running = Some((number, Running::Recording { held }));
        Ok(())
    }

    pub(super) fn command_committed(&mut self) {
        self.update_unmarked();
        let Some((number, running)) = self.running.take() else { return };
        if let Running::Recording { held } = running {
            self.release(&held, true);
        }
        self.running = Some((number, Running::Flushing));
        self.flushing.wait(Waiter::Command);
    }

    pub(super) fn command_flushed(&mut self, result: Result<(), i32>) {
        let Some((number, _)) = self.running.take() else { return };
        let failed = |errno| StoreError::Failed(std::io::Error::from_raw_os_error(errno));
        self.answers.push_back((number, result.map(|()| Answer::Done).map_err(failed)));
    }

    pub(super) fn command_failed(&mut self, errno: i32) {
        let Some((number, running)) = self.running.take() else { return };
        if let Running::Recording { held } = running {
            self.release(&held, false);
        }
        self.answers.push_back((number, Err(StoreError::Failed(std::io::Error::from_raw_os_error(errno)))));
    }

    /// A command waits for a checkpoint.
    pub(super) fn wants_checkpoint(&self) -> bool {
        match &self.running {
            Some((_, Running::Growing { .. })) => true,
            Some((_, Running::Closing)) => {
                self.operations.len() == self.free_operations.len() && self.journal.is_idle()
            }
            _ => false,
        }
    }

    /// A checkpoint with this many zones is written.
    pub(super) fn command_checkpointed(&mut self, zones: usize) {
        match self.running.take() {
            Some((number, Running::Growing { zones: wanted })) if zones >= wanted => {
                let layout = &self.superblock.layout;
                self.allocator.grow(layout, |_| false);
                self.places.learn(&layout.zones);
                self.sums.learn(&layout.zones);
                self.requests
                    .extend(std::mem::take(&mut self.starved).into_iter().map(|(request, _)| request));
                self.answers.push_back((number, Ok(Answer::Done)));
            }
            // An earlier checkpoint does not hold all that was said since it began.
            Some((number, Running::Closing)) if self.journal.used().0 == 0 => {
                self.answers.push_back((number, Ok(Answer::Done)))
            }
            running => self.running = running,
        }
    }
}

impl Command {
    fn possesses(&self) -> bool {
        matches!(self, Self::Possess)
    }

    /// It changes something on the drive.
    fn changes(&self) -> bool {
        !matches!(
            self,
            Self::Open { .. }
                | Self::Close { .. }
                | Self::List { .. }
                | Self::Figures
                | Self::Diff { .. }
                | Self::Reclaimable { .. }
                | Self::Scrub { .. }
                | Self::CancelScrub
                | Self::ScrubStatus
                | Self::Shutdown
        )
    }
}

pub(super) fn check_name(name: &str) -> Result<(), StoreError> {
    match (1..=NAME_MAX).contains(&name.len()) {
        true => Ok(()),
        false => Err(StoreError::Name { len: name.len(), most: NAME_MAX }),
    }
}

//! What a store has to hold: for each sector of each volume and snapshot the values that may be there.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::drive::Crash;

/// Moments are counted; each thing that happens has its own.
pub type Moment = u64;

/// A value that was written to a sector. 0: zeroes.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub value: u64,
    issued: Moment,
    answered: Option<Moment>,
    ok: bool,
    durable: bool,
    /// When a later write was answered; from then on only a loss of power can bring it back.
    retired: Option<Moment>,
    /// Not even that can.
    gone: bool,
}

impl Entry {
    fn settled(value: u64, at: Moment) -> Self {
        Self { value, issued: at, answered: Some(at), ok: true, durable: true, retired: None, gone: false }
    }

    /// Ended before `other` began.
    fn is_before(&self, other: &Self) -> bool {
        self.answered.is_some_and(|answered| answered < other.issued)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    Failed,
    Done,
    Durable,
}

/// See the module.
#[derive(Clone, Default)]
pub struct Content(Vec<Vec<Entry>>);

impl Content {
    pub fn new(sectors: u64) -> Self {
        Self(vec![vec![Entry::settled(0, 0)]; sectors as usize])
    }

    fn range(&mut self, sectors: Range<u64>) -> &mut [Vec<Entry>] {
        // Of the filler nothing is known.
        if self.0.is_empty() {
            return &mut [];
        }
        &mut self.0[sectors.start as usize..sectors.end as usize]
    }

    pub fn sectors(&self) -> u64 {
        self.0.len() as u64
    }

    pub fn grow(&mut self, sectors: u64) {
        self.0.resize(sectors as usize, vec![Entry::settled(0, 0)]);
    }

    pub fn issue(&mut self, sectors: Range<u64>, value: u64, now: Moment) {
        for entries in self.range(sectors) {
            let new = Entry::settled(value, now);
            entries.push(Entry { answered: None, ok: false, durable: false, ..new });
        }
    }

    /// The write that was issued at `issued` has ended. `oldest`: nothing that began earlier is under way.
    pub fn answer(
        &mut self,
        sectors: Range<u64>,
        issued: Moment,
        how: Answered,
        now: Moment,
        oldest: Moment,
    ) {
        for entries in self.range(sectors) {
            let Some(at) = entries.iter().position(|entry| entry.issued == issued) else { continue };
            entries[at].answered = Some(now);
            if how == Answered::Failed {
                continue;
            }
            (entries[at].ok, entries[at].durable) = (true, how == Answered::Durable);
            let this = entries[at];
            // Of two writes at one time to one sector either may be the last, whatever a third one does beside one of them.
            let is_rival = |entry: &&Entry| entry.retired.is_none() && !entry.is_before(&this);
            let rivals: Vec<Entry> = entries.iter().filter(is_rival).copied().collect();
            let is_over = |entry: &&mut Entry| {
                entry.is_before(&this) && rivals.iter().all(|rival| entry.is_before(rival))
            };
            for entry in entries.iter_mut().filter(is_over) {
                entry.retired.get_or_insert(now);
            }
            forget(entries, oldest);
        }
    }

    /// A flush that was issued at `issued` was answered.
    pub fn flushed(&mut self, issued: Moment, oldest: Moment) {
        for entries in &mut self.0 {
            if let [one] = &mut entries[..] {
                one.durable |= one.ok && one.answered.is_some_and(|answered| answered < issued);
                continue;
            }
            for entry in entries.iter_mut().filter(|entry| entry.ok) {
                entry.durable |= entry.answered.is_some_and(|answered| answered < issued);
            }
            forget(entries, oldest);
        }
    }

    /// Whether a read that began at `since` may see `value`.
    pub fn may_read(&self, sector: u64, value: u64, since: Moment) -> bool {
        let mut entries = self.0[sector as usize].iter();
        entries.any(|entry| entry.value == value && entry.retired.is_none_or(|retired| retired > since))
    }

    pub fn may_be_after(&self, crash: Crash, sector: u64, value: u64) -> bool {
        let may_be = |entry: &Entry| match crash {
            Crash::Power => !entry.gone,
            Crash::Killed => entry.retired.is_none(),
        };
        let mut entries = self.0[sector as usize].iter();
        entries.any(|entry| entry.value == value && may_be(entry))
    }

    pub fn describe(&self, sector: u64) -> String {
        format!("{:?}", self.0[sector as usize])
    }

    /// What a snapshot has that was made between `since` and now.
    pub fn frozen(&self, since: Moment, now: Moment) -> Self {
        let freeze = |entries: &Vec<Entry>| {
            let there = entries.iter().filter(|entry| entry.retired.is_none_or(|retired| retired > since));
            there.map(|entry| Entry::settled(entry.value, now)).collect()
        };
        Self(self.0.iter().map(freeze).collect())
    }

    /// This is what the store holds after a crash, with nothing under way.
    pub fn settle(&mut self, crash: Crash, values: &[u64], now: Moment) {
        for (entries, value) in self.0.iter_mut().zip(values) {
            if crash == Crash::Power {
                *entries = vec![Entry::settled(*value, now)];
                continue;
            }
            let seen = |entry: &Entry| entry.value == *value && entry.retired.is_none();
            let Some(at) = entries.iter().rposition(seen) else { continue };
            let ended = entries[at].answered;
            let mut this = entries.remove(at);
            entries.retain(|entry| !entry.gone);
            // What began when this one had ended was never on the drive.
            entries.retain(|entry| ended.is_none_or(|ended| entry.issued < ended));
            for entry in entries.iter_mut() {
                entry.answered.get_or_insert(now);
                entry.retired.get_or_insert(now);
            }
            this.answered.get_or_insert(now);
            this.ok = true;
            entries.push(this);
        }
    }
}

/// No loss of power brings back what ended before a durable write began. Whoever began before that may still see it.
fn forget(entries: &mut Vec<Entry>, oldest: Moment) {
    if entries.len() < 2 {
        return;
    }
    let durable: Vec<Entry> = entries.iter().filter(|entry| entry.durable).copied().collect();
    let is_beaten = |entry: &Entry| durable.iter().any(|later| entry.is_before(later));
    let rivals: Vec<Entry> = entries.iter().filter(|entry| !is_beaten(entry)).copied().collect();
    for entry in entries.iter_mut() {
        entry.gone |= is_beaten(entry) && rivals.iter().all(|rival| entry.is_before(rival));
    }
    entries.retain(|entry| !entry.gone || entry.retired.is_none_or(|retired| retired > oldest));
}

/// The volume that only takes room. What it holds is not looked at.
pub const FILLER: &str = "filler";

#[derive(Clone)]
pub struct Snapshot {
    pub size: u64,
    pub content: Content,
}

#[derive(Clone, Default)]
pub struct Volume {
    pub size: u64,
    pub content: Content,
    pub snapshots: BTreeMap<String, Snapshot>,
    /// Snapshots that were deleted, and whose deletion may be taken back.
    pub deleted: BTreeMap<String, Snapshot>,
    pub origin: Option<(String, String)>,
}

/// What an operator has asked for and not yet been told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    Create { name: String, size: u64 },
    Delete { name: String },
    Resize { name: String, size: u64 },
    Snapshot { volumes: Vec<String>, name: String },
    DeleteSnapshot { volume: String, name: String },
    KeepSnapshot { volume: String, name: String },
    Revert { volume: String, name: String },
    Clone { volume: String, snapshot: Option<String>, name: String },
    Open { name: String },
    Close { name: String },
    Grow { size: u64 },
    Figures,
    Shutdown,
    Possess,
}

#[derive(Clone, Default)]
pub struct Model {
    pub volumes: BTreeMap<String, Volume>,
    /// Volumes whose flattening has begun and was not answered: they may have an origin or none.
    pub flattening: Option<String>,
}

/// What a store was seen to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub volumes: BTreeMap<String, SeenVolume>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenVolume {
    pub size: u64,
    pub origin: Option<(String, String)>,
    pub values: Vec<u64>,
    pub snapshots: BTreeMap<String, (u64, Vec<u64>)>,
}

pub fn sectors(size: u64) -> u64 {
    size / crate::drive::SECTOR
}

impl Model {
    pub fn volume(&mut self, name: &str) -> &mut Volume {
        self.volumes.get_mut(name).expect("the model has the volume")
    }

    pub fn has_clones(&self, volume: &str, snapshot: &str) -> bool {
        let is = |origin: &(String, String)| origin.0 == volume && origin.1 == snapshot;
        self.volumes.values().any(|volume| volume.origin.as_ref().is_some_and(is))
    }

    /// `wish`, asked at `since`, was carried out by now.
    pub fn apply(&mut self, wish: &Wish, since: Moment, now: Moment) {
        match wish {
            Wish::Create { name, size } => {
                let content = if name == FILLER { Content::default() } else { Content::new(sectors(*size)) };
                let volume = Volume { size: *size, content, origin: None, ..Volume::default() };
                self.volumes.insert(name.clone(), volume);
            }
            Wish::Delete { name } => drop(self.volumes.remove(name)),
            Wish::Resize { name, size } => {
                let volume = self.volume(name);
                volume.size = *size;
                volume.content.grow(sectors(*size));
            }
            Wish::Snapshot { volumes, name } => {
                for volume in volumes {
                    let volume = self.volume(volume);
                    let snapshot = Snapshot { size: volume.size, content: volume.content.frozen(since, now) };
                    volume.snapshots.insert(name.clone(), snapshot);
                }
            }
            Wish::DeleteSnapshot { volume, name } => {
                let volume = self.volume(volume);
                let snapshot = volume.snapshots.remove(name).expect("it was there");
                volume.deleted.insert(name.clone(), snapshot);
            }
            Wish::KeepSnapshot { volume, name } => {
                let volume = self.volume(volume);
                let snapshot = volume.deleted.remove(name).expect("it was deleted");
                volume.snapshots.insert(name.clone(), snapshot);
            }
            Wish::Revert { volume, name } => {
                let volume = self.volume(volume);
                volume.content = volume.snapshots[name].content.clone();
                volume.content.grow(sectors(volume.size));
            }
            Wish::Clone { volume, snapshot, name } => {
                let source = self.volume(volume);
                let (size, content) = match snapshot {
                    Some(snapshot) => {
                        let snapshot = &source.snapshots[snapshot];
                        (snapshot.size, snapshot.content.clone())
                    }
                    None => (source.size, source.content.frozen(since, now)),
                };
                let origin = snapshot.as_ref().map(|snapshot| (volume.clone(), snapshot.clone()));
                let clone = Volume { size, content, origin, ..Volume::default() };
                self.volumes.insert(name.clone(), clone);
            }
            Wish::Open { .. }
            | Wish::Close { .. }
            | Wish::Grow { .. }
            | Wish::Figures
            | Wish::Shutdown
            | Wish::Possess => {}
        }
    }

    /// Whether a store that crashed may hold this.
    ///
    /// # Errors
    /// What it must not hold.
    pub fn allows(&self, crash: Crash, seen: &Seen) -> Result<(), String> {
        let names = |seen: &Seen| seen.volumes.keys().cloned().collect::<Vec<_>>();
        let expected: Vec<String> = self.volumes.keys().cloned().collect();
        if names(seen) != expected {
            return Err(format!("volumes {:?} instead of {expected:?}", names(seen)));
        }
        for (name, volume) in &self.volumes {
            let other = &seen.volumes[name];
            if other.size != volume.size {
                return Err(format!("{name} has {} bytes instead of {}", other.size, volume.size));
            }
            let may_be_flat = self.flattening.as_ref() == Some(name) && other.origin.is_none();
            if other.origin != volume.origin && !may_be_flat {
                return Err(format!("{name} comes from {:?} instead of {:?}", other.origin, volume.origin));
            }
            compare(name, &volume.content, crash, &other.values)?;
            let expected: Vec<&String> = volume.snapshots.keys().collect();
            if other.snapshots.keys().collect::<Vec<_>>() != expected {
                let there = other.snapshots.keys();
                return Err(format!("{name} has snapshots {there:?} instead of {expected:?}"));
            }
            for (snapshot, is) in &volume.snapshots {
                let (size, values) = &other.snapshots[snapshot];
                if *size != is.size {
                    return Err(format!("{name}@{snapshot} has {size} bytes instead of {}", is.size));
                }
                compare(&format!("{name}@{snapshot}"), &is.content, crash, values)?;
            }
        }
        Ok(())
    }

    /// The store holds this, and nothing is under way.
    pub fn settle(&mut self, crash: Crash, seen: &Seen, now: Moment) {
        for (name, volume) in &mut self.volumes {
            let other = &seen.volumes[name];
            volume.content.settle(crash, &other.values, now);
            volume.origin.clone_from(&other.origin);
            for (name, snapshot) in &mut volume.snapshots {
                // A snapshot was durable when it was answered, so what it has stays.
                snapshot.content.settle(Crash::Power, &other.snapshots[name].1, now);
            }
        }
        self.flattening = None;
    }
}

fn compare(name: &str, content: &Content, crash: Crash, values: &[u64]) -> Result<(), String> {
    if content.sectors() != values.len() as u64 {
        return Err(format!("{name} has {} sectors instead of {}", values.len(), content.sectors()));
    }
    for (sector, value) in (0..).zip(values) {
        if !content.may_be_after(crash, sector, *value) {
            let legal = content.describe(sector);
            return Err(format!("sector {sector} of {name} has {value} instead of one of {legal}"));
        }
    }
    Ok(())
}

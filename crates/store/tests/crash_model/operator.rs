//! What an operator asks of the store in use.

use ringstone_store::{Command, ScrubInfo, Seal};

use crate::guest;
use crate::reference::{Wish, FILLER};
use crate::world::World;

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const MOST_VOLUMES: usize = 4;
const MOST_SNAPSHOTS: usize = 3;
const MOST_BYTES: u64 = 320 << 10;
const MOST_GROWTH: u64 = 24 << 20;

impl World {
    pub fn ask(&mut self, wish: Wish) {
        assert!(self.wish.is_none());
        let command = match wish.clone() {
            Wish::Create { name, size } => {
                let seal = self.seal_of(&name);
                Command::Create { name, size, created_s: 7, seal }
            }
            Wish::Delete { name } => Command::Delete { name },
            Wish::Resize { name, size } => Command::Resize { name, size },
            Wish::Snapshot { volumes, name } => Command::Snapshot { volumes, name, created_s: 8 },
            Wish::DeleteSnapshot { volume, name } => Command::DeleteSnapshot { volume, name },
            Wish::KeepSnapshot { volume, name } => Command::KeepSnapshot { volume, name },
            Wish::Revert { volume, name } => Command::Revert { volume, name },
            Wish::Clone { volume, snapshot, name } => Command::Clone { volume, snapshot, name, created_s: 9 },
            Wish::Open { name } => Command::Open { name, cipher: guest::cipher() },
            Wish::Close { name } => {
                let opened = self.open.remove(&name).expect("open");
                Command::Close { volume: opened.id }
            }
            Wish::Grow { size } => {
                self.drive.grow(size);
                Command::Grow { size }
            }
            Wish::Figures => Command::Figures,
            Wish::Shutdown => Command::Shutdown,
            Wish::Possess => Command::Possess,
        };
        let number = self.next;
        self.next += 1;
        let now = self.tick();
        self.note(|| format!("command {number}: {wish:?}"));
        self.wish = Some((number, wish, now, false));
        self.keeper.command(number, command);
    }

    /// How a new volume's blocks are sealed.
    fn seal_of(&self, name: &str) -> Seal {
        if !self.setup.sealed || name == FILLER {
            return Seal::default();
        }
        let n = self.setup.seed + u64::from(name.as_bytes()[0]);
        Seal {
            integrity: !n.is_multiple_of(3),
            key: if n.is_multiple_of(2) { b"key".to_vec() } else { Vec::new() },
        }
    }

    /// Begin to flatten a clone.
    fn flatten(&mut self, name: String) {
        let number = self.next;
        self.next += 1;
        self.note(|| format!("command {number}: flatten {name}"));
        self.model.flattening = Some(name.clone());
        self.flatten = Some(number);
        self.keeper.command(number, Command::Flatten { volume: name });
    }

    /// Begin a scrub, change its rate, or end it.
    pub fn scrub(&mut self, rate: Option<u64>) {
        let number = self.next;
        self.next += 1;
        self.note(|| format!("command {number}: scrub {rate:?}"));
        self.scrubs.insert(number);
        let command = rate.map_or(Command::CancelScrub, |rate| Command::Scrub { rate, started_s: 10 });
        self.keeper.command(number, command);
    }

    /// Nothing rots here, so a scrub finds nothing but what the drive refuses to read.
    pub fn check_scrub(&self) {
        let Some(ScrubInfo { bad, faults, .. }) = self.keeper.scrub_info() else { return };
        let refused = |fault: &String| self.fails && fault.contains("cannot be read: ");
        assert!(bad == 0 && faults.iter().all(refused), "a scrub found {faults:?}");
    }

    fn free_name(&mut self) -> Option<String> {
        let free: Vec<&str> =
            NAMES.into_iter().filter(|name| !self.model.volumes.contains_key(*name)).collect();
        (self.model.volumes.len() <= MOST_VOLUMES)
            .then(|| self.rng.pick(&free).map(|name| name.to_string()))?
    }

    /// A volume that is not in the midst of something.
    fn some_volume(&mut self) -> Option<String> {
        let names: Vec<String> = self.model.volumes.keys().filter(|name| *name != FILLER).cloned().collect();
        let name = self.rng.pick(&names).cloned()?;
        (self.model.flattening.as_ref() != Some(&name)).then_some(name)
    }

    fn some_snapshot(&mut self) -> Option<(String, String)> {
        let all: Vec<(String, String)> = self
            .model
            .volumes
            .iter()
            .flat_map(|(volume, one)| one.snapshots.keys().map(|name| (volume.clone(), name.clone())))
            .collect();
        self.rng.pick(&all).cloned()
    }

    /// A snapshot whose deletion may be under way.
    fn some_deleted(&mut self) -> Option<(String, String)> {
        let volumes = self.model.volumes.iter();
        let all =
            volumes.flat_map(|(volume, one)| one.deleted.keys().map(|name| (volume.clone(), name.clone())));
        // The latest has the highest number, and is most likely not gone.
        all.max_by_key(|(_, name)| name[1..].parse::<u64>().unwrap_or(0))
    }

    fn some_size(&mut self) -> u64 {
        let extents = self.rng.below(MOST_BYTES / self.setup.extent) + 1;
        // Not always a whole number of extents, nor of blocks.
        let less = if self.rng.once_in(3) { self.rng.below(20) * 512 } else { 0 };
        (extents * self.setup.extent).max(16 << 10) - less
    }

    /// Ask something that can be done.
    pub fn ask_something(&mut self) {
        if self.wish.is_some() {
            return;
        }
        if let Some(wish) = self.choose() {
            self.ask(wish);
        }
    }

    fn choose(&mut self) -> Option<Wish> {
        if self.rng.once_in(8) {
            let rate = *self.rng.pick(&[1 << 40, 1 << 32, 64 << 20, 1 << 20]).unwrap_or(&1);
            let cancels = self.rng.once_in(6);
            self.scrub((!cancels).then_some(rate));
            return None;
        }
        Some(match self.rng.below(26) {
            0 | 1 => {
                let size = self.some_size();
                Wish::Create { name: self.free_name()?, size }
            }
            2..=6 => {
                let name = self.some_volume()?;
                if self.open.contains_key(&name) {
                    return None;
                }
                Wish::Open { name }
            }
            7 => {
                let name = self.some_volume()?;
                if !self.open.contains_key(&name) || self.requests.values().any(|asked| asked.volume == name)
                {
                    return None;
                }
                Wish::Close { name }
            }
            8 => {
                let name = self.some_volume()?;
                if self.open.contains_key(&name) || !self.model.volumes[&name].snapshots.is_empty() {
                    return None;
                }
                Wish::Delete { name }
            }
            9 => {
                let name = self.some_volume()?;
                let size = self.model.volumes[&name].size + self.rng.below(40) * 512;
                (size <= 2 * MOST_BYTES).then_some(Wish::Resize { name, size })?
            }
            10..=12 => {
                let first = self.some_volume()?;
                let mut volumes = vec![first];
                if let (Some(second), true) = (self.some_volume(), self.rng.once_in(2)) {
                    if second != volumes[0] {
                        volumes.push(second);
                    }
                }
                let full = |name: &String| self.model.volumes[name].snapshots.len() >= MOST_SNAPSHOTS;
                if volumes.iter().any(full) {
                    return None;
                }
                let name = format!("s{}", self.next);
                Wish::Snapshot { volumes, name }
            }
            13..=15 => {
                let (volume, name) = self.some_snapshot()?;
                if self.model.has_clones(&volume, &name) {
                    return None;
                }
                Wish::DeleteSnapshot { volume, name }
            }
            16 => {
                let (volume, name) = self.some_snapshot()?;
                if self.open.contains_key(&volume) || self.model.flattening.as_ref() == Some(&volume) {
                    return None;
                }
                Wish::Revert { volume, name }
            }
            17 | 18 => {
                let (volume, snapshot) = self.some_snapshot()?;
                Wish::Clone { volume, snapshot: Some(snapshot), name: self.free_name()? }
            }
            19 => {
                let volume = self.some_volume()?;
                Wish::Clone { volume, snapshot: None, name: self.free_name()? }
            }
            20 | 21 => {
                let name = self.some_volume()?;
                if self.model.flattening.is_none() && self.model.volumes[&name].origin.is_some() {
                    self.flatten(name);
                }
                return None;
            }
            22 if self.rng.once_in(3) => {
                let size = self.drive.size() + (2 + self.rng.below(3)) * (1 << 20);
                (size <= MOST_GROWTH).then_some(Wish::Grow { size })?
            }
            23 | 24 => {
                let (volume, name) = self.some_deleted()?;
                Wish::KeepSnapshot { volume, name }
            }
            _ => Wish::Figures,
        })
    }
}

//! Opening a store and looking at all that it holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringstone_store::{
    check, copies, mend, recover, verify, Answer, Command, Epochs, Figures, Keeper, Map, Reader, Run, Seal,
    Sums, VolumeInfo,
};

use crate::drive::{Bench, Drive, Owner};
use crate::guest;
use crate::reference::{Seen, SeenVolume, FILLER};
use crate::rng::Rng;

/// The name of a clone through which a snapshot is read.
const PROBE: &str = "probe";

/// A keeper whose I/O is done at once.
pub struct Calm {
    pub drive: Drive,
    keeper: Keeper,
    epochs: Arc<Epochs>,
    now: u64,
    rng: Rng,
}

impl Calm {
    /// # Errors
    /// It cannot be opened.
    pub fn open(mut drive: Drive, boot: [u8; 16]) -> Result<Self, String> {
        let epochs = Arc::new(Epochs::default());
        let keeper = {
            let bench = Bench::new(&mut drive, u64::MAX);
            let recovered = recover(&bench, boot).map_err(|error| error.to_string())?;
            let faults = check(&recovered);
            if !faults.is_empty() {
                return Err(format!("faults: {faults:?}"));
            }
            // What was being written is not rotten, and no copy that counts is taken for bad.
            let rotten = verify(&bench, &recovered, &mut |_, _| true).expect("nobody stops it").faults;
            let copies = copies(&bench, &recovered.superblock).map_err(|error| error.to_string())?;
            if !rotten.is_empty() || !copies.faults.is_empty() {
                return Err(format!("{rotten:?}, {:?}", copies.faults));
            }
            mend(&bench, &copies.mends).map_err(|error| error.to_string())?;
            ringstone_store::begin(&bench, boot, epochs.clone()).map_err(|error| error.to_string())?
        };
        Ok(Self { drive, keeper, epochs, now: 0, rng: Rng::new(1) })
    }

    /// Until nothing is left to do.
    ///
    /// # Errors
    /// It never ends.
    pub fn rest(&mut self) -> Result<(), String> {
        for _ in 0..100_000 {
            self.now += 1_000_000;
            let went_on = self.keeper.turn(self.now);
            let mut had = false;
            while let Some(io) = self.keeper.next_io() {
                had = true;
                if let Some(io) = guest::start(&mut self.drive, io, |_, _, _| Vec::new()) {
                    self.keeper.completed(io, Ok(()));
                }
            }
            while !self.drive.flights.is_empty() {
                let flight = self.drive.complete(0, false, &mut self.rng);
                if let Owner::Keeper(mut io) = flight.owner {
                    guest::read(&self.drive, &mut io, &mut self.rng);
                    self.keeper.completed(io, Ok(()));
                }
            }
            if !went_on && !had && self.keeper.is_idle() {
                return Ok(());
            }
        }
        Err("the keeper never rests".into())
    }

    /// # Errors
    /// It was refused, or never answered.
    pub fn command(&mut self, command: Command) -> Result<Answer, String> {
        self.keeper.command(1, command.clone());
        for _ in 0..100 {
            self.rest()?;
            if let Some((_, answer)) = self.keeper.next_answer() {
                return answer.map_err(|error| format!("{command:?}: {error}"));
            }
        }
        Err(format!("{command:?} was not answered"))
    }

    fn volumes(&mut self) -> Result<Vec<VolumeInfo>, String> {
        match self.command(Command::List { name: None })? {
            Answer::Volumes(volumes) => Ok(volumes),
            _ => Err("a list is no list".into()),
        }
    }

    pub fn figures(&mut self) -> Result<Figures, String> {
        match self.command(Command::Figures)? {
            Answer::Figures(figures) => Ok(figures),
            _ => Err("figures are none".into()),
        }
    }

    fn read(&mut self, name: &str) -> Result<Vec<u64>, String> {
        let Answer::Opened { volume, map, size, seal, sums } =
            self.command(Command::Open { name: name.into(), cipher: None })?
        else {
            return Err("opened and no volume".into());
        };
        let values = read_all(&self.drive, &self.epochs, &map, size, &seal, sums.as_deref());
        self.command(Command::Close { volume })?;
        values
    }

    /// # Errors
    /// Something cannot be read.
    pub fn look(&mut self) -> Result<Seen, String> {
        let mut seen = Seen::default();
        for info in self.volumes()? {
            let values = if info.name == FILLER { Vec::new() } else { self.read(&info.name)? };
            let mut snapshots = BTreeMap::new();
            for snapshot in &info.snapshots {
                let values = self.snapshot(&info.name, &snapshot.name)?;
                snapshots.insert(snapshot.name.clone(), (snapshot.size, values));
            }
            let volume = SeenVolume { size: info.size, origin: info.origin, values, snapshots };
            seen.volumes.insert(info.name, volume);
        }
        Ok(seen)
    }

    fn snapshot(&mut self, volume: &str, snapshot: &str) -> Result<Vec<u64>, String> {
        self.command(Command::Clone {
            volume: volume.into(),
            snapshot: Some(snapshot.into()),
            name: PROBE.into(),
            created_s: 0,
        })?;
        let values = self.read(PROBE);
        self.command(Command::Delete { name: PROBE.into() })?;
        values
    }

    /// What differs between two points of a volume is in what `Diff` names.
    ///
    /// # Errors
    /// It is not.
    pub fn compare_diffs(&mut self, seen: &Seen) -> Result<(), String> {
        for (name, volume) in &seen.volumes {
            let live = (None, &volume.values);
            let snapshots = volume.snapshots.iter().map(|(name, (_, values))| (Some(name.clone()), values));
            let points: Vec<(Option<String>, &Vec<u64>)> = snapshots.chain([live]).collect();
            for (from, old) in points.iter().filter(|(from, _)| from.is_some()) {
                for (to, new) in &points {
                    let (from, to) = (from.clone(), to.clone());
                    let answer = self.command(Command::Diff { volume: name.clone(), from, to })?;
                    let Answer::Ranges(ranges) = answer else { return Err("no ranges".into()) };
                    let ranges = ranges.sorted();
                    let end = ranges.last().map_or(0, |(at, len)| at + len);
                    if end > new.len() as u64 * 512 {
                        return Err(format!("a difference of {name} ends at {end}"));
                    }
                    let differs = |n: &usize| old.get(*n).copied().unwrap_or(0) != new[*n];
                    for n in (0..new.len()).filter(differs) {
                        let at = n as u64 * 512;
                        if !ranges.iter().any(|(start, len)| (*start..start + len).contains(&at)) {
                            return Err(format!("sector {n} of {name} is in no difference"));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Delete all there is, and see that it leaves nothing.
    ///
    /// # Errors
    /// It does.
    pub fn delete_all(mut self, boot: [u8; 16]) -> Result<(), String> {
        loop {
            let volumes = self.volumes()?;
            if volumes.is_empty() {
                break;
            }
            let origins: Vec<_> = volumes.iter().filter_map(|volume| volume.origin.clone()).collect();
            for volume in &volumes {
                let mut left = volume.snapshots.len();
                for snapshot in &volume.snapshots {
                    if !origins.contains(&(volume.name.clone(), snapshot.name.clone())) {
                        let (volume, name) = (volume.name.clone(), snapshot.name.clone());
                        self.command(Command::DeleteSnapshot { volume, name })?;
                        left -= 1;
                    }
                }
                if left == 0 {
                    self.command(Command::Delete { name: volume.name.clone() })?;
                }
            }
        }
        self.rest()?;
        let figures = self.figures()?;
        if figures.used != 0 || figures.reclaiming != 0 || figures.promised != 0 {
            return Err(format!("all is deleted, and {figures:?}"));
        }
        self.command(Command::Shutdown)?;
        let mut again = Self::open(self.drive.crashed(crate::drive::Crash::Power, &mut Rng::new(2)), boot)?;
        match again.figures()?.used {
            0 => Ok(()),
            used => Err(format!("all is deleted, and {used} bytes are in use after a restart")),
        }
    }
}

/// The values of all sectors.
///
/// # Errors
/// A run is impossible, or a sector is none that a guest wrote there.
pub fn read_all(
    drive: &Drive,
    epochs: &Epochs,
    map: &Map,
    size: u64,
    seal: &Seal,
    sums: Option<&Sums>,
) -> Result<Vec<u64>, String> {
    let mut reader = Reader::new(ringstone_store::MOST_READERS - 1);
    reader.begin(epochs);
    let mut values = Vec::with_capacity((size / 512) as usize);
    let mut at = 0;
    while at < size {
        match map.read(at, size - at) {
            Run::Zero { len } | Run::At { len, .. } if len == 0 || len > size - at => {
                return Err(format!("a run of {len} bytes at {at}"));
            }
            Run::Zero { len } => {
                values.resize(((at + len) / 512) as usize, 0);
                at += len;
            }
            Run::At { at: place, len } => {
                let mut bytes = vec![0; len.next_multiple_of(4096) as usize];
                drive.read(place, &mut bytes);
                if !guest::is_sound(sums, place, &bytes) {
                    return Err(format!(
                        "blocks at {at}, {len} bytes at {place} of the drive, are not what was written"
                    ));
                }
                guest::turn(seal, at, &mut bytes);
                values.extend(guest::values(&bytes[..len as usize], at)?);
                at += len;
            }
        }
    }
    reader.leave(epochs);
    Ok(values)
}

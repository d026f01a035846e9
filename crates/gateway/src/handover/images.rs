//! Images of a cluster in a handover. Their locks go from one process to the other while all other volumes are served, as
//! a cluster may take as long as it likes: each image has a thread of its own, and each step a limit.

use std::collections::HashMap;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringstone_blockdev::{Drive, DriveError};
use ringstone_rbd::{Cluster, ClusterSpec, Image, RbdError};
use ringstone_volume::Volume;

use super::format::VolumeState;
use crate::backend::BackendSpec;
use crate::control::{Caller, Control};
use crate::error::EngineError;
use crate::events::Level;

/// The new process opens them while nothing stands; librados gives a cluster 30 s of its own.
pub const OPEN: Duration = Duration::from_secs(45);
/// The old one lets go of their locks, and the new one takes them, while their guests stand.
pub const LET_GO: Duration = Duration::from_secs(10);
pub const OWN: Duration = Duration::from_secs(15);
/// The old one takes them back, which the new one may still have for a moment.
const TAKE_BACK: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);

/// Of a new process that has gone: the old one shuts it out, as a lock outlives its client for half a minute.
const GONE: Duration = Duration::from_secs(3);

/// Images by their volumes' names. Those that are left at its end are closed on a thread, as a cluster may take long.
#[derive(Default)]
pub struct Images(HashMap<String, Image>);

impl Images {
    pub fn has(&self, volume: &str) -> bool {
        self.0.contains_key(volume)
    }

    pub fn take(&mut self, volume: &str) -> Option<Image> {
        self.0.remove(volume)
    }

    pub fn extend(&mut self, mut more: Self) {
        self.0.extend(std::mem::take(&mut more.0));
    }

    /// What their clusters know this process by.
    pub fn clients(&self) -> Vec<String> {
        let mut clients: Vec<String> = self.0.values().map(|image| image.client().to_owned()).collect();
        clients.sort();
        clients.dedup();
        clients
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        let left = std::mem::take(&mut self.0);
        if !left.is_empty() {
            // Where there is no thread to be had, it is done here.
            let _ = apart(move || drop(left));
        }
    }
}

fn failed(error: impl std::fmt::Display) -> EngineError {
    EngineError::Handover(error.to_string())
}

pub fn image_of(volume: &Volume) -> Option<&Image> {
    match volume.drive() {
        Drive::Rbd(image) => Some(image),
        _ => None,
    }
}

/// Start a thread that is waited for by what it sends, or not at all.
pub fn apart(run: impl FnOnce() + Send + 'static) -> Result<(), EngineError> {
    let thread = std::thread::Builder::new().name("image".into()).spawn(run);
    thread.map(drop).map_err(|source| EngineError::System { what: "starting a thread", source })
}

/// The results, by volume; an error names one that failed, or one of `names` that is late.
fn gather<T>(
    results: &Receiver<(String, Result<T, EngineError>)>,
    names: &[String],
    what: &str,
    limit: Duration,
) -> Result<HashMap<String, T>, EngineError> {
    let end = Instant::now() + limit;
    let mut all = HashMap::new();
    while all.len() < names.len() {
        let Ok((name, result)) = results.recv_timeout(end.saturating_duration_since(Instant::now())) else {
            let late: Vec<&str> =
                names.iter().map(String::as_str).filter(|name| !all.contains_key(*name)).collect();
            return Err(failed(format!(
                "{what} took more than {} s; look at the cluster of volume {}",
                limit.as_secs(),
                late.join(", ")
            )));
        };
        all.insert(name, result?);
    }
    Ok(all)
}

// The old process's side.

/// Images whose locks another process may have. Dropping this has them taken back; their volumes are held until then.
pub struct Lent(Vec<Sender<()>>);

impl Lent {
    /// Let go of all locks at once. The volumes are held, and their vrings at rest. `successors`: what the clusters know the
    /// new process by.
    ///
    /// # Errors
    /// A cluster refuses, or is late.
    pub fn let_go(
        &mut self,
        images: Vec<(Arc<Volume>, BackendSpec)>,
        successors: &[String],
        caller: &Caller,
    ) -> Result<(), EngineError> {
        let (told, results) = channel();
        let names: Vec<String> = images.iter().map(|(volume, _)| volume.name().to_owned()).collect();
        let mut all = images.into_iter();
        while let Some((volume, backend)) = all.next() {
            let (handed_over, verdict) = channel();
            let held = Held { volume, backend, successors: successors.to_vec(), caller: caller.clone() };
            let (told, mine) = (told.clone(), held.volume.clone());
            if let Err(error) = apart(move || held.attend(&told, &verdict)) {
                // Nothing of these was let go of.
                for volume in std::iter::once(mine).chain(all.map(|(volume, _)| volume)) {
                    caller.call(Box::new(move |control| control.image_is_back(&volume, Ok(()))));
                }
                return Err(error);
            }
            self.0.push(handed_over);
        }
        gather(&results, &names, "letting go of images", LET_GO).map(drop)
    }

    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// They are the other process's for good.
    pub fn handed_over(self) {
        for thread in &self.0 {
            // One that is late has nothing to do any more.
            let _ = thread.send(());
        }
    }
}

/// An image on its way: its lock is let go of, and taken back unless it was handed over.
struct Held {
    volume: Arc<Volume>,
    backend: BackendSpec,
    successors: Vec<String>,
    caller: Caller,
}

impl Held {
    fn attend(self, told: &Sender<(String, Result<(), EngineError>)>, verdict: &Receiver<()>) {
        let Some(image) = image_of(&self.volume) else { return };
        let gone = image.let_go().map_err(|error| DriveError::from(error).into());
        // Whoever waited may have given up.
        let _ = told.send((self.volume.name().into(), gone));
        if verdict.recv().is_ok() {
            return;
        }
        let taken = self.take_back(image);
        let volume = self.volume.clone();
        self.caller.call(Box::new(move |control| control.image_is_back(&volume, taken)));
    }

    fn take_back(&self, image: &Image) -> Result<(), EngineError> {
        let begun = Instant::now();
        loop {
            let error = match image.retake() {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let waited = begun.elapsed();
            match &error {
                // It was never told to go, so nothing of it is lost.
                RbdError::Locked { owner, .. } if waited > GONE && self.successors.contains(owner) => {
                    return self.backend.own_image(image, Some(owner));
                }
                _ if waited > TAKE_BACK => return Err(DriveError::from(error).into()),
                _ => std::thread::sleep(PAUSE),
            }
        }
    }
}

impl Control {
    /// The volumes on images.
    ///
    /// # Errors
    /// One of them cannot be handed over now.
    pub fn images(&self) -> Result<Vec<(Arc<Volume>, BackendSpec)>, EngineError> {
        for open in self.volumes.values() {
            let name = open.volume.name();
            if open.volume.is_incoming() {
                let why = "waits for its guest from another host; try again when it has come";
                return Err(failed(format!("volume {name:?} {why}")));
            }
            if open.held {
                let why = "waits for its cluster since an upgrade that failed; try again when it is served";
                return Err(failed(format!("volume {name:?} {why}")));
            }
        }
        let images = self.volumes.values().filter(|open| image_of(&open.volume).is_some());
        Ok(images.map(|open| (open.volume.clone(), open.spec.backend.clone())).collect())
    }

    /// Bring the vrings of all volumes on images to rest, and start nothing there; `quiet` hears when all are.
    pub fn hold_images(&mut self, quiet: Sender<()>) {
        for open in self.volumes.values_mut().filter(|open| image_of(&open.volume).is_some()) {
            open.held = true;
        }
        self.rest(quiet);
    }

    /// Nothing has been let go of: the volumes on images go on.
    pub fn release_images(&mut self) {
        self.volumes.values_mut().for_each(|open| open.held = false);
        self.thaw();
    }

    /// An image's lock was let go of for a handover that did not come about. A volume whose lock is gone is served no more.
    fn image_is_back(&mut self, volume: &Arc<Volume>, taken: Result<(), EngineError>) {
        let open = self.volumes.get_mut(volume.name()).filter(|open| Arc::ptr_eq(&open.volume, volume));
        // It was closed meanwhile.
        let Some(open) = open else { return };
        open.held = false;
        if let (Err(error), false) = (&taken, volume.is_fenced()) {
            volume.fence();
            self.events.log(Level::Error, volume.name(), format!("it is not served any more: {error}"));
        }
        if let Some(id) = self.attachment_of(volume.name()) {
            self.wake(id);
        }
    }
}

// The new process's side.

/// Open the image of each of `volumes`, without its lock.
///
/// # Errors
/// One cannot be opened, or is late; whatever was opened is closed then.
pub fn open(volumes: &[VolumeState]) -> Result<Images, EngineError> {
    let mut clusters: HashMap<ClusterSpec, Vec<VolumeState>> = HashMap::new();
    for volume in volumes {
        clusters.entry(volume.backend.cluster()?).or_default().push(volume.clone());
    }
    let (told, results) = channel();
    for (spec, volumes) in clusters {
        let told = told.clone();
        // One connection for all of its images.
        apart(move || {
            let cluster = match Cluster::shared(&spec) {
                Ok(cluster) => cluster,
                Err(error) => {
                    // The first is enough: it ends the wait.
                    let _ = told.send((volumes[0].name.clone(), Err(DriveError::from(error).into())));
                    return;
                }
            };
            for volume in volumes {
                let (told, cluster) = (told.clone(), cluster.clone());
                let opening = move || {
                    let image = volume.backend.open_image(volume.size, volume.read_only, true);
                    // Whoever waited may have given up; then it is closed here.
                    let _ = told.send((volume.name, image));
                    drop(cluster);
                };
                if apart(opening).is_err() {
                    // Whoever waits finds that it is late.
                    return;
                }
            }
        })?;
    }
    gather(&results, &names(volumes), "opening images", OPEN).map(Images)
}

fn names(volumes: &[VolumeState]) -> Vec<String> {
    volumes.iter().map(|volume| volume.name.clone()).collect()
}

/// Take the lock of each of `images`, which are those of `volumes`.
///
/// # Errors
/// One cannot be had, or is late; all are closed then.
pub fn own(mut images: Images, volumes: &[VolumeState]) -> Result<Images, EngineError> {
    let (told, results) = channel();
    for volume in volumes {
        let image = images.take(&volume.name).ok_or_else(|| EngineError::NoVolume(volume.name.clone()))?;
        let (volume, told) = (volume.clone(), told.clone());
        apart(move || {
            let owned = match volume.read_only {
                true => Ok(image),
                false => volume.backend.own_image(&image, None).map(|()| image),
            };
            let _ = told.send((volume.name, owned));
        })?;
    }
    gather(&results, &names(volumes), "taking images over", OWN).map(Images)
}

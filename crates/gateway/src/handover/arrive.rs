//! The new process's side: everything is built from what came over, and runs when the old process says so.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ringstone_blockdev::{Drive, DriveError, FileDrive, Key, StoreDoor, StoreVolume};
use ringstone_cipher::{VolumeKey, VOLUME_KEY_LEN};
use ringstone_rbd::Image;
use ringstone_reactor::Ring;
use ringstone_store::{Command, BLOCK};
use ringstone_vhost_user::{Connection, Descriptors, Link, Message, Session};
use ringstone_volume::Volume;
use zeroize::Zeroizing;

use super::format::{
    kind, AttachmentState, FrontendState, Greeting, HandoverState, ImagesState, Opened, Refused, Serving,
    VolumeState, FORMAT,
};
use super::images::{self, Images};
use super::{monotonic_ns, ANSWER};
use crate::attachment::Attachment;
use crate::backend::BackendSpec;
use crate::control::{frontend_event, Control, OpenVolume};
use crate::descriptors;
use crate::engine::{Engine, EngineSettings, VolumeSpec};
use crate::error::EngineError;
use crate::frontend::Live;

/// An engine that serves what another process served.
pub struct TakenOver {
    pub engine: Engine,
    /// Release of the process before.
    pub version: String,
    pub volumes: usize,
    pub stall_ns: u64,
    /// Descriptors of the control side, by name.
    pub extras: Vec<(String, OwnedFd)>,
}

/// A connection to the process whose place is to be taken.
pub struct Takeover {
    link: Link,
    old_version: String,
}

fn failed(error: impl std::fmt::Display) -> EngineError {
    EngineError::Handover(error.to_string())
}

impl Takeover {
    /// Greet the gateway at the other end of `stream`.
    ///
    /// # Errors
    /// It does not answer or hands over in a format of another time.
    pub fn greet(stream: UnixStream, version: &str) -> Result<Self, EngineError> {
        let mut link = Link::new(stream, ANSWER).map_err(failed)?;
        let hello = Greeting { version: version.into(), formats: vec![FORMAT], descriptors: 0, images: true };
        let body = serde_json::to_vec(&hello).map_err(failed)?;
        link.send(kind::HELLO, &body, std::iter::empty()).map_err(failed)?;
        let welcome = next(&mut link, kind::WELCOME)?;
        let welcome: Greeting = serde_json::from_slice(&welcome.body).map_err(failed)?;
        // Twice what the old process has: mappings, io_urings and duplicates come on top.
        descriptors::make_room((2 * welcome.descriptors).max(descriptors::AT_START));
        Ok(Self { link, old_version: welcome.version })
    }

    /// Start an engine and go on with what the old process serves. Returns when it runs here.
    ///
    /// # Errors
    /// The engine cannot be started, or something that comes over cannot be used here: the old process goes on.
    pub fn run(mut self, settings: &EngineSettings) -> Result<TakenOver, EngineError> {
        // The old process's stats page stays readable until it has nothing left to count.
        let final_path = settings.stats_path.clone();
        let mut own = settings.clone();
        own.stats_path.as_mut_os_string().push(".new");
        let result = Engine::start(&own).and_then(|engine| self.install(&engine).map(|done| (engine, done)));
        match result {
            Ok((engine, (state, extras, since_ns))) => {
                if let Err(source) = std::fs::rename(&own.stats_path, &final_path) {
                    let message = format!("the stats page stays at {}: {source}", own.stats_path.display());
                    engine.log_warning(message);
                }
                Ok(TakenOver {
                    engine,
                    version: self.old_version,
                    volumes: state.attachments.len(),
                    stall_ns: since_ns.saturating_sub(state.stopped_ns),
                    extras,
                })
            }
            Err(error) => {
                let body = serde_json::to_vec(&Refused { reason: error.to_string() }).unwrap_or_default();
                // The old process may have gone; it resumes by itself in any case.
                let _ = self.link.send(kind::REFUSED, &body, std::iter::empty());
                let _ = std::fs::remove_file(&own.stats_path);
                Err(error)
            }
        }
    }

    /// Own the images of clusters, while the old process serves all other volumes.
    fn own_images(&mut self, body: &[u8]) -> Result<Images, EngineError> {
        let state: ImagesState = serde_json::from_slice(body).map_err(failed)?;
        let images = images::open(&state.volumes)?;
        let opened = serde_json::to_vec(&Opened { clients: images.clients() }).map_err(failed)?;
        self.link.send(kind::OPENED, &opened, std::iter::empty()).map_err(failed)?;
        next(&mut self.link, kind::FREE)?;
        let images = images::own(images, &state.volumes)?;
        self.link.send(kind::OWNED, b"", std::iter::empty()).map_err(failed)?;
        Ok(images)
    }

    #[expect(clippy::type_complexity, reason = "what came over, used once above")]
    fn install(
        &mut self,
        engine: &Engine,
    ) -> Result<(HandoverState, Vec<(String, OwnedFd)>, u64), EngineError> {
        self.link.send(kind::READY, b"", std::iter::empty()).map_err(failed)?;
        // As long as the requests in flight of the old one take.
        self.link.set_limit(ANSWER * 6).map_err(failed)?;
        let mut message = hear(&mut self.link)?;
        let mut images = Images::default();
        if message.kind == kind::IMAGES {
            images = self.own_images(&message.body)?;
            message = hear(&mut self.link)?;
        }
        let Message { body, fds, .. } = only(message, kind::STATE)?;
        self.link.set_limit(ANSWER).map_err(failed)?;
        let state = HandoverState::parse(&body).map_err(failed)?;
        let mut fds = Descriptors::new(fds);
        // From a release that hands over all at once.
        let late = |volume: &&VolumeState| volume.drive == "rbd" && !images.has(&volume.name);
        let late: Vec<VolumeState> = state.volumes.iter().filter(late).cloned().collect();
        images.extend(images::own(images::open(&late)?, &late)?);
        let mut extras = Vec::new();
        for (name, place) in &state.extras {
            extras.push((name.clone(), fds.take(*place).map_err(failed)?));
        }
        let mut arrived = Arrived { images, ..Arrived::default() };
        let doors = arrive_stores(engine, &state, &mut fds, &mut arrived)?;
        let build = state.clone();
        let installed = engine.call(move |control| control.install(&build, &mut fds, &mut arrived))?;
        let told = installed.and_then(|()| {
            self.link.send(kind::INSTALLED, b"", std::iter::empty()).map_err(failed)?;
            next(&mut self.link, kind::GO)
        });
        if let Err(error) = told {
            // Nothing of it is ours: it is let go without a trace.
            engine.abandon();
            return Err(error);
        }
        // Only now: until the word to go the stores are the old process's.
        for (path, door) in doors {
            if let Err(error) = door.call(Command::Possess) {
                engine.log_warning(format!("the store {} cannot be written: {error}", path.display()));
            }
        }
        let since_ns = engine.call(|control| {
            control.thaw();
            monotonic_ns()
        })?;
        let body = serde_json::to_vec(&Serving { since_ns }).map_err(failed)?;
        // Whether the old process still hears it or not, this one serves.
        if self.link.send(kind::SERVING, &body, std::iter::empty()).is_err() {
            engine.log_warning("the process before had gone before it heard that this one serves".into());
        }
        Ok((state, extras, since_ns))
    }
}

/// The way to each store that came over.
type Doors = Vec<(PathBuf, Arc<dyn StoreDoor>)>;

/// What was opened before the control thread hears of it.
#[derive(Default)]
struct Arrived {
    images: Images,
    /// Drives of stores' volumes, by the volume's name.
    of_stores: HashMap<String, Drive>,
}

/// Read the stores that came over, and open their volumes. Nothing is written: they are the old process's still.
fn arrive_stores(
    engine: &Engine,
    state: &HandoverState,
    fds: &mut Descriptors,
    arrived: &mut Arrived,
) -> Result<Doors, EngineError> {
    let mut doors = Vec::new();
    let mut stores = HashMap::new();
    for store in &state.stores {
        let file = File::from(fds.take(store.fd).map_err(failed)?);
        let drive = FileDrive::adopt(file, &store.path, 0, BLOCK as u32, false)?;
        let parts = engine.borrow_store(store.path.clone(), Arc::new(drive))?;
        doors.push((store.path.clone(), parts.door.clone()));
        stores.insert(store.path.clone(), parts);
    }
    for volume in &state.volumes {
        let BackendSpec::Store { path, volume: name } = &volume.backend else { continue };
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        let Some(parts) = stores.get(&path) else { continue };
        let key = match volume.key {
            Some(place) => Key::Volume(key_in(File::from(fds.take(place).map_err(failed)?))?),
            None => Key::None,
        };
        let drive = Drive::Store(StoreVolume::open(parts, name, volume.size, volume.block_size, &key)?);
        arrived.of_stores.insert(volume.name.clone(), drive);
    }
    Ok(doors)
}

fn hear(link: &mut Link) -> Result<Message, EngineError> {
    let message = link.receive().map_err(|error| failed(format!("the running gateway: {error}")))?;
    if message.kind == kind::REFUSED {
        let refused: Refused = serde_json::from_slice(&message.body).map_err(failed)?;
        return Err(failed(refused.reason));
    }
    Ok(message)
}

fn next(link: &mut Link, wanted: u32) -> Result<Message, EngineError> {
    only(hear(link)?, wanted)
}

fn only(message: Message, wanted: u32) -> Result<Message, EngineError> {
    if message.kind != wanted {
        return Err(failed(format!("the running gateway said {} where {wanted} must come", message.kind)));
    }
    Ok(message)
}

impl Control {
    /// Build all of `state`, and run nothing of it yet.
    fn install(
        &mut self,
        state: &HandoverState,
        fds: &mut Descriptors,
        arrived: &mut Arrived,
    ) -> Result<(), EngineError> {
        self.frozen = true;
        for volume in &state.volumes {
            let of_store = arrived.of_stores.remove(&volume.name);
            let open = resume_volume(volume, fds, arrived.images.take(&volume.name), of_store)?;
            self.volumes.insert(volume.name.clone(), open);
        }
        for attachment in &state.attachments {
            self.resume_attachment(attachment, fds)?;
        }
        Ok(())
    }

    fn resume_attachment(
        &mut self,
        state: &AttachmentState,
        fds: &mut Descriptors,
    ) -> Result<(), EngineError> {
        let volume = self.volumes.get(&state.volume).map(|open| open.volume.clone());
        let volume = volume.ok_or_else(|| EngineError::NoVolume(state.volume.clone()))?;
        if !(1..=64).contains(&state.queues) {
            return Err(EngineError::Queues { queues: state.queues });
        }
        let listener = UnixListener::from(fds.take(state.listener).map_err(failed)?);
        let mut attachment =
            Attachment::over(volume, Path::new(&state.path), listener, state.queues, &self.page)?;
        attachment.shared = state.shared;
        for (at, frontend) in state.frontends.iter().enumerate() {
            let id = self.next_session;
            self.next_session += 1;
            let live = resume_frontend(&attachment, id, frontend, fds)?;
            self.epoll
                .add(live.connection.as_fd(), frontend_event(id))
                .map_err(|errno| EngineError::System { what: "epoll_ctl", source: errno.into() })?;
            if state.writer == Some(at) {
                attachment.writer = Some(id);
            }
            attachment.frontends.push(live);
        }
        self.attach(attachment)?;
        Ok(())
    }
}

fn resume_frontend(
    attachment: &Attachment,
    id: u64,
    state: &FrontendState,
    fds: &mut Descriptors,
) -> Result<Live, EngineError> {
    let begun_fds =
        state.begun_fds.iter().map(|place| fds.take(*place)).collect::<Result<_, _>>().map_err(failed)?;
    let stream = UnixStream::from(fds.take(state.connection).map_err(failed)?);
    let connection =
        Connection::resume(stream, &state.begun, begun_fds, attachment.strangers.clone()).map_err(failed)?;
    let mut session = Session::resume(attachment.device(), &state.session, fds, attachment.reaper.clone())
        .map_err(failed)?;
    session.device_mut().set_cache(state.cache);
    // Rings that cannot be built here are found now, while the old process can still go on.
    for index in 0..attachment.queues {
        if let Some(setup) = session.runnable(index).map_err(failed)? {
            Ring::new(setup.packed, setup.ring).map_err(failed)?;
        }
    }
    Ok(Live::new(id, session, connection, attachment.queues))
}

fn resume_volume(
    state: &VolumeState,
    fds: &mut Descriptors,
    image: Option<Image>,
    of_store: Option<Drive>,
) -> Result<OpenVolume, EngineError> {
    let mut take = |place: Option<usize>| {
        place.map(|place| fds.take(place)).transpose().map_err(failed).map(|fd| fd.map(File::from))
    };
    let (file, presence) = (take(state.fd)?, take(state.presence)?);
    let presence = presence.map(read_all).transpose().map_err(failed)?;
    let (drive, faults) = match of_store {
        Some(drive) => (drive, None),
        None => state.backend.adopt(state, file, presence.as_deref(), image)?,
    };
    let spec = VolumeSpec {
        name: state.name.clone(),
        backend: state.backend.clone(),
        size: state.size,
        block_size: state.block_size,
        read_only: state.read_only,
        serial: state.serial.clone(),
    };
    let volume = Volume::new(
        &state.name,
        &state.serial,
        state.size,
        state.block_size,
        state.read_only,
        drive,
        faults,
    )?;
    Ok(OpenVolume { volume: Arc::new(volume), spec, held: false })
}

/// The key in a file of the process before.
fn key_in(mut file: File) -> Result<VolumeKey, EngineError> {
    let mut bytes = Zeroizing::new([0; VOLUME_KEY_LEN]);
    file.rewind().and_then(|()| file.read_exact(&mut *bytes)).map_err(failed)?;
    VolumeKey::new(&*bytes).map_err(|error| EngineError::Volume(DriveError::from(error).into()))
}

fn read_all(mut file: File) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

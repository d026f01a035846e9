//! The API of the engine.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use ringstone_blockdev::{Drive, DriveError, Key};
use ringstone_reactor::{ReactorHandle, ReactorSettings};
use ringstone_store::{Epochs, Reader};
use ringstone_telemetry::{Clock, ReactorView, StatsPage, MAX_REACTORS};
use ringstone_volume::Volume;

use crate::attachment::Attachment;
use crate::backend::BackendSpec;
use crate::control::{Call, Caller, Control, ControlParts, OpenVolume, Pulse};
use crate::descriptors;
use crate::error::EngineError;
use crate::events::{Event, Events, Level};
use crate::frontend::Live;
use crate::listener::SocketRights;
use crate::placement::Reactors;
use crate::topology::Topology;
use crate::watchdog::Watchdog;

/// How an engine is to run.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// One reactor on each.
    pub cores: Vec<usize>,
    /// Microseconds of polling without work before a reactor sleeps.
    pub idle_us: u64,
    pub stats_path: PathBuf,
    /// Move queues between reactors by measured load.
    pub balance: bool,
    /// `None`: this machine's.
    pub topology: Option<Topology>,
}

/// A volume to open.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    pub name: String,
    pub backend: BackendSpec,
    /// Bytes.
    pub size: u64,
    pub block_size: u32,
    pub read_only: bool,
    /// Up to 20 bytes; empty: the begin of the name.
    pub serial: String,
}

/// An open volume, for a person.
#[derive(Clone, Debug)]
pub struct VolumeInfo {
    pub name: String,
    pub size: u64,
    pub block_size: u32,
    pub read_only: bool,
    pub backend: &'static str,
    pub detail: String,
    pub discard: bool,
    /// Another host owns it: it is not served any more.
    pub fenced: bool,
    /// What storage across hosts knows this client by; a successor shuts it out.
    pub client: Option<String>,
    pub attached: bool,
}

/// One queue of an attachment.
#[derive(Clone, Debug)]
pub struct QueueInfo {
    pub index: usize,
    pub size: u32,
    pub reactor: Option<usize>,
    pub running: bool,
}

/// An attached volume, for a person.
#[derive(Clone, Debug)]
pub struct AttachmentInfo {
    pub volume: String,
    pub socket: PathBuf,
    pub state: &'static str,
    pub features: u64,
    pub protocol_features: u64,
    pub memory_bytes: u64,
    pub memory_regions: usize,
    pub peer_pid: Option<i32>,
    /// The rings are packed ones.
    pub packed: bool,
    pub shared: bool,
    /// Frontends that are connected.
    pub frontends: usize,
    pub queues: Vec<QueueInfo>,
}

/// A reactor, for a person.
#[derive(Clone, Copy, Debug)]
pub struct ReactorInfo {
    pub index: usize,
    pub core: usize,
}

/// The engine: reactors, a control thread, and what is open and attached. All methods may be called from any thread.
pub struct Engine {
    calls: Mutex<Option<Sender<Call>>>,
    bell: Arc<EventFd>,
    events: Events,
    thread: Mutex<Option<JoinHandle<()>>>,
    idle_us: u64,
    clock: Clock,
    /// What a new reactor tells the control thread by.
    reactors_bell: Arc<OwnedFd>,
    /// Reactors come and go one at a time.
    changing: Mutex<()>,
    /// Stores are opened and closed one at a time.
    pub(crate) opening: Mutex<()>,
    pub(crate) epochs: Arc<Epochs>,
    views: Vec<ReactorView>,
    pulse: Arc<Pulse>,
    watchdog: Mutex<Option<Watchdog>>,
}

impl Engine {
    /// Start the reactors and the control thread.
    ///
    /// # Errors
    /// No cores, one that cannot be used, no usable io_uring, or a stats page that cannot be made.
    pub fn start(settings: &EngineSettings) -> Result<Self, EngineError> {
        if settings.cores.is_empty() {
            return Err(EngineError::NoCores);
        }
        descriptors::make_room(descriptors::AT_START);
        let system = |what| move |source| EngineError::System { what, source };
        let bell = || {
            EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                .map_err(|errno| EngineError::System { what: "eventfd", source: errno.into() })
        };
        let page = StatsPage::create(&settings.stats_path, &settings.cores)?;
        let events = Events::new().map_err(system("eventfd"))?;
        let clock = Clock::calibrate();
        let reactors_bell = bell()?;
        let theirs = Arc::new(reactors_bell.as_fd().try_clone_to_owned().map_err(system("dup"))?);
        let topology = settings.topology.clone().unwrap_or_else(Topology::of_this_machine);
        let mut reactors = Reactors::new();
        let epochs = Arc::<Epochs>::default();
        for (index, core) in settings.cores.iter().enumerate() {
            let own = ReactorSettings { core: *core, idle_ns: settings.idle_us * 1000 };
            let handle = ReactorHandle::start(
                own,
                clock,
                page.reactor(index),
                theirs.clone(),
                epochs.clone(),
                Reader::new(index),
            )?;
            reactors.put(index, *core, topology.node_of_core(*core), handle, page.reactor(index));
        }
        // Slots that no reactor has yet look stopped.
        let views = (0..MAX_REACTORS).map(|index| page.view(index)).collect();
        let (calls, receiver) = channel();
        let calls_bell = Arc::new(bell()?);
        let pulse = Arc::<Pulse>::default();
        let parts = ControlParts {
            page,
            events: events.clone(),
            reactors,
            topology,
            reactors_bell,
            calls: receiver,
            caller: Caller { calls: calls.clone(), bell: calls_bell.clone() },
            balancing: settings.balance,
            pulse: pulse.clone(),
        };
        let control = Control::new(parts).map_err(system("epoll"))?;
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || control.run())
            .map_err(system("starting the control thread"))?;
        Ok(Self {
            calls: Mutex::new(Some(calls)),
            bell: calls_bell,
            events,
            thread: Mutex::new(Some(thread)),
            idle_us: settings.idle_us,
            clock,
            reactors_bell: theirs,
            changing: Mutex::new(()),
            opening: Mutex::new(()),
            epochs,
            views,
            pulse,
            watchdog: Mutex::new(None),
        })
    }

    /// Run `call` on the control thread and wait for what it returns.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Control) -> T + Send + 'static,
    ) -> Result<T, EngineError> {
        let (sender, receiver) = channel();
        self.post(Box::new(move |control| {
            // The caller waits below; if it is gone there is nobody to tell.
            let _ = sender.send(call(control));
        }))?;
        receiver.recv().map_err(|_| EngineError::Stopped)
    }

    /// For threads that tell the control thread something later.
    pub(crate) fn caller(&self) -> Result<Caller, EngineError> {
        let calls = self.calls.lock().unwrap_or_else(|e| e.into_inner());
        let calls = calls.clone().ok_or(EngineError::Stopped)?;
        Ok(Caller { calls, bell: self.bell.clone() })
    }

    fn post(&self, call: Call) -> Result<(), EngineError> {
        let calls = self.calls.lock().unwrap_or_else(|e| e.into_inner());
        calls.as_ref().and_then(|calls| calls.send(call).ok()).ok_or(EngineError::Stopped)?;
        // A full counter means that the bell rings already.
        let _ = self.bell.write(1);
        Ok(())
    }

    /// Open a volume. `key`: of one that is encrypted.
    ///
    /// # Errors
    /// The name is taken, or its drive cannot be opened; nothing stays open then.
    pub fn open_volume(&self, spec: &VolumeSpec, key: &Key) -> Result<(), EngineError> {
        let taken = spec.name.clone();
        if self.call(move |control| control.volumes.contains_key(&taken))? {
            return Err(EngineError::VolumeExists(spec.name.clone()));
        }
        // On the caller's thread: opening may take long.
        let (drive, faults) = match &spec.backend {
            BackendSpec::Store { path, volume } => (self.open_store_volume(spec, path, volume, key)?, None),
            backend => backend.open(spec.size, spec.block_size, spec.read_only)?,
        };
        let volume =
            Volume::new(&spec.name, &spec.serial, spec.size, spec.block_size, spec.read_only, drive, faults)?;
        volume.set_incoming(spec.backend.is_incoming());
        let (volume, spec) = (Arc::new(volume), spec.clone());
        self.call(move |control| match control.volumes.get(volume.name()) {
            Some(_) => Err(EngineError::VolumeExists(volume.name().into())),
            None => {
                control.volumes.insert(volume.name().into(), OpenVolume { volume, spec, held: false });
                Ok(())
            }
        })?
    }

    /// Close a volume that is not attached.
    ///
    /// # Errors
    /// It is not open, or attached.
    pub fn close_volume(&self, name: &str) -> Result<(), EngineError> {
        let name = name.to_owned();
        let closed = self.call(move |control| {
            if control.attachment_of(&name).is_some() {
                return Err(EngineError::Attached(name));
            }
            control.volumes.remove(&name).ok_or(EngineError::NoVolume(name))
        })??;
        // The last reference goes here: unmapping a large volume is not the control thread's business.
        drop(closed);
        Ok(())
    }

    /// Grow a volume, running or not.
    ///
    /// # Errors
    /// It is not open, would shrink, or its drive is too short.
    pub fn resize_volume(&self, name: &str, size: u64) -> Result<(), EngineError> {
        let volume = self.volume(name)?;
        let outgrown = volume.resize(size)?;
        let name = name.to_owned();
        self.call(move |control| control.resized(&name, outgrown))
    }

    /// This host owns an incoming volume from here on, as `backend` says: when its predecessors are shut out and its lock is
    /// taken, the queues of a frontend that has come meanwhile start.
    ///
    /// # Errors
    /// It is not open or not incoming, or it cannot be owned; then it is incoming as before.
    pub fn own_volume(&self, name: &str, backend: BackendSpec) -> Result<(), EngineError> {
        let volume = self.volume(name)?;
        let (Drive::Rbd(image), BackendSpec::Rbd { epoch, predecessors, incoming: false, .. }) =
            (volume.drive(), &backend)
        else {
            return Err(EngineError::OneHost(name.into()));
        };
        if !volume.is_incoming() {
            return Err(EngineError::NotIncoming(name.into()));
        }
        // On the caller's thread: the cluster may take long.
        image.own(*epoch, predecessors).map_err(DriveError::from)?;
        let name = name.to_owned();
        self.call(move |control| {
            if let Some(open) = control.volumes.get_mut(&name) {
                open.spec.backend = backend;
            }
            control.take_up(&volume);
        })
    }

    /// Let another host own a volume whose guest stands still; its frontend stays connected. It is incoming from here on:
    /// [`own_volume`](Self::own_volume) is the way back.
    ///
    /// # Errors
    /// It is not open, queues of it run, or the cluster does not answer; then it is served as before.
    pub fn release_volume(&self, name: &str) -> Result<(), EngineError> {
        let volume = self.volume(name)?;
        let Drive::Rbd(image) = volume.drive() else { return Err(EngineError::OneHost(name.into())) };
        let (resting, name) = (volume.clone(), name.to_owned());
        self.call(move |control| {
            let mut all = control.attachments.values().filter(|one| one.volume.name() == name);
            if !all.all(|attachment| attachment.frontends.iter().all(Live::at_rest)) {
                return Err(EngineError::QueuesRun(name));
            }
            if control.volumes.get(&name).is_some_and(|open| open.held) {
                return Err(EngineError::Held(name));
            }
            resting.set_incoming(true);
            Ok(())
        })??;
        // On the caller's thread: the cluster may take long.
        let released = image.let_go().map_err(DriveError::from);
        if released.is_err() {
            self.call(move |control| control.take_up(&volume))?;
        }
        Ok(released?)
    }

    /// Stop a volume's I/O at once, as another host owns it now. Requests in flight are not answered; closing it is all that
    /// can be done with it then.
    ///
    /// # Errors
    /// It is not open.
    pub fn fence_volume(&self, name: &str) -> Result<(), EngineError> {
        self.volume(name)?.fence();
        Ok(())
    }

    fn volume(&self, name: &str) -> Result<Arc<Volume>, EngineError> {
        let name = name.to_owned();
        self.call(move |control| match control.volumes.get(&name) {
            Some(open) => Ok(open.volume.clone()),
            None => Err(EngineError::NoVolume(name)),
        })?
    }

    /// Every open volume, by name.
    ///
    /// # Errors
    /// The engine was stopped.
    pub fn volumes(&self) -> Result<Vec<VolumeInfo>, EngineError> {
        let mut volumes = self.call(|control| {
            let info = |volume: &Arc<Volume>| VolumeInfo {
                name: volume.name().into(),
                size: volume.size(),
                block_size: volume.block_size(),
                read_only: volume.read_only(),
                backend: if volume.faults().is_some() { "faulty" } else { volume.drive().backing().kind() },
                detail: volume.drive().backing().describe(),
                discard: !volume.read_only() && volume.drive().backing().can_discard(),
                fenced: volume.is_fenced(),
                client: volume.drive().backing().client().map(str::to_owned),
                attached: control.attachment_of(volume.name()).is_some(),
            };
            control.volumes.values().map(|open| info(&open.volume)).collect::<Vec<_>>()
        })?;
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    /// Serve a volume on a socket that only this process's user may connect to.
    ///
    /// # Errors
    /// Those of [`attach_for`](Self::attach_for).
    pub fn attach(&self, name: &str, path: &Path, queues: usize) -> Result<(), EngineError> {
        self.attach_for(name, path, queues, SocketRights::default())
    }

    /// Serve a volume on a socket that has `rights` from the moment on at which it can be connected to.
    ///
    /// # Errors
    /// It is not open or attached already, the socket is somebody else's or cannot be given away, or the number of queues is
    /// impossible.
    pub fn attach_for(
        &self,
        name: &str,
        path: &Path,
        queues: usize,
        rights: SocketRights,
    ) -> Result<(), EngineError> {
        if !(1..=64).contains(&queues) {
            return Err(EngineError::Queues { queues });
        }
        let volume = self.volume(name)?;
        let path = path.to_owned();
        self.call(move |control| {
            if control.attachment_of(volume.name()).is_some() {
                return Err(EngineError::Attached(volume.name().into()));
            }
            let attachment = Attachment::new(volume, &path, rights, queues, &control.page)?;
            control.attach(attachment).map(drop)
        })?
    }

    /// Stop serving a volume; returns when everything in flight is done and the socket is gone.
    ///
    /// # Errors
    /// It is not attached, or a frontend is connected and `force` is not set.
    pub fn detach(&self, name: &str, force: bool) -> Result<(), EngineError> {
        let (sender, receiver) = channel();
        let name = name.to_owned();
        self.post(Box::new(move |control| control.detach(&name, force, sender)))?;
        receiver.recv().map_err(|_| EngineError::Stopped)?
    }

    /// Let a second frontend connect to a volume's socket, or no more. Only one of the two runs its vrings at a time.
    ///
    /// # Errors
    /// It is not attached, or two are connected and there is to be one.
    pub fn share(&self, name: &str, shared: bool) -> Result<(), EngineError> {
        let name = name.to_owned();
        self.call(move |control| control.share(&name, shared))?
    }

    /// Begin to move a running queue to the reactor on `core`; it arrives when its requests in flight are done.
    ///
    /// # Errors
    /// There is no such reactor or attachment, or the queue does not run.
    pub fn move_queue(&self, name: &str, queue: usize, core: usize) -> Result<(), EngineError> {
        let name = name.to_owned();
        self.call(move |control| control.move_queue(&name, queue, core))?
    }

    /// The reactors that take queues.
    ///
    /// # Errors
    /// The engine was stopped.
    pub fn reactors(&self) -> Result<Vec<ReactorInfo>, EngineError> {
        let info = |(index, core)| ReactorInfo { index, core };
        self.call(move |control| control.reactors.usable().map(info).collect())
    }

    /// Start a reactor on `core`.
    ///
    /// # Errors
    /// There is one, or the core cannot be used.
    pub fn add_reactor(&self, core: usize) -> Result<ReactorInfo, EngineError> {
        let _one_at_a_time = self.changing.lock().unwrap_or_else(|e| e.into_inner());
        let (index, counts, reads) = self.call(move |control| {
            if control.reactors.on_core(core).is_some() {
                return Err(EngineError::ReactorExists { core });
            }
            let index = control.reactors.free_index();
            let counts = control.page.add_reactor(index, core)?;
            Ok((index, counts, control.page.reactor(index)))
        })??;
        let settings = ReactorSettings { core, idle_ns: self.idle_us * 1000 };
        let started = ReactorHandle::start(
            settings,
            self.clock,
            counts,
            self.reactors_bell.clone(),
            self.epochs.clone(),
            Reader::new(index),
        );
        let handle = match started {
            Ok(handle) => handle,
            Err(error) => {
                reads.set_removed();
                return Err(error.into());
            }
        };
        self.call(move |control| {
            let node = control.topology.node_of_core(core);
            control.reactors.put(index, core, node, handle, reads);
            ReactorInfo { index, core }
        })
    }

    /// Move every queue off the reactor on `core` and end it. Returns when it has ended.
    ///
    /// # Errors
    /// There is none, or it is the last.
    pub fn remove_reactor(&self, core: usize) -> Result<(), EngineError> {
        let _one_at_a_time = self.changing.lock().unwrap_or_else(|e| e.into_inner());
        let (done, handle) = channel();
        self.call(move |control| control.remove_reactor(core, done))??;
        // Dropping the handle waits for the thread.
        handle.recv().map(drop).map_err(|_| EngineError::Stopped)
    }

    pub(crate) fn log_warning(&self, message: String) {
        self.events.log(Level::Warning, "", message);
    }

    /// Every attached volume, by name.
    ///
    /// # Errors
    /// The engine was stopped.
    pub fn attachments(&self) -> Result<Vec<AttachmentInfo>, EngineError> {
        let mut all =
            self.call(|control| control.attachments.values().map(Attachment::info).collect::<Vec<_>>())?;
        all.sort_by(|a, b| a.volume.cmp(&b.volume));
        Ok(all)
    }

    /// Say `WATCHDOG=1` to the service manager at `socket` (a path, or `@name`) every `interval` while the reactors turn, until
    /// the engine is stopped.
    ///
    /// # Errors
    /// The address cannot be one, or there is no thread to be had.
    pub fn watchdog(&self, socket: &str, interval: Duration) -> Result<(), EngineError> {
        let watchdog =
            Watchdog::start(self.views.clone(), self.pulse.clone(), self.events.clone(), socket, interval)
                .map_err(|source| EngineError::System { what: "starting the watchdog", source })?;
        *self.watchdog.lock().unwrap_or_else(|e| e.into_inner()) = Some(watchdog);
        Ok(())
    }

    /// The eventfd that is readable while there are events.
    pub fn event_fd(&self) -> i32 {
        self.events.fd()
    }

    pub fn drain_events(&self) -> Vec<Event> {
        self.events.drain()
    }

    /// Detach everything and end all threads. Does nothing the second time.
    pub fn stop(&self) {
        // First: a reactor that ends turns no more, and the service manager has its own limit for a stop.
        self.watchdog.lock().unwrap_or_else(|e| e.into_inner()).take();
        let attached = self.attachments().unwrap_or_default();
        for attachment in attached {
            // Detached meanwhile by somebody else: as good.
            let _ = self.detach(&attachment.volume, true);
        }
        self.close_stores();
        let _ = self.call(|control| control.stopping = true);
        self.calls.lock().unwrap_or_else(|e| e.into_inner()).take();
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(thread) = thread {
            // A control thread that panicked has said so on stderr.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

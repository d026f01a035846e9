//! One attached volume: where it listens, and the frontend it serves.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::Arc;

use ringstone_blockdev::Drive;
use ringstone_mapping::Mapping;
use ringstone_reactor::{Command, Queue, QueueKey, QueueParts};
use ringstone_telemetry::{QueueStats, StatsPage};
use ringstone_vhost_user::{notify_config_change, Connection, Incoming, Quiet, Session};
use ringstone_virtqueue::SplitRing;
use ringstone_volume::Volume;

use crate::device::BlockDevice;
use crate::engine::{AttachmentInfo, QueueInfo};
use crate::error::EngineError;
use crate::placement::Reactors;

/// Where a vring runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingState {
    Stopped,
    Running {
        reactor: usize,
    },
    /// Told to stop; its reactor still finishes what is in flight.
    Stopping {
        reactor: usize,
    },
}

/// The frontend connected now.
pub struct Live {
    /// Unique over the engine's life, so that late replies of reactors find the right session or none.
    pub id: u64,
    pub session: Session<BlockDevice>,
    pub connection: Connection,
    pub rings: Vec<RingState>,
    /// A message that waits for vrings to come to rest.
    pub pending: Option<Incoming>,
    /// Set once the connection is to end.
    pub closing: bool,
    /// Guest memory registered with io_urings: which mapping with which reactor.
    registered: Vec<(Arc<Mapping>, usize)>,
    pub registered_bytes: u64,
}

/// A volume and the socket it is served on.
pub struct Attachment {
    pub volume: Arc<Volume>,
    pub path: PathBuf,
    pub listener: UnixListener,
    queues: u16,
    stats: Vec<Option<QueueStats>>,
    pub live: Option<Live>,
    /// Whoever waits for the detach to be done.
    pub detach: Vec<Sender<Result<(), EngineError>>>,
    pub detaching: bool,
}

impl Attachment {
    pub fn new(volume: Arc<Volume>, path: &Path, queues: u16, page: &StatsPage) -> Result<Self, EngineError> {
        let stats = (0..usize::from(queues))
            .map(|index| page.queue(volume.name(), index).map(Some))
            .collect::<Result<_, _>>()?;
        let listener = listen(path)?;
        Ok(Self {
            volume,
            path: path.to_owned(),
            listener,
            queues,
            stats,
            live: None,
            detach: Vec::new(),
            detaching: false,
        })
    }

    /// A frontend connected.
    pub fn connect(&mut self, id: u64, stream: UnixStream) -> std::io::Result<()> {
        let device = BlockDevice::new(self.volume.clone(), self.queues);
        self.live = Some(Live {
            id,
            session: Session::new(device),
            connection: Connection::new(stream)?,
            rings: vec![RingState::Stopped; usize::from(self.queues)],
            pending: None,
            closing: false,
            registered: Vec::new(),
            registered_bytes: 0,
        });
        Ok(())
    }

    /// Run every vring that can run and does not.
    ///
    /// # Errors
    /// A ring is malformed or a descriptor is unusable: the message says why, and the device must stop.
    pub fn start_rings(&mut self, reactors: &mut Reactors) -> Result<(), String> {
        let Some(live) = &mut self.live else { return Ok(()) };
        if live.closing {
            return Ok(());
        }
        for index in 0..self.queues {
            let at = usize::from(index);
            if live.rings[at] != RingState::Stopped {
                continue;
            }
            let Some(setup) = live.session.runnable(index).map_err(|e| e.to_string())? else { continue };
            let ring = SplitRing::new(
                setup.memory.clone(),
                setup.size,
                setup.addresses,
                setup.base,
                setup.event_idx,
                setup.indirect,
            )
            .map_err(|error| format!("vring {index}: {error}"))?;
            let Some(stats) = self.stats[at].take() else { continue };
            let rings = &live.rings;
            let reactor = reactors.choose(|candidate| {
                rings.iter().filter(|state| **state == RingState::Running { reactor: candidate }).count()
            });
            stats.placed(Some(reactor), ring.size());
            let queue = Queue::new(QueueParts {
                key: QueueKey { session: live.id, vring: index },
                ring,
                volume: self.volume.clone(),
                writeback: live.session.device().writeback(),
                stats,
                kick: setup.kick,
                call: setup.call,
                geometry: live.session.device().geometry(),
            });
            live.register_memory(&self.volume, reactor, reactors);
            live.rings[at] = RingState::Running { reactor };
            reactors.started(reactor);
            reactors.send(reactor, Command::Start(Box::new(queue)));
        }
        Ok(())
    }

    /// A reactor gave a queue back.
    pub fn ring_stopped(&mut self, queue: Queue, reactor: usize, reactors: &mut Reactors) {
        let parts = queue.into_parts();
        let at = usize::from(parts.key.vring);
        parts.stats.placed(None, parts.ring.size());
        self.stats[at] = Some(parts.stats);
        reactors.stopped(reactor);
        if let Some(live) = &mut self.live {
            live.session.stopped(parts.key.vring, parts.ring.next_available());
            live.rings[at] = RingState::Stopped;
        }
    }

    pub fn info(&self) -> AttachmentInfo {
        let live = self.live.as_ref();
        let running = |state: &RingState| matches!(state, RingState::Running { .. });
        let state = match live {
            None => "listening",
            Some(live) if live.session.broken() => "needs_reset",
            Some(live) if live.rings.iter().any(running) => "running",
            Some(_) => "connected",
        };
        let regions = live.map(|live| live.session.memory().regions()).unwrap_or_default();
        let queues = (0..self.queues).map(|index| {
            let ring = live.map(|live| live.rings[usize::from(index)]);
            QueueInfo {
                index: usize::from(index),
                size: live.map_or(0, |live| live.session.vring_size(index)),
                reactor: match ring {
                    Some(RingState::Running { reactor } | RingState::Stopping { reactor }) => Some(reactor),
                    _ => None,
                },
                running: ring.as_ref().is_some_and(running),
            }
        });
        AttachmentInfo {
            volume: self.volume.name().into(),
            socket: self.path.clone(),
            state,
            features: live.map_or(0, |live| live.session.features()),
            protocol_features: live.map_or(0, |live| live.session.protocol_features()),
            memory_bytes: regions.iter().map(|region| region.len).sum(),
            memory_regions: regions.len(),
            registered_bytes: live.map_or(0, |live| live.registered_bytes),
            peer_pid: live.and_then(|live| live.connection.peer_pid()),
            queues: queues.collect(),
        }
    }
}

impl Live {
    /// Bring the vrings that `quiet` names to rest; true once they are.
    pub fn quieten(&mut self, quiet: Quiet, reactors: &mut Reactors) -> bool {
        let mut at_rest = true;
        for (index, state) in self.rings.iter_mut().enumerate() {
            if quiet == Quiet::None || matches!(quiet, Quiet::Vring(only) if usize::from(only) != index) {
                continue;
            }
            if let RingState::Running { reactor } = *state {
                let key = QueueKey { session: self.id, vring: index as u16 };
                reactors.send(reactor, Command::Stop(key));
                *state = RingState::Stopping { reactor };
            }
            at_rest &= *state == RingState::Stopped;
        }
        at_rest
    }

    /// Tell the reactor of a running vring something about it.
    pub fn tell(&self, index: u16, reactors: &mut Reactors, command: impl FnOnce(QueueKey) -> Command) {
        if let Some(RingState::Running { reactor }) = self.rings.get(usize::from(index)).copied() {
            reactors.send(reactor, command(QueueKey { session: self.id, vring: index }));
        }
    }

    /// Register guest memory with a reactor that gets one of our queues, where the drive can use it. Memory that has no
    /// pages yet stays as it is: pinning it would take it all at once.
    fn register_memory(&mut self, volume: &Volume, reactor: usize, reactors: &mut Reactors) {
        if !matches!(volume.drive(), Drive::File(_)) {
            return;
        }
        for region in self.session.memory().regions() {
            let known = self.registered.iter().any(|(m, r)| *r == reactor && Arc::ptr_eq(m, &region.mapping));
            if !known && region.mapping.allocated() {
                self.registered.push((region.mapping.clone(), reactor));
                reactors.send(reactor, Command::Register(region.mapping.clone()));
            }
        }
    }

    /// Forget registrations of memory that the guest no longer has; every vring must be at rest. `all`: the session ends.
    pub fn unregister_memory(&mut self, all: bool, reactors: &mut Reactors) {
        let memory = self.session.memory().clone();
        let kept = |mapping: &Arc<Mapping>| {
            !all && memory.regions().iter().any(|region| Arc::ptr_eq(&region.mapping, mapping))
        };
        self.registered.retain(|(mapping, reactor)| {
            let keep = kept(mapping);
            if !keep {
                reactors.send(*reactor, Command::Unregister(mapping.clone()));
            }
            keep
        });
        if self.registered.is_empty() {
            self.registered_bytes = 0;
        }
    }

    pub fn owns_mapping(&self, mapping: &Arc<Mapping>) -> bool {
        self.registered.iter().any(|(own, _)| Arc::ptr_eq(own, mapping))
    }

    /// Tell the frontend to read the configuration space again, if it has a channel for that.
    pub fn config_changed(&self) -> Result<(), String> {
        match self.session.backend_channel() {
            Some(channel) => notify_config_change(channel).map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }
}

/// Listen on `path`: a socket that nobody listens on is replaced, a live one is somebody else's.
fn listen(path: &Path) -> Result<UnixListener, EngineError> {
    use std::os::unix::fs::FileTypeExt;
    let fail = |source| EngineError::Listen { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(EngineError::NotASocket { path: path.to_owned() })
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(EngineError::SocketTaken { path: path.to_owned() })
        }
        Ok(_) => std::fs::remove_file(path).map_err(fail)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    listener.set_nonblocking(true).map_err(fail)?;
    Ok(listener)
}

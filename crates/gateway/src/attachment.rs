//! One attached volume: where it listens, and the frontend it serves.

use std::os::fd::AsRawFd;
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
    /// Guest memory that reactors were asked to register with their io_urings.
    registered: Vec<Registration>,
}

struct Registration {
    mapping: Arc<Mapping>,
    reactor: usize,
    /// What the reactor has registered of it; 0 until it answers.
    bytes: u64,
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
            registered_bytes: live.map_or(0, Live::registered_bytes),
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
        for region in self.session.memory().clone().regions() {
            let known = self.registration(&region.mapping, reactor).is_some();
            if !known && region.mapping.allocated() {
                self.registered.push(Registration { mapping: region.mapping.clone(), reactor, bytes: 0 });
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
        self.registered.retain(|one| {
            let keep = kept(&one.mapping);
            if !keep {
                reactors.send(one.reactor, Command::Unregister(one.mapping.clone()));
            }
            keep
        });
    }

    fn registration(&mut self, mapping: &Arc<Mapping>, reactor: usize) -> Option<&mut Registration> {
        self.registered.iter_mut().find(|one| one.reactor == reactor && Arc::ptr_eq(&one.mapping, mapping))
    }

    /// A reactor registered `bytes` of a mapping; false if it is none of ours.
    pub fn registered(&mut self, mapping: &Arc<Mapping>, reactor: usize, bytes: u64) -> bool {
        self.registration(mapping, reactor).map(|one| one.bytes = bytes).is_some()
    }

    /// Guest memory that every reactor with one of our queues has registered.
    fn registered_bytes(&self) -> u64 {
        let of =
            |reactor| self.registered.iter().filter(|one| one.reactor == reactor).map(|one| one.bytes).sum();
        self.registered.iter().map(|one| of(one.reactor)).min().unwrap_or(0)
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
        Ok(_) if somebody_listens(path) => return Err(EngineError::SocketTaken { path: path.to_owned() }),
        Ok(_) => std::fs::remove_file(path).map_err(fail)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    listener.set_nonblocking(true).map_err(fail)?;
    Ok(listener)
}

/// Without waiting: whoever listens there may not be accepting.
fn somebody_listens(path: &Path) -> bool {
    use nix::sys::socket::{connect, socket, AddressFamily, SockFlag, SockType, UnixAddr};
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let Ok(probe) = socket(AddressFamily::Unix, SockType::Stream, flags, None) else { return false };
    let connected = UnixAddr::new(path).and_then(|address| connect(probe.as_raw_fd(), &address));
    // EAGAIN: its backlog is full.
    matches!(connected, Ok(()) | Err(nix::errno::Errno::EAGAIN))
}

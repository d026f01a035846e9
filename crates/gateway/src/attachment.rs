//! One attached volume: where it listens, the frontends it serves, and which of them may write.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::Arc;

use ringstone_reactor::{Command, Queue, QueueParts, Ring};
use ringstone_telemetry::{QueueCounter, QueueReader, QueueStats, StatsPage};
use ringstone_vhost_user::{Connection, Reaped, Reaper, Session, VringSetup};
use ringstone_volume::Volume;

use crate::device::BlockDevice;
use crate::engine::{AttachmentInfo, QueueInfo};
use crate::error::EngineError;
use crate::frontend::{Live, RingState};
use crate::listener::{listen, SocketRights};
use crate::placement::Reactors;
use crate::topology::Topology;

/// Frontends at a time: one, and while a guest moves from one QEMU to another both of them.
const SHARED: usize = 2;

/// A vring that could not be started: the session's id and why.
pub type Unstartable = (u64, String);

/// What came of starting rings.
#[derive(Default)]
pub struct Started {
    /// Requests of a process before, which are done again.
    pub again: u64,
    /// Vrings, with their entries, whose requests are not noted though the frontend wants them to be.
    pub unnoted: Vec<(u16, u32)>,
}

/// A volume and the socket it is served on.
pub struct Attachment {
    pub volume: Arc<Volume>,
    pub path: PathBuf,
    /// Whoever waits in its backlog has sent what is closed with it.
    pub listener: Reaped<UnixListener>,
    /// Closes what frontends of this volume gave, so that it can be slow for nobody else.
    pub strangers: Reaper,
    /// Lets go of their memory, which waits for no stranger.
    pub reaper: Reaper,
    /// Tells them of errors. A frontend can hold that up for good, so one that waits is enough.
    pub signals: Reaper,
    pub queues: u16,
    /// A second frontend may connect.
    pub shared: bool,
    pub frontends: Vec<Live>,
    /// The one frontend whose vrings may run: it keeps that until it has stopped all of them or is gone.
    pub writer: Option<u64>,
    stats: Vec<Option<QueueStats>>,
    readers: Vec<QueueReader>,
    /// Whoever waits for the detach to be done.
    pub detach: Vec<Sender<Result<(), EngineError>>>,
    pub detaching: bool,
}

impl Attachment {
    pub fn new(
        volume: Arc<Volume>,
        path: &Path,
        rights: SocketRights,
        queues: usize,
        page: &StatsPage,
    ) -> Result<Self, EngineError> {
        let listener = listen(path, rights)?;
        Self::over(volume, path, listener, queues, page).inspect_err(|_| {
            // A socket that leads to nobody is replaced by the next attempt, if it cannot be removed.
            let _ = std::fs::remove_file(path);
        })
    }

    /// An attachment on a socket that listens already.
    pub fn over(
        volume: Arc<Volume>,
        path: &Path,
        listener: UnixListener,
        queues: usize,
        page: &StatsPage,
    ) -> Result<Self, EngineError> {
        let stats =
            (0..queues).map(|index| page.queue(volume.name(), index)).collect::<Result<Vec<_>, _>>()?;
        let readers = stats.iter().map(QueueStats::reader).collect();
        let strangers = Reaper::default();
        Ok(Self {
            volume,
            path: path.to_owned(),
            listener: strangers.hold(listener),
            strangers,
            reaper: Reaper::default(),
            signals: Reaper::default(),
            queues: queues as u16,
            shared: false,
            frontends: Vec::new(),
            writer: None,
            stats: stats.into_iter().map(Some).collect(),
            readers,
            detach: Vec::new(),
            detaching: false,
        })
    }

    pub fn device(&self) -> BlockDevice {
        BlockDevice::new(self.volume.clone(), self.queues)
    }

    /// One more frontend may connect now.
    pub fn has_room(&self) -> bool {
        self.frontends.len() < if self.shared { SHARED } else { 1 } && !self.detaching
    }

    /// A frontend connected.
    pub fn connect(&mut self, id: u64, stream: UnixStream) -> std::io::Result<&Live> {
        let connection = Connection::new(stream, self.strangers.clone())?;
        let session = Session::new(self.device(), self.reaper.clone());
        let live = Live::new(id, session, connection, self.queues);
        self.frontends.push(live);
        Ok(&self.frontends[self.frontends.len() - 1])
    }

    pub fn frontend(&mut self, session: u64) -> Option<&mut Live> {
        self.frontends.iter_mut().find(|live| live.id == session)
    }

    /// Pass the right to run vrings on, if whoever has it needs it no more.
    fn elect(&mut self) {
        let holds = |live: &Live| live.session.wants_to_run() || !live.at_rest();
        let writer = self.writer.take();
        self.writer = self
            .frontends
            .iter()
            .find(|live| Some(live.id) == writer && holds(live))
            .or_else(|| self.frontends.iter().find(|live| !live.closing && live.session.wants_to_run()))
            .map(|live| live.id);
    }

    /// Run every vring that can run and does not.
    ///
    /// # Errors
    /// A ring is malformed or a descriptor is unusable: the message says why, and the device must stop.
    pub fn start_rings(
        &mut self,
        topology: &Topology,
        reactors: &mut Reactors,
    ) -> Result<Started, Unstartable> {
        if self.volume.is_incoming() {
            return Ok(Started::default());
        }
        self.elect();
        let Some(writer) = self.writer else { return Ok(Started::default()) };
        let Some(live) = self.frontends.iter_mut().find(|live| live.id == writer) else {
            return Ok(Started::default());
        };
        // A pending message has the vrings rest, or will ask them to.
        if live.closing || live.pending.is_some() {
            return Ok(Started::default());
        }
        let mut started = Started::default();
        for index in 0..self.queues {
            let at = usize::from(index);
            if live.rings[at] != RingState::Stopped {
                continue;
            }
            let setup = live.session.runnable(index).map_err(|error| (writer, error.to_string()))?;
            let Some(setup) = setup else { continue };
            let VringSetup { packed, unnoted, ring, kick, call } = setup;
            if unnoted {
                started.unnoted.push((index, ring.size));
            }
            let ring =
                Ring::new(packed, ring).map_err(|error| (writer, format!("vring {index}: {error}")))?;
            let Some(stats) = self.stats[at].take() else { continue };
            let node = live.node(topology);
            let rings = &live.rings;
            let reactor = reactors.choose(node, |candidate| {
                rings.iter().filter(|state| **state == RingState::Running { reactor: candidate }).count()
            });
            let device = live.session.device();
            let parts = QueueParts {
                key: live.key(at),
                volume: self.volume.clone(),
                writeback: device.writeback(),
                stats,
                kick,
                call,
                geometry: device.geometry(),
            };
            let queue = Queue::new(ring, parts);
            started.again += u64::from(queue.resubmitting());
            queue.stats().placed(Some(reactor), queue.size());
            live.rings[at] = RingState::Running { reactor };
            reactors.started(reactor);
            reactors.send(reactor, Command::Start(Box::new(queue)));
        }
        Ok(started)
    }

    /// A reactor gave a queue back: it goes on elsewhere if it is being moved, else it rests. True if it rests.
    pub fn ring_stopped(&mut self, mut queue: Box<Queue>, reactor: usize, reactors: &mut Reactors) -> bool {
        let key = queue.key();
        let at = usize::from(key.vring);
        reactors.stopped(reactor);
        let live = self.frontends.iter_mut().find(|live| live.id == key.session);
        if let Some(live) = live {
            if let RingState::Moving { to, .. } = live.rings[at] {
                // What was told of the descriptors on the way did not reach the queue.
                let kick = live.session.kick_descriptor(key.vring);
                let call = live.session.call_descriptor(key.vring);
                if let (Ok(kick), Ok(call)) = (kick, call) {
                    let to = if reactors.is_usable(to) { to } else { reactors.choose(None, |_| 0) };
                    queue.set_notifiers(kick, call);
                    queue.stats().placed(Some(to), queue.size());
                    queue.stats().add(QueueCounter::Moves, 1);
                    live.rings[at] = RingState::Running { reactor: to };
                    reactors.started(to);
                    reactors.send(to, Command::Start(queue));
                    return false;
                }
            }
            live.session.stopped(key.vring, queue.base());
            live.rings[at] = RingState::Stopped;
        }
        queue.stats().placed(None, queue.size());
        self.stats[at] = Some(queue.into_parts().stats);
        true
    }

    /// Busy nanoseconds of vring `index` so far.
    pub fn busy_ns(&self, index: usize) -> u64 {
        self.readers[index].get(QueueCounter::BusyNs)
    }

    pub fn info(&self) -> AttachmentInfo {
        // The one that matters to a person: who may write, or who came first.
        let live = self
            .frontends
            .iter()
            .find(|live| Some(live.id) == self.writer)
            .or_else(|| self.frontends.first());
        let running =
            |state: &RingState| matches!(state, RingState::Running { .. } | RingState::Moving { .. });
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
                reactor: ring.and_then(RingState::reactor),
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
            peer_pid: live.and_then(|live| live.connection.peer_pid()),
            packed: live.is_some_and(|live| live.session.packed()),
            shared: self.shared,
            frontends: self.frontends.len(),
            queues: queues.collect(),
        }
    }
}

//! One connected frontend: its session, where its vrings run, and the guest memory that reactors have registered.

use std::sync::Arc;

use ringstone_blockdev::Drive;
use ringstone_mapping::Mapping;
use ringstone_reactor::{Command, QueueKey};
use ringstone_vhost_user::{notify_config_change, Connection, Incoming, Quiet, Session};
use ringstone_virtqueue::MemoryTable;
use ringstone_volume::Volume;

use crate::device::BlockDevice;
use crate::placement::Reactors;
use crate::topology::Topology;

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
    /// Told to stop, to go on at another reactor.
    Moving {
        from: usize,
        to: usize,
    },
}

impl RingState {
    /// The reactor that has it.
    pub fn reactor(self) -> Option<usize> {
        match self {
            Self::Stopped => None,
            Self::Running { reactor } | Self::Stopping { reactor } => Some(reactor),
            Self::Moving { from, .. } => Some(from),
        }
    }
}

/// A frontend that is connected.
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
    /// NUMA node of most of the guest's memory, and the table it was found for.
    node: Option<(Arc<MemoryTable>, Option<u32>)>,
    /// Guest memory that reactors were asked to register with their io_urings.
    registered: Vec<Registration>,
}

struct Registration {
    mapping: Arc<Mapping>,
    reactor: usize,
    /// What the reactor has registered of it; 0 until it answers.
    bytes: u64,
}

impl Live {
    pub fn new(id: u64, session: Session<BlockDevice>, connection: Connection, queues: u16) -> Self {
        Self {
            id,
            session,
            connection,
            rings: vec![RingState::Stopped; usize::from(queues)],
            pending: None,
            closing: false,
            node: None,
            registered: Vec::new(),
        }
    }

    pub fn at_rest(&self) -> bool {
        self.rings.iter().all(|state| *state == RingState::Stopped)
    }

    pub fn key(&self, vring: usize) -> QueueKey {
        QueueKey { session: self.id, vring: vring as u16 }
    }

    /// Bring the vrings that `quiet` names to rest; true once they are. `leave`: what the drive does not have yet may stay
    /// undone in the in-flight region.
    pub fn quieten(&mut self, quiet: Quiet, leave: bool, reactors: &mut Reactors) -> bool {
        let mut at_rest = true;
        for (index, state) in self.rings.iter_mut().enumerate() {
            if quiet == Quiet::None || matches!(quiet, Quiet::Vring(only) if usize::from(only) != index) {
                continue;
            }
            match *state {
                RingState::Running { reactor } => {
                    let key = QueueKey { session: self.id, vring: index as u16 };
                    reactors.send(reactor, Command::Stop { key, leave });
                    *state = RingState::Stopping { reactor };
                }
                // It is being stopped already, and stays so.
                RingState::Moving { from, .. } => *state = RingState::Stopping { reactor: from },
                RingState::Stopping { .. } | RingState::Stopped => {}
            }
            at_rest &= *state == RingState::Stopped;
        }
        at_rest
    }

    /// Begin to move a running vring, or send one that is on its way elsewhere; false if it does not run, or is or will be
    /// there already.
    pub fn begin_move(&mut self, vring: usize, to: usize, reactors: &mut Reactors) -> bool {
        match self.rings.get(vring).copied() {
            Some(RingState::Running { reactor: from }) if from != to => {
                reactors.send(from, Command::Stop { key: self.key(vring), leave: false });
                self.rings[vring] = RingState::Moving { from, to };
                true
            }
            Some(RingState::Moving { from, to: before }) if before != to => {
                self.rings[vring] = RingState::Moving { from, to };
                true
            }
            _ => false,
        }
    }

    /// Tell the reactor of a running vring something about it.
    pub fn tell(&self, index: u16, reactors: &mut Reactors, command: impl FnOnce(QueueKey) -> Command) {
        if let Some(RingState::Running { reactor }) = self.rings.get(usize::from(index)).copied() {
            reactors.send(reactor, command(QueueKey { session: self.id, vring: index }));
        }
    }

    /// The NUMA node of most of the guest's memory; asked once for a memory table.
    pub fn node(&mut self, topology: &Topology) -> Option<u32> {
        let memory = self.session.memory();
        if let Some((of, node)) = &self.node {
            if Arc::ptr_eq(of, memory) && node.is_some() {
                return *node;
            }
        }
        let node = topology.node_of_memory(memory);
        self.node = Some((memory.clone(), node));
        node
    }

    /// Register guest memory with a reactor that gets one of our queues, where the drive can use it. Memory that has no
    /// pages yet stays as it is: pinning it would take it all at once.
    pub fn register_memory(&mut self, volume: &Volume, reactor: usize, reactors: &mut Reactors) {
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

    /// A reactor has ended, and its registrations with it.
    pub fn forget_reactor(&mut self, reactor: usize) {
        self.registered.retain(|one| one.reactor != reactor);
    }

    fn registration(&mut self, mapping: &Arc<Mapping>, reactor: usize) -> Option<&mut Registration> {
        self.registered.iter_mut().find(|one| one.reactor == reactor && Arc::ptr_eq(&one.mapping, mapping))
    }

    /// A reactor registered `bytes` of a mapping; false if it is none of ours.
    pub fn registered(&mut self, mapping: &Arc<Mapping>, reactor: usize, bytes: u64) -> bool {
        self.registration(mapping, reactor).map(|one| one.bytes = bytes).is_some()
    }

    /// Guest memory that every reactor with one of our queues has registered.
    pub fn registered_bytes(&self) -> u64 {
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

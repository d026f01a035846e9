//! One connected frontend: its session, and where its vrings run.

use std::sync::{Arc, Weak};

use ringstone_reactor::{Command, QueueKey};
use ringstone_vhost_user::{notify_config_change, Connection, Incoming, Quiet, Session};
use ringstone_virtqueue::MemoryTable;

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
    /// What the pending message needs made durable before.
    pub cache: CacheFlush,
    /// Set once the connection is to end.
    pub closing: bool,
    /// NUMA node of most of the guest's memory, and the table it was found for.
    node: Option<(Weak<MemoryTable>, Option<u32>)>,
}

/// Whether what a frontend's driver has written is durable, as a message asks that turns the write cache off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheFlush {
    Needless,
    UnderWay,
    Done,
}

impl Live {
    pub fn new(id: u64, session: Session<BlockDevice>, connection: Connection, queues: u16) -> Self {
        Self {
            id,
            session,
            connection,
            rings: vec![RingState::Stopped; usize::from(queues)],
            pending: None,
            cache: CacheFlush::Needless,
            closing: false,
            node: None,
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
            let key = QueueKey { session: self.id, vring: index as u16 };
            match *state {
                RingState::Running { reactor } => {
                    reactors.send(reactor, Command::Stop { key, leave });
                    *state = RingState::Stopping { reactor };
                }
                // It is being stopped already, and stays so; what it has need not be done any more.
                RingState::Moving { from: reactor, .. } | RingState::Stopping { reactor } => {
                    if leave {
                        reactors.send(reactor, Command::Stop { key, leave });
                    }
                    *state = RingState::Stopping { reactor };
                }
                RingState::Stopped => {}
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

    /// Tell the reactor of a vring that runs, or finishes what it has, something about it.
    pub fn tell(&self, index: u16, reactors: &mut Reactors, command: impl FnOnce(QueueKey) -> Command) {
        let state = self.rings.get(usize::from(index)).copied();
        if let Some(RingState::Running { reactor } | RingState::Stopping { reactor }) = state {
            reactors.send(reactor, command(QueueKey { session: self.id, vring: index }));
        }
    }

    /// The NUMA node of most of the guest's memory; asked once for a memory table.
    pub fn node(&mut self, topology: &Topology) -> Option<u32> {
        let memory = self.session.memory();
        if let Some((of, node)) = &self.node {
            if of.as_ptr() == Arc::as_ptr(memory) && node.is_some() {
                return *node;
            }
        }
        let node = topology.node_of_memory(memory);
        self.node = Some((Arc::downgrade(memory), node));
        node
    }

    /// Tell the frontend to read the configuration space again, if it has a channel for that.
    pub fn config_changed(&self) -> Result<(), String> {
        match self.session.backend_channel() {
            Some(channel) => notify_config_change(channel).map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }
}

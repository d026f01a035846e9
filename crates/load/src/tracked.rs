//! The load job's connection when it asks for what the independent crate's transport cannot negotiate: a packed ring, an
//! in-flight region, a dirty log. It is the pattern job's: rings of this side's own, and rust-vmm's messages.
//!
//! Loads that are to be compared with each other must come over the same connection, so `inflight: false` chooses this
//! one as well.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use virtio_driver::iovec;

use crate::config::LoadConfig;
use crate::connection::Device;
use crate::memory::SharedMemory;
use crate::pattern::connection::{Backend, Choices};
use crate::pattern::ring::{Layout, Reaped, Ring};
use crate::pattern::{probe, Probe};
use crate::queue::{Completed, LoadQueue};
use crate::LoadError;

/// Fields are dropped in this order, and it matters: the backend may write to the memory until its socket closes.
pub(crate) struct Tracked {
    queues: Vec<Ring>,
    _backend: Backend,
    _ring_memory: SharedMemory,
    memory: SharedMemory,
    pub device: Device,
    /// From the first byte on the socket that serves until every queue was enabled.
    pub connect_ns: u64,
}

impl Tracked {
    pub(crate) fn open(config: &LoadConfig, memory: SharedMemory) -> Result<Self, LoadError> {
        let probed = probe(Probe {
            socket: &config.socket,
            queues: config.queues,
            packed: config.packed,
            event_idx: config.event_idx,
            write_through: false,
        })?;
        let layout = Layout {
            socket: &config.socket,
            entries: config.ring_entries()?,
            features: probed.device.features,
            packed: config.packed,
        };
        let (ring_memory, queues) = layout.make(probed.translators)?;
        let choices = Choices { inflight: config.inflight.unwrap_or(false), dirty_log: config.dirty_log };
        let started = Instant::now();
        let patience = Duration::from_secs_f64(config.stall_seconds);
        let shared = [&memory, &ring_memory];
        let mut backend =
            Backend::new(&config.socket, patience, probed.device.features, &shared, &queues, choices)?;
        backend.connect()?;
        if choices.inflight && !backend.keeps_inflight() {
            return Err(LoadError::Feature {
                socket: config.socket.clone(),
                feature: "INFLIGHT_SHMFD".into(),
                fix: "set `inflight` to false",
            });
        }
        Ok(Self {
            queues,
            _backend: backend,
            _ring_memory: ring_memory,
            memory,
            device: probed.device,
            connect_ns: started.elapsed().as_nanos() as u64,
        })
    }

    /// Queues to drive and the memory they work on.
    pub(crate) fn parts(&mut self) -> (&mut [Ring], &SharedMemory) {
        (&mut self.queues, &self.memory)
    }
}

impl LoadQueue for Ring {
    fn index(&self) -> usize {
        self.index()
    }

    fn in_flight(&self) -> usize {
        self.in_flight()
    }

    fn kicks(&self) -> u64 {
        self.kicks()
    }

    fn call(&self) -> RawFd {
        self.call().as_raw_fd()
    }

    #[inline(always)]
    fn submit(
        &mut self,
        kind: u32,
        sector: u64,
        readable: &[iovec],
        writable: &[iovec],
        tag: u32,
    ) -> Result<(), LoadError> {
        self.submit(kind, sector, readable, writable, tag)
    }

    #[inline(always)]
    fn kick_if_needed(&mut self) -> Result<(), LoadError> {
        self.kick_if_needed()
    }

    #[inline(always)]
    fn has_completed(&mut self) -> bool {
        Ring::has_completed(self)
    }

    #[inline(always)]
    fn reap(&mut self) -> Result<Option<Completed>, LoadError> {
        match Ring::reap(self) {
            None => Ok(None),
            Some(Reaped::Done { tag, status }) => Ok(Some(Completed { tag, status })),
            Some(Reaped::Stray { head }) => Err(LoadError::Protocol { queue: self.index(), id: head as u16 }),
        }
    }

    fn enable_calls(&mut self, enabled: bool) {
        self.enable_calls(enabled);
    }
}

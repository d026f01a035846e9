//! A session as another process continues it: everything between two messages, as plain data beside its descriptors.
//!
//! The fields are part of the handover format (docs/formats/handover.md): what is added later gets a default.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ringstone_virtqueue::RingAddresses;
use serde::{Deserialize, Serialize};

use crate::descriptor::{channel, eventfd};
use crate::error::SessionError;
use crate::inflight::Inflight;
use crate::log::Log;
use crate::memory::{table, Region};
use crate::message::{WireInflight, WireRegion};
use crate::reaper::Reaper;
use crate::session::{DeviceModel, Session};

/// Descriptors that travel beside a description and are named in it by their place.
#[derive(Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Add a copy of `fd` and tell its place.
    ///
    /// # Errors
    /// It could not be duplicated.
    pub fn add(&mut self, fd: BorrowedFd<'_>) -> Result<usize, SessionError> {
        self.0.push(Some(fd.try_clone_to_owned()?));
        Ok(self.0.len() - 1)
    }

    fn add_each(&mut self, fd: Option<&OwnedFd>) -> Result<Option<usize>, SessionError> {
        fd.map(|fd| self.add(fd.as_fd())).transpose()
    }

    /// Take the descriptor at `place`; each is taken once.
    ///
    /// # Errors
    /// It is not there.
    pub fn take(&mut self, place: usize) -> Result<OwnedFd, SessionError> {
        let fd = self.0.get_mut(place).and_then(Option::take);
        fd.ok_or(SessionError::Handover { what: "a descriptor is missing" })
    }

    /// All of them, in order of their places.
    pub fn as_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().flatten().map(AsFd::as_fd)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    pub features: u64,
    pub protocol_features: u64,
    pub status: u64,
    #[serde(default)]
    pub broken: bool,
    pub regions: Vec<RegionState>,
    pub vrings: Vec<VringState>,
    #[serde(default)]
    pub backend_channel: Option<usize>,
    #[serde(default)]
    pub inflight: Option<InflightState>,
    #[serde(default)]
    pub log: Option<LogState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionState {
    pub guest: u64,
    pub len: u64,
    pub user: u64,
    pub offset: u64,
    pub fd: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringState {
    pub size: u32,
    /// Descriptors, available and used ring (packed: descriptor ring, driver and device event area), frontend's addresses.
    #[serde(default)]
    pub addresses: Option<[u64; 3]>,
    /// As GET_VRING_BASE codes it.
    #[serde(default)]
    pub base: Option<u32>,
    pub enabled: bool,
    /// SET_VRING_KICK has come, with a descriptor or without.
    pub started: bool,
    #[serde(default)]
    pub kick: Option<usize>,
    #[serde(default)]
    pub call: Option<usize>,
    #[serde(default)]
    pub error: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightState {
    pub len: u64,
    pub offset: u64,
    pub queues: u16,
    pub queue_size: u16,
    pub fd: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogState {
    pub len: u64,
    pub offset: u64,
    pub fd: usize,
}

impl<D: DeviceModel> Session<D> {
    /// The session between two messages. Every vring must be at rest.
    ///
    /// # Errors
    /// A descriptor could not be duplicated.
    pub fn save(&self, fds: &mut Descriptors) -> Result<SessionState, SessionError> {
        let mut regions = Vec::with_capacity(self.regions.len());
        for Region { wire, file, .. } in self.regions.iter() {
            let fd = fds.add(file.as_fd())?;
            regions.push(RegionState {
                guest: wire.guest,
                len: wire.len,
                user: wire.user,
                offset: wire.offset,
                fd,
            });
        }
        let mut vrings = Vec::with_capacity(self.vrings.len());
        for vring in &self.vrings {
            vrings.push(VringState {
                size: vring.size,
                addresses: vring.addresses.map(|a| [a.descriptors, a.available, a.used]),
                base: vring.base,
                enabled: vring.enabled,
                started: vring.kick.is_some(),
                kick: fds.add_each(vring.kick.as_ref().and_then(Option::as_ref))?,
                call: fds.add_each(vring.call.as_ref())?,
                error: fds.add_each(vring.error.as_ref())?,
            });
        }
        let inflight = match self.inflight.as_deref() {
            Some(Inflight { wire, file, .. }) => Some(InflightState {
                len: wire.len,
                offset: wire.offset,
                queues: wire.queues,
                queue_size: wire.queue_size,
                fd: fds.add(file.as_fd())?,
            }),
            None => None,
        };
        let log = match &self.log {
            Some(log) => Some(LogState { len: log.len, offset: log.offset, fd: fds.add(log.file.as_fd())? }),
            None => None,
        };
        Ok(SessionState {
            features: self.features,
            protocol_features: self.protocol_features,
            status: self.status,
            broken: self.broken,
            regions,
            vrings,
            backend_channel: fds.add_each(self.backend_channel.as_deref())?,
            inflight,
            log,
        })
    }

    /// Go on with a session that another process has saved.
    ///
    /// # Errors
    /// The device has fewer queues, a feature of the session is not ours, memory cannot be mapped, or something is missing.
    pub fn resume(
        device: D,
        state: &SessionState,
        fds: &mut Descriptors,
        reaper: Reaper,
    ) -> Result<Self, SessionError> {
        let mut take = |place| fds.take(place).map(|fd| reaper.hold(fd));
        let mut session = Self::new(device, reaper.clone());
        if state.vrings.len() != session.vrings.len() {
            return Err(SessionError::Handover { what: "it has another number of vrings than the device" });
        }
        if !session.accepts(state.features) {
            return Err(SessionError::Features { asked: state.features, offered: session.offered() });
        }
        session.features = state.features;
        session.protocol_features = state.protocol_features;
        session.status = state.status;
        session.broken = state.broken;
        if state.features != 0 {
            session.device.set_features(state.features);
        }
        for region in &state.regions {
            let wire =
                WireRegion { guest: region.guest, len: region.len, user: region.user, offset: region.offset };
            session.regions.push(Region::map(wire, take(region.fd)?, &reaper)?);
        }
        session.memory = reaper.hold(std::sync::Arc::new(table(&session.regions)?));
        for (vring, state) in session.vrings.iter_mut().zip(&state.vrings) {
            vring.size = state.size;
            vring.addresses = state.addresses.map(|[descriptors, available, used]| RingAddresses {
                descriptors,
                available,
                used,
            });
            vring.base = state.base;
            vring.enabled = state.enabled;
            let mut notifier =
                |place: Option<usize>, what| place.map(|place| eventfd(take(place)?, what)).transpose();
            let kick = notifier(state.kick, "kick")?;
            vring.kick = state.started.then_some(kick);
            vring.call = notifier(state.call, "call")?;
            vring.error = notifier(state.error, "error")?;
        }
        session.backend_channel = state.backend_channel.map(|place| channel(take(place)?)).transpose()?;
        if let Some(inflight) = &state.inflight {
            let wire = WireInflight {
                len: inflight.len,
                offset: inflight.offset,
                queues: inflight.queues,
                queue_size: inflight.queue_size,
            };
            let queues = session.device.max_queues();
            let inflight = Inflight::open(wire, take(inflight.fd)?, queues, session.packed(), &reaper)?;
            session.inflight = Some(inflight);
        }
        if let Some(log) = &state.log {
            session.log = Some(Log::open(log.len, log.offset, take(log.fd)?, &reaper)?);
        }
        Ok(session)
    }
}

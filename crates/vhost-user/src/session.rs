//! The state of one vhost-user connection, message by message.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringstone_virtqueue::{InflightRegion, MemoryTable, RingAddresses, RingSetup, MAX_RING_SIZE};

use crate::descriptor::{channel, eventfd};
use crate::error::SessionError;
use crate::inflight::Inflight;
use crate::log::Log;
use crate::memory::{table, Region};
use crate::message::{protocol, Reply, Request, MAX_CONFIG, MAX_MEMORY_SLOTS};
use crate::reaper::{Reaped, Reaper};
use crate::vring::{Vring, VringSetup};
use crate::{F_LOG_ALL, F_PROTOCOL_FEATURES};

/// virtio 1.2, 2.1: the device has met an error from which it cannot recover.
const STATUS_NEEDS_RESET: u64 = 64;
const F_RING_INDIRECT_DESC: u64 = 1 << 28;
const F_RING_EVENT_IDX: u64 = 1 << 29;
const F_RING_PACKED: u64 = 1 << 34;

/// The virtio device behind a session.
pub trait DeviceModel {
    /// virtio feature bits on offer, without the vhost-user bit.
    fn features(&self) -> u64;
    /// Bits that are not on offer any more, and that a driver which took them once may still have.
    fn former_features(&self) -> u64 {
        0
    }
    fn max_queues(&self) -> u16;
    /// The configuration space.
    fn config(&self) -> Vec<u8>;
    /// Write configuration bytes; false if a driver may not.
    fn set_config(&mut self, offset: usize, bytes: &[u8]) -> bool;
    /// The driver's choice of features is known.
    fn set_features(&mut self, features: u64);
    /// With these features the driver could no more flush what it has written until now.
    fn features_end_cache(&self, _features: u64) -> bool {
        false
    }
    /// Writing these configuration bytes turns the write cache off.
    fn config_ends_cache(&self, _offset: usize, _bytes: &[u8]) -> bool {
        false
    }
}

/// Flag of SET_CONFIG: a live migration sets what our own device says anyway.
const LIVE_MIGRATION: u32 = 1;

/// Vrings that must be at rest before a message is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quiet {
    None,
    Vring(u16),
    All,
}

/// What a message changed in a vring that goes on running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    Call(u16),
    Kick(u16),
    /// Guest memory is another; the old mappings are no longer needed.
    Memory,
}

/// The outcome of a message.
pub struct Applied {
    pub reply: Option<Reply>,
    /// A descriptor to send with the reply.
    pub descriptor: Option<OwnedFd>,
    pub effect: Effect,
}

impl Applied {
    fn silent() -> Self {
        Self { reply: None, descriptor: None, effect: Effect::None }
    }

    fn with(reply: Reply) -> Self {
        Self { reply: Some(reply), ..Self::silent() }
    }

    fn effect(effect: Effect) -> Self {
        Self { effect, ..Self::silent() }
    }
}

/// See the module.
pub struct Session<D> {
    pub(crate) device: D,
    pub(crate) features: u64,
    pub(crate) protocol_features: u64,
    pub(crate) vrings: Vec<Vring>,
    /// Guest memory, the in-flight region and the dirty log take long to unmap: all of them go to the reaper.
    pub(crate) reaper: Reaper,
    pub(crate) regions: Reaped<Vec<Region>>,
    pub(crate) memory: Reaped<Arc<MemoryTable>>,
    pub(crate) status: u64,
    pub(crate) backend_channel: Option<Reaped<OwnedFd>>,
    pub(crate) inflight: Option<Reaped<Inflight>>,
    pub(crate) log: Option<Reaped<Log>>,
    /// A ring was malformed; nothing runs until the device is reset.
    pub(crate) broken: bool,
}

impl<D: DeviceModel> Session<D> {
    pub fn new(device: D, reaper: Reaper) -> Self {
        let vrings = (0..device.max_queues()).map(|_| Vring::default()).collect();
        Self {
            device,
            features: 0,
            protocol_features: 0,
            vrings,
            regions: reaper.hold(Vec::new()),
            memory: reaper.hold(Arc::default()),
            reaper,
            status: 0,
            backend_channel: None,
            inflight: None,
            log: None,
            broken: false,
        }
    }

    pub fn device(&self) -> &D {
        &self.device
    }

    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    pub fn features(&self) -> u64 {
        self.features
    }

    /// The rings are packed ones (virtio 1.2, 2.8).
    pub fn packed(&self) -> bool {
        self.features & F_RING_PACKED != 0
    }

    pub fn protocol_features(&self) -> u64 {
        self.protocol_features
    }

    pub fn memory(&self) -> &Arc<MemoryTable> {
        &self.memory
    }

    pub fn broken(&self) -> bool {
        self.broken
    }

    /// Ring entries of a vring as set so far.
    pub fn vring_size(&self, index: u16) -> u32 {
        self.vrings[usize::from(index)].size
    }

    pub fn backend_channel(&self) -> Option<&OwnedFd> {
        self.backend_channel.as_deref()
    }

    /// The frontend cut a file that we have mapped: guest memory, the in-flight region or the dirty log.
    pub fn poisoned(&self) -> bool {
        self.memory.poisoned()
            || self.inflight.as_ref().is_some_and(|inflight| inflight.poisoned())
            || self.log.as_ref().is_some_and(|log| log.poisoned())
    }

    /// Stop for good until a reset: a ring cannot be trusted any more.
    pub fn set_broken(&mut self) {
        self.broken = true;
        self.status |= STATUS_NEEDS_RESET;
    }

    /// The descriptors through which the frontend hears of vring errors.
    pub fn error_descriptors(&self) -> impl Iterator<Item = &OwnedFd> {
        self.vrings.iter().filter_map(|vring| vring.error.as_ref())
    }

    /// Whether to answer a message that has no answer of its own.
    pub fn acknowledges(&self) -> bool {
        self.protocol_features & protocol::REPLY_ACK != 0
    }

    /// Which vrings must rest before `request` is applied.
    pub fn needs_quiet(&self, request: &Request) -> Quiet {
        let one = |index: &u32| match u16::try_from(*index) {
            Ok(index) if usize::from(index) < self.vrings.len() => Quiet::Vring(index),
            // apply() will refuse it.
            _ => Quiet::None,
        };
        match request {
            Request::SetVringNum { index, .. }
            | Request::SetVringAddr { index, .. }
            | Request::SetVringBase { index, .. }
            | Request::GetVringBase { index, .. }
            | Request::SetVringEnable { index, enable: false } => one(index),
            Request::SetFeatures(_)
            | Request::ResetOwner
            | Request::SetMemTable(_)
            | Request::AddMemReg(_)
            | Request::RemMemReg(_)
            | Request::ResetDevice
            | Request::SetInflightFd(_)
            | Request::SetStatus(0) => Quiet::All,
            Request::SetConfig { .. } if self.ends_cache(request) => Quiet::All,
            // Rings that log write to the bitmap they were given.
            Request::SetLogBase { .. } if self.features & F_LOG_ALL != 0 => Quiet::All,
            _ => Quiet::None,
        }
    }

    /// From `request` on the driver does not flush any more: what it has written must be durable before it is applied.
    pub fn ends_cache(&self, request: &Request) -> bool {
        match request {
            Request::SetFeatures(features) => self.device.features_end_cache(*features),
            Request::SetConfig { offset, flags, bytes } => {
                flags & LIVE_MIGRATION == 0 && self.device.config_ends_cache(*offset as usize, bytes)
            }
            _ => false,
        }
    }

    /// A vring that rests for `request` may leave requests undone: they stay in the in-flight region, which the frontend
    /// takes along. The frontend says so with each message if it can (GET_VRING_BASE_SKIP_DRAIN), else once for all
    /// (GET_VRING_BASE_INFLIGHT). QEMU disables a vring before it asks for its base, so that has the same effect then.
    pub fn may_leave(&self, request: &Request) -> bool {
        let (index, asks) = match request {
            Request::GetVringBase { index, skip_drain } => (index, *skip_drain),
            Request::SetVringEnable { index, enable: false } => (index, false),
            _ => return false,
        };
        self.protocol_features & protocol::GET_VRING_BASE_INFLIGHT != 0
            && asks == self.asks_each_time()
            && u16::try_from(*index).is_ok_and(|index| self.part(index).is_some())
    }

    /// `request` has a vring take no more, but need not wait until what it has taken is done: whether that is to be waited
    /// for comes with the message that asks for the vring's base.
    pub fn only_begins_rest(&self, request: &Request) -> bool {
        matches!(request, Request::SetVringEnable { enable: false, .. }) && self.asks_each_time()
    }

    fn asks_each_time(&self) -> bool {
        self.protocol_features & protocol::GET_VRING_BASE_SKIP_DRAIN != 0
    }

    /// The part of the in-flight region in which vring `index` notes its requests.
    fn part(&self, index: u16) -> Option<InflightRegion> {
        let vring = self.vrings.get(usize::from(index))?;
        self.inflight.as_ref()?.queue(index, vring.size, self.packed())
    }

    /// A vring came to rest at `base`, coded as in GET_VRING_BASE.
    pub fn stopped(&mut self, index: u16, base: u32) {
        self.vrings[usize::from(index)].base = Some(base);
    }

    /// The frontend wants at least one vring to run.
    pub fn wants_to_run(&self) -> bool {
        !self.broken && !self.regions.is_empty() && self.vrings.iter().any(runs)
    }

    /// What it takes to run vring `index`, if the frontend has said all there is to say.
    ///
    /// # Errors
    /// A descriptor could not be duplicated.
    pub fn runnable(&self, index: u16) -> Result<Option<VringSetup>, SessionError> {
        let vring = &self.vrings[usize::from(index)];
        let (Some(addresses), Some(kick)) = (vring.addresses, &vring.kick) else {
            return Ok(None);
        };
        if self.broken || !runs(vring) || self.regions.is_empty() {
            return Ok(None);
        }
        let packed = self.packed();
        let inflight = self.part(index);
        let log = self.log.as_ref().filter(|_| self.features & F_LOG_ALL != 0);
        Ok(Some(VringSetup {
            packed,
            unnoted: self.inflight.is_some() && inflight.is_none(),
            ring: RingSetup {
                memory: self.memory.clone(),
                size: vring.size,
                addresses,
                base: vring.start_at(packed),
                event_idx: self.features & F_RING_EVENT_IDX != 0,
                indirect: self.features & F_RING_INDIRECT_DESC != 0,
                inflight,
                log: log.map(|log| log.dirty.clone()),
            },
            kick: kick.as_ref().map(OwnedFd::try_clone).transpose()?,
            call: vring.call.as_ref().map(OwnedFd::try_clone).transpose()?,
        }))
    }

    /// A copy of a vring's present call descriptor.
    ///
    /// # Errors
    /// It could not be duplicated.
    pub fn call_descriptor(&self, index: u16) -> Result<Option<OwnedFd>, SessionError> {
        Ok(self.vrings[usize::from(index)].call.as_ref().map(OwnedFd::try_clone).transpose()?)
    }

    /// A copy of a vring's present kick descriptor.
    ///
    /// # Errors
    /// It could not be duplicated.
    pub fn kick_descriptor(&self, index: u16) -> Result<Option<OwnedFd>, SessionError> {
        Ok(self.vrings[usize::from(index)]
            .kick
            .iter()
            .flatten()
            .next()
            .map(OwnedFd::try_clone)
            .transpose()?)
    }

    /// Apply a request. The vrings that [`needs_quiet`](Self::needs_quiet) names must be at rest.
    ///
    /// # Errors
    /// A value that is wrong in itself or in the present state; nothing was changed then.
    pub fn apply(
        &mut self,
        code: u32,
        request: Request,
        mut fds: Vec<Reaped<OwnedFd>>,
    ) -> Result<Applied, SessionError> {
        let (least, most) = request.descriptors();
        if fds.len() < least || fds.len() > most {
            return Err(SessionError::Descriptors { request: code, got: fds.len(), want: most });
        }
        match request {
            Request::GetFeatures => Ok(Applied::with(Reply::u64(self.offered()))),
            Request::SetFeatures(asked) => self.set_features(asked),
            Request::SetOwner => Ok(Applied::silent()),
            Request::ResetOwner | Request::ResetDevice => {
                self.reset();
                self.vrings.iter_mut().for_each(|vring| vring.base = None);
                Ok(Applied::silent())
            }
            Request::SetStatus(0) => {
                // Where the vrings stopped stays known: QEMU 7.2 resets the status of a VM that it pauses or migrates, and
                // asks for the vrings' bases after that.
                self.reset();
                Ok(Applied::silent())
            }
            Request::GetProtocolFeatures => Ok(Applied::with(Reply::u64(protocol::OFFERED))),
            Request::SetProtocolFeatures(asked) => {
                if asked & !protocol::OFFERED != 0 {
                    return Err(SessionError::Features { asked, offered: protocol::OFFERED });
                }
                self.protocol_features = asked;
                Ok(Applied::silent())
            }
            Request::GetQueueNum => Ok(Applied::with(Reply::u64(u64::from(self.device.max_queues())))),
            Request::GetMaxMemSlots => Ok(Applied::with(Reply::u64(MAX_MEMORY_SLOTS as u64))),
            Request::SetMemTable(wire) => {
                let mut regions = self.reaper.hold(Vec::new());
                for (region, fd) in wire.into_iter().zip(fds) {
                    regions.push(Region::map(region, fd, &self.reaper)?);
                }
                self.set_memory(regions)
            }
            Request::AddMemReg(wire) => {
                let mut regions = self.reaper.hold(self.regions.clone());
                regions.extend(fds.pop().map(|fd| Region::map(wire, fd, &self.reaper)).transpose()?);
                self.set_memory(regions)
            }
            Request::RemMemReg(wire) => {
                let mut regions = self.reaper.hold(self.regions.clone());
                let at = regions
                    .iter()
                    .position(|region| region.is(&wire))
                    .ok_or(SessionError::NoRegion { guest: wire.guest })?;
                regions.remove(at);
                self.set_memory(regions)
            }
            Request::SetVringNum { index, num } => {
                let valid = num.is_power_of_two() && (2..=u32::from(MAX_RING_SIZE)).contains(&num);
                let vring = self.vring(index)?;
                if !valid {
                    return Err(SessionError::BadVringValue { index, what: "ring size", value: num.into() });
                }
                vring.size = num;
                Ok(Applied::silent())
            }
            Request::SetVringAddr { index, descriptors, used, available } => {
                self.vring(index)?.addresses = Some(RingAddresses { descriptors, available, used });
                Ok(Applied::silent())
            }
            Request::SetVringBase { index, base } => {
                let packed = self.packed();
                let vring = self.vring(index)?;
                if !packed && base > u32::from(u16::MAX) {
                    return Err(SessionError::BadVringValue { index, what: "base", value: base.into() });
                }
                vring.base = Some(base);
                Ok(Applied::silent())
            }
            Request::GetVringBase { index, .. } => {
                let packed = self.packed();
                let vring = self.vring(index)?;
                // "The back-end must stop the ring"; it starts again with the next kick descriptor.
                vring.kick = None;
                Ok(Applied::with(Reply::vring_state(index, vring.start_at(packed))))
            }
            Request::SetLogBase { len, offset } => {
                let file =
                    fds.pop().ok_or(SessionError::Log { len, why: "no descriptor came along".into() })?;
                self.log = Some(Log::open(len, offset, file, &self.reaper)?);
                // Answered in any case: frontends wait for it before they begin to trust the bitmap.
                Ok(Applied::with(Reply::u64(0)))
            }
            // An eventfd to tell of new bits; the bitmap itself is what frontends read.
            Request::SetLogFd => {
                fds.pop().map(|fd| eventfd(fd, "log")).transpose()?;
                Ok(Applied::silent())
            }
            Request::SetVringKick { index, .. } => {
                let kick = fds.pop().map(|fd| eventfd(fd, "kick")).transpose()?;
                self.vring(index)?.kick = Some(kick);
                Ok(Applied::effect(Effect::Kick(index as u16)))
            }
            Request::SetVringCall { index, .. } => {
                let call = fds.pop().map(|fd| eventfd(fd, "call")).transpose()?;
                self.vring(index)?.call = call;
                Ok(Applied::effect(Effect::Call(index as u16)))
            }
            Request::SetVringErr { index, .. } => {
                let error = fds.pop().map(|fd| eventfd(fd, "error")).transpose()?;
                self.vring(index)?.error = error;
                Ok(Applied::silent())
            }
            Request::SetVringEnable { index, enable } => {
                self.vring(index)?.enabled = enable;
                Ok(Applied::silent())
            }
            Request::SetBackendReqFd => {
                self.backend_channel = fds.pop().map(channel).transpose()?;
                Ok(Applied::silent())
            }
            Request::GetConfig { offset, len, flags } => {
                Ok(Applied::with(Reply::config(offset, flags, &self.read_config(offset, len))))
            }
            Request::SetConfig { offset, flags, bytes } => self.write_config(offset, flags, &bytes),
            Request::GetInflightFd(wire) => {
                let queues = wire.queues.min(self.device.max_queues());
                let (wire, fd) = Inflight::create(queues, wire.queue_size, self.packed())?;
                Ok(Applied { descriptor: Some(fd), ..Applied::with(Reply::inflight(&wire)) })
            }
            Request::SetInflightFd(wire) => {
                let fd = fds.pop().ok_or(SessionError::Inflight { why: "it has no descriptor" })?;
                let inflight =
                    Inflight::open(wire, fd, self.device.max_queues(), self.packed(), &self.reaper)?;
                self.inflight = Some(inflight);
                Ok(Applied::silent())
            }
            Request::SetStatus(status) => {
                self.status = status | self.status & STATUS_NEEDS_RESET;
                Ok(Applied::silent())
            }
            Request::GetStatus => Ok(Applied::with(Reply::u64(self.status))),
        }
    }

    pub(crate) fn offered(&self) -> u64 {
        self.device.features() | F_PROTOCOL_FEATURES | F_LOG_ALL
    }

    /// Whether a driver may have all of `features`.
    pub(crate) fn accepts(&self, features: u64) -> bool {
        features & !(self.offered() | self.device.former_features()) == 0
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring, SessionError> {
        let queues = self.vrings.len() as u16;
        self.vrings.get_mut(index as usize).ok_or(SessionError::NoVring { index, queues })
    }

    fn set_features(&mut self, asked: u64) -> Result<Applied, SessionError> {
        if !self.accepts(asked) {
            return Err(SessionError::Features { asked, offered: self.offered() });
        }
        self.features = asked;
        self.device.set_features(asked);
        if asked & F_PROTOCOL_FEATURES == 0 {
            // "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the enabled state."
            for vring in &mut self.vrings {
                vring.enabled = true;
            }
        }
        Ok(Applied::silent())
    }

    fn reset(&mut self) {
        let enabled = self.features & F_PROTOCOL_FEATURES == 0;
        for vring in &mut self.vrings {
            vring.reset(enabled);
        }
        self.status = 0;
        self.broken = false;
    }

    fn set_memory(&mut self, regions: Reaped<Vec<Region>>) -> Result<Applied, SessionError> {
        self.memory = self.reaper.hold(Arc::new(table(&regions)?));
        self.regions = regions;
        Ok(Applied::effect(Effect::Memory))
    }

    /// "Any length within the specification": bytes behind the structure are zero; none if the range is not acceptable.
    fn read_config(&self, offset: u32, len: u32) -> Vec<u8> {
        let (offset, len) = (offset as usize, len as usize);
        if offset.saturating_add(len) > MAX_CONFIG {
            return Vec::new();
        }
        let mut space = self.device.config();
        space.resize(MAX_CONFIG, 0);
        space[offset..offset + len].to_vec()
    }

    fn write_config(&mut self, offset: u32, flags: u32, bytes: &[u8]) -> Result<Applied, SessionError> {
        if flags & LIVE_MIGRATION != 0 || self.device.set_config(offset as usize, bytes) {
            return Ok(Applied::silent());
        }
        Err(SessionError::Config { offset, len: bytes.len() })
    }
}

fn runs(vring: &Vring) -> bool {
    vring.enabled && vring.size != 0 && vring.addresses.is_some() && vring.kick.is_some()
}

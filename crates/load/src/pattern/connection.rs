//! The control socket: rust-vmm's vhost-user messages, and how a backend that comes anew gets everything back.
//!
//! What must survive a backend is this side's: the memory with the rings and the requests in flight, the eventfds, and
//! the in-flight region, which the first backend made and every later one is given. The order of the messages is
//! QEMU's.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::memory::SharedMemory;
use crate::pattern::ring::{kick, Addresses, Ring};
use crate::LoadError;

const SET_LOG_BASE: u32 = 6;
const SET_VRING_BASE: u32 = 10;
const HEADER_BYTES: usize = 12;
/// Version 1, "need reply" (vhost-user, "Header").
const NEED_REPLY: u32 = 1 | 1 << 3;
/// Both indexes 0 with their wrap counters 1 (vhost-user, "A vring state description" for packed virtqueues).
const PACKED_START: u32 = 0x8000_8000;

/// A bit for each page of 4096 bytes of all addresses that a process can have, as the addresses that the backend is told
/// are this process's own. Only the parts that it writes to take memory.
const LOG_BYTES: u64 = (1 << 47) / 4096 / 8;

/// What a frontend may leave out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choices {
    /// Ask for an in-flight region where the backend has one.
    pub inflight: bool,
    /// Have it log the pages it writes to.
    pub dirty_log: bool,
}

/// What a queue shows the backend.
struct Vring {
    addresses: Addresses,
    kick: EventFd,
    call: EventFd,
}

/// A live control socket. The clone is the same socket, for what the library's frontend does not offer.
struct Link {
    frontend: Frontend,
    stream: UnixStream,
    acks: bool,
}

/// The backend behind a socket path, connected or not.
pub(crate) struct Backend {
    socket: String,
    /// Longest wait for an answer.
    patience: Duration,
    /// The features that every backend must offer: those that were negotiated first.
    features: u64,
    regions: Vec<VhostUserMemoryRegionInfo>,
    vrings: Vec<Vring>,
    choices: Choices,
    /// The region as the first backend described it; None until then, or when that keeps none.
    inflight: Option<(VhostUserInflight, File)>,
    connected_before: bool,
    link: Option<Link>,
}

impl Backend {
    /// `memory` and `rings` must outlive the result: the backend works on them while it is connected.
    pub fn new(
        socket: &str,
        patience: Duration,
        features: u64,
        memory: &[&SharedMemory],
        rings: &[Ring],
        choices: Choices,
    ) -> Result<Self, LoadError> {
        let regions = memory.iter().map(|memory| VhostUserMemoryRegionInfo {
            guest_phys_addr: memory.base() as u64,
            memory_size: memory.len() as u64,
            userspace_addr: memory.base() as u64,
            mmap_offset: 0,
            mmap_handle: memory.file().as_raw_fd(),
        });
        let vrings = rings.iter().map(|ring| {
            Ok(Vring { addresses: ring.addresses(), kick: clone(ring.kick())?, call: clone(ring.call())? })
        });
        Ok(Self {
            socket: socket.to_owned(),
            patience,
            features: features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            regions: regions.collect(),
            vrings: vrings.collect::<Result<_, LoadError>>()?,
            choices,
            inflight: None,
            connected_before: false,
            link: None,
        })
    }

    /// The control socket while there is one, to be polled for its end.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.link.as_ref().map(|link| link.stream.as_raw_fd())
    }

    pub fn disconnect(&mut self) {
        self.link = None;
    }

    /// Whether requests in flight survive the backend.
    pub fn keeps_inflight(&self) -> bool {
        self.inflight.is_some()
    }

    /// Wakes whoever waits for a call of any queue.
    pub fn wake(&self) -> Result<(), LoadError> {
        self.vrings.iter().try_for_each(|vring| kick(&vring.call))
    }

    /// Connects, negotiates what was negotiated before, and starts every queue where it is.
    pub fn connect(&mut self) -> Result<(), LoadError> {
        let link = self.open()?;
        self.start(&link)?;
        if self.connected_before {
            self.vrings.iter().try_for_each(|vring| kick(&vring.kick))?;
        }
        self.connected_before = true;
        self.link = Some(link);
        Ok(())
    }

    fn refused(&self, what: &'static str) -> impl Fn(vhost::Error) -> LoadError + '_ {
        move |source| LoadError::Control { socket: self.socket.clone(), what, source }
    }

    fn open(&mut self) -> Result<Link, LoadError> {
        let failed = |source| LoadError::Connect { socket: self.socket.clone(), source };
        let stream = UnixStream::connect(&self.socket).map_err(failed)?;
        stream.set_read_timeout(Some(self.patience)).map_err(failed)?;
        stream.set_write_timeout(Some(self.patience)).map_err(failed)?;
        let mut frontend =
            Frontend::from_stream(stream.try_clone().map_err(failed)?, self.vrings.len() as u64);
        frontend.set_owner().map_err(self.refused("SET_OWNER"))?;
        let offered = frontend.get_features().map_err(self.refused("GET_FEATURES"))?;
        if offered & self.features != self.features {
            return Err(LoadError::Feature {
                socket: self.socket.clone(),
                feature: format!("the features {:#x}, which it had", self.features & !offered),
                fix: "a device may not lose features while it is in use",
            });
        }
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG;
        let wanted = match self.choices.inflight {
            true => wanted | VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            false => wanted,
        };
        let wanted = match self.choices.dirty_log {
            true => wanted | VhostUserProtocolFeatures::LOG_SHMFD,
            false => wanted,
        };
        let protocol =
            wanted & frontend.get_protocol_features().map_err(self.refused("GET_PROTOCOL_FEATURES"))?;
        frontend.set_protocol_features(protocol).map_err(self.refused("SET_PROTOCOL_FEATURES"))?;
        let acks = protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        if acks {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        // The in-flight region's layout follows from the ring's format, so the features come first.
        frontend.set_features(self.features).map_err(self.refused("SET_FEATURES"))?;
        if protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            self.give_inflight(&mut frontend)?;
        } else if self.connected_before {
            return Err(LoadError::Feature {
                socket: self.socket.clone(),
                feature: "INFLIGHT_SHMFD".into(),
                fix: "without it nobody knows which requests in flight were served",
            });
        }
        Ok(Link { frontend, stream, acks })
    }

    fn give_inflight(&mut self, frontend: &mut Frontend) -> Result<(), LoadError> {
        if self.inflight.is_none() && !self.connected_before {
            let (queues, size) = (self.vrings.len() as u16, self.vrings[0].addresses.size);
            let region = frontend
                .get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size))
                .map_err(self.refused("GET_INFLIGHT_FD"))?;
            self.inflight = Some(region);
        }
        let Some((region, file)) = &self.inflight else { return Ok(()) };
        frontend.set_inflight_fd(region, file.as_raw_fd()).map_err(self.refused("SET_INFLIGHT_FD"))
    }

    fn start(&self, link: &Link) -> Result<(), LoadError> {
        let mut frontend = link.frontend.clone();
        frontend.set_mem_table(&self.regions).map_err(self.refused("SET_MEM_TABLE"))?;
        if self.choices.dirty_log {
            self.give_log(link)?;
            let features = self.features | VhostUserVirtioFeatures::LOG_ALL.bits();
            frontend.set_features(features).map_err(self.refused("SET_FEATURES"))?;
        }
        for (index, Vring { addresses, kick, call }) in self.vrings.iter().enumerate() {
            frontend.set_vring_num(index, addresses.size).map_err(self.refused("SET_VRING_NUM"))?;
            if addresses.packed {
                self.set_packed_base(link, index)?;
            } else {
                // What is in flight lies between this and the available index; the in-flight region tells which of it.
                frontend
                    .set_vring_base(index, addresses.used_index())
                    .map_err(self.refused("SET_VRING_BASE"))?;
            }
            let config = VringConfigData {
                queue_max_size: addresses.size,
                queue_size: addresses.size,
                flags: 0,
                desc_table_addr: addresses.descriptors as u64,
                used_ring_addr: addresses.device as u64,
                avail_ring_addr: addresses.driver as u64,
                log_addr: None,
            };
            frontend.set_vring_addr(index, &config).map_err(self.refused("SET_VRING_ADDR"))?;
            frontend.set_vring_kick(index, kick).map_err(self.refused("SET_VRING_KICK"))?;
            frontend.set_vring_call(index, call).map_err(self.refused("SET_VRING_CALL"))?;
        }
        for index in 0..self.vrings.len() {
            frontend.set_vring_enable(index, true).map_err(self.refused("SET_VRING_ENABLE"))?;
        }
        Ok(())
    }

    /// By hand, as the library wants an answer of a length that the specification does not say.
    fn give_log(&self, link: &Link) -> Result<(), LoadError> {
        let failed = |source| LoadError::Setup { socket: self.socket.clone(), what: "SET_LOG_BASE", source };
        // SAFETY: the name is a NUL-terminated literal.
        let fd = unsafe { libc::memfd_create(c"ringstone-log".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        // SAFETY: `fd` was just made and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(LOG_BYTES).map_err(failed)?;
        let mut message: Vec<u8> =
            [SET_LOG_BASE, 1, 16].iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        message.extend(LOG_BYTES.to_le_bytes());
        message.extend(0u64.to_le_bytes());
        link.stream
            .send_with_fd(message.as_slice(), file.as_raw_fd())
            .map_err(|error| failed(std::io::Error::from_raw_os_error(error.errno())))?;
        let mut header = [0; HEADER_BYTES];
        (&link.stream).read_exact(&mut header).map_err(failed)?;
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
        if header[..4] != SET_LOG_BASE.to_le_bytes() || length > 64 {
            return Err(failed(std::io::ErrorKind::InvalidData.into()));
        }
        (&link.stream).read_exact(&mut vec![0; length]).map_err(failed)
    }

    /// The library's frontend takes 16 bits, which hold the available half of a packed ring's state only.
    fn set_packed_base(&self, link: &Link, index: usize) -> Result<(), LoadError> {
        let failed =
            |source| LoadError::Setup { socket: self.socket.clone(), what: "SET_VRING_BASE", source };
        let flags = if link.acks { NEED_REPLY } else { 1 };
        let words = [SET_VRING_BASE, flags, 8, index as u32, PACKED_START];
        let message: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        (&link.stream).write_all(&message).map_err(failed)?;
        if link.acks {
            let mut reply = [0; 20];
            (&link.stream).read_exact(&mut reply).map_err(failed)?;
            if reply[..4] != SET_VRING_BASE.to_le_bytes() || reply[12..] != [0; 8] {
                return Err(failed(std::io::ErrorKind::InvalidData.into()));
            }
        }
        Ok(())
    }
}

fn clone(eventfd: &EventFd) -> Result<EventFd, LoadError> {
    eventfd.try_clone().map_err(|source| LoadError::System { what: "duplicating an eventfd", source })
}

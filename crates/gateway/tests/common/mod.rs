//! A frontend that can be as rude as it likes, and a driver for the rings in its memory.
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags};
use ringstone_blockdev::Key;
use ringstone_gateway::{BackendSpec, Engine, EngineSettings, Event, Topology, VolumeSpec};

pub mod packed;
pub mod upgrade;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_LOG_BASE: u32 = 6;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;
pub const RESET_DEVICE: u32 = 34;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;
pub const SET_STATUS: u32 = 39;
pub const GET_STATUS: u32 = 40;
pub const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;

pub const F_LOG_ALL: u64 = 1 << 26;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_PROTOCOL: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_RING_PACKED: u64 = 1 << 34;
pub const F_FLUSH: u64 = 1 << 9;

pub const NEED_REPLY: u32 = 1 << 3;
/// Longest wait for anything that should happen; only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// An engine in a directory of its own.
pub struct Host {
    pub engine: Engine,
    pub dir: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        Self::with_idle_us(100)
    }

    pub fn with_idle_us(idle_us: u64) -> Self {
        Self::with(vec![0], idle_us)
    }

    /// A reactor on each of `cores`; naming one twice is allowed.
    pub fn with(cores: Vec<usize>, idle_us: u64) -> Self {
        Self::on(cores, idle_us, None)
    }

    /// As [`with`](Self::with), on a machine with an imagined topology.
    pub fn on(cores: Vec<usize>, idle_us: u64, topology: Option<Topology>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings =
            EngineSettings { cores, idle_us, stats_path: dir.path().join("stats"), balance: false, topology };
        Self { engine: Engine::start(&settings).unwrap(), dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Open and attach a volume; its socket is `NAME.sock`.
    pub fn volume(&self, name: &str, backend: &str, size: u64, queues: usize) -> PathBuf {
        self.volume_with_key(name, backend, size, queues, &Key::None)
    }

    pub fn volume_with_key(&self, name: &str, backend: &str, size: u64, queues: usize, key: &Key) -> PathBuf {
        let spec = VolumeSpec {
            name: name.into(),
            backend: BackendSpec::parse(backend).unwrap(),
            size,
            block_size: 512,
            read_only: false,
            serial: String::new(),
        };
        self.engine.open_volume(&spec, key).unwrap();
        let socket = self.path(&format!("{name}.sock"));
        self.engine.attach(name, &socket, queues).unwrap();
        socket
    }

    pub fn memory_volume(&self, name: &str) -> PathBuf {
        self.volume(name, r#"{"type":"memory","hugepages":"off"}"#, 64 << 20, 2)
    }

    /// A file on a real disk (tmpfs files are mapped), `size` bytes long.
    pub fn disk_file(&self, size: u64) -> PathBuf {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
            "disk-{}-{}",
            std::process::id(),
            self.dir.path().file_name().unwrap().to_string_lossy()
        ));
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    pub fn state(&self, name: &str) -> &'static str {
        let all = self.engine.attachments().unwrap();
        all.iter().find(|a| a.volume == name).map_or("detached", |a| a.state)
    }

    pub fn wait_state(&self, name: &str, wanted: &str) {
        wait_for(&format!("{name} to be {wanted}"), || self.state(name) == wanted);
    }

    /// Requests in flight on the first queue slot of the stats page.
    pub fn in_flight(&self) -> u64 {
        let page = File::open(self.path("stats")).unwrap();
        let u64_at = |at: u64| {
            let mut bytes = [0u8; 8];
            page.read_exact_at(&mut bytes, at).unwrap();
            u64::from_le_bytes(bytes)
        };
        u64_at(u64_at(56) + 88)
    }

    /// Wait for a log line of `volume` that contains `text`, and return it.
    pub fn wait_event(&self, volume: &str, text: &str) -> Event {
        let mut found = None;
        let mut seen = Vec::new();
        wait_for(&format!("an event with {text:?}"), || {
            seen.extend(self.engine.drain_events());
            found = seen.iter().find(|e| e.volume == volume && e.message.contains(text)).cloned();
            found.is_some()
        });
        found.unwrap()
    }
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The raw socket of a frontend.
pub struct Frontend {
    pub stream: UnixStream,
}

impl Frontend {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    pub fn send_raw(&self, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        assert_eq!(sent.unwrap(), bytes.len());
    }

    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        let mut bytes = message(request, payload);
        bytes[4] |= flags as u8;
        self.send_raw(&bytes, fds);
    }

    /// A reply's payload and descriptors; `None` if the backend closed the connection.
    pub fn receive(&self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        let mut bytes = [0u8; 1024];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let (len, fds) = {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            let message =
                recvmsg::<()>(self.stream.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::empty()).ok()?;
            let mut fds = Vec::new();
            for control in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    // SAFETY: the kernel has just made these descriptors for us.
                    fds.extend(
                        raw.into_iter()
                            .map(|fd| unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) }),
                    );
                }
            }
            (message.bytes, fds)
        };
        if len == 0 {
            return None;
        }
        let size = u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
        assert_eq!(len, 12 + size, "one reply at a time");
        Some((bytes[12..len].to_vec(), fds))
    }

    pub fn get_u64(&self, request: u32) -> u64 {
        self.send(request, 0, &[], &[]);
        u64::from_le_bytes(self.receive().unwrap().0.try_into().unwrap())
    }

    /// Send and wait for the acknowledgement; true if it is "done".
    pub fn ack(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> bool {
        self.send(request, NEED_REPLY, payload, fds);
        let (reply, _) = self.receive().expect("the backend closed the connection");
        u64::from_le_bytes(reply.try_into().unwrap()) == 0
    }

    /// Wait until the backend has closed the connection.
    pub fn wait_closed(&self) {
        while self.receive().is_some() {}
    }

    pub fn negotiate(&self, features: u64) {
        let offered = self.get_u64(GET_FEATURES);
        assert_eq!(offered & features, features, "{offered:#x} lacks some of {features:#x}");
        let protocol = self.get_u64(GET_PROTOCOL_FEATURES);
        self.send(SET_PROTOCOL_FEATURES, 0, &protocol.to_le_bytes(), &[]);
        assert!(self.ack(SET_OWNER, &[], &[]));
        assert!(self.ack(SET_FEATURES, &(features | F_PROTOCOL).to_le_bytes(), &[]));
    }
}

/// A message that asks for no acknowledgement, as it goes over the socket.
pub fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    [pair(request, 1), (payload.len() as u32).to_le_bytes().to_vec(), payload.to_vec()].concat()
}

pub fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn pair(a: u32, b: u32) -> Vec<u8> {
    [a.to_le_bytes(), b.to_le_bytes()].concat()
}

/// The user address of guest address 0: different, so that mixing them up shows.
pub const USER: u64 = 0x7f00_0000_0000;
/// Where data buffers may lie; rings come before.
pub const DATA: u64 = 8 << 20;
pub const MEMORY: u64 = 16 << 20;

/// A driver of one vring, with the guest's memory.
pub struct Driver {
    pub frontend: Frontend,
    pub memory: File,
    pub kick: EventFd,
    pub call: EventFd,
    pub index: u16,
    pub size: u16,
    /// Where the ring begins in guest memory.
    rings: u64,
    avail: u16,
    used: u16,
}

/// Room for a ring of any size.
const RING_ROOM: u64 = 1 << 20;
/// Headers and status bytes, before the data.
const SLOTS: u64 = 1 << 19;

impl Driver {
    /// Connect, negotiate and start vring 0 with `size` entries.
    pub fn start(path: &Path, size: u16, features: u64) -> Self {
        let driver = Self::prepare(path, size, features);
        driver.set_memory();
        driver.start_vring(0);
        driver
    }

    /// As [`start`](Self::start), up to the features.
    pub fn prepare(path: &Path, size: u16, features: u64) -> Self {
        let frontend = Frontend::connect(path);
        frontend.negotiate(features);
        Self::over(frontend, size)
    }

    /// A driver with new memory on a connection that was negotiated.
    pub fn over(frontend: Frontend, size: u16) -> Self {
        let memory =
            File::from(nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::empty()).unwrap());
        memory.set_len(MEMORY).unwrap();
        let eventfd = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        Self {
            frontend,
            memory,
            kick: eventfd(),
            call: eventfd(),
            index: 0,
            size,
            rings: 0,
            avail: 0,
            used: 0,
        }
    }

    /// The driver of another vring of the same guest.
    pub fn beside(&self, index: u16) -> Self {
        let frontend = Frontend { stream: self.frontend.stream.try_clone().unwrap() };
        let rings = RING_ROOM * u64::from(index);
        let memory = self.memory.try_clone().unwrap();
        Self { memory, index, rings, ..Self::over(frontend, self.size) }
    }

    /// Hang up, connect anew and negotiate, with memory and rings as they are.
    pub fn reconnect(&mut self, path: &Path, features: u64) {
        self.frontend.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.frontend = Frontend::connect(path);
        self.frontend.negotiate(features);
    }

    pub fn set_memory(&self) {
        let mut table = pair(1, 0);
        table.extend(words(&[0, MEMORY, USER, 0]));
        assert!(self.frontend.ack(SET_MEM_TABLE, &table, &[self.memory.as_raw_fd()]));
    }

    pub fn start_vring(&self, base: u32) {
        let f = &self.frontend;
        let index = u32::from(self.index);
        assert!(f.ack(SET_VRING_NUM, &pair(index, self.size.into()), &[]));
        assert!(f.ack(SET_VRING_BASE, &pair(index, base), &[]));
        let mut address = pair(index, 0);
        address.extend(words(&[USER + self.rings, USER + self.used_at(), USER + self.avail_at(), 0]));
        assert!(f.ack(SET_VRING_ADDR, &address, &[]));
        assert!(f.ack(SET_VRING_CALL, &words(&[index.into()]), &[self.call.as_fd().as_raw_fd()]));
        assert!(f.ack(SET_VRING_KICK, &words(&[index.into()]), &[self.kick.as_fd().as_raw_fd()]));
        assert!(f.ack(SET_VRING_ENABLE, &pair(index, 1), &[]));
    }

    /// GET_VRING_BASE: the vring stops, and where it does.
    pub fn stop_vring(&self) -> u32 {
        self.stop_vring_by(GET_VRING_BASE)
    }

    /// The same by `message`, which may be GET_VRING_BASE_SKIP_DRAIN.
    pub fn stop_vring_by(&self, message: u32) -> u32 {
        self.frontend.send(message, 0, &pair(self.index.into(), 0), &[]);
        let (reply, _) = self.frontend.receive().expect("the backend closed the connection");
        assert_eq!(reply[..4], u32::from(self.index).to_le_bytes());
        u32::from_le_bytes(reply[4..8].try_into().unwrap())
    }

    /// Guest address of the descriptor table.
    pub fn rings(&self) -> u64 {
        self.rings
    }

    fn avail_at(&self) -> u64 {
        self.rings + 16 * u64::from(self.size)
    }

    pub fn used_at(&self) -> u64 {
        (self.avail_at() + 6 + 2 * u64::from(self.size)).next_multiple_of(4096)
    }

    /// Where the header of the request at `head` is; its status byte comes 32 bytes behind.
    pub fn slot(&self, head: u16) -> u64 {
        let own = SLOTS / 2 * (1 + u64::from(self.index % 2));
        DATA - own + 64 * u64::from(head % 4096)
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn u16_at(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }

    /// A descriptor in a table at `table`: (address, length, flags, next).
    pub fn descriptor(&self, table: u64, at: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table + 16 * u64::from(at), &bytes);
    }

    /// Make the chain at `head` available and kick.
    pub fn offer(&mut self, head: u16) {
        let at = self.avail_at() + 4 + 2 * u64::from(self.avail % self.size);
        self.write(at, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.write(self.avail_at() + 2, &self.avail.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    pub fn set_avail_index(&mut self, index: u16) {
        self.write(self.avail_at() + 2, &index.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    pub fn set_used_event(&self, event: u16) {
        self.write(self.avail_at() + 4 + 2 * u64::from(self.size), &event.to_le_bytes());
    }

    pub fn used_index(&self) -> u16 {
        self.u16_at(self.used_at() + 2)
    }

    /// The next used entry, if there is one: head and bytes written.
    pub fn next_used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let at = self.used_at() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let entry = self.read(at, 8);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// Wait for the next used entry.
    pub fn wait_used(&mut self) -> (u32, u32) {
        let mut next = None;
        wait_for("a used entry", || {
            next = self.next_used();
            next.is_some()
        });
        next.unwrap()
    }

    /// Write the header and a status that no device writes into slot `head`; where that is.
    pub fn put_header(&self, head: u16, kind: u32, sector: u64) -> u64 {
        let slot = self.slot(head);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.write(slot, &header);
        self.write(slot + 32, &[0xff]);
        slot
    }

    /// Lay a request out from descriptor `head` on (three descriptors), its header and status in slot `head`.
    pub fn lay(&self, head: u16, kind: u32, sector: u64, data: Option<(u64, u32)>) {
        let slot = self.put_header(head, kind, sector);
        let write = |on: bool| u16::from(on) << 1;
        match data {
            Some((address, len)) => {
                self.descriptor(self.rings, head, (slot, 16, 1, head + 1));
                let from_device = matches!(kind, 0 | 8);
                self.descriptor(self.rings, head + 1, (address, len, 1 | write(from_device), head + 2));
                self.descriptor(self.rings, head + 2, (slot + 32, 1, write(true), 0));
            }
            None => {
                self.descriptor(self.rings, head, (slot, 16, 1, head + 1));
                self.descriptor(self.rings, head + 1, (slot + 32, 1, write(true), 0));
            }
        }
    }

    pub fn status(&self, head: u16) -> u8 {
        self.read(self.slot(head) + 32, 1)[0]
    }

    /// One request from begin to end: its status byte.
    pub fn request(&mut self, kind: u32, sector: u64, data: Option<(u64, u32)>) -> u8 {
        self.lay(0, kind, sector, data);
        self.offer(0);
        assert_eq!(self.wait_used().0, 0);
        self.status(0)
    }
}

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

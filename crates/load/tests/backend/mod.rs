//! A vhost-user-blk backend small enough to be wrong on command. It serves one request after the other, in order, so the
//! used index tells where it was when it is "killed", which is to drop its socket between two requests.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const PACKED: u64 = 1 << 34;
const FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;
/// MQ, REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS; without the in-flight region.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 15;
const INFLIGHT: u64 = 1 << 12;

const CAPACITY: usize = 1 << 20;

/// What the backend does wrong, to the request with the number given (counted over all queues).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    CompleteTwice(u64),
    NeverComplete(u64),
    NoStatus(u64),
    /// Every write from this one on is acknowledged and dropped.
    LoseWrites(u64),
    /// Every read from this one on returns the neighbour of the block that was asked for.
    ReadOther(u64),
    /// Every write from this one on reaches the first sector only.
    TearWrites(u64),
    /// Every request from this one on fails.
    Fail(u64),
}

#[derive(Debug, Clone, Copy)]
pub struct Behaviour {
    pub queues: usize,
    pub packed: bool,
    pub keeps_inflight: bool,
    /// Drop the socket after so many requests, again and again; 0: never.
    pub killed_every: u64,
    /// How often at most.
    pub kills: u64,
    /// Do not come back after the last time.
    pub stays_away: bool,
    pub fault: Fault,
}

impl Default for Behaviour {
    fn default() -> Self {
        let (killed_every, kills, stays_away) = (0, 0, false);
        let fault = Fault::None;
        Self { queues: 2, packed: false, keeps_inflight: true, killed_every, kills, stays_away, fault }
    }
}

/// The backend's thread; dropping this ends it.
pub struct Backend {
    pub socket: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Backend {
    pub fn start(behaviour: Behaviour) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("blk.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let mut device = Device::new(behaviour, stop.clone());
        let thread = Some(std::thread::spawn(move || device.serve(listener)));
        Self { socket, stop, thread, _directory: directory }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(std::thread::panicking() || ended.is_ok(), "the backend panicked");
    }
}

#[derive(Default)]
struct Vring {
    size: u16,
    descriptors: usize,
    driver: usize,
    device: usize,
    /// Split: the next available index. Packed: the next descriptor.
    next: u16,
    wrap: bool,
    call: Option<File>,
    enabled: bool,
}

/// A memory region of the frontend, mapped.
struct Region {
    guest: usize,
    len: usize,
    base: usize,
}

impl Region {
    fn map(guest: usize, len: usize, file: &File) -> Self {
        let (rights, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: a fresh mapping of the frontend's file, which `drop` unmaps.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, libc::MAP_SHARED, fd, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        Self { guest, len, base: base as usize }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; the device reads no address of it after it has given it up.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.len) };
    }
}

struct Device {
    behaviour: Behaviour,
    stop: Arc<AtomicBool>,
    volume: Vec<u8>,
    vrings: Vec<Vring>,
    memory: Vec<Region>,
    inflight: Option<File>,
    /// Whether this session's frontend has given the region back.
    given: bool,
    served: u64,
    kills: u64,
    started_before: bool,
}

/// One request as it lies in the ring: (address, length, writable) of each descriptor.
type Chain = Vec<(usize, usize, bool)>;

impl Device {
    fn new(behaviour: Behaviour, stop: Arc<AtomicBool>) -> Self {
        let vrings = (0..behaviour.queues).map(|_| Vring::default()).collect();
        Self {
            behaviour,
            stop,
            volume: vec![0; CAPACITY],
            vrings,
            memory: Vec::new(),
            inflight: None,
            given: false,
            served: 0,
            kills: 0,
            started_before: false,
        }
    }

    /// Where the frontend's address lies here.
    fn at(&self, guest: usize) -> usize {
        let inside = |region: &&Region| (region.guest..region.guest + region.len).contains(&guest);
        let region = self.memory.iter().find(inside).expect("an address in the frontend's memory");
        guest - region.guest + region.base
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn serve(&mut self, listener: UnixListener) {
        while !self.stopped() {
            if let Ok((stream, _)) = listener.accept() {
                self.session(&stream);
                if self.kills > 0 && self.kills == self.behaviour.kills && self.behaviour.stays_away {
                    return;
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Until the frontend closes the socket, or the backend is killed.
    fn session(&mut self, stream: &UnixStream) {
        stream.set_nonblocking(true).unwrap();
        self.vrings.iter_mut().for_each(|vring| (vring.enabled, vring.call) = (false, None));
        self.given = false;
        let until = self.served + self.behaviour.killed_every;
        while !self.stopped() {
            match self.message(stream) {
                Some(true) => continue,
                Some(false) => {}
                None => return,
            }
            let mut worked = false;
            for index in 0..self.vrings.len() {
                if self.vrings[index].enabled && self.request(index) {
                    worked = true;
                }
                let kills = self.behaviour.killed_every > 0 && self.kills < self.behaviour.kills;
                if kills && self.served >= until {
                    self.kills += 1;
                    return;
                }
            }
            if !worked {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Some(true) after a message, Some(false) when there is none, None at the end of the socket.
    fn message(&mut self, stream: &UnixStream) -> Option<bool> {
        let mut header = [0; 12];
        let mut fds = [-1; 8];
        let mut iovecs = [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() }];
        // SAFETY: the iovec is of `header`, which lives on.
        let (count, files) = match unsafe { stream.recv_with_fds(&mut iovecs, &mut fds) } {
            Ok((0, _)) => return None,
            Ok(read) => read,
            Err(error) if error.errno() == libc::EAGAIN => return Some(false),
            Err(_) => return None,
        };
        stream.set_nonblocking(false).unwrap();
        (&*stream).read_exact(&mut header[count..]).ok()?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (code, flags, size) = (word(0), word(4), word(8) as usize);
        let mut payload = vec![0; size];
        (&*stream).read_exact(&mut payload).ok()?;
        // SAFETY: descriptors that were just received have no other owner.
        let mut files: Vec<File> =
            fds[..files].iter().map(|&fd| unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }).collect();
        let reply = self.apply(code, &payload, &mut files);
        let answer = match reply {
            Some(answer) => answer,
            None if flags & 8 != 0 => vec![0; 8],
            None => return self.nonblocking(stream),
        };
        let mut message: Vec<u8> =
            [code, 1 | 4, answer.len() as u32].iter().flat_map(|word| word.to_le_bytes()).collect();
        message.extend(answer);
        match (code, &self.inflight) {
            (31, Some(file)) => {
                stream.send_with_fds(&[&message[..]], &[file.as_raw_fd()]).ok()?;
            }
            _ => (&*stream).write_all(&message).ok()?,
        }
        self.nonblocking(stream)
    }

    fn nonblocking(&self, stream: &UnixStream) -> Option<bool> {
        stream.set_nonblocking(true).unwrap();
        Some(true)
    }

    /// The reply's payload, for a message that has one of its own.
    fn apply(&mut self, code: u32, payload: &[u8], files: &mut Vec<File>) -> Option<Vec<u8>> {
        let word = |at: usize| u32::from_le_bytes(payload[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().unwrap());
        let Behaviour { packed, keeps_inflight, .. } = self.behaviour;
        match code {
            1 => {
                let packed = if packed { PACKED } else { 0 };
                let features = EVENT_IDX | PROTOCOL_FEATURES | VERSION_1 | FLUSH | MQ | packed;
                return Some(features.to_le_bytes().to_vec());
            }
            5 => {
                let region =
                    |index: usize| (long(8 + index * 32 + 16) as usize, long(8 + index * 32 + 8) as usize);
                let regions = files.drain(..).enumerate().map(|(index, file)| {
                    let (guest, len) = region(index);
                    Region::map(guest, len, &file)
                });
                self.memory = regions.collect();
            }
            8 => self.vrings[word(0) as usize].size = word(4) as u16,
            9 => {
                let [descriptors, device, driver] = [8, 16, 24].map(|field| self.at(long(field) as usize));
                let vring = &mut self.vrings[word(0) as usize];
                (vring.descriptors, vring.device, vring.driver) = (descriptors, device, driver);
            }
            10 if packed => {
                assert_eq!(word(4), 0x8000_8000, "a packed ring starts at 0 with both wrap counters 1");
                // The in-flight region would tell where it was.
                if !self.started_before {
                    let vring = &mut self.vrings[word(0) as usize];
                    (vring.next, vring.wrap) = (0, true);
                }
            }
            10 => self.vrings[word(0) as usize].next = word(4) as u16,
            13 => self.vrings[word(0) as usize].call = files.pop(),
            15 => {
                let inflight = if keeps_inflight { INFLIGHT } else { 0 };
                return Some((PROTOCOL | inflight).to_le_bytes().to_vec());
            }
            17 => return Some((self.vrings.len() as u64).to_le_bytes().to_vec()),
            18 => {
                assert!(self.given == keeps_inflight, "the in-flight region comes before the rings");
                self.started_before = true;
                self.vrings[word(0) as usize].enabled = word(4) == 1;
            }
            24 => {
                let mut answer = payload.to_vec();
                let config = &mut answer[12..];
                config[..8].copy_from_slice(&(CAPACITY as u64 / 512).to_le_bytes());
                config[34..36].copy_from_slice(&(self.vrings.len() as u16).to_le_bytes());
                return Some(answer);
            }
            31 => {
                assert!(self.inflight.is_none(), "the first region is to be kept");
                self.inflight = Some(tempfile::tempfile().unwrap());
                let mut answer = payload.to_vec();
                answer[..8].copy_from_slice(&4096u64.to_le_bytes());
                return Some(answer);
            }
            32 => {
                let inode = |file: &File| file.metadata().unwrap().ino();
                assert_eq!(inode(&files.pop().unwrap()), inode(self.inflight.as_ref().unwrap()));
                self.given = true;
            }
            36 => return Some(64u64.to_le_bytes().to_vec()),
            _ => {}
        };
        None
    }

    /// Serves the next request of a queue; false when there is none.
    fn request(&mut self, index: usize) -> bool {
        let Some((head, chain)) = self.take(index) else { return false };
        let number = self.served;
        self.served += 1;
        let fault = self.behaviour.fault;
        if fault == Fault::NeverComplete(number) {
            return true;
        }
        let written = if fault == Fault::NoStatus(number) { 0 } else { self.execute(number, &chain) };
        self.complete(index, head, chain.len() as u16, written);
        if fault == Fault::CompleteTwice(number) {
            self.complete(index, head, chain.len() as u16, written);
        }
        if let Some(call) = &mut self.vrings[index].call {
            call.write_all(&1u64.to_ne_bytes()).unwrap();
        }
        true
    }

    fn take(&mut self, index: usize) -> Option<(u16, Chain)> {
        let packed = self.behaviour.packed;
        let vring = &mut self.vrings[index];
        let mut chain = Chain::new();
        let descriptor = |at: u16| {
            let at = vring.descriptors + usize::from(at) * 16;
            (
                load::<u64>(at) as usize,
                load::<u32>(at + 8) as usize,
                load::<u16>(at + 12),
                load::<u16>(at + 14),
            )
        };
        if packed {
            let (mut at, mut wrap) = (vring.next, vring.wrap);
            let flags = atomic(vring.descriptors + usize::from(at) * 16 + 14).load(Ordering::Acquire);
            if (flags & 1 << 7 != 0) != wrap || (flags & 1 << 15 != 0) == wrap {
                return None;
            }
            loop {
                let (address, len, id, flags) = descriptor(at);
                chain.push((address, len, flags & 2 != 0));
                (at, wrap) = if at + 1 == vring.size { (0, !wrap) } else { (at + 1, wrap) };
                if flags & 1 == 0 {
                    return Some((id, chain));
                }
            }
        }
        if atomic(vring.driver + 2).load(Ordering::Acquire) == vring.next {
            return None;
        }
        let head: u16 = load(vring.driver + 4 + usize::from(vring.next % vring.size) * 2);
        vring.next = vring.next.wrapping_add(1);
        let mut at = head;
        loop {
            let (address, len, flags, next) = descriptor(at);
            chain.push((address, len, flags & 2 != 0));
            if flags & 1 == 0 {
                return Some((head, chain));
            }
            at = next;
        }
    }

    /// Bytes written to the frontend's memory.
    fn execute(&mut self, number: u64, chain: &Chain) -> u32 {
        let (header, status) = (self.at(chain[0].0), self.at(chain[chain.len() - 1].0));
        let (kind, sector) = (load::<u32>(header), load::<u64>(header + 8) as usize);
        let fault = self.behaviour.fault;
        let since = |first: u64| number >= first;
        let mut at = sector * 512;
        let mut written = 1;
        let failing = matches!(fault, Fault::Fail(first) if since(first));
        for &(address, len, writable) in &chain[1..chain.len() - 1] {
            let address = self.at(address);
            let volume = self.volume.as_mut_ptr().wrapping_add(at);
            assert!(at + len <= CAPACITY);
            match kind {
                _ if failing => {}
                0 => {
                    let other = matches!(fault, Fault::ReadOther(first) if since(first));
                    let from = self.volume.as_ptr().wrapping_add(if other { at ^ len } else { at });
                    assert!(writable);
                    // SAFETY: the buffer lies in the frontend's memory, mapped here; the range lies in the volume.
                    unsafe { std::ptr::copy_nonoverlapping(from, address as *mut u8, len) };
                    written += len as u32;
                }
                1 => {
                    let len = match fault {
                        Fault::LoseWrites(first) if since(first) => 0,
                        Fault::TearWrites(first) if since(first) => 512,
                        _ => len,
                    };
                    // SAFETY: as for the read.
                    unsafe { std::ptr::copy_nonoverlapping(address as *const u8, volume, len) };
                }
                _ => {}
            }
            at += len;
        }
        store(status, u8::from(failing));
        if failing {
            1
        } else {
            written
        }
    }

    fn complete(&mut self, index: usize, head: u16, descriptors: u16, written: u32) {
        let packed = self.behaviour.packed;
        let vring = &mut self.vrings[index];
        if packed {
            let at = vring.descriptors + usize::from(vring.next) * 16;
            store(at + 8, written);
            store(at + 12, head);
            atomic(at + 14).store(if vring.wrap { 1 << 7 | 1 << 15 } else { 0 }, Ordering::Release);
            vring.next += descriptors;
            if vring.next >= vring.size {
                vring.next -= vring.size;
                vring.wrap = !vring.wrap;
            }
            return;
        }
        let used: u16 = load(vring.device + 2);
        let at = vring.device + 4 + usize::from(used % vring.size) * 8;
        store(at, u32::from(head));
        store(at + 4, written);
        atomic(vring.device + 2).store(used.wrapping_add(1), Ordering::Release);
    }
}

fn load<T: Copy>(address: usize) -> T {
    // SAFETY: the addresses are of rings and requests in the frontend's memory, mapped here.
    unsafe { std::ptr::read_volatile(address as *const T) }
}

fn store<T>(address: usize, value: T) {
    // SAFETY: as for `load`.
    unsafe { std::ptr::write_volatile(address as *mut T, value) }
}

fn atomic(address: usize) -> &'static AtomicU16 {
    // SAFETY: as for `load`; the fields asked for are 2-byte aligned.
    unsafe { &*(address as *const AtomicU16) }
}

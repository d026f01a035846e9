//! A frontend sends whatever it likes over a vhost-user socket, descriptors too, and may have the rings it sets up served.
//!
//! The input is a list of records (see `Record`), each a message or bytes for the guest's memory. They go through a real
//! socket into a `Connection` and its `Session`; what may run is run as the control thread and a reactor would run it.
//! Nothing may panic or hang, a refused message must change nothing, and no descriptor may be left open.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::io::IoSlice;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use ringstone_fuzz::{memory_file, serve};
use ringstone_vhost_user::{
    Connection, DeviceModel, Incoming, Quiet, Reaper, Session, SessionError, F_LOG_ALL, F_PROTOCOL_FEATURES,
    HEADER_LEN,
};
use ringstone_virtio_blk::Geometry;
use ringstone_virtqueue::{Chain, PackedRing, SplitRing, VirtRing};

const QUEUES: u16 = 4;
const GUEST_MEMORY: usize = 64 << 10;
const FEATURES: u64 = 1 << 34 | 1 << 32 | 1 << 29 | 1 << 28 | 1 << 12;
const CONFIG_LEN: usize = 60;
/// A record with this code is no message: its payload goes into the guest's memory.
const MEMORY_RECORD: u8 = 0xff;
/// A record with this code cuts the guest's memory file short behind every mapping of it.
const TRUNCATE_RECORD: u8 = 0xfe;
/// Code, flags, descriptors, pause and length of the payload.
const RECORD_HEADER: usize = 5;
const MOST_FDS: usize = 12;

/// One step of the frontend.
struct Record<'a> {
    code: u8,
    flags: u8,
    descriptors: u8,
    /// After how many bytes of the message the frontend pauses.
    pause: u8,
    payload: &'a [u8],
}

impl<'a> Record<'a> {
    /// The next record and what follows it.
    fn split(input: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (&[code, flags, descriptors, pause, len], rest) = input.split_first_chunk::<RECORD_HEADER>()?;
        let (payload, rest) = rest.split_at(usize::from(len).min(rest.len()));
        Some((Self { code, flags, descriptors, pause, payload }, rest))
    }

    /// The message's bytes; bit 7 of the flags makes the header lie about the length.
    fn message(&self) -> Vec<u8> {
        let lie = if self.flags & 0x80 != 0 { u32::from(self.pause) } else { 0 };
        let mut bytes = u32::from(self.code).to_le_bytes().to_vec();
        bytes.extend(u32::from(self.flags & 0x7f).to_le_bytes());
        bytes.extend((self.payload.len() as u32 + lie).to_le_bytes());
        bytes.extend(self.payload);
        bytes
    }
}

/// What a frontend may send along: guest memory, eventfds, and one of each kind that is neither.
struct Descriptors {
    memory: File,
    short: File,
    event: OwnedFd,
    null: File,
    others: Vec<OwnedFd>,
}

impl Descriptors {
    fn new() -> Self {
        // SAFETY: a plain system call; the descriptor is checked before it is owned.
        let event = unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            assert!(fd >= 0, "eventfd");
            OwnedFd::from_raw_fd(fd)
        };
        Self {
            memory: memory_file(GUEST_MEMORY),
            short: memory_file(100),
            event,
            null: File::open("/dev/null").expect("/dev/null"),
            others: others(),
        }
    }

    /// Low four bits: how many; the rest: of which kind.
    fn choose(&self, choice: u8) -> Vec<RawFd> {
        let one = match usize::from(choice >> 4) {
            0 => self.memory.as_raw_fd(),
            1 => self.event.as_raw_fd(),
            2 => self.short.as_raw_fd(),
            3 => self.null.as_raw_fd(),
            other => self.others[other % self.others.len()].as_raw_fd(),
        };
        vec![one; usize::from(choice & 15).min(MOST_FDS)]
    }
}

/// Both ends of a pipe, one whose other end is closed, sockets connected and not, a directory, a regular file, one that is
/// open as a path only, and an epoll.
fn others() -> Vec<OwnedFd> {
    let (read, write) = std::io::pipe().expect("a pipe");
    let (broken, _) = std::io::pipe().expect("a pipe");
    let (stream, peer) = UnixStream::pair().expect("a pair of sockets");
    let path = std::env::current_exe().expect("this program");
    let only = File::options().read(true).custom_flags(libc::O_PATH).open(&path).expect("a path");
    // SAFETY: a plain system call; the descriptor is checked before it is owned.
    let epoll = unsafe {
        let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        assert!(fd >= 0, "epoll");
        OwnedFd::from_raw_fd(fd)
    };
    vec![
        read.into(),
        write.into(),
        broken.into(),
        stream.into(),
        peer.into(),
        UnixDatagram::unbound().expect("a socket").into(),
        TcpListener::bind("127.0.0.1:0").expect("a socket").into(),
        File::open("/proc/self").expect("a directory").into(),
        File::open(&path).expect("a file").into(),
        only.into(),
        epoll,
    ]
}

struct Disk;

impl DeviceModel for Disk {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn max_queues(&self) -> u16 {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        vec![0x5a; CONFIG_LEN]
    }

    fn set_config(&mut self, offset: usize, bytes: &[u8]) -> bool {
        offset == 32 && bytes.len() == 1
    }

    fn set_features(&mut self, features: u64) {
        assert_eq!(features & !(FEATURES | F_PROTOCOL_FEATURES | F_LOG_ALL), 0);
    }
}

enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// The control thread and the reactor of one connection.
struct Backend {
    connection: Connection,
    session: Session<Disk>,
    rings: [Option<Ring>; QUEUES as usize],
    chain: Chain,
}

impl Backend {
    fn new(socket: UnixStream, reaper: &Reaper) -> Self {
        Self {
            connection: Connection::new(socket, reaper.clone()).expect("a socket that does not block"),
            session: Session::new(Disk, reaper.clone()),
            rings: Default::default(),
            chain: Chain::default(),
        }
    }

    /// Take every whole message that has come.
    fn receive(&mut self) -> Result<(), SessionError> {
        while let Some(incoming) = self.connection.receive()? {
            self.apply(incoming)?;
            self.run();
        }
        Ok(())
    }

    fn apply(&mut self, incoming: Incoming) -> Result<(), SessionError> {
        match self.session.needs_quiet(&incoming.request) {
            Quiet::None => {}
            Quiet::Vring(index) => self.stop(index),
            Quiet::All => (0..QUEUES).for_each(|index| self.stop(index)),
        }
        let code = incoming.header.request;
        let before = self.state();
        let applied = self.session.apply(code, incoming.request, incoming.fds).inspect_err(|error| {
            assert_eq!(before, self.state(), "refused and yet applied: {error}");
        })?;
        if let Some(reply) = applied.reply {
            assert!(reply.encode(code).len() <= HEADER_LEN + 12 + 256);
            self.connection.reply(code, &reply, applied.descriptor.as_ref())?;
        }
        Ok(())
    }

    /// What a refused message must leave as it is.
    fn state(&self) -> (u64, u64, usize, Vec<u32>) {
        let session = &self.session;
        let sizes = (0..QUEUES).map(|index| session.vring_size(index)).collect();
        (session.features(), session.protocol_features(), Arc::as_ptr(session.memory()) as usize, sizes)
    }

    fn stop(&mut self, index: u16) {
        if let Some(ring) = self.rings[usize::from(index)].take() {
            self.session.stopped(
                index,
                match ring {
                    Ring::Split(ring) => ring.base(),
                    Ring::Packed(ring) => ring.base(),
                },
            );
        }
    }

    /// Start the rings that may run, and serve all that run.
    fn run(&mut self) {
        for index in 0..QUEUES {
            // An in-flight region made for rings of the other kind stops the device too.
            let setup = match self.session.runnable(index) {
                Ok(Some(setup)) => Some(setup),
                Ok(None) => continue,
                Err(_) => None,
            };
            let ring = &mut self.rings[usize::from(index)];
            if ring.is_none() {
                *ring = setup.and_then(|setup| match setup.packed {
                    false => SplitRing::new(setup.ring).ok().map(Ring::Split),
                    true => PackedRing::new(setup.ring).ok().map(Ring::Packed),
                });
            }
            let sound = match ring {
                Some(Ring::Split(ring)) => serve(ring, &mut self.chain, &GEOMETRY),
                Some(Ring::Packed(ring)) => serve(ring, &mut self.chain, &GEOMETRY),
                None => false,
            };
            if !sound {
                self.session.set_broken();
                (0..QUEUES).for_each(|index| self.stop(index));
                assert!(matches!(self.session.runnable(index), Ok(None)), "a broken device runs");
                return;
            }
        }
    }
}

const GEOMETRY: Geometry = Geometry {
    size: 1 << 20,
    block_size: 512,
    read_only: false,
    discard: true,
    write_zeroes: true,
    max_discard: 1 << 20,
    max_write_zeroes: 1 << 20,
};

/// Write `bytes` with `fds`; false once the other end has hung up.
fn send(socket: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> bool {
    #[repr(C, align(8))]
    struct Control([u8; 256]);
    let mut control = Control([0; 256]);
    let slices = [IoSlice::new(bytes)];
    let payload = size_of_val(fds) as u32;
    // SAFETY: all-zero is a valid msghdr; the control buffer has room for MOST_FDS descriptors; sendmsg only reads.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = slices.as_ptr().cast_mut().cast();
        message.msg_iovlen = 1;
        if !fds.is_empty() {
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(payload) as usize;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload) as usize;
            fds.as_ptr().copy_to_nonoverlapping(libc::CMSG_DATA(header).cast(), fds.len());
        }
        libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    sent == bytes.len() as isize
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}

fn talk(descriptors: &Descriptors, reaper: &Reaper, mut input: &[u8]) {
    let (frontend, backend) = UnixStream::pair().expect("a pair of sockets");
    let mut backend = Backend::new(backend, reaper);
    while let Some((record, rest)) = Record::split(input) {
        input = rest;
        if record.code == MEMORY_RECORD {
            let at = u64::from(record.descriptors) * 256;
            let room = (GUEST_MEMORY - at as usize).min(record.payload.len());
            descriptors.memory.write_all_at(&record.payload[..room], at).expect("guest memory");
            backend.run();
            continue;
        }
        if record.code == TRUNCATE_RECORD {
            descriptors.memory.set_len(u64::from(record.descriptors) * 256).expect("a shorter file");
            backend.run();
            continue;
        }
        let message = record.message();
        let (first, second) = message.split_at(usize::from(record.pause).clamp(1, message.len()));
        if !send(&frontend, first, &descriptors.choose(record.descriptors)) || backend.receive().is_err() {
            return;
        }
        if !second.is_empty() && (!send(&frontend, second, &[]) || backend.receive().is_err()) {
            return;
        }
    }
}

thread_local! {
    static DESCRIPTORS: RefCell<Descriptors> = RefCell::new(Descriptors::new());
    /// One for all inputs: its thread stays for a while.
    static REAPER: Reaper = Reaper::default();
}

fuzz_target!(|input: &[u8]| {
    let reaper = REAPER.with(Reaper::clone);
    DESCRIPTORS.with_borrow(|descriptors| {
        descriptors.memory.set_len(0).expect("an empty file");
        descriptors.memory.set_len(GUEST_MEMORY as u64).expect("room for guest memory");
        // The guard of guest memory keeps an eventfd for good; the first mapping makes it.
        ringstone_mapping::guard::poison_event();
        let before = open_descriptors();
        talk(descriptors, &reaper, input);
        // None of them can hold it up.
        while !reaper.is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(before, open_descriptors(), "a descriptor was left open");
    });
});

//! A frontend that says what the input says: messages with descriptors of every kind, and bytes for the guest's memory.

use std::fs::File;
use std::io::IoSlice;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};

use crate::memory_file;

pub const GUEST_MEMORY: usize = 64 << 10;
/// A record with this code is no message: its payload goes into the guest's memory.
pub const MEMORY_RECORD: u8 = 0xff;
/// A record with this code cuts the guest's memory file short behind every mapping of it.
pub const TRUNCATE_RECORD: u8 = 0xfe;
/// Code, flags, descriptors, pause and length of the payload.
const RECORD_HEADER: usize = 5;
const MOST_FDS: usize = 12;

/// One step of the frontend.
pub struct Record<'a> {
    pub code: u8,
    pub flags: u8,
    pub descriptors: u8,
    /// After how many bytes of the message the frontend pauses.
    pub pause: u8,
    pub payload: &'a [u8],
}

impl<'a> Record<'a> {
    /// The next record and what follows it.
    pub fn split(input: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (&[code, flags, descriptors, pause, len], rest) = input.split_first_chunk::<RECORD_HEADER>()?;
        let (payload, rest) = rest.split_at(usize::from(len).min(rest.len()));
        Some((Self { code, flags, descriptors, pause, payload }, rest))
    }

    /// The message's bytes; bit 7 of the flags makes the header lie about the length.
    pub fn message(&self) -> Vec<u8> {
        let lie = if self.flags & 0x80 != 0 { u32::from(self.pause) } else { 0 };
        let mut bytes = u32::from(self.code).to_le_bytes().to_vec();
        bytes.extend(u32::from(self.flags & 0x7f).to_le_bytes());
        bytes.extend((self.payload.len() as u32 + lie).to_le_bytes());
        bytes.extend(self.payload);
        bytes
    }
}

/// What a frontend may send along: guest memory, eventfds, and one of each kind that is neither.
pub struct Descriptors {
    pub memory: File,
    short: File,
    event: OwnedFd,
    null: File,
    others: Vec<OwnedFd>,
}

impl Descriptors {
    /// # Panics
    /// There are none to be had.
    #[expect(clippy::new_without_default, reason = "it takes the system")]
    pub fn new() -> Self {
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

    /// Tell whoever runs a ring to look.
    pub fn kick(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: a plain system call with a buffer of the length given. A counter that is full has told enough.
        let _ = unsafe { libc::write(self.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Low four bits: how many; the rest: of which kind.
    pub fn choose(&self, choice: u8) -> Vec<RawFd> {
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

/// Write `bytes` with `fds`; false once the other end has hung up.
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> bool {
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

/// # Panics
/// There is no /proc.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}

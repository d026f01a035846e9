//! The socket: whole messages in, whole messages out, never waiting for the peer.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::error::SessionError;
use crate::message::{config_change, Header, Reply, Request, HEADER_LEN, MAX_FDS, MAX_PAYLOAD};

/// A complete message.
pub struct Incoming {
    pub header: Header,
    pub request: Request,
    pub fds: Vec<OwnedFd>,
}

/// A frontend's connection.
pub struct Connection {
    stream: UnixStream,
    buffer: [u8; HEADER_LEN + MAX_PAYLOAD],
    filled: usize,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, buffer: [0; HEADER_LEN + MAX_PAYLOAD], filled: 0, fds: Vec::new() })
    }

    /// The socket, for waiting on it.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// The peer has closed its end, whatever still waits to be read.
    pub fn peer_gone(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.stream.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one pollfd, on our stack; a timeout of 0 never waits.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        ready > 0 && poll.revents & (libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR) != 0
    }

    /// Process id of the peer, where the kernel knows it.
    pub fn peer_pid(&self) -> Option<i32> {
        let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: SO_PEERCRED fills a ucred of the length given.
        let rc = unsafe {
            libc::getsockopt(
                self.stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut cred).cast(),
                &mut len,
            )
        };
        (rc == 0 && cred.pid > 0).then_some(cred.pid)
    }

    /// Read on; `Ok(None)` if the message is not complete yet, `Err(Closed)` at the end of the stream between messages.
    ///
    /// # Errors
    /// The peer closed ([`io::ErrorKind::UnexpectedEof`] in a `Socket` error between messages, `Truncated` within one), or
    /// the message is malformed.
    pub fn receive(&mut self) -> Result<Option<Incoming>, SessionError> {
        loop {
            let want =
                if self.filled < HEADER_LEN { HEADER_LEN } else { HEADER_LEN + self.header()?.len as usize };
            if self.filled == want {
                let header = self.header()?;
                let request = Request::decode(&header, &self.buffer[HEADER_LEN..want])?;
                self.filled = 0;
                return Ok(Some(Incoming { header, request, fds: std::mem::take(&mut self.fds) }));
            }
            match self.read(want) {
                Ok(0) if self.filled == 0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(0) => return Err(SessionError::Truncated),
                Ok(n) => self.filled += n,
                Err(SessionError::Socket(e)) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(SessionError::Socket(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn header(&self) -> Result<Header, SessionError> {
        let mut bytes = [0u8; HEADER_LEN];
        bytes.copy_from_slice(&self.buffer[..HEADER_LEN]);
        Header::decode(&bytes)
    }

    /// Read up to byte `want` of the message, never into the next one: descriptors belong to their own message.
    fn read(&mut self, want: usize) -> Result<usize, SessionError> {
        // Room for twice the descriptors, so that a message with too many is told from one with enough.
        #[repr(C, align(8))]
        struct Control([u8; 256]);
        const { assert!(size_of::<libc::cmsghdr>() + 2 * MAX_FDS * size_of::<RawFd>() <= 256) };
        let mut control = Control([0; 256]);
        let mut iov = libc::iovec {
            iov_base: self.buffer[self.filled..want].as_mut_ptr().cast(),
            iov_len: want - self.filled,
        };
        // SAFETY: all-zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = control.0.len();
        // SAFETY: the message header points at live buffers of the lengths given.
        let n = unsafe { libc::recvmsg(self.stream.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
        if n < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: the kernel filled the control buffer; CMSG_* walk it within msg_controllen; each descriptor is owned once.
        unsafe {
            let mut header = libc::CMSG_FIRSTHDR(&message);
            while !header.is_null() {
                if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                    let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                    let data = libc::CMSG_DATA(header).cast::<RawFd>();
                    for i in 0..bytes / size_of::<RawFd>() {
                        self.fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                    }
                }
                header = libc::CMSG_NXTHDR(&message, header);
            }
        }
        if message.msg_flags & libc::MSG_CTRUNC != 0 || self.fds.len() > MAX_FDS {
            return Err(SessionError::TooManyDescriptors { limit: MAX_FDS });
        }
        Ok(n as usize)
    }

    /// Send the reply to `request`, with a descriptor if there is one.
    ///
    /// # Errors
    /// The socket is full: replies are small and the peer waits for them, so it does not read.
    pub fn reply(&mut self, request: u32, reply: &Reply, fd: Option<&OwnedFd>) -> Result<(), SessionError> {
        send(self.stream.as_raw_fd(), &reply.encode(request), fd)
    }
}

/// Tell the frontend on its back-end channel that the configuration space changed.
///
/// # Errors
/// The channel is full or closed.
pub fn notify_config_change(channel: &OwnedFd) -> Result<(), SessionError> {
    send(channel.as_raw_fd(), &config_change(), None)
}

fn send(socket: RawFd, bytes: &[u8], fd: Option<&OwnedFd>) -> Result<(), SessionError> {
    #[repr(C, align(8))]
    struct Control([u8; 64]);
    let mut control = Control([0; 64]);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid msghdr; the control buffer has room for one descriptor; sendmsg only reads.
    let n = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        if let Some(fd) = fd {
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd.as_raw_fd());
        }
        libc::sendmsg(socket, &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    match n {
        n if n == bytes.len() as isize => Ok(()),
        n if n < 0 => {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::WouldBlock {
                return Err(SessionError::Stuck);
            }
            Err(error.into())
        }
        // A message of a few hundred bytes that does not fit: the peer has not read for long.
        _ => Err(SessionError::Stuck),
    }
}

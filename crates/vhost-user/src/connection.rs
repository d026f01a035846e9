//! The socket: whole messages in, whole messages out, never waiting for the peer.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::error::SessionError;
use crate::message::{config_change, Header, Reply, Request, HEADER_LEN, MAX_FDS, MAX_PAYLOAD};
use crate::reaper::{Reaped, Reaper};

/// Things a frontend may have given that its reaper has not let go of. Whoever goes beyond is disconnected, as they hold
/// descriptors and memory of ours.
const BACKLOG: usize = 1024;

/// A complete message.
pub struct Incoming {
    pub header: Header,
    pub request: Request,
    pub fds: Vec<Reaped<OwnedFd>>,
}

/// A frontend's connection.
pub struct Connection {
    /// What waits in its queue is closed with it.
    stream: Reaped<UnixStream>,
    buffer: [u8; HEADER_LEN + MAX_PAYLOAD],
    filled: usize,
    fds: Vec<Reaped<OwnedFd>>,
    reaper: Reaper,
}

impl Connection {
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn new(stream: UnixStream, reaper: Reaper) -> io::Result<Self> {
        let stream = reaper.hold(stream);
        stream.set_nonblocking(true)?;
        Ok(Self { stream, buffer: [0; HEADER_LEN + MAX_PAYLOAD], filled: 0, fds: Vec::new(), reaper })
    }

    /// Go on with a connection in the middle of a message, of which `begun` and `fds` have come.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking, or that is more than a message.
    pub fn resume(
        stream: UnixStream,
        begun: &[u8],
        fds: Vec<OwnedFd>,
        reaper: Reaper,
    ) -> Result<Self, SessionError> {
        let fds: Vec<_> = fds.into_iter().map(|fd| reaper.hold(fd)).collect();
        let mut connection = Self::new(stream, reaper)?;
        if begun.len() > connection.buffer.len() || fds.len() > MAX_FDS {
            return Err(SessionError::Handover { what: "more than a message has begun" });
        }
        connection.buffer[..begun.len()].copy_from_slice(begun);
        connection.filled = begun.len();
        connection.fds = fds;
        Ok(connection)
    }

    /// What has come of the message that is not complete yet.
    pub fn begun(&self) -> (&[u8], &[Reaped<OwnedFd>]) {
        (&self.buffer[..self.filled], &self.fds)
    }

    /// The socket, for waiting on it.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Let the peer see the end now, whenever the socket is closed. Nobody else may go on with it.
    pub fn hang_up(&self) {
        // One that is closed already has seen it.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
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
        if self.reaper.len() > BACKLOG {
            return Err(SessionError::Backlog { limit: BACKLOG });
        }
        // Room for as many descriptors as can be sent at once: those that did not fit would be closed by the kernel here.
        let room = &mut self.buffer[self.filled..want];
        let mut fds = Vec::new();
        let read = receive_with_descriptors(self.stream.as_raw_fd(), room, &mut fds, CONTROL_FDS);
        self.fds.extend(fds.into_iter().map(|fd| self.reaper.hold(fd)));
        let n = read?;
        if self.fds.len() > MAX_FDS {
            return Err(SessionError::TooManyDescriptors { limit: MAX_FDS });
        }
        Ok(n)
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
    let fd = fd.map(|fd| [fd.as_raw_fd()]);
    let fds = fd.as_ref().map_or(&[][..], |fd| fd);
    match send_with_descriptors(socket, bytes, fds, libc::MSG_DONTWAIT) {
        Ok(n) if n == bytes.len() => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(SessionError::Stuck),
        Err(error) => Err(error.into()),
        // A message of a few hundred bytes that does not fit: the peer has not read for long.
        Ok(_) => Err(SessionError::Stuck),
    }
}

/// What the kernel sends at once (`SCM_MAX_FD`).
const CONTROL_FDS: usize = 253;
/// Bytes of a control buffer for them.
const CONTROL: usize = size_of::<libc::cmsghdr>() + (CONTROL_FDS * size_of::<RawFd>()).next_multiple_of(8);

#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// `sendmsg` with `fds` (at most `CONTROL_FDS`) beside `bytes`. Answers how many bytes went.
pub(crate) fn send_with_descriptors(
    socket: RawFd,
    bytes: &[u8],
    fds: &[RawFd],
    flags: libc::c_int,
) -> io::Result<usize> {
    assert!(fds.len() <= CONTROL_FDS);
    let mut control = Control([0; CONTROL]);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid msghdr; the control buffer has room for the descriptors; sendmsg only reads.
    let n = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        if !fds.is_empty() {
            let len = size_of_val(fds) as u32;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as usize;
            let data = libc::CMSG_DATA(header).cast::<RawFd>();
            for (at, fd) in fds.iter().enumerate() {
                data.add(at).write_unaligned(*fd);
            }
        }
        libc::sendmsg(socket, &message, flags | libc::MSG_NOSIGNAL)
    };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(n as usize)
}

/// `recvmsg` into `bytes`; descriptors that come along are added to `fds`.
///
/// # Errors
/// What the call says, or more than `most` descriptors at once.
pub(crate) fn receive_with_descriptors(
    socket: RawFd,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    most: usize,
) -> Result<usize, SessionError> {
    assert!(most <= CONTROL_FDS);
    let mut control = Control([0; CONTROL]);
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE only reckons.
    message.msg_controllen = unsafe { libc::CMSG_SPACE((most * size_of::<RawFd>()) as u32) } as usize;
    // SAFETY: the message header points at live buffers of the lengths given.
    let n = unsafe { libc::recvmsg(socket, &mut message, libc::MSG_CMSG_CLOEXEC) };
    if n < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: the kernel filled the control buffer; CMSG_* walk it within msg_controllen; each descriptor is owned once.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let len = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for at in 0..len / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(at).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(SessionError::TooManyDescriptors { limit: most });
    }
    Ok(n as usize)
}

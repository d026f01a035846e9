//! Messages with any number of descriptors between two gateways of one host, over a connected Unix stream socket.
//!
//! Layout: docs/formats/handover.md. Both sides wait, each for at most its time limit; neither is on a request's way.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::connection::{receive_with_descriptors, send_with_descriptors};
use crate::error::SessionError;

const MAGIC: u32 = u32::from_le_bytes(*b"RSHO");
const HEADER: usize = 16;
/// Descriptors that go with one byte: the kernel takes 253 (SCM_MAX_FD).
const FDS_A_BYTE: usize = 128;
/// Far more than a host full of guests needs, and little enough that a stranger cannot make us run out of memory.
const MAX_BODY: usize = 64 << 20;
const MAX_FDS: usize = 1 << 16;

/// One message.
pub struct Message {
    pub kind: u32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// A connection to the other gateway.
pub struct Link(UnixStream);

impl Link {
    /// # Errors
    /// The socket's time limits cannot be set.
    pub fn new(stream: UnixStream, limit: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(Self(stream))
    }

    /// Wait for at most `limit` from now on.
    ///
    /// # Errors
    /// The socket's time limit cannot be set.
    pub fn set_limit(&self, limit: Duration) -> io::Result<()> {
        self.0.set_read_timeout(Some(limit))
    }

    /// # Errors
    /// The other side has gone, or does not read for longer than the limit.
    pub fn send<'a>(
        &mut self,
        kind: u32,
        body: &[u8],
        fds: impl Iterator<Item = BorrowedFd<'a>>,
    ) -> Result<(), SessionError> {
        let fds: Vec<_> = fds.map(|fd| fd.as_raw_fd()).collect();
        let mut head = [0u8; HEADER];
        let words = [MAGIC, kind, body.len() as u32, fds.len() as u32];
        for (place, word) in head.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        self.0.write_all(&head)?;
        self.0.write_all(body)?;
        for some in fds.chunks(FDS_A_BYTE) {
            send_with_descriptors(self.0.as_raw_fd(), b"F", some, 0)?;
        }
        Ok(())
    }

    /// The next message.
    ///
    /// # Errors
    /// The other side has gone or says nothing for longer than the limit, or what it says is none of these messages.
    pub fn receive(&mut self) -> Result<Message, SessionError> {
        let mut head = [0u8; HEADER];
        self.0.read_exact(&mut head)?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (len, count) = (word(8) as usize, word(12) as usize);
        if word(0) != MAGIC || len > MAX_BODY || count > MAX_FDS {
            return Err(SessionError::Handover { what: "that is no message of a gateway" });
        }
        let mut body = vec![0; len];
        self.0.read_exact(&mut body)?;
        let mut fds = Vec::with_capacity(count);
        while fds.len() < count {
            let mut byte = [0u8; 1];
            let before = fds.len();
            let read = receive_with_descriptors(self.0.as_raw_fd(), &mut byte, &mut fds, FDS_A_BYTE)?;
            if read == 0 || fds.len() == before {
                return Err(SessionError::Handover { what: "descriptors are missing" });
            }
        }
        Ok(Message { kind: word(4), body, fds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn many_descriptors_arrive_in_order() {
        let (one, other) = UnixStream::pair().unwrap();
        let limit = Duration::from_secs(10);
        let (mut one, mut other) = (Link::new(one, limit).unwrap(), Link::new(other, limit).unwrap());
        let files: Vec<_> = (0..300u64)
            .map(|n| {
                let file = tempfile::tempfile().unwrap();
                file.set_len(n).unwrap();
                file
            })
            .collect();
        let sender = std::thread::spawn(move || {
            one.send(7, b"body", files.iter().map(|file| file.as_fd())).unwrap();
            one.send(8, b"", std::iter::empty()).unwrap();
        });
        let message = other.receive().unwrap();
        assert_eq!((message.kind, message.body.as_slice()), (7, b"body".as_slice()));
        let lens: Vec<u64> =
            message.fds.into_iter().map(|fd| std::fs::File::from(fd).metadata().unwrap().len()).collect();
        assert_eq!(lens, (0..300).collect::<Vec<_>>());
        assert_eq!(other.receive().unwrap().kind, 8);
        sender.join().unwrap();
        assert!(other.receive().is_err(), "the other side has gone");
    }

    #[test]
    fn a_stranger_is_turned_away() {
        let (mut stranger, other) = UnixStream::pair().unwrap();
        let mut link = Link::new(other, Duration::from_secs(10)).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n").unwrap();
        assert!(matches!(link.receive(), Err(SessionError::Handover { .. })));
    }
}

//! Descriptors of the frontend's choice. The gateway once closed whatever came along on its control thread: a socket that
//! lingers, or a file whose file system does not answer, held up every other frontend and the API for as long as its sender
//! wished. And any file was taken for guest memory, so that a slow one stalled the reactor that touched it.

mod common;

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use common::*;

/// A descriptor whose last close waits, for an hour or until this is dropped.
struct Lingering {
    socket: Option<TcpStream>,
    /// Reads nothing. Once it is closed the other end has nothing to wait for.
    _peer: TcpStream,
}

impl Lingering {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        let hour = libc::linger { l_onoff: 1, l_linger: 3600 };
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &hour).unwrap();
        socket.set_nonblocking(true).unwrap();
        let full = loop {
            if let Err(error) = socket.write(&[0; 1 << 16]) {
                break error;
            }
        };
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        Self { socket: Some(socket), _peer: peer }
    }

    fn fd(&self) -> RawFd {
        self.socket.as_ref().unwrap().as_raw_fd()
    }

    /// It was sent: the receiver's is the last one. It may have closed that already, and then closing ours waits.
    fn sent(&mut self) {
        let ours = self.socket.take();
        std::thread::spawn(move || drop(ours));
    }
}

fn message(request: u32, version: u32, payload: &[u8]) -> Vec<u8> {
    [&request.to_le_bytes()[..], &version.to_le_bytes(), &(payload.len() as u32).to_le_bytes(), payload]
        .concat()
}

/// Who is served while the close waits: another frontend's messages, and whoever asks the engine.
struct Neighbour(Frontend);

impl Neighbour {
    fn new(host: &Host) -> Self {
        Self(Frontend::connect(&host.memory_volume("neighbour")))
    }

    fn is_answered(&self, host: &Host) {
        self.0.get_u64(GET_FEATURES);
        assert_eq!(host.state("neighbour"), "connected");
    }
}

/// Send `bytes` with `count` times the descriptor, hang up if `leave`, and see that the neighbour is answered before the
/// descriptor can be closed.
fn disturbs_nobody(bytes: &[u8], count: usize, leave: bool) {
    let host = Host::new();
    let neighbour = Neighbour::new(&host);
    let socket = host.memory_volume("rude");
    let mut lingering = Lingering::new();
    let rude = Frontend::connect(&socket);
    rude.send_raw(bytes, &vec![lingering.fd(); count]);
    lingering.sent();
    if leave {
        drop(rude);
        host.wait_event("rude", "disconnected");
    } else {
        assert!(rude.receive().is_none(), "whoever sends what nobody asked for is disconnected");
    }
    for _ in 0..3 {
        neighbour.is_answered(&host);
    }
    // And the volume itself is served again, and can be detached.
    let next = Frontend::connect(&socket);
    next.get_u64(GET_FEATURES);
    drop(next);
    host.engine.detach("rude", true).unwrap();
    host.engine.close_volume("rude").unwrap();
    neighbour.is_answered(&host);
    drop(lingering);
}

#[test]
fn a_socket_sent_as_a_kick_disturbs_nobody_when_it_is_closed() {
    disturbs_nobody(&message(SET_VRING_KICK, 1, &0u64.to_le_bytes()), 1, false);
}

#[test]
fn a_descriptor_beside_a_message_that_carries_none_disturbs_nobody() {
    disturbs_nobody(&message(GET_FEATURES, 1, &[]), 1, false);
}

#[test]
fn more_descriptors_than_any_message_has_disturb_nobody() {
    // As many as the kernel sends at once: what does not fit into the receiver's buffer it closes itself.
    disturbs_nobody(&message(GET_FEATURES, 1, &[]), 253, false);
}

#[test]
fn a_descriptor_of_half_a_message_disturbs_nobody() {
    disturbs_nobody(&message(SET_VRING_KICK, 1, &0u64.to_le_bytes())[..5], 1, true);
}

/// What frontends left behind once went through one thread, in order and with the volume: while one close waited, a volume
/// of another guest stayed open, with the locks on its file.
#[test]
fn a_close_that_waits_keeps_no_volume_and_nothing_of_another_guest() {
    let host = Host::new();
    let neighbour = Neighbour::new(&host);
    let socket = host.memory_volume("rude");
    let mut lingering = Lingering::new();
    let rude = Frontend::connect(&socket);
    let (begin, end) = UnixStream::pair().unwrap();
    Frontend { stream: begin }.send_raw(b"x", &[lingering.fd()]);
    lingering.sent();
    // A queue within a queue: the channel that the frontend gives has the descriptor waiting in it.
    rude.send(SET_BACKEND_REQ_FD, 0, &[], &[end.as_raw_fd()]);
    drop(end);
    rude.get_u64(GET_FEATURES);
    drop(rude);
    host.wait_event("rude", "disconnected");
    neighbour.is_answered(&host);

    let path = host.disk_file(1 << 20);
    let backend = format!(r#"{{"type":"file","path":{path:?}}}"#);
    for name in ["polite", "polite-again"] {
        let polite = Driver::start(&host.volume(name, &backend, 1 << 20, 1), 16, F_VERSION_1);
        drop(polite);
        host.wait_state(name, "listening");
        host.engine.detach(name, false).unwrap();
        host.engine.close_volume(name).unwrap();
    }
    std::fs::remove_file(&path).unwrap();
    host.engine.detach("rude", true).unwrap();
    neighbour.is_answered(&host);
    drop(lingering);
}

#[test]
fn only_memory_is_taken_for_memory() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let path = host.disk_file(1 << 20);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let fd = file.as_raw_fd();
    let driver = Driver::start(&socket, 16, F_VERSION_1);
    let frontend = &driver.frontend;
    let region = words(&[1 << 40, 1 << 20, 1 << 40, 0]);
    assert!(!frontend.ack(SET_MEM_TABLE, &[pair(1, 0), region.clone()].concat(), &[fd]));
    host.wait_event("vol", "neither a memfd nor a file on tmpfs or hugetlbfs");
    assert!(!frontend.ack(ADD_MEM_REG, &[words(&[0]), region].concat(), &[fd]));
    let inflight = [words(&[1 << 16, 0]), 1u16.to_le_bytes().to_vec(), 16u16.to_le_bytes().to_vec()].concat();
    assert!(!frontend.ack(SET_INFLIGHT_FD, &inflight, &[fd]));
    assert!(!frontend.ack(SET_LOG_BASE, &words(&[1 << 16, 0]), &[fd]));
    assert!(!frontend.ack(SET_BACKEND_REQ_FD, &[], &[fd]));
    assert_eq!(host.state("vol"), "running");
}

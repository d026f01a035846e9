//! Frontends and guests that break the rules: the one device stops or the one connection ends, and nobody else notices.

mod common;

use common::*;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use ringstone_gateway::{Code, Level};

/// A second volume whose driver must be able to work whatever happens to the first.
struct Bystander(Driver);

impl Bystander {
    fn new(host: &Host) -> Self {
        Self(Driver::start(&host.memory_volume("bystander"), 16, F_VERSION_1))
    }

    fn is_served(&mut self) {
        self.0.write(DATA, &[0x5a; 512]);
        assert_eq!(self.0.request(OUT, 0, Some((DATA, 512))), 0);
        self.0.write(DATA, &[0; 512]);
        assert_eq!(self.0.request(IN, 0, Some((DATA, 512))), 0);
        assert_eq!(self.0.read(DATA, 512), [0x5a; 512]);
    }
}

type Breakage = (&'static str, fn(&mut Driver));

/// Ways to break a ring, with what the log line must say.
const BROKEN_RINGS: &[Breakage] = &[
    ("ahead of", |d| d.set_avail_index(1000)),
    ("outside a table", |d| d.offer(999)),
    ("outside a table", |d| {
        d.descriptor(0, 0, (DATA, 16, 1, 500));
        d.offer(0);
    }),
    ("loops", |d| {
        d.descriptor(0, 0, (DATA, 16, 1, 1));
        d.descriptor(0, 1, (DATA, 16, 1, 0));
        d.offer(0);
    }),
    ("readable descriptor after", |d| {
        d.descriptor(0, 0, (DATA, 16, 3, 1));
        d.descriptor(0, 1, (DATA, 16, 0, 0));
        d.offer(0);
    }),
    ("was not negotiated", |d| {
        d.descriptor(0, 0, (DATA, 32, 4, 0));
        d.offer(0);
    }),
    ("no status byte", |d| {
        d.descriptor(0, 0, (DATA, 16, 0, 0));
        d.offer(0);
    }),
    ("no status byte", |d| {
        d.lay(0, IN, 0, Some((DATA, 512)));
        d.descriptor(0, 2, (MEMORY + 4096, 1, 2, 0));
        d.offer(0);
    }),
];

#[test]
fn a_malformed_ring_stops_that_device_until_it_is_reset() {
    let host = Host::new();
    let mut bystander = Bystander::new(&host);
    let socket = host.memory_volume("vol");
    for (log, break_it) in BROKEN_RINGS {
        let mut driver = Driver::start(&socket, 16, F_VERSION_1);
        assert_eq!(driver.request(FLUSH, 0, None), 0);
        break_it(&mut driver);
        let event = host.wait_event("vol", "needs a reset");
        assert_eq!(event.level, Level::Error);
        assert!(event.message.contains(log), "{:?} does not say {log:?}", event.message);
        host.wait_state("vol", "needs_reset");
        assert_eq!(driver.frontend.get_u64(GET_STATUS) & 64, 64, "DEVICE_NEEDS_RESET");
        bystander.is_served();
        // After a reset the same connection works again.
        assert!(driver.frontend.ack(RESET_DEVICE, &[], &[]));
        let mut again = Driver::over(driver.frontend, 16);
        again.set_memory();
        again.start_vring(0);
        assert_eq!(again.request(FLUSH, 0, None), 0);
        drop(again);
        host.wait_state("vol", "listening");
    }
    bystander.is_served();
}

#[test]
fn a_request_that_is_wrong_in_itself_is_an_io_error_and_no_more() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 16, F_VERSION_1);
    let end = (64 << 20) / 512;
    assert_eq!(driver.request(IN, end, Some((DATA, 512))), 1, "behind the end");
    assert_eq!(driver.request(IN, u64::MAX, Some((DATA, 512))), 1, "sector that wraps");
    assert_eq!(driver.request(IN, 0, Some((DATA, 100))), 1, "ragged length");
    assert_eq!(driver.request(OUT, 0, Some((MEMORY + 512, 512))), 1, "outside guest memory");
    assert_eq!(driver.request(OUT, 0, Some((u64::MAX - 255, 512))), 1, "address that wraps");
    assert_eq!(driver.request(77, 0, None), 2, "unknown type");
    driver.write(DATA, &[words(&[0]), pair(u32::MAX, 0)].concat());
    assert_eq!(driver.request(DISCARD, 0, Some((DATA, 16))), 1, "a range longer than announced");
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    assert_eq!(host.state("vol"), "running");
}

#[test]
fn a_head_offered_again_while_in_flight_stops_the_device() {
    let host = Host::new();
    let slow = r#"{"type":"faulty","inner":{"type":"memory","hugepages":"off"},"delay_us":200000}"#;
    let socket = host.volume("vol", slow, 1 << 20, 1);
    let mut driver = Driver::start(&socket, 16, F_VERSION_1);
    driver.lay(0, IN, 0, Some((DATA, 512)));
    driver.offer(0);
    driver.offer(0);
    assert!(host.wait_event("vol", "needs a reset").message.contains("still in flight"));
}

/// Descriptors of no length cost a step each, which counts in the guest's turn, and are no data.
#[test]
fn a_chain_of_empty_descriptors_is_an_io_error() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 4096, F_VERSION_1);
    for at in 0..1000 {
        driver.descriptor(0, at, (DATA, 0, 1, at + 1));
    }
    driver.descriptor(0, 1000, (DATA, 1, 2, 0));
    driver.offer(0);
    assert_eq!(driver.wait_used(), (0, 1));
    assert_eq!(driver.read(DATA, 1), [1]);
    assert_eq!(driver.request(FLUSH, 0, None), 0);
}

/// A frontend that cuts its memory file makes every access to it a SIGBUS.
#[test]
fn memory_cut_behind_our_back_stops_the_device_and_not_the_process() {
    let host = Host::new();
    let mut bystander = Bystander::new(&host);
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 16, F_VERSION_1);
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    driver.memory.set_len(0).unwrap();
    driver.kick.write(1).unwrap();
    let event = host.wait_event("vol", "needs a reset");
    assert!(event.message.contains("cut the file"), "{}", event.message);
    bystander.is_served();
}

#[test]
fn messages_that_make_no_sense_end_the_connection() {
    let host = Host::new();
    let mut bystander = Bystander::new(&host);
    let socket = host.memory_volume("vol");
    let header = |request: u32, flags: u32, len: u32| -> Vec<u8> {
        [request.to_le_bytes(), flags.to_le_bytes(), len.to_le_bytes()].concat()
    };
    let cases: &[(&str, Vec<u8>)] = &[
        ("version", header(GET_FEATURES, 2, 0)),
        ("is a reply", header(GET_FEATURES, 5, 0)),
        ("more than any message", header(SET_MEM_TABLE, 1, 1 << 20)),
        ("not known", header(200, 1, 0)),
        ("does not fit", [header(SET_FEATURES, 1, 4), vec![0; 4]].concat()),
        ("does not fit", [header(SET_MEM_TABLE, 1, 8), pair(3, 0)].concat()),
        ("are offered", [header(SET_FEATURES, 1, 8), words(&[u64::MAX])].concat()),
        ("does not exist", [header(GET_VRING_BASE, 1, 8), pair(64, 0)].concat()),
        ("file descriptors", [header(SET_VRING_KICK, 1, 8), words(&[0])].concat()),
    ];
    for (log, bytes) in cases {
        let frontend = Frontend::connect(&socket);
        frontend.send_raw(bytes, &[]);
        frontend.wait_closed();
        let event = host.wait_event("vol", "was disconnected");
        assert!(event.message.contains(log), "{:?} does not say {log:?}", event.message);
        host.wait_state("vol", "listening");
    }
    bystander.is_served();
}

#[test]
fn a_message_that_never_ends_holds_nobody_up() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let half = Frontend::connect(&socket);
    half.send_raw(&[1, 0, 0, 0, 1, 0], &[]);
    let mut bystander = Bystander::new(&host);
    bystander.is_served();
    drop(half);
    assert!(host.wait_event("vol", "was disconnected").message.contains("middle of a message"));
    host.wait_state("vol", "listening");
}

#[test]
fn descriptors_that_are_no_eventfds_or_memory_that_is_too_short_are_refused() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let driver = Driver::prepare(&socket, 16, F_VERSION_1);
    let f = &driver.frontend;
    let (pipe, _other) = UnixStream::pair().unwrap();
    assert!(!f.ack(SET_VRING_CALL, &words(&[0]), &[pipe.as_raw_fd()]));
    host.wait_event("vol", "no eventfd");
    let mut table = pair(1, 0);
    table.extend(words(&[0, MEMORY * 2, USER, 0]));
    assert!(!f.ack(SET_MEM_TABLE, &table, &[driver.memory.as_raw_fd()]));
    host.wait_event("vol", "holds only");
    let mut overlapping = pair(2, 0);
    overlapping.extend(words(&[0, 8192, USER, 0, 4096, 8192, USER + 8192, 0]));
    let fd = driver.memory.as_raw_fd();
    assert!(!f.ack(SET_MEM_TABLE, &overlapping, &[fd, fd]));
    host.wait_event("vol", "overlap");
    assert!(!f.ack(SET_VRING_NUM, &pair(0, 3), &[]));
    host.wait_event("vol", "no valid ring size");
    // None of that did harm.
    driver.set_memory();
    driver.start_vring(0);
    host.wait_state("vol", "running");
}

#[test]
fn a_second_frontend_is_turned_away() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 16, F_VERSION_1);
    let second = Frontend::connect(&socket);
    second.wait_closed();
    host.wait_event("vol", "second frontend");
    assert_eq!(driver.request(FLUSH, 0, None), 0);
}

/// A datagram socket cannot be connected to as ours are, and was once taken for one that nobody has: it was removed from under
/// its daemon.
#[test]
fn a_socket_of_another_kind_is_somebody_elses() {
    use std::os::unix::net::UnixDatagram;
    let host = Host::new();
    host.memory_volume("vol");
    host.engine.detach("vol", false).unwrap();
    let path = host.path("datagram");
    let daemon = UnixDatagram::bind(&path).unwrap();
    assert_eq!(host.engine.attach("vol", &path, 1).unwrap_err().code(), Code::Exists);
    UnixDatagram::unbound().unwrap().send_to(b"still there", &path).unwrap();
    drop(daemon);
    // Nobody has it any more.
    host.engine.attach("vol", &path, 1).unwrap();
}

/// Asking whether somebody listens once waited in the queue of whoever does, and the control thread with it.
#[test]
fn a_socket_whose_owner_does_not_accept_holds_nobody_up() {
    use nix::sys::socket::{listen, Backlog};
    let host = Host::new();
    host.memory_volume("vol");
    host.engine.detach("vol", false).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(host.path("stuck")).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let _queued = UnixStream::connect(host.path("stuck")).unwrap();
    assert_eq!(host.engine.attach("vol", &host.path("stuck"), 1).unwrap_err().code(), Code::Exists);
}

/// A frontend that reconnected in the same moment was once turned away, as its own old connection was not yet seen off.
#[test]
fn a_frontend_may_reconnect_at_once() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    for _ in 0..50 {
        let mut driver = Driver::start(&socket, 16, F_VERSION_1);
        assert_eq!(driver.request(FLUSH, 0, None), 0);
    }
}

#[test]
fn connections_that_come_and_go_leave_nothing_behind() {
    let host = Host::new();
    let mut bystander = Bystander::new(&host);
    let socket = host.memory_volume("vol");
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for round in 0..50u16 {
        let driver = Driver::prepare(&socket, 16, F_VERSION_1);
        if round % 2 == 0 {
            driver.set_memory();
            driver.start_vring(0);
        }
        drop(driver);
        host.wait_state("vol", "listening");
    }
    bystander.is_served();
    wait_for("descriptors to be closed", || descriptors() <= before);
}

#[test]
fn names_sockets_and_sizes_are_checked_before_anything_is_made() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let code = |result: Result<(), ringstone_gateway::EngineError>| result.unwrap_err().code();
    let engine = &host.engine;
    assert_eq!(code(engine.attach("vol", &host.path("x"), 1)), Code::Busy);
    assert_eq!(code(engine.attach("none", &host.path("x"), 1)), Code::NotFound);
    assert_eq!(code(engine.close_volume("vol")), Code::Busy);
    assert_eq!(code(engine.resize_volume("vol", 512)), Code::Invalid);
    assert_eq!(code(engine.resize_volume("vol", (64 << 20) + 1)), Code::Invalid);
    let driver = Driver::start(&socket, 16, F_VERSION_1);
    assert_eq!(code(engine.detach("vol", false)), Code::Busy);
    engine.detach("vol", true).unwrap();
    driver.frontend.wait_closed();
    assert!(!socket.exists());
    assert_eq!(code(engine.attach("vol", &host.path("x"), 0)), Code::Invalid);
    assert_eq!(code(engine.attach("vol", &host.path("x"), 65)), Code::Invalid);
    std::fs::write(host.path("file"), "").unwrap();
    assert_eq!(code(engine.attach("vol", &host.path("file"), 1)), Code::Exists);
    let _other = std::os::unix::net::UnixListener::bind(host.path("taken")).unwrap();
    assert_eq!(code(engine.attach("vol", &host.path("taken"), 1)), Code::Exists);
    drop(std::os::unix::net::UnixListener::bind(host.path("stale")).unwrap());
    engine.attach("vol", &host.path("stale"), 1).unwrap();
    engine.detach("vol", false).unwrap();
    engine.close_volume("vol").unwrap();
}

/// Lost and torn writes must be visible to whoever looks, or no test with them means anything.
#[test]
fn a_faulty_drive_tears_loses_and_fails_as_told() {
    let host = Host::new();
    let write_then_read = |faults: &str| {
        let backend =
            format!(r#"{{"type":"faulty","inner":{{"type":"memory","hugepages":"off"}},{faults}}}"#);
        let socket = host.volume("vol", &backend, 1 << 20, 1);
        let mut driver = Driver::start(&socket, 16, F_VERSION_1);
        driver.write(DATA, &[7; 4096]);
        let status = driver.request(OUT, 0, Some((DATA, 4096)));
        let _ = driver.request(IN, 0, Some((DATA, 4096)));
        let read = driver.read(DATA, 4096);
        drop(driver);
        host.wait_state("vol", "listening");
        host.engine.detach("vol", false).unwrap();
        host.engine.close_volume("vol").unwrap();
        (status, read)
    };
    let (status, read) = write_then_read(r#""torn_per_million":1000000"#);
    assert_eq!((status, &read[..2048], &read[2048..]), (0, &[7; 2048][..], &[0; 2048][..]));
    let (status, read) = write_then_read(r#""lost_per_million":1000000"#);
    assert_eq!((status, read), (0, vec![0; 4096]));
    assert_eq!(write_then_read(r#""error_per_million":1000000"#).0, 1);
}

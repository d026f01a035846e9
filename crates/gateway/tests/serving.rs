//! Requests through a real socket, a real ring and a real reactor.

mod common;

use common::*;
use std::os::fd::{AsFd, AsRawFd};

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

/// Write, read back, flush, serial, discard, zeroes: on a driver that is running.
fn exercise(driver: &mut Driver, data: u64) {
    let bytes = pattern(data as u8, 8192);
    driver.write(data, &bytes);
    assert_eq!(driver.request(OUT, 128, Some((data, 8192))), 0);
    driver.write(data, &[0; 8192]);
    assert_eq!(driver.request(IN, 128, Some((data, 8192))), 0);
    assert_eq!(driver.read(data, 8192), bytes);
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    assert_eq!(driver.request(GET_ID, 0, Some((data, 20))), 0);
    assert_eq!(driver.read(data, 4), b"vol\0");
    driver.write(data, &[words(&[132]), pair(4, 0)].concat());
    assert_eq!(driver.request(DISCARD, 0, Some((data, 16))), 0);
    driver.write(data, &[words(&[140]), pair(4, 1)].concat());
    assert_eq!(driver.request(WRITE_ZEROES, 0, Some((data, 16))), 0);
    assert_eq!(driver.request(IN, 128, Some((data, 8192))), 0);
    let read = driver.read(data, 8192);
    assert_eq!(read[..2048], bytes[..2048]);
    assert_eq!(read[2048..4096], [0; 2048]);
    assert_eq!(read[4096..6144], bytes[4096..6144]);
    assert_eq!(read[6144..], [0; 2048]);
}

#[test]
fn every_request_type_on_memory_and_on_a_file() {
    let host = Host::new();
    let disk = host.disk_file(64 << 20);
    let file = format!(r#"{{"type":"file","path":{disk:?}}}"#);
    for backend in [r#"{"type":"memory","hugepages":"off"}"#, &file] {
        let socket = host.volume("vol", backend, 64 << 20, 1);
        for features in [0, F_EVENT_IDX, F_INDIRECT | F_EVENT_IDX] {
            let mut driver = Driver::start(&socket, 8, F_VERSION_1 | F_FLUSH | features);
            exercise(&mut driver, DATA);
            drop(driver);
            host.wait_state("vol", "listening");
        }
        host.engine.detach("vol", false).unwrap();
        host.engine.close_volume("vol").unwrap();
    }
    std::fs::remove_file(disk).unwrap();
}

/// A guest's firmware reads into buffers at odd addresses; direct I/O does not take them.
#[test]
fn buffers_that_direct_io_cannot_take_go_through_a_bounce_buffer() {
    let host = Host::new();
    let disk = host.disk_file(64 << 20);
    let socket =
        host.volume("vol", &format!(r#"{{"type":"file","path":{disk:?},"direct":"on"}}"#), 64 << 20, 1);
    let mut driver = Driver::start(&socket, 8, F_VERSION_1);
    // Longer than one bounce buffer, so that it takes steps.
    let len = 600 << 10;
    let bytes = pattern(3, len);
    driver.write(DATA + 13, &bytes);
    assert_eq!(driver.request(OUT, 0, Some((DATA + 13, len as u32))), 0);
    assert_eq!(driver.request(IN, 0, Some((DATA + (2 << 20) + 7, len as u32))), 0);
    assert_eq!(driver.read(DATA + (2 << 20) + 7, len), bytes);
    assert_eq!(std::fs::read(&disk).unwrap()[..len], bytes);
    drop(driver);
    std::fs::remove_file(disk).unwrap();
}

#[test]
fn rings_of_every_size_wrap_around() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    for size in [4u16, 64, 1024, 32768] {
        let mut driver = Driver::start(&socket, size, F_VERSION_1 | F_EVENT_IDX);
        for n in 0..u32::from(size).min(300) * 2 + 3 {
            driver.write(DATA, &n.to_le_bytes());
            assert_eq!(driver.request(OUT, u64::from(n), Some((DATA, 512))), 0);
        }
        drop(driver);
        host.wait_state("vol", "listening");
    }
}

/// A ring of two has room for a request only through an indirect table.
#[test]
fn a_ring_of_two_serves_indirect_tables() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 2, F_VERSION_1 | F_INDIRECT);
    let table = DATA + 0x10000;
    let (header, status, data) = (DATA + 0x20000, DATA + 0x20100, DATA + 0x30000);
    for round in 0..5u8 {
        driver.write(header, &[words(&[1]), words(&[u64::from(round) * 8])].concat());
        driver.write(status, &[0xff]);
        driver.write(data, &pattern(round, 4096));
        // Many segments: more than the ring has entries, as drivers size the table by seg_max.
        driver.descriptor(table, 0, (header, 16, 1, 1));
        for i in 0..8 {
            driver.descriptor(table, i + 1, (data + 512 * u64::from(i), 512, 1, i + 2));
        }
        driver.descriptor(table, 9, (status, 1, 2, 0));
        driver.descriptor(0, 0, (table, 160, 4, 0));
        driver.offer(0);
        assert_eq!(driver.wait_used(), (0, 1));
        assert_eq!(driver.read(status, 1), [0]);
        driver.write(header, &[words(&[0]), words(&[u64::from(round) * 8])].concat());
        driver.write(data, &[0; 4096]);
        driver.descriptor(table, 1, (data, 4096, 3, 9));
        driver.offer(0);
        assert_eq!(driver.wait_used(), (0, 4097));
        assert_eq!(driver.read(data, 4096), pattern(round, 4096));
    }
}

#[test]
fn calls_come_when_the_driver_asks_and_only_then() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_EVENT_IDX);
    // Starting a ring calls once, in case an earlier backend's call was lost.
    wait_for("the first call", || driver.call.read().is_ok());
    driver.set_used_event(2);
    for _ in 0..2 {
        assert_eq!(driver.request(FLUSH, 0, None), 0);
    }
    // The reactor submits calls before it sleeps; asleep means that no call is to come.
    assert!(driver.call.read().is_err(), "a call before the entry asked for");
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    wait_for("the call for entry 2", || driver.call.read().is_ok());
}

#[test]
fn without_event_idx_the_no_interrupt_flag_decides() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 64, F_VERSION_1);
    wait_for("the first call", || driver.call.read().is_ok());
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    wait_for("a call", || driver.call.read().is_ok());
    driver.write(16 * 64, &1u16.to_le_bytes());
    for _ in 0..3 {
        assert_eq!(driver.request(FLUSH, 0, None), 0);
    }
    driver.write(16 * 64, &0u16.to_le_bytes());
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    wait_for("a call", || driver.call.read().is_ok());
}

/// Kicks wake a reactor that sleeps; while it polls they are not asked for.
#[test]
fn a_sleeping_reactor_wakes_for_a_kick() {
    let host = Host::with_idle_us(0);
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 16, F_VERSION_1 | F_EVENT_IDX);
    for _ in 0..200 {
        assert_eq!(driver.request(FLUSH, 0, None), 0);
    }
}

#[test]
fn guest_memory_may_change_under_a_running_ring() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 16, F_VERSION_1);
    exercise_simple(&mut driver, 1);
    for round in 0..20u8 {
        // A second region comes and goes; the first is set anew every other round.
        let extra = tempfile::tempfile_in("/dev/shm").unwrap();
        extra.set_len(1 << 20).unwrap();
        let region = words(&[0, 1 << 40, 1 << 20, USER + (1 << 41), 0]);
        assert!(driver.frontend.ack(ADD_MEM_REG, &region, &[extra.as_raw_fd()]));
        assert_eq!(driver.request(IN, 0, Some((1 << 40, 512))), 0);
        assert!(driver.frontend.ack(REM_MEM_REG, &region, &[]));
        assert_eq!(driver.request(IN, 0, Some((1 << 40, 512))), 1, "the region is gone");
        if round % 2 == 0 {
            driver.set_memory();
        }
        exercise_simple(&mut driver, round);
    }
}

fn exercise_simple(driver: &mut Driver, seed: u8) {
    driver.write(DATA, &pattern(seed, 4096));
    assert_eq!(driver.request(OUT, 8, Some((DATA, 4096))), 0);
    driver.write(DATA, &[0; 4096]);
    assert_eq!(driver.request(IN, 8, Some((DATA, 4096))), 0);
    assert_eq!(driver.read(DATA, 4096), pattern(seed, 4096));
}

/// GET_VRING_BASE answers only when all that was taken is done, and the ring goes on from there.
#[test]
fn stopping_a_ring_waits_for_what_is_in_flight() {
    let host = Host::new();
    let slow = r#"{"type":"faulty","inner":{"type":"memory","hugepages":"off"},"delay_us":300000}"#;
    let socket = host.volume("vol", slow, 1 << 20, 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1);
    for n in 0..10u16 {
        driver.lay(n * 3, OUT, u64::from(n), Some((DATA + 512 * u64::from(n), 512)));
        driver.offer(n * 3);
    }
    wait_for("the requests to be taken", || host.in_flight() > 0);
    driver.frontend.send(GET_VRING_BASE, 0, &pair(0, 0), &[]);
    let base = driver.frontend.receive().unwrap().0;
    let base = u32::from_le_bytes(base[4..8].try_into().unwrap());
    assert_eq!(u32::from(driver.used_index()), base, "everything taken is used");
    assert!(base > 0);
    driver.start_vring(base);
    for _ in 0..10 {
        driver.wait_used();
    }
    assert!((0..10u16).all(|n| driver.status(n * 3) == 0));
}

#[test]
fn growing_a_volume_reaches_the_guest() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 16, F_VERSION_1);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(driver.frontend.ack(SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()]));
    drop(theirs);
    let end = (64 << 20) / 512;
    assert_eq!(driver.request(IN, end, Some((DATA, 512))), 1);
    host.engine.resize_volume("vol", 128 << 20).unwrap();
    let mut message = [0u8; 12];
    std::io::Read::read_exact(&mut &ours, &mut message).unwrap();
    assert_eq!(message[..8], pair(2, 1)[..], "BACKEND_CONFIG_CHANGE_MSG, version 1");
    assert_eq!(capacity(&driver.frontend), 2 * end);
    assert_eq!(driver.request(IN, end, Some((DATA, 512))), 0);
}

fn capacity(frontend: &Frontend) -> u64 {
    let bytes = config(frontend, 0, 60);
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

fn config(frontend: &Frontend, offset: u32, len: u32) -> Vec<u8> {
    let mut payload = [offset.to_le_bytes(), len.to_le_bytes(), [0; 4]].concat();
    payload.extend(vec![0; len as usize]);
    frontend.send(GET_CONFIG, 0, &payload, &[]);
    frontend.receive().unwrap().0[12..].to_vec()
}

/// QEMU 11.1 refuses a guest that got it from an older QEMU and migrates; those that have it keep it.
#[test]
fn size_max_is_not_offered_any_more_and_still_taken() {
    const SIZE_MAX: u64 = 1 << 1;
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let frontend = Frontend::connect(&socket);
    let offered = frontend.get_u64(GET_FEATURES);
    assert_eq!(offered & SIZE_MAX, 0);
    frontend.negotiate(F_VERSION_1);
    assert!(frontend.ack(SET_FEATURES, &words(&[F_PROTOCOL | F_VERSION_1 | SIZE_MAX]), &[]));
    assert!(!frontend.ack(SET_FEATURES, &words(&[F_PROTOCOL | F_VERSION_1 | 1 << 4]), &[]));
}

/// Some frontends ask for 60 bytes of configuration, some for 256, QEMU for what its own structure has.
#[test]
fn configuration_space_is_answered_at_any_length() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let frontend = Frontend::connect(&socket);
    frontend.negotiate(F_VERSION_1);
    let whole = config(&frontend, 0, 256);
    assert_eq!(whole.len(), 256);
    assert!(u32::from_le_bytes(whole[8..12].try_into().unwrap()) > 0, "size_max");
    assert_eq!(u16::from_le_bytes([whole[34], whole[35]]), 2, "num_queues");
    for (offset, len) in [(0, 8), (0, 60), (0, 96), (20, 4), (56, 100)] {
        assert_eq!(config(&frontend, offset, len), whole[offset as usize..][..len as usize]);
    }
    assert!(config(&frontend, 200, 100).is_empty(), "behind the end: no bytes");
    // The write cache is the one thing a driver may set.
    let set = |offset: u32, value: u8| {
        frontend.ack(
            SET_CONFIG,
            &[&offset.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 4], &[value]].concat(),
            &[],
        )
    };
    assert!(set(32, 0));
    assert_eq!(config(&frontend, 32, 1), [0]);
    assert!(!set(0, 1));
    assert!(!set(32, 7));
}

/// What `vhost`, the crate of the rust-vmm project, makes of us.
/// QEMU 7.2 pauses a VM by SET_STATUS(0) and asks for the vrings' bases after that; the base it got was 0, and a guest that
/// was migrated found its disk broken at the destination.
#[test]
fn where_a_vring_stopped_is_known_after_the_status_is_reset() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 128, F_VERSION_1 | F_FLUSH);
    for _ in 0..5 {
        assert_eq!(driver.request(FLUSH, 0, None), 0);
    }
    assert!(driver.frontend.ack(SET_STATUS, &words(&[0]), &[]));
    assert_eq!(host.state("vol"), "connected");
    assert!(driver.frontend.ack(SET_VRING_ENABLE, &pair(0, 0), &[]));
    driver.frontend.send(GET_VRING_BASE, 0, &pair(0, 0), &[]);
    assert_eq!(driver.frontend.receive().unwrap().0, pair(0, 5));
    driver.start_vring(5);
    assert_eq!(driver.request(FLUSH, 0, None), 0);
}

#[test]
fn an_independent_frontend_library_agrees() {
    use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
    use vhost::vhost_user::{Frontend as Library, VhostUserFrontend};
    use vhost::VhostBackend;
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut library = Library::connect(&socket, 64).unwrap();
    library.set_owner().unwrap();
    let features = library.get_features().unwrap();
    library.set_features(features).unwrap();
    let protocol = library.get_protocol_features().unwrap();
    for wanted in [
        VhostUserProtocolFeatures::MQ,
        VhostUserProtocolFeatures::LOG_SHMFD,
        VhostUserProtocolFeatures::REPLY_ACK,
        VhostUserProtocolFeatures::BACKEND_REQ,
        VhostUserProtocolFeatures::CONFIG,
        VhostUserProtocolFeatures::INFLIGHT_SHMFD,
        VhostUserProtocolFeatures::RESET_DEVICE,
        VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
        VhostUserProtocolFeatures::STATUS,
    ] {
        assert!(protocol.contains(wanted), "{wanted:?}");
    }
    library.set_protocol_features(protocol & !VhostUserProtocolFeatures::STATUS).unwrap();
    library.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(library.get_queue_num().unwrap(), 2);
    assert_eq!(library.get_max_mem_slots().unwrap(), 509);
    let ask = VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues: 2, queue_size: 128 };
    let (inflight, file) = library.get_inflight_fd(&ask).unwrap();
    assert!(inflight.mmap_size >= 2 * (16 + 16 * 128));
    library.set_inflight_fd(&inflight, file.as_fd().as_raw_fd()).unwrap();
    library.reset_device().unwrap();
    // The rings are packed: both positions 0, both wrap counters 1.
    assert_eq!(library.get_vring_base(0).unwrap(), 0x8000_8000);
}

/// A removed reactor's slot once said "polling" for ever, as its thread woke to end: whoever watches for reactors that
/// poll and do not turn found one that was stuck, and ended the gateway.
#[test]
fn a_removed_reactor_says_so() {
    let host = Host::with(vec![0], 100);
    let core = 1;
    if std::thread::available_parallelism().unwrap().get() < 2 {
        eprintln!("skipped: a second reactor takes a second core");
        return;
    }
    for _ in 0..20 {
        let index = host.engine.add_reactor(core).unwrap().index;
        // docs/formats/stats-page.md: the offset of the first reactor's slot, of 256 bytes, whose second word is the state.
        let state = || {
            let bytes = std::fs::read(host.path("stats")).unwrap();
            let at = u64::from_le_bytes(bytes[40..48].try_into().unwrap()) as usize + 256 * index;
            u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap())
        };
        wait_for("the reactor to sleep", || state() == 2);
        host.engine.remove_reactor(core).unwrap();
        assert_eq!(state(), 3);
    }
}

/// A queue whose requests took long to finish could not be told to go elsewhere meanwhile: "it does not run".
#[test]
fn a_queue_on_its_way_can_be_sent_elsewhere() {
    let host = Host::with(vec![0], 100);
    let slow = r#"{"type":"faulty","inner":{"type":"memory","hugepages":"off"},"delay_us":100000}"#;
    let socket = host.volume("vol", slow, 1 << 20, 1);
    let mut driver = Driver::start(&socket, 16, F_VERSION_1);
    if std::thread::available_parallelism().unwrap().get() < 2 {
        eprintln!("skipped: a second reactor takes a second core");
        return;
    }
    let there = host.engine.add_reactor(1).unwrap().index;
    let reactor = || host.engine.attachments().unwrap()[0].queues[0].reactor;
    for round in 0..6 {
        driver.lay(0, FLUSH, 0, None);
        driver.offer(0);
        // There and back before the request is done, or back and there.
        for core in [1, 0, 1].into_iter().take(2 + round % 2) {
            host.engine.move_queue("vol", 0, core).unwrap();
        }
        assert_eq!(driver.wait_used().0, 0);
        wait_for("the queue to arrive", || (reactor() == Some(there)) == (round % 2 == 1));
        assert_eq!(driver.request(FLUSH, 0, None), 0);
    }
}

//! GET_VRING_BASE with GET_VRING_BASE_INFLIGHT, and GET_VRING_BASE_SKIP_DRAIN: a vring stops without finishing what the drive does not have yet. That stays
//! in the in-flight region, which the frontend takes along, and is done where the vring goes on.

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::*;

const F_INFLIGHT: u64 = 1 << 20;
const F_SKIP_DRAIN: u64 = 1 << 23;
const SIZE: u16 = 64;
/// Requests of three descriptors each.
const REQUESTS: u16 = 16;
const ROUNDS: u16 = 40;

/// `VhostUserInflight` and the memory that it describes, with where the first queue's part is.
struct Region {
    wire: Vec<u8>,
    file: File,
    begin: u64,
    entries: u16,
}

impl Region {
    /// Ask for a region of [`SIZE`] entries, for a ring of `entries`.
    fn ask(frontend: &Frontend, entries: u16) -> Self {
        let mut wire = words(&[0, 0]);
        wire.extend(1u16.to_le_bytes());
        wire.extend(SIZE.to_le_bytes());
        frontend.send(GET_INFLIGHT_FD, 0, &wire, &[]);
        let (reply, fds) = frontend.receive().unwrap();
        let fd: OwnedFd = fds.into_iter().next().unwrap();
        let begin = if entries > SIZE { 16 * u64::from(SIZE + 1).next_multiple_of(4) } else { 0 };
        Self { wire: reply, file: fd.into(), begin, entries }
    }

    fn set(&self, frontend: &Frontend) {
        assert!(frontend.ack(SET_INFLIGHT_FD, &self.wire, &[self.file.as_raw_fd()]));
    }

    /// Heads that are in flight: `QueueRegionSplit` has 16 bytes, and 16 for each entry, beginning with the flag.
    fn undone(&self) -> BTreeSet<u32> {
        let mut bytes = vec![0; 16 * (usize::from(self.entries) + 1)];
        self.file.read_exact_at(&mut bytes, self.begin).unwrap();
        (0..u32::from(self.entries)).filter(|head| bytes[16 + 16 * *head as usize] == 1).collect()
    }
}

/// A vring of `size` with a region, of a frontend that leaves out the protocol features `without`.
fn start(path: &Path, size: u16, without: u64) -> (Driver, Region) {
    let driver = Driver::prepare(path, size, F_VERSION_1);
    negotiate(&driver.frontend, without);
    let region = Region::ask(&driver.frontend, size);
    region.set(&driver.frontend);
    driver.set_memory();
    driver.start_vring(0);
    (driver, region)
}

fn negotiate(frontend: &Frontend, without: u64) {
    let features = frontend.get_u64(GET_PROTOCOL_FEATURES) & !without;
    assert!(frontend.ack(SET_PROTOCOL_FEATURES, &words(&[features]), &[]));
}

fn offer_all(driver: &mut Driver, data: (u64, u32)) -> Vec<u32> {
    let heads: Vec<u16> = (0..REQUESTS).map(|number| 3 * number).collect();
    for head in &heads {
        driver.lay(*head, IN, 0, Some(data));
    }
    heads.iter().for_each(|head| driver.offer(*head));
    heads.into_iter().map(u32::from).collect()
}

/// Stop a busy vring of `size` over and over: every request is done once, there or where the vring goes on. Answers how many were left.
fn goes_on(socket: &Path, size: u16, data: (u64, u32), message: u32, without: u64) -> usize {
    let (mut driver, region) = start(socket, size, without);
    let mut left = 0;
    let mut before = 0u16;
    for round in 0.. {
        // On a busy machine the requests may be done each time before the vring is asked to stop.
        if round >= ROUNDS && left > 0 || round >= 50 * ROUNDS {
            break;
        }
        let heads = offer_all(&mut driver, data);
        let base = driver.stop_vring_by(message);
        let taken: BTreeSet<u32> =
            heads.iter().take(usize::from((base as u16).wrapping_sub(before))).copied().collect();
        let done: BTreeSet<u32> = std::iter::from_fn(|| driver.next_used()).map(|(head, _)| head).collect();
        let undone = region.undone();
        assert!(done.is_disjoint(&undone), "{done:?} {undone:?}");
        assert_eq!(&done | &undone, taken, "what was taken is done or noted");
        for head in &heads {
            let wanted = if done.contains(head) { 0 } else { 0xff };
            assert_eq!(driver.status(*head as u16), wanted, "request {head}");
        }
        left += undone.len();
        // There, or in another place that gets the region: a new connection knows nothing else.
        if round % 2 == 1 {
            driver.reconnect(socket, F_VERSION_1);
            negotiate(&driver.frontend, without);
            region.set(&driver.frontend);
            driver.set_memory();
        }
        driver.start_vring(base);
        let mut rest: BTreeSet<u32> = heads.into_iter().filter(|head| !done.contains(head)).collect();
        while !rest.is_empty() {
            let (head, len) = driver.wait_used();
            assert!(rest.remove(&head), "request {head} is done again");
            assert_eq!((driver.status(head as u16), len), (0, data.1 + 1));
        }
        assert_eq!(driver.request(FLUSH, 0, None), 0);
        assert_eq!(driver.next_used(), None);
        assert_eq!(region.undone(), BTreeSet::new());
        before = before.wrapping_add(REQUESTS + 1);
    }
    left
}

#[test]
fn long_copies_are_left_undone_and_done_where_the_vring_goes_on() {
    let host = Host::new();
    let socket = host.volume("vol", r#"{"type":"memory","hugepages":"off"}"#, 16 << 20, 1);
    let left = goes_on(&socket, SIZE, (DATA, 4 << 20), GET_VRING_BASE, F_SKIP_DRAIN);
    assert!(left > 0, "no vring was stopped in the middle of its requests");
}

#[test]
fn a_frontend_may_ask_with_each_message() {
    let host = Host::new();
    let socket = host.volume("vol", r#"{"type":"memory","hugepages":"off"}"#, 16 << 20, 1);
    let left = goes_on(&socket, SIZE, (DATA, 4 << 20), GET_VRING_BASE_SKIP_DRAIN, 0);
    assert!(left > 0, "no vring was stopped in the middle of its requests");
}

/// Reads to odd addresses share few bounce buffers; most wait for one when the vring is to stop.
#[test]
fn requests_that_wait_for_a_bounce_buffer_are_left_undone() {
    let host = Host::new();
    let disk = host.disk_file(16 << 20);
    let backend = format!(r#"{{"type":"file","path":{disk:?},"direct":"on"}}"#);
    let socket = host.volume("vol", &backend, 16 << 20, 1);
    // Others' share of the buffers makes ours small.
    let neighbours: Vec<Driver> = (0..4)
        .map(|number| {
            Driver::start(
                &host.volume(&format!("vol-{number}"), r#"{"type":"null"}"#, 1 << 20, 1),
                16,
                F_VERSION_1,
            )
        })
        .collect();
    let left = goes_on(&socket, SIZE, (DATA + 13, 2 << 20), GET_VRING_BASE_SKIP_DRAIN, 0);
    assert!(left > 0, "no vring was stopped in the middle of its requests");
    drop(neighbours);
    std::fs::remove_file(disk).unwrap();
}

/// What the drive has is waited for unless the drive gives it back: either way it is done once.
#[test]
fn requests_at_a_drive_are_finished_or_given_back() {
    let host = Host::new();
    let disk = host.disk_file(16 << 20);
    let backend = format!(r#"{{"type":"file","path":{disk:?},"direct":"on"}}"#);
    let socket = host.volume("vol", &backend, 16 << 20, 1);
    goes_on(&socket, SIZE, (DATA, 2 << 20), GET_VRING_BASE_SKIP_DRAIN, 0);
    std::fs::remove_file(disk).unwrap();
}

const SLOW: &str = r#"{"type":"faulty","inner":{"type":"memory","hugepages":"off"},"delay_us":20000}"#;

fn leaves_what_has_not_reached_the_drive(message: u32, without: u64) {
    let host = Host::new();
    let socket = host.volume("vol", SLOW, 1 << 20, 1);
    let (mut driver, region) = start(&socket, SIZE, without);
    let heads: BTreeSet<u32> = offer_all(&mut driver, (DATA, 512)).into_iter().collect();
    wait_for("all to be taken", || region.undone().len() == heads.len());
    // As QEMU does it.
    assert!(driver.frontend.ack(SET_VRING_ENABLE, &pair(0, 0), &[]));
    let base = driver.stop_vring_by(message);
    assert_eq!((base, region.undone(), driver.next_used()), (heads.len() as u32, heads.clone(), None));
    driver.start_vring(base);
    assert_eq!(heads.iter().map(|_| driver.wait_used().0).collect::<BTreeSet<u32>>(), heads);
}

#[test]
fn requests_that_have_not_reached_the_drive_are_left_undone() {
    leaves_what_has_not_reached_the_drive(GET_VRING_BASE, F_SKIP_DRAIN);
    leaves_what_has_not_reached_the_drive(GET_VRING_BASE_SKIP_DRAIN, 0);
}

/// The base is asked for as it always was, or the vring is enabled again: nothing is left behind.
#[test]
fn a_disabled_vring_finishes_what_it_has_unless_it_is_told_otherwise() {
    let host = Host::new();
    let socket = host.volume("vol", SLOW, 1 << 20, 1);
    let cases = [(0, true), (0, false), (F_SKIP_DRAIN, false), (F_INFLIGHT | F_SKIP_DRAIN, false)];
    for (without, stop) in cases {
        let (mut driver, region) = start(&socket, SIZE, without);
        let heads: BTreeSet<u32> = offer_all(&mut driver, (DATA, 512)).into_iter().collect();
        wait_for("all to be taken", || region.undone().len() == heads.len());
        assert!(driver.frontend.ack(SET_VRING_ENABLE, &pair(0, 0), &[]));
        if stop {
            assert_eq!(driver.stop_vring(), heads.len() as u32);
            assert_eq!(region.undone(), BTreeSet::new());
        } else {
            assert!(driver.frontend.ack(SET_VRING_ENABLE, &pair(0, 1), &[]));
        }
        assert_eq!(heads.iter().map(|_| driver.wait_used().0).collect::<BTreeSet<u32>>(), heads);
        assert_eq!(driver.next_used(), None);
        driver.frontend.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

/// A frontend that does not take the region along finds nothing undone in it.
fn finishes_everything(message: u32, without: u64) {
    let host = Host::new();
    let socket = host.volume("vol", r#"{"type":"memory","hugepages":"off"}"#, 16 << 20, 1);
    let (mut driver, region) = start(&socket, SIZE, without);
    for _ in 0..ROUNDS {
        let mut rest: BTreeSet<u32> = offer_all(&mut driver, (DATA, 4 << 20)).into_iter().collect();
        let base = driver.stop_vring_by(message);
        assert_eq!(region.undone(), BTreeSet::new());
        driver.start_vring(base);
        while !rest.is_empty() {
            assert!(rest.remove(&driver.wait_used().0));
        }
    }
}

#[test]
fn without_the_feature_everything_taken_is_finished() {
    finishes_everything(GET_VRING_BASE, F_INFLIGHT | F_SKIP_DRAIN);
}

#[test]
fn a_frontend_that_can_ask_each_time_and_does_not_finds_everything_finished() {
    finishes_everything(GET_VRING_BASE, 0);
}

#[test]
fn asking_without_the_features_it_takes_finishes_everything() {
    finishes_everything(GET_VRING_BASE_SKIP_DRAIN, F_SKIP_DRAIN);
    finishes_everything(GET_VRING_BASE_SKIP_DRAIN, F_INFLIGHT);
}

/// As QEMU 10.0 does: it asks for a region of as many entries as it was told, and then its rings are of 1024.
#[test]
fn a_ring_larger_than_the_region_was_asked_for_is_noted_too() {
    let host = Host::new();
    let socket = host.volume("vol", r#"{"type":"memory","hugepages":"off"}"#, 16 << 20, 1);
    let left = goes_on(&socket, 1024, (DATA, 4 << 20), GET_VRING_BASE_SKIP_DRAIN, 0);
    assert!(left > 0, "no vring was stopped in the middle of its requests");
}

#[test]
fn a_ring_that_no_region_has_room_for_is_served_and_told() {
    let host = Host::new();
    let socket = host.volume("vol", r#"{"type":"memory","hugepages":"off"}"#, 16 << 20, 1);
    let (mut driver, _region) = start(&socket, 2048, 0);
    host.wait_event("vol", "no room");
    // Nobody would know of what is left undone.
    let heads: BTreeSet<u32> = offer_all(&mut driver, (DATA, 4 << 20)).into_iter().collect();
    let base = driver.stop_vring_by(GET_VRING_BASE_SKIP_DRAIN);
    let mut done: BTreeSet<u32> = std::iter::from_fn(|| driver.next_used()).map(|(head, _)| head).collect();
    assert_eq!(done.len(), base as usize);
    driver.start_vring(base);
    while done.len() < heads.len() {
        assert!(done.insert(driver.wait_used().0));
    }
    assert_eq!(done, heads);
}

//! One engine goes on where another stands, under a driver that must not notice; and the old one goes on when the new one
//! cannot.

mod common;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::upgrade::{settings, upgrade, DRAIN};
use common::*;
use ringstone_gateway::{format_store, Engine, EngineError, Takeover};
use ringstone_store::Command;
use ringstone_vhost_user::Link;

const LIMIT: Duration = Duration::from_secs(20);

fn state_of(engine: &Engine) -> &'static str {
    engine.attachments().unwrap()[0].state
}

fn goes_over(backend: impl Fn(&Host) -> String, features: u64) {
    let host = Host::new();
    let socket = host.volume("vol", &backend(&host), 16 << 20, 2);
    let mut driver = Driver::start(&socket, 128, features | F_VERSION_1 | F_FLUSH);
    driver.write(DATA, &[0x5a; 4096]);
    assert_eq!(driver.request(OUT, 8, Some((DATA, 4096))), 0);
    let engine = upgrade(&host, 0).unwrap();
    assert_eq!(state_of(&engine), "running");
    // The same connection, the same rings: what was written is there, and more can be.
    driver.write(DATA, &[0; 4096]);
    assert_eq!(driver.request(IN, 8, Some((DATA, 4096))), 0);
    assert_eq!(driver.read(DATA, 4096), vec![0x5a; 4096]);
    for sector in 0..300 {
        driver.write(DATA, &[sector as u8; 512]);
        assert_eq!(driver.request(OUT, sector, Some((DATA, 512))), 0);
    }
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    assert_eq!(driver.frontend.get_u64(GET_QUEUE_NUM), 2);
    // A frontend that goes, and another that comes, are the new engine's too.
    drop(driver);
    wait_for("the frontend to be gone", || state_of(&engine) == "listening");
    let mut next = Driver::start(&socket, 64, F_VERSION_1);
    assert_eq!(next.request(IN, 299, Some((DATA, 512))), 0);
    assert_eq!(next.read(DATA, 512), vec![299u16 as u8; 512]);
    assert!(socket.exists());
    drop(next);
    engine.detach("vol", true).unwrap();
    assert!(!socket.exists());
}

#[test]
fn memory_goes_over_with_its_content() {
    goes_over(|_| r#"{"type":"memory","hugepages":"off"}"#.into(), 0);
}

#[test]
fn a_file_goes_over_with_its_lock() {
    goes_over(
        |host| format!(r#"{{"type":"file","path":{:?}}}"#, host.disk_file(16 << 20)),
        F_EVENT_IDX | F_INDIRECT,
    );
}

/// The new process reads the store from the drive, and has it when it is told to go.
#[test]
fn a_volume_of_a_store_goes_over_with_its_keeper() {
    goes_over(
        |host| {
            let path = host.path("store");
            format_store(&path, Some(64 << 20), 64 << 10).unwrap();
            let create = Command::Create {
                name: "vol".into(),
                size: 16 << 20,
                created_s: 1,
                seal: Default::default(),
            };
            host.engine.open_store(&path).unwrap().call(create).unwrap();
            format!(r#"{{"type":"store","path":{path:?},"volume":"vol"}}"#)
        },
        F_EVENT_IDX,
    );
}

#[test]
fn a_chain_of_upgrades_loses_nothing() {
    let mut host = Host::new();
    let socket = host.volume("vol", r#"{"type":"memory","hugepages":"off"}"#, 16 << 20, 1);
    let mut driver = Driver::start(&socket, 128, F_VERSION_1 | F_EVENT_IDX);
    for round in 0..20u64 {
        driver.write(DATA, &[round as u8 + 1; 512]);
        assert_eq!(driver.request(OUT, round, Some((DATA, 512))), 0);
        host.engine = upgrade(&host, 0).unwrap();
    }
    for round in 0..20u64 {
        assert_eq!(driver.request(IN, round, Some((DATA, 512))), 0);
        assert_eq!(driver.read(DATA, 512), vec![round as u8 + 1; 512]);
    }
}

/// The new process cannot even start: nothing has stopped.
#[test]
fn a_new_engine_without_a_core_changes_nothing() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 128, F_VERSION_1);
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    let error = upgrade(&host, 4000).map(drop).unwrap_err();
    assert!(error.to_string().contains("core 4000"), "{error}");
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    assert!(host.path("stats").exists(), "the stats page is the old engine's");
}

/// A message as a new process sends it: kind and body.
type Said = (u32, &'static [u8]);

/// A new process that dies or refuses after each of the steps before the word to go.
#[test]
fn the_old_engine_goes_on_whenever_the_new_one_fails() {
    const HELLO: Said = (1, br#"{"version":"3","formats":[1]}"#);
    const READY: Said = (3, b"");
    const REFUSED: Said = (8, br#"{"reason":"I do not feel like it"}"#);
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 128, F_VERSION_1);
    let stories: [(&[Said], usize, &str); 7] = [
        (&[], 0, "has gone"),
        (&[(1, br#"{"version":"9","formats":[7]}"#)], 0, "does not read"),
        (&[(1, b"{")], 0, "EOF"),
        (&[HELLO], 1, "has gone"),
        (&[HELLO, (5, b"")], 1, "said 5"),
        (&[HELLO, READY], 2, "has gone"),
        (&[HELLO, READY, REFUSED], 2, "feel like it"),
    ];
    for (said, heard, wanted) in stories {
        let (old, new) = UnixStream::pair().unwrap();
        let fake = std::thread::spawn(move || {
            let mut link = Link::new(new, LIMIT).unwrap();
            for (kind, body) in said {
                link.send(*kind, body, std::iter::empty()).unwrap();
            }
            (0..heard).for_each(|_| drop(link.receive().unwrap()));
        });
        let error = host.engine.hand_over(old, "1.0.0", Vec::new(), DRAIN).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
        assert!(error.to_string().contains("goes on"), "{error}");
        fake.join().unwrap();
        driver.write(DATA, &[heard as u8; 512]);
        assert_eq!(driver.request(OUT, 3, Some((DATA, 512))), 0, "after {wanted}");
        assert_eq!(driver.request(IN, 3, Some((DATA, 512))), 0);
    }
}

/// A new process that had died when it was told to go took the old one with it, although it can have run nothing.
#[test]
fn a_word_to_go_that_cannot_be_sent_changes_nothing() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 128, F_VERSION_1);
    let (old, new) = UnixStream::pair().unwrap();
    let fake = std::thread::spawn(move || {
        let reading = new.try_clone().unwrap();
        let mut link = Link::new(new, LIMIT).unwrap();
        for (kind, body) in [(1, br#"{"version":"3","formats":[1]}"#.as_slice()), (3, b"")] {
            link.send(kind, body, std::iter::empty()).unwrap();
        }
        (0..2).for_each(|_| drop(link.receive().unwrap()));
        // INSTALLED, from one who hears nothing any more.
        reading.shutdown(std::net::Shutdown::Read).unwrap();
        link.send(5, b"", std::iter::empty()).unwrap();
        link
    });
    let error = host.engine.hand_over(old, "1.0.0", Vec::new(), DRAIN).unwrap_err();
    assert!(matches!(error, EngineError::Handover(_)), "{error}");
    drop(fake.join().unwrap());
    assert_eq!(driver.request(FLUSH, 0, None), 0);
}

/// The drive does not finish: the old engine does not wait for ever, and goes on.
#[test]
fn requests_that_take_too_long_stop_the_handover_and_not_the_guest() {
    let host = Host::new();
    let slow = r#"{"type":"faulty","inner":{"type":"memory","hugepages":"off"},"delay_us":1500000}"#;
    let socket = host.volume("vol", slow, 1 << 20, 1);
    let mut driver = Driver::start(&socket, 128, F_VERSION_1);
    driver.lay(0, OUT, 0, Some((DATA, 512)));
    driver.offer(0);
    let page = host.path("stats");
    wait_for("the request to be taken", || {
        // Requests in flight of the first queue: docs/formats/stats-page.md.
        let bytes = std::fs::read(&page).unwrap();
        let at = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize;
        bytes[at + 88] == 1
    });
    let (old, new) = UnixStream::pair().unwrap();
    let own = settings(&host, 0);
    let arriving = std::thread::spawn(move || Takeover::greet(new, "2.0.0")?.run(&own).map(drop));
    let error = host.engine.hand_over(old, "1.0.0", Vec::new(), Duration::from_millis(50)).unwrap_err();
    assert!(error.to_string().contains("were not done within 0.05 s"), "{error}");
    assert!(arriving.join().unwrap().unwrap_err().to_string().contains("were not done"));
    assert_eq!(driver.wait_used().0, 0);
    assert_eq!((driver.status(0), driver.request(FLUSH, 0, None)), (0, 0));
}

/// An upgrade in the middle of a migration: what the guest is written to afterwards is in the bitmap too.
#[test]
fn a_dirty_log_goes_over() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_LOG_ALL);
    let bitmap = tempfile::tempfile_in("/dev/shm").unwrap();
    let len = MEMORY / 4096 / 8;
    bitmap.set_len(len).unwrap();
    assert!(driver.frontend.ack(SET_LOG_BASE, &words(&[len, 0]), &[bitmap.as_raw_fd()]));
    let marked = |address: u64| {
        let page = address / 4096;
        let mut byte = [0];
        bitmap.read_exact_at(&mut byte, page / 8).unwrap();
        bitmap.write_all_at(&[0], page / 8).unwrap();
        byte[0] & 1 << (page % 8) != 0
    };
    assert_eq!(driver.request(IN, 0, Some((DATA, 512))), 0);
    assert!(marked(DATA));
    let engine = upgrade(&host, 0).unwrap();
    assert_eq!(driver.request(IN, 0, Some((DATA, 512))), 0);
    assert!(marked(DATA));
    assert!(driver.frontend.ack(SET_FEATURES, &words(&[F_VERSION_1 | F_PROTOCOL]), &[]));
    marked(DATA);
    assert_eq!(driver.request(IN, 0, Some((DATA, 512))), 0);
    assert!(!marked(DATA));
    drop(engine);
}

/// Two frontends go over, and so does which of them may write.
#[test]
fn a_shared_volume_goes_over_with_both_frontends() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    host.engine.share("vol", true).unwrap();
    let mut source = Driver::start(&socket, 64, F_VERSION_1);
    assert_eq!(source.request(FLUSH, 0, None), 0);
    let mut target = Driver::start(&socket, 64, F_VERSION_1);
    target.lay(0, FLUSH, 0, None);
    target.offer(0);
    let engine = upgrade(&host, 0).unwrap();
    let attachment = &engine.attachments().unwrap()[0];
    assert_eq!((attachment.shared, attachment.frontends), (true, 2));
    (0..50).for_each(|_| assert_eq!(source.request(FLUSH, 0, None), 0));
    assert_eq!(target.used_index(), 0);
    source.stop_vring();
    assert_eq!(target.wait_used().0, 0);
    let engine = Host { engine, dir: host.dir };
    let engine = upgrade(&engine, 0).unwrap();
    assert_eq!(target.request(FLUSH, 0, None), 0);
    drop(source);
    assert_eq!(target.request(FLUSH, 0, None), 0);
    drop(engine);
}

//! Turning the write cache off. What completed before lay in the drive's cache, and the driver sends no flush any more: once
//! nothing made it durable, and it was lost with the power.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use common::upgrade::upgrade;
use common::*;

/// Of virtio-blk's configuration space.
const WRITEBACK: u32 = 32;
const F_CONFIG_WCE: u64 = 1 << 11;

/// The fdatasync calls of this process, as the kernel sees them.
struct Watched {
    strace: Child,
    log: PathBuf,
}

impl Watched {
    fn start(dir: &Path) -> Self {
        Self::with(dir, &[])
    }

    /// The calls are as `fault` says: strace's words for a delay or an error.
    fn injecting(dir: &Path, fault: &str) -> Self {
        Self::with(dir, &["-e", &format!("inject=fdatasync:{fault}")])
    }

    fn with(dir: &Path, more: &[&str]) -> Self {
        let log = dir.join("strace");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-e", "trace=fdatasync"]).args(more);
        strace.args(["-p", &std::process::id().to_string(), "-o"]).arg(&log);
        let strace = strace.stderr(Stdio::null()).spawn().expect("strace, which `make setup` installs");
        let traced = |task: std::fs::DirEntry| {
            let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        };
        wait_for("strace to attach", || std::fs::read_dir("/proc/self/task").unwrap().flatten().all(traced));
        Self { strace, log }
    }

    /// How many there were until now: strace writes a line before the call returns.
    fn flushes(&self) -> usize {
        std::fs::read_to_string(&self.log).unwrap().matches("fdatasync(").count()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // SAFETY: a signal to our own child, which was not waited for yet.
        unsafe { libc::kill(self.strace.id() as i32, libc::SIGINT) };
        self.strace.wait().unwrap();
    }
}

/// SET_CONFIG's payload that turns the cache on or off.
fn cache(on: u8) -> Vec<u8> {
    let mut payload = pair(WRITEBACK, 1);
    payload.extend(0u32.to_le_bytes());
    payload.push(on);
    payload
}

fn set_cache(driver: &Driver, on: u8) -> bool {
    driver.frontend.ack(SET_CONFIG, &cache(on), &[])
}

/// The answer to a message with NEED_REPLY; true if it is "done".
fn answer(driver: &Driver) -> bool {
    let (reply, _) = driver.frontend.receive().expect("the backend closed the connection");
    u64::from_le_bytes(reply.try_into().unwrap()) == 0
}

/// A file whose requests take 0.3 s each, so that one can be in flight, and one whose requests do not.
fn slow(disk: &Path) -> String {
    format!(r#"{{"type":"faulty","inner":{{"type":"file","path":{disk:?}}},"delay_us":300000}}"#)
}

fn plain(disk: &Path) -> String {
    format!(r#"{{"type":"file","path":{disk:?}}}"#)
}

/// A process has one tracer at a time, which sees the calls of all its threads.
static ALONE: Mutex<()> = Mutex::new(());

fn with_disk(backend: impl Fn(&Path) -> String, test: impl FnOnce(Host, &Path, Driver)) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Host::new();
    let disk = host.disk_file(1 << 20);
    let socket = host.volume("vol", &backend(&disk), 1 << 20, 1);
    let driver = Driver::start(&socket, 16, F_VERSION_1 | F_FLUSH | F_CONFIG_WCE);
    test(host, &socket, driver);
    std::fs::remove_file(disk).unwrap();
}

#[test]
fn what_was_written_is_durable_before_the_cache_is_off() {
    with_disk(plain, |host, _, mut driver| {
        assert_eq!(driver.request(OUT, 0, Some((DATA, 4096))), 0);
        let watched = Watched::start(host.dir.path());
        assert!(set_cache(&driver, 0));
        assert_eq!(watched.flushes(), 1, "when the cache is off, all is durable");
        // Nothing is in a cache any more.
        assert!(set_cache(&driver, 0) && set_cache(&driver, 1));
        assert_eq!(watched.flushes(), 1);
        assert_eq!(driver.request(OUT, 8, Some((DATA, 4096))), 0);
        // Without FLUSH the driver cannot flush either.
        assert!(driver.frontend.ack(SET_FEATURES, &(F_VERSION_1 | F_PROTOCOL).to_le_bytes(), &[]));
        assert_eq!(watched.flushes(), 2, "when the feature is gone, all is durable");
        drop(watched);
        assert_eq!(driver.request(OUT, 16, Some((DATA, 4096))), 0);
    });
}

#[test]
fn writes_in_flight_are_durable_too() {
    with_disk(slow, |host, _, mut driver| {
        let watched = Watched::injecting(host.dir.path(), "delay_enter=200000");
        driver.lay(0, OUT, 0, Some((DATA, 4096)));
        driver.offer(0);
        wait_for("the write to be taken", || host.in_flight() > 0 || driver.used_index() > 0);
        driver.frontend.send(SET_CONFIG, NEED_REPLY, &cache(0), &[]);
        wait_for("the flush", || watched.flushes() == 1);
        assert_eq!(driver.used_index(), 1, "the flush began before the write was done");
        assert!(answer(&driver));
        assert_eq!(watched.flushes(), 1);
    });
}

/// The cache stays on, so the next attempt has to flush.
#[test]
fn a_flush_that_fails_refuses_the_message() {
    with_disk(plain, |host, socket, mut driver| {
        assert_eq!(driver.request(OUT, 0, Some((DATA, 4096))), 0);
        let watched = Watched::injecting(host.dir.path(), "error=EIO");
        assert!(!set_cache(&driver, 0));
        host.wait_event("vol", "message 25 of the frontend was refused");
        assert_eq!(driver.request(OUT, 8, Some((DATA, 4096))), 0, "the vrings go on");
        // Who does not ask for an answer must not take it for done.
        driver.frontend.send(SET_CONFIG, 0, &cache(0), &[]);
        driver.frontend.wait_closed();
        driver.reconnect(socket, F_VERSION_1 | F_FLUSH | F_CONFIG_WCE);
        driver.set_memory();
        driver.start_vring(2);
        drop(watched);
        let watched = Watched::start(host.dir.path());
        assert!(set_cache(&driver, 0));
        assert_eq!(watched.flushes(), 1);
    });
}

#[test]
fn a_reset_does_not_forget_what_is_not_durable() {
    with_disk(plain, |host, _, mut driver| {
        assert_eq!(driver.request(OUT, 0, Some((DATA, 4096))), 0);
        let watched = Watched::start(host.dir.path());
        assert!(driver.frontend.ack(SET_STATUS, &0u64.to_le_bytes(), &[]));
        assert_eq!(watched.flushes(), 0, "the next driver may flush");
        assert!(driver.frontend.ack(SET_FEATURES, &(F_VERSION_1 | F_PROTOCOL).to_le_bytes(), &[]));
        assert_eq!(watched.flushes(), 1, "this one cannot");
    });
}

#[test]
fn a_frontend_that_goes_while_the_drive_flushes_leaves_the_volume_free() {
    with_disk(plain, |host, socket, mut driver| {
        assert_eq!(driver.request(OUT, 0, Some((DATA, 4096))), 0);
        let watched = Watched::injecting(host.dir.path(), "delay_enter=300000");
        driver.frontend.send(SET_CONFIG, NEED_REPLY, &cache(0), &[]);
        wait_for("the flush", || watched.flushes() == 1);
        driver.reconnect(socket, F_VERSION_1 | F_FLUSH | F_CONFIG_WCE);
        driver.set_memory();
        driver.start_vring(1);
        assert_eq!(driver.request(OUT, 8, Some((DATA, 4096))), 0);
        assert!(set_cache(&driver, 0));
        assert_eq!(watched.flushes(), 2, "nobody takes the flush of another's message for his own");
    });
}

/// Hand over while a write is in flight, or done, and a message waits that turns the cache off.
fn goes_over(backend: impl Fn(&Path) -> String, ready: impl Fn(&Watched) -> bool) {
    with_disk(backend, |mut host, _, mut driver| {
        let watched = Watched::injecting(host.dir.path(), "delay_enter=300000");
        driver.lay(0, OUT, 0, Some((DATA, 4096)));
        driver.offer(0);
        wait_for("the write to be taken", || host.in_flight() > 0 || driver.used_index() > 0);
        driver.frontend.send(SET_CONFIG, NEED_REPLY, &cache(0), &[]);
        wait_for("the message to wait", || ready(&watched));
        host.engine = upgrade(&host, 0).unwrap();
        assert!(answer(&driver));
        assert_eq!(watched.flushes(), 1, "the message was applied without the flush");
        assert!(set_cache(&driver, 0));
        assert_eq!(watched.flushes(), 1, "the new engine knows that the cache is off");
        assert_eq!(driver.wait_used().0, 0);
        assert_eq!(driver.request(OUT, 8, Some((DATA, 4096))), 0);
    });
}

#[test]
fn a_handover_waits_for_the_flush() {
    goes_over(plain, |watched| watched.flushes() == 1);
}

#[test]
fn a_handover_flushes_for_a_message_that_waits_for_requests() {
    goes_over(slow, |_| true);
}

#[test]
fn a_handover_goes_on_when_the_flush_fails() {
    with_disk(plain, |mut host, _, mut driver| {
        assert_eq!(driver.request(OUT, 0, Some((DATA, 4096))), 0);
        let watched = Watched::injecting(host.dir.path(), "error=EIO:delay_enter=300000");
        driver.frontend.send(SET_CONFIG, NEED_REPLY, &cache(0), &[]);
        wait_for("the flush", || watched.flushes() == 1);
        host.engine = upgrade(&host, 0).unwrap();
        assert!(!answer(&driver));
        drop(watched);
        let watched = Watched::start(host.dir.path());
        assert!(set_cache(&driver, 0));
        assert_eq!(watched.flushes(), 1, "the cache was still on");
    });
}

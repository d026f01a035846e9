//! Turning the write cache off. What completed before lay in the drive's cache, and the driver sends no flush any more: once
//! nothing made it durable, and it was lost with the power.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

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
        let log = dir.join("strace");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-e", "trace=fdatasync", "-p", &std::process::id().to_string(), "-o"]).arg(&log);
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

fn set_cache(driver: &Driver, on: u8) -> bool {
    let mut payload = pair(WRITEBACK, 1);
    payload.extend(0u32.to_le_bytes());
    payload.push(on);
    driver.frontend.ack(SET_CONFIG, &payload, &[])
}

#[test]
fn what_was_written_is_durable_before_the_cache_is_off() {
    let host = Host::new();
    let disk = host.disk_file(1 << 20);
    let socket = host.volume("vol", &format!(r#"{{"type":"file","path":{disk:?}}}"#), 1 << 20, 1);
    let mut driver = Driver::start(&socket, 16, F_VERSION_1 | F_FLUSH | F_CONFIG_WCE);
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
    drop(driver);
    std::fs::remove_file(disk).unwrap();
}

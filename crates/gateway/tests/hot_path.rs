//! Law 2 of the data path: no allocation and no system call per request. Counted, on the reactor's own thread, while an
//! independent client keeps it busy: allocations by the allocator below, system calls by strace.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use common::Host;

/// Counts what the watched thread allocates.
struct Counting;

static WATCHED: AtomicI32 = AtomicI32::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let watched = WATCHED.load(Ordering::Relaxed);
        // SAFETY: gettid has no preconditions.
        if watched != 0 && unsafe { libc::gettid() } == watched {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn reactor_thread() -> i32 {
    let named = |entry: std::fs::DirEntry| {
        let comm = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        comm.starts_with("reactor-").then(|| entry.file_name().to_string_lossy().parse().unwrap())
    };
    std::fs::read_dir("/proc/self/task").unwrap().flatten().find_map(named).expect("a reactor thread")
}

/// System calls of the watched thread by name, while `work` runs.
fn system_calls<T>(dir: &Path, work: impl FnOnce() -> T) -> (T, Vec<(String, u64)>) {
    let summary = dir.join("strace");
    let mut strace = Command::new("strace")
        .args(["-c", "-U", "calls,name", "-o"])
        .arg(&summary)
        .args(["-p", &WATCHED.load(Ordering::Relaxed).to_string()])
        .stderr(Stdio::null())
        .spawn()
        .expect("strace, which `make setup` installs");
    let traced = || {
        let status =
            std::fs::read_to_string(format!("/proc/self/task/{}/status", WATCHED.load(Ordering::Relaxed)));
        status.unwrap().lines().any(|l| l.starts_with("TracerPid:") && !l.ends_with("\t0"))
    };
    common::wait_for("strace to attach", traced);
    let result = work();
    // SAFETY: a signal to our own child, which was not waited for yet.
    unsafe { libc::kill(strace.id() as i32, libc::SIGINT) };
    strace.wait().unwrap();
    let text = std::fs::read_to_string(&summary).unwrap();
    let row = |line: &str| {
        let mut words = line.split_whitespace();
        let calls = words.next()?.parse().ok()?;
        let name = words.next().filter(|name| *name != "total")?;
        Some((name.to_string(), calls))
    };
    (result, text.lines().filter_map(row).collect())
}

fn load(socket: &Path, depth: u32, read_share: u32) -> u64 {
    let job = serde_json::json!({
        "mode": "load", "socket": socket, "seconds": 0.5, "warmup_seconds": 0.0, "queues": 2, "queue_size": 128,
        "depth": depth, "block_size": 4096, "read_share": read_share, "cores": [1], "wait": "poll", "hugepages": "off",
    });
    let report = ringstone_load::run_json(&job.to_string()).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["errors"], 0, "{report}");
    report["operations"].as_u64().unwrap()
}

#[test]
fn requests_allocate_nothing_and_share_their_system_calls() {
    // Long enough not to sleep between two requests of a slow, shared machine.
    let host = Host::with_idle_us(50_000);
    let disk = host.disk_file(64 << 20);
    let file = format!(r#"{{"type":"file","path":{disk:?}}}"#);
    WATCHED.store(reactor_thread(), Ordering::Relaxed);
    for (name, backend, depth) in [
        ("memory", r#"{"type":"memory","hugepages":"off"}"#, 4),
        ("null", r#"{"type":"null"}"#, 4),
        ("file", &file, 32),
    ] {
        let socket = host.volume(name, backend, 64 << 20, 2);
        // Fill it, and count the allocations of a run that begins and ends: connecting and stopping may allocate.
        load(&socket, depth, 0);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let plain = load(&socket, depth, 50);
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert!(plain > 100, "{name}: only {plain} requests were done, too few to tell");
        assert!(allocations < 200, "{name}: {allocations} allocations for {plain} requests");
        let (traced, calls) = system_calls(host.dir.path(), || load(&socket, depth, 50));
        let enters: u64 = calls.iter().filter(|(n, _)| n == "io_uring_enter").map(|(_, c)| *c).sum();
        let others: Vec<_> = calls.iter().filter(|(n, _)| n != "io_uring_enter").collect();
        println!("{name}: {plain} requests, {allocations} allocations; traced {traced} requests, {calls:?}");
        // Replies to the control thread write its eventfd, a few times a connection.
        let other_calls: u64 = others.iter().map(|(_, c)| *c).sum();
        assert!(other_calls < 200, "{name}: {others:?} for {traced} requests");
        if name == "file" {
            assert!(enters * 2 < traced * 3, "{name}: {enters} io_uring_enter for {traced} requests");
        } else {
            assert!(enters < 200 + traced / 100, "{name}: {enters} io_uring_enter for {traced} requests");
        }
    }
    WATCHED.store(0, Ordering::Relaxed);
    std::fs::remove_file(disk).unwrap();
}

//! A client thread: its queues in turn, and sleep when none has anything to do.

use std::os::fd::AsRawFd;
use std::sync::atomic::{fence, AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::{io, ptr};

use vmm_sys_util::eventfd::EventFd;

use crate::affinity::{bind_current_thread, thread_cpu_seconds};
use crate::clock::kernel_nanoseconds;
use crate::config::{PatternConfig, Wait};
use crate::pattern::driver::{Driver, QueueRecord};
use crate::pattern::gaps::Pulse;
use crate::pattern::ring::kick;
use crate::LoadError;

/// Longest sleep without looking at the rings.
const SLEEP_NS: u64 = 100_000_000;
/// A call that comes later than this after its completion was missed. Long, as a busy host may take the core from the backend
/// in between.
const MISSED_NS: u64 = 2_000_000_000;

/// What the threads and whoever started them tell each other.
pub(super) struct Shared {
    /// No new requests: drain, check and end.
    pub stop: AtomicBool,
    /// End at once.
    pub abort: AtomicBool,
    /// When the backend connected last; 0 while it is gone.
    pub connected: AtomicU64,
    pub pulse: Pulse,
    /// Threads all of whose queues have completed a request.
    pub running: AtomicUsize,
    pub finished: AtomicUsize,
    /// Signalled with each change of the two.
    pub changed: EventFd,
    /// How often the drive may have lost what was not flushed.
    pub losses: AtomicU64,
    /// How many of them each thread has reckoned with; `u64::MAX` when it has ended.
    pub reckoned: Vec<AtomicU64>,
}

/// What a thread brings home.
pub(super) struct ThreadRecord {
    /// By queue index.
    pub queues: Vec<(usize, QueueRecord)>,
    pub missed_calls: u64,
    pub cpu_seconds: f64,
}

/// Tells that the thread has ended, however it did.
struct Finished<'a>(&'a Shared, usize);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        self.0.finished.fetch_add(1, Ordering::AcqRel);
        self.0.reckoned[self.1].store(u64::MAX, Ordering::Release);
        // The eventfd is this process's own and its counter far from full.
        let _ = kick(&self.0.changed);
    }
}

pub(super) fn run(
    config: &PatternConfig,
    shared: &Shared,
    thread: usize,
    core: Option<usize>,
    drivers: Vec<Driver<'_>>,
) -> Result<ThreadRecord, LoadError> {
    let _finished = Finished(shared, thread);
    let done = drive(config, shared, thread, core, drivers);
    if done.is_err() {
        shared.abort.store(true, Ordering::Release);
    }
    done
}

fn drive(
    config: &PatternConfig,
    shared: &Shared,
    thread: usize,
    core: Option<usize>,
    mut drivers: Vec<Driver<'_>>,
) -> Result<ThreadRecord, LoadError> {
    if let Some(core) = core {
        bind_current_thread(core)?;
    }
    let cpu_before = thread_cpu_seconds();
    let stall = (config.stall_seconds * 1e9) as u64;
    let mut told = false;
    let mut missed_calls = 0;
    for driver in &mut drivers {
        driver.ring.enable_calls(config.wait == Wait::Sleep);
    }
    while !shared.abort.load(Ordering::Acquire) && drivers.iter().any(|driver| !driver.is_done()) {
        let stop = shared.stop.load(Ordering::Acquire);
        let losses = shared.losses.load(Ordering::Acquire);
        if losses > shared.reckoned[thread].load(Ordering::Relaxed) {
            for driver in drivers.iter_mut().filter(|driver| !driver.is_done()) {
                driver.lose_unflushed(kernel_nanoseconds());
            }
            shared.reckoned[thread].store(losses, Ordering::Release);
        }
        let mut found = false;
        for driver in drivers.iter_mut().filter(|driver| !driver.is_done()) {
            if driver.ring.has_completed() {
                found = true;
                driver.reap(kernel_nanoseconds());
            }
            driver.advance(stop, kernel_nanoseconds())?;
        }
        if found {
            if !told && drivers.iter().all(|driver| driver.record.latency.count() > 0) {
                told = true;
                shared.running.fetch_add(1, Ordering::AcqRel);
                kick(&shared.changed)?;
            }
            continue;
        }
        if config.wait == Wait::Sleep {
            // A backend that is killed between showing a completion and calling cannot call before it is back.
            let connected = shared.connected.load(Ordering::Acquire);
            let missed =
                sleep(&drivers)? && connected > 0 && connected == shared.connected.load(Ordering::Acquire);
            missed_calls += u64::from(missed);
        }
        let connected = shared.connected.load(Ordering::Acquire);
        if connected > 0 {
            let now = kernel_nanoseconds();
            drivers.iter_mut().for_each(|driver| driver.give_up_after(stall, connected, now));
        }
    }
    let queues = drivers.into_iter().map(|driver| (driver.ring.index(), driver.record));
    Ok(ThreadRecord {
        queues: queues.collect(),
        missed_calls,
        cpu_seconds: thread_cpu_seconds() - cpu_before,
    })
}

/// Sleeps until a queue is called or a request is due. True when something had completed and no call came for it.
fn sleep(drivers: &[Driver<'_>]) -> Result<bool, LoadError> {
    // The last completion's used event must be seen before the ring is looked at again; the independent crate has no
    // fence there for packed rings.
    fence(Ordering::SeqCst);
    let waiting: Vec<&Driver<'_>> = drivers.iter().filter(|driver| !driver.is_done()).collect();
    let completed = || waiting.iter().any(|driver| driver.ring.has_completed());
    if waiting.is_empty() || completed() {
        return Ok(false);
    }
    let now = kernel_nanoseconds();
    let due = waiting.iter().filter_map(|driver| driver.due()).min();
    let longest = due.map_or(SLEEP_NS, |due| due.saturating_sub(now)).min(SLEEP_NS);
    if wait_for_call(&waiting, longest)? || longest < SLEEP_NS || !completed() {
        return Ok(false);
    }
    // It may have completed at this very moment, with the call on its way.
    Ok(!wait_for_call(&waiting, MISSED_NS)?)
}

/// False when no call came in `nanoseconds`.
fn wait_for_call(drivers: &[&Driver<'_>], nanoseconds: u64) -> Result<bool, LoadError> {
    let entry = |driver: &&Driver<'_>| libc::pollfd {
        fd: driver.ring.call().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut polled: Vec<libc::pollfd> = drivers.iter().map(entry).collect();
    let timeout = libc::timespec {
        tv_sec: (nanoseconds / 1_000_000_000) as libc::time_t,
        tv_nsec: (nanoseconds % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: `polled` is a live array of as many entries as told, `timeout` a valid timespec; no mask is given.
    let ready =
        unsafe { libc::ppoll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, &timeout, ptr::null()) };
    if ready < 0 {
        let source = io::Error::last_os_error();
        return match source.kind() {
            io::ErrorKind::Interrupted => Ok(true),
            _ => Err(LoadError::System { what: "waiting for a call", source }),
        };
    }
    for (driver, entry) in drivers.iter().zip(&polled) {
        if entry.revents & libc::POLLIN != 0 {
            // Nobody else reads it, so it does not block and cannot be empty.
            driver
                .ring
                .call()
                .read()
                .map_err(|source| LoadError::System { what: "reading a call", source })?;
        }
    }
    Ok(ready > 0)
}

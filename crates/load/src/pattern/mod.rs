//! Load whose every answer is checked, on a backend that may be killed, started anew or replaced meanwhile.
//!
//! The rings, the requests in flight and the payload are this side's memory and outlive every backend. The queues' threads
//! ([`worker`], [`driver`]) never stop for a backend that is gone: like a guest, they find their requests answered later.
//! The thread that called [`run`] keeps the control socket ([`connection`]): when it closes, it connects again and gives
//! the new backend the memory, the rings as they are, and the in-flight region of the first. What a block may hold is
//! reckoned in [`blocks`], times without a completion in [`gaps`].

mod blocks;
pub(crate) mod connection;
mod driver;
mod gaps;
mod report;
pub(crate) mod ring;
mod worker;

use std::fs::File;
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use virtio_driver::{IovaTranslator, VirtioBlkFeatureFlags, VirtioFeatureFlags, VirtioTransport};
use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use crate::clock::kernel_nanoseconds;
use crate::config::{Hugepages, PatternConfig};
use crate::connection::{connect_for, describe, understood, Device};
use crate::memory::SharedMemory;
use crate::queue::RequestArea;
use crate::random::Random;
use crate::LoadError;

use blocks::{Blocks, Stamp};
use connection::{Backend, Choices};
use driver::{Common, Driver};
use gaps::{Gap, Pulse};
use report::{Circumstances, PatternReport};
use ring::Layout;
use worker::{Shared, ThreadRecord};

/// Each block in use costs 16 bytes here.
const MAX_BLOCKS: u64 = 1 << 27;

pub(crate) fn run(config: &PatternConfig) -> Result<PatternReport, LoadError> {
    config.check()?;
    let Probed { device, translators } = probe(Probe {
        socket: &config.socket,
        queues: config.queues,
        packed: config.packed,
        event_idx: config.event_idx,
        write_through: config.write_through,
    })?;
    if device.read_only {
        return Err(LoadError::config("socket", "leads to a read-only volume; a pattern has to be written"));
    }
    let total = blocks_in_use(config, &device)?;
    let layout = Layout {
        socket: &config.socket,
        entries: config.ring_entries()?,
        features: device.features,
        packed: config.packed,
    };
    // Dropped in reverse order: the rings, then the connection, and the memory when nobody writes to it any more.
    let payload = SharedMemory::new(config.queues * config.depth * config.block_size, Hugepages::Off)?;
    let (ring_memory, rings) = layout.make(translators)?;
    let patience = Duration::from_secs_f64(config.stall_seconds);
    let memory = [&payload, &ring_memory];
    let choices = Choices { inflight: true, dirty_log: false };
    let mut backend = Backend::new(&config.socket, patience, device.features, &memory, &rings, choices)?;
    backend.connect()?;

    let started = kernel_nanoseconds();
    let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|source| LoadError::System { what: "making an eventfd", source })?;
    let shared = Shared {
        stop: AtomicBool::new(false),
        abort: AtomicBool::new(false),
        connected: AtomicU64::new(started),
        pulse: Pulse::default(),
        running: AtomicUsize::new(0),
        finished: AtomicUsize::new(0),
        losses: AtomicU64::new(0),
        reckoned: (0..config.threads).map(|_| AtomicU64::new(0)).collect(),
        changed,
    };
    let common = Common { config, payload: &payload, pulse: &shared.pulse, flush: device.flush, started };
    // Another run with the same seed must not be taken for this one.
    let stamp =
        Stamp { seed: config.seed, run: Random::new(started ^ u64::from(std::process::id()) << 40).next() };
    let mut shares: Vec<Vec<Driver<'_>>> = (0..config.threads).map(|_| Vec::new()).collect();
    for ring in rings {
        let index = ring.index();
        let blocks = Blocks::new(stamp, total, index, config.queues);
        shares[index % config.threads].push(Driver::new(common, ring, blocks));
    }
    let (outages, records) = thread::scope(|scope| {
        let spawn = |(index, drivers)| {
            let core = (!config.cores.is_empty()).then(|| config.cores[index % config.cores.len()]);
            let shared = &shared;
            scope.spawn(move || worker::run(config, shared, index, core, drivers))
        };
        let threads: Vec<_> = shares.into_iter().enumerate().map(spawn).collect();
        let controlled = control(config, &shared, &mut backend, started);
        if controlled.is_err() {
            shared.abort.store(true, Ordering::Release);
        }
        let records: Result<Vec<ThreadRecord>, LoadError> = threads
            .into_iter()
            .map(|thread| thread.join().expect("a client thread that does not panic"))
            .collect();
        Ok::<_, LoadError>((controlled?, records?))
    })?;
    let circumstances = Circumstances {
        started,
        inflight_region: backend.keeps_inflight(),
        outages,
        missed_calls: records.iter().map(|record| record.missed_calls).sum(),
        cpu_seconds: records.iter().map(|record| record.cpu_seconds).sum(),
        windows: config.windows,
        device,
    };
    let mut queues: Vec<_> = records.into_iter().flat_map(|record| record.queues).collect();
    queues.sort_by_key(|(index, _)| *index);
    Ok(PatternReport::new(queues.into_iter().map(|(_, record)| record).collect(), circumstances))
}

/// What a device must offer.
pub(crate) struct Probe<'a> {
    pub socket: &'a str,
    pub queues: usize,
    pub packed: bool,
    pub event_idx: bool,
    /// Leave out what lets a driver flush.
    pub write_through: bool,
}

/// What a device offers, with an address translator for each queue.
pub(crate) struct Probed {
    pub device: Device,
    pub translators: Vec<Box<dyn IovaTranslator>>,
}

/// Asks what the device is on a connection of its own, made by the independent crate; that also gives the address
/// translators its virtqueues want, which it lets nobody else make.
pub(crate) fn probe(wanted: Probe<'_>) -> Result<Probed, LoadError> {
    let mut features = understood(wanted.event_idx);
    if wanted.packed {
        features |= VirtioFeatureFlags::RING_PACKED.bits();
    }
    if wanted.write_through {
        features &= !(VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::CONFIG_WCE).bits();
    }
    let transport = connect_for::<RequestArea>(wanted.socket, features)?;
    let device = describe(&transport, wanted.socket)?;
    let socket = || wanted.socket.to_owned();
    if wanted.packed && device.features & VirtioFeatureFlags::RING_PACKED.bits() == 0 {
        return Err(LoadError::Feature {
            socket: socket(),
            feature: "RING_PACKED".into(),
            fix: "set `packed` to false",
        });
    }
    if device.queues < wanted.queues {
        return Err(LoadError::Queues { socket: socket(), offered: device.queues, asked: wanted.queues });
    }
    let translators = (0..wanted.queues).map(|_| transport.iova_translator()).collect();
    Ok(Probed { device, translators })
}

/// Blocks of `block_size` the job may touch.
fn blocks_in_use(config: &PatternConfig, device: &Device) -> Result<u64, LoadError> {
    let span = if config.span_bytes == 0 { device.capacity_bytes } else { config.span_bytes };
    if span > device.capacity_bytes {
        let problem = format!("is {span} but the volume has {} bytes", device.capacity_bytes);
        return Err(LoadError::config("span_bytes", problem));
    }
    if !config.block_size.is_multiple_of(device.block_size as usize) {
        let problem = format!("must be a multiple of the volume's {} bytes", device.block_size);
        return Err(LoadError::config("block_size", problem));
    }
    let blocks = span / config.block_size as u64;
    if blocks < config.queues as u64 || blocks > MAX_BLOCKS {
        let problem = format!(
            "makes {blocks} blocks of {} bytes, but there must be one for each queue and at most {MAX_BLOCKS}",
            config.block_size
        );
        return Err(LoadError::config("span_bytes", problem));
    }
    Ok(blocks)
}

/// Keeps the connection, and ends the load when it is time. Returns when every thread has ended.
fn control(
    config: &PatternConfig,
    shared: &Shared,
    backend: &mut Backend,
    started: u64,
) -> Result<Vec<Gap>, LoadError> {
    let deadline = started + (config.seconds * 1e9) as u64;
    let stall = (config.stall_seconds * 1e9) as u64;
    let retry = config.reconnect_ms * 1_000_000;
    let mut outages = Vec::new();
    let mut lost: Option<Lost> = None;
    let mut stopped = false;
    let mut ready_fd = config.ready_fd;
    while shared.finished.load(Ordering::Acquire) < config.threads {
        let now = kernel_nanoseconds();
        let until_retry = lost.as_ref().map_or(u64::MAX, |lost| lost.next_attempt.saturating_sub(now));
        let until_stop = if stopped { u64::MAX } else { deadline.saturating_sub(now) };
        let release = config.release_fd.filter(|_| !stopped);
        let events = wait(shared, backend, release, until_retry.min(until_stop))?;
        if let (Some(fd), true) = (ready_fd, shared.running.load(Ordering::Acquire) == config.threads) {
            tell(fd)?;
            ready_fd = None;
        }
        let now = kernel_nanoseconds();
        if !stopped && (events.released || now >= deadline) {
            stopped = true;
            shared.stop.store(true, Ordering::Release);
            backend.wake()?;
        }
        if events.closed {
            backend.disconnect();
            shared.connected.store(0, Ordering::Release);
            if config.volatile {
                lose_unflushed(shared, backend)?;
            }
            lost = Some(Lost { since: now, attempts: 0, next_attempt: now });
        }
        let Some(gone) = lost.as_mut().filter(|gone| now >= gone.next_attempt) else { continue };
        match backend.connect() {
            Ok(()) => {
                let now = kernel_nanoseconds();
                outages.push(Gap { start_ns: gone.since - started, duration_ns: now - gone.since });
                shared.connected.store(now, Ordering::Release);
                lost = None;
            }
            Err(error @ LoadError::Feature { .. }) => return Err(error),
            Err(error) => {
                // It may have served the first queues and gone before the last was set up.
                if config.volatile {
                    lose_unflushed(shared, backend)?;
                }
                let now = kernel_nanoseconds();
                gone.attempts += 1;
                gone.next_attempt = now + retry;
                if now - gone.since >= stall {
                    return Err(LoadError::Gone {
                        socket: config.socket.clone(),
                        seconds: (now - gone.since) as f64 / 1e9,
                        attempts: gone.attempts,
                        last: error.to_string(),
                    });
                }
            }
        }
    }
    Ok(outages)
}

/// Have every queue reckon with the loss of what was not flushed, before anybody completes a request again: from then on a
/// completion is one of after the loss.
fn lose_unflushed(shared: &Shared, backend: &Backend) -> Result<(), LoadError> {
    let losses = shared.losses.fetch_add(1, Ordering::AcqRel) + 1;
    backend.wake()?;
    while shared.reckoned.iter().any(|thread| thread.load(Ordering::Acquire) < losses) {
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A backend that went away.
struct Lost {
    since: u64,
    attempts: u64,
    next_attempt: u64,
}

struct Events {
    closed: bool,
    released: bool,
}

/// Waits for the end of the socket, the release, a thread's news, or `nanoseconds` to pass.
fn wait(
    shared: &Shared,
    backend: &Backend,
    release: Option<i32>,
    nanoseconds: u64,
) -> Result<Events, LoadError> {
    let entry = |fd: Option<i32>, events| libc::pollfd { fd: fd.unwrap_or(-1), events, revents: 0 };
    let mut polled = [
        entry(backend.descriptor(), libc::POLLRDHUP),
        entry(release, libc::POLLIN),
        entry(Some(shared.changed.as_raw_fd()), libc::POLLIN),
    ];
    let milliseconds = nanoseconds.div_ceil(1_000_000).min(1000) as i32;
    // SAFETY: `polled` is a live array of as many entries as told; a descriptor below 0 is passed over.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, milliseconds) };
    if ready < 0 {
        let source = io::Error::last_os_error();
        if source.kind() != io::ErrorKind::Interrupted {
            return Err(LoadError::System { what: "waiting for the backend's socket", source });
        }
        return Ok(Events { closed: false, released: false });
    }
    let [socket, release, changed] = polled.map(|entry| entry.revents != 0);
    if changed {
        shared.changed.read().map_err(|source| LoadError::System { what: "reading an eventfd", source })?;
    }
    Ok(Events { closed: socket, released: release })
}

fn tell(fd: i32) -> Result<(), LoadError> {
    // SAFETY: the descriptor is the caller's; ManuallyDrop leaves it open, and writing to a wrong one is an error.
    let mut ready = ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
    ready.write_all(b"r").map_err(|source| LoadError::System { what: "telling ready_fd", source })
}

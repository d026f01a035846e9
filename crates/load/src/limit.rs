//! The bare shared-memory ring between two cores: what two threads that only poll, copy and store can reach.
//!
//! It is the least that any polling backend must do for a request, so it is what the gateway is compared with. A request
//! is one cache line written with one release store; completions are one counter, since the server works in order.
//! There is no descriptor, no header, no status, no used ring, and nothing is checked. As in `generator`, the
//! client stamps once a turn and never touches the payload.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use crate::affinity::{bind_current_thread, thread_cpu_seconds};
use crate::clock::Clock;
#[cfg(test)]
use crate::config::Hugepages;
use crate::config::{LimitConfig, Pattern};
use crate::memory::SharedMemory;
use crate::random::Random;
use crate::recorder::{QueueRecord, TurnRecord, Window};
use crate::report::{LoadReport, MemoryReport, ThreadRecord};
use crate::LoadError;

/// Most requests in flight.
pub(crate) const MAX_DEPTH: usize = 1024;
/// Empty turns of the server between two looks at the stop flag.
const TURNS_PER_STOP_CHECK: u32 = 1 << 10;

/// One request. `word` is block << 2 | write << 1 | phase; the phase flips each time round, so the server sees a new
/// request by this word alone and no index line is shared.
#[repr(C, align(64))]
#[derive(Default)]
struct Entry {
    word: AtomicU64,
    buffer: AtomicU64,
}

/// Everything both threads touch; what one writes shares no line with what the other writes.
struct Ring {
    entries: Box<[Entry]>,
    completed: Line<AtomicU64>,
    stop: Line<AtomicBool>,
}

#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

impl Ring {
    fn new(depth: usize) -> Self {
        let entries = (0..depth.next_power_of_two()).map(|_| Entry::default()).collect();
        Self { entries, completed: Line::default(), stop: Line::default() }
    }

    #[inline(always)]
    fn index(&self, sequence: u64) -> usize {
        sequence as usize & (self.entries.len() - 1)
    }

    /// The entry of a request and the phase that tells it from the entry's request before.
    #[inline(always)]
    fn entry(&self, sequence: u64) -> (&Entry, u64) {
        let round = sequence >> self.entries.len().trailing_zeros();
        (&self.entries[self.index(sequence)], round & 1 ^ 1)
    }
}

pub(crate) fn run(config: &LimitConfig) -> Result<LoadReport, LoadError> {
    config.check()?;
    let volume = SharedMemory::new(config.volume_bytes, config.hugepages)?;
    let ring = Ring::new(config.depth);
    let payload = SharedMemory::new(ring.entries.len() * config.block_size, config.hugepages)?;
    let clock = Clock::calibrated();
    let (bound, server_bound) = mpsc::channel();
    let record = thread::scope(|scope| {
        scope.spawn(|| {
            let result = bind_current_thread(config.server_core);
            let serving = result.is_ok();
            bound.send(result).expect("a client that waits for the server");
            if serving {
                serve(&ring, &volume, &payload, config.block_size);
            }
        });
        server_bound.recv().expect("a server that reports its binding")?;
        let client = scope.spawn(|| {
            // A client that ends early, for whatever reason, must not leave the server polling.
            let _stop = StopOnDrop(&ring.stop.0);
            bind_current_thread(config.client_core)?;
            let window = Window::starting_now(&clock, config.warmup_seconds, config.seconds, 0.0);
            Ok::<_, LoadError>(drive(config, &clock, window, &ring))
        });
        client.join().expect("a client thread that does not panic")
    })?;
    let memory =
        MemoryReport { bytes: volume.len() + payload.len(), hugepages: volume.is_huge(), regions: 2 };
    Ok(LoadReport::new("limit", &clock, &[record], config.block_size, memory))
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn serve(ring: &Ring, volume: &SharedMemory, payload: &SharedMemory, block_size: usize) {
    let (volume, payload) = (volume.base(), payload.base());
    let mut next = 0;
    let mut empty_turns = 0;
    loop {
        let (entry, phase) = ring.entry(next);
        let word = entry.word.load(Ordering::Acquire);
        if word & 1 != phase {
            empty_turns += 1;
            if empty_turns == TURNS_PER_STOP_CHECK {
                empty_turns = 0;
                if ring.stop.0.load(Ordering::Relaxed) {
                    return;
                }
            }
            continue;
        }
        let block = (word >> 2) as usize;
        let buffer = entry.buffer.load(Ordering::Relaxed) as usize;
        // SAFETY: the client draws `block` below volume length / block_size, and `buffer` is the start of one of the
        // payload's blocks, one for each entry; the two mappings do not overlap, and the client leaves both alone
        // until this request has completed.
        unsafe {
            let (block, buffer) = (volume.add(block * block_size), payload.add(buffer));
            if word & 2 == 0 {
                ptr::copy_nonoverlapping(block, buffer, block_size);
            } else {
                ptr::copy_nonoverlapping(buffer, block, block_size);
            }
        }
        next += 1;
        ring.completed.0.store(next, Ordering::Release);
    }
}

/// The client's half. Slot, entry and buffer of a request follow from its sequence number.
struct Client<'a> {
    config: &'a LimitConfig,
    ring: &'a Ring,
    random: Random,
    blocks: u64,
    next_block: u64,
    submitted: u64,
    /// By sequence modulo ring size: stamp and direction.
    flights: Vec<(u64, bool)>,
}

impl Client<'_> {
    #[inline(always)]
    fn submit(&mut self, now: u64) {
        let block = match self.config.pattern {
            Pattern::Random => self.random.below(self.blocks),
            Pattern::Sequential => {
                let block = self.next_block;
                self.next_block = if block + 1 == self.blocks { 0 } else { block + 1 };
                block
            }
        };
        let write = match self.config.read_share {
            100 => false,
            0 => true,
            share => self.random.below(100) >= u64::from(share),
        };
        let index = self.ring.index(self.submitted);
        self.flights[index] = (now, write);
        let (entry, phase) = self.ring.entry(self.submitted);
        let buffer = (index * self.config.block_size) as u64;
        entry.buffer.store(buffer, Ordering::Relaxed);
        entry.word.store(block << 2 | u64::from(write) << 1 | phase, Ordering::Release);
        self.submitted += 1;
    }
}

fn drive(config: &LimitConfig, clock: &Clock, window: Window, ring: &Ring) -> ThreadRecord {
    let mut client = Client {
        config,
        ring,
        random: Random::new(config.seed),
        blocks: (config.volume_bytes / config.block_size) as u64,
        next_block: 0,
        submitted: 0,
        flights: vec![(0, false); ring.entries.len()],
    };
    let mut record = QueueRecord::default();
    let mut turns = TurnRecord::default();
    let mut cpu_before = 0.0;
    let mut began = None;
    let mut done = 0;
    let mut last = clock.ticks();
    for _ in 0..config.depth {
        client.submit(last);
    }
    while last < window.end {
        let completed = ring.completed.0.load(Ordering::Acquire);
        if completed == done {
            continue;
        }
        let now = clock.ticks();
        while done < completed {
            let (stamp, write) = client.flights[ring.index(done)];
            record.record(write, clock.nanoseconds(now - stamp));
            client.submit(now);
            done += 1;
        }
        last = clock.ticks();
        turns.busy(last - now);
        if began.is_none() && last >= window.begin {
            record.clear();
            turns = TurnRecord::default();
            cpu_before = thread_cpu_seconds();
            began = Some(last);
        }
    }
    ThreadRecord {
        queues: vec![(0, record)],
        turns,
        measured_ticks: last - began.unwrap_or(last),
        cpu_seconds: thread_cpu_seconds() - cpu_before,
        kicks: 0,
        calls: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_changes_phase_each_time_round() {
        let ring = Ring::new(3);
        assert_eq!(ring.entries.len(), 4);
        let phases: Vec<u64> = (0..12).map(|sequence| ring.entry(sequence).1).collect();
        assert_eq!(phases, [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]);
        assert_ne!(ring.entries[0].word.load(Ordering::Relaxed) & 1, ring.entry(0).1);
    }

    #[test]
    fn the_server_copies_both_ways_and_stops() {
        let (volume, payload) = (
            SharedMemory::new(8192, Hugepages::Off).unwrap(),
            SharedMemory::new(4096, Hugepages::Off).unwrap(),
        );
        volume.store(512, &[7; 512]);
        payload.store(1024, &[9; 512]);
        let ring = Ring::new(2);
        let request = |sequence: u64, block: u64, write: u64, buffer: u64| {
            let (entry, phase) = ring.entry(sequence);
            entry.buffer.store(buffer, Ordering::Relaxed);
            entry.word.store(block << 2 | write << 1 | phase, Ordering::Release);
        };
        request(0, 1, 0, 0);
        request(1, 2, 1, 1024);
        ring.stop.0.store(true, Ordering::Relaxed);
        serve(&ring, &volume, &payload, 512);
        assert_eq!(ring.completed.0.load(Ordering::Relaxed), 2);
        assert_eq!((payload.load(0, 512), volume.load(1024, 512)), (vec![7; 512], vec![9; 512]));
    }

    #[test]
    fn a_core_that_does_not_exist_ends_both_threads() {
        let config = r#"{"server_core":1000,"client_core":0,"volume_bytes":65536,"hugepages":"off"}"#;
        let error = crate::limit_json(config).unwrap_err().to_string();
        assert!(error.contains("core 1000"), "{error}");
    }
}

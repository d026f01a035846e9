//! Load: every slot of every queue always in flight, each completion at once replaced by a new request.
//!
//! One stamp is taken when a turn finds completions. It ends their latency and begins that of the requests that
//! replace them, so at depth 1 the mean latency is the time of a whole round: wait, reap, build, submit. The payload
//! is never touched by the client, as in the bare ring of `limit`.

use std::thread;
use std::time::Duration;

use libc::c_void;
use virtio_driver::iovec;

use crate::affinity::{bind_current_thread, thread_cpu_seconds};
use crate::clock::Clock;
use crate::config::{LoadConfig, Pattern, Wait};
use crate::connection::{Connection, Device, Request};
use crate::memory::SharedMemory;
use crate::queue::{kind, wait_for_calls, LoadQueue};
use crate::random::Random;
use crate::recorder::{QueueRecord, TurnRecord, Window};
use crate::report::{LoadReport, MemoryReport, ThreadRecord};
use crate::tracked::Tracked;
use crate::LoadError;

/// Empty turns between two looks at the clock.
const TURNS_PER_STALL_CHECK: u32 = 1 << 14;

pub(crate) fn run(config: &LoadConfig) -> Result<LoadReport, LoadError> {
    config.check()?;
    let payload = config.queues * config.depth * config.block_size;
    let memory = SharedMemory::new(payload, config.hugepages)?;
    if config.read_share < 100 {
        fill(&memory, config.seed);
    }
    if config.needs_tracked() {
        let mut connection = Tracked::open(config, memory)?;
        let (device, connect_ns) = (connection.device.clone(), connection.connect_ns);
        let (queues, memory) = connection.parts();
        return measure(config, queues, memory, device, 1, connect_ns);
    }
    let request = Request {
        socket: &config.socket,
        queues: config.queues,
        queue_size: config.ring_entries()?,
        event_idx: config.event_idx,
    };
    let mut connection = Connection::open(request, Some(memory), config.region_bytes)?;
    let (device, regions, connect_ns) =
        (connection.device.clone(), connection.regions, connection.connect_ns);
    let (queues, memory) = connection.parts();
    measure(config, queues, memory, device, regions, connect_ns)
}

/// Drives `queues` for the job's time. Compiled for each kind of queue, so that the loop has no indirect calls.
fn measure<Q: LoadQueue>(
    config: &LoadConfig,
    queues: &mut [Q],
    memory: &SharedMemory,
    device: Device,
    regions: usize,
    connect_ns: u64,
) -> Result<LoadReport, LoadError> {
    let blocks = blocks_in_use(config, device.capacity_bytes)?;
    if device.read_only && config.read_share < 100 {
        return Err(LoadError::config("read_share", "must be 100: the volume is read-only"));
    }
    let clock = Clock::calibrated();
    let window = Window::starting_now(&clock, config.warmup_seconds, config.seconds, config.stall_seconds);
    let mut shares: Vec<Vec<Driver<'_, Q>>> = (0..config.threads).map(|_| Vec::new()).collect();
    for (index, queue) in queues.iter_mut().enumerate() {
        shares[index % config.threads].push(Driver::new(config, queue, memory, blocks));
    }
    let records: Vec<ThreadRecord> = thread::scope(|scope| {
        let threads: Vec<_> = shares
            .into_iter()
            .enumerate()
            .map(|(index, drivers)| {
                let core = (!config.cores.is_empty()).then(|| config.cores[index % config.cores.len()]);
                scope.spawn(move || drive(config, &clock, window, core, drivers))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a client thread that does not panic"))
            .collect::<Result<_, LoadError>>()
    })?;
    let memory = MemoryReport { bytes: memory.len(), hugepages: memory.is_huge(), regions };
    let mut report = LoadReport::new("load", &clock, &records, config.block_size, memory);
    report.kicks = Some(records.iter().map(|record| record.kicks).sum());
    report.calls = Some(records.iter().map(|record| record.calls).sum());
    report.connect_ns = Some(connect_ns);
    report.device = Some(device);
    Ok(report)
}

/// Blocks of `block_size` the job may touch.
fn blocks_in_use(config: &LoadConfig, capacity: u64) -> Result<u64, LoadError> {
    let span = if config.span_bytes == 0 { capacity } else { config.span_bytes };
    if span > capacity {
        return Err(LoadError::config(
            "span_bytes",
            format!("is {span} but the volume has {capacity} bytes"),
        ));
    }
    match span / config.block_size as u64 {
        0 => Err(LoadError::config("block_size", format!("does not fit into the {span} bytes in use"))),
        blocks => Ok(blocks),
    }
}

/// Random bytes all over, so that a backend that looks for zeros finds none.
pub(crate) fn fill(memory: &SharedMemory, seed: u64) {
    let mut random = Random::new(seed);
    let mut page = vec![0; 4096];
    for offset in (0..memory.len()).step_by(page.len()) {
        random.fill(&mut page);
        memory.store(offset, &page);
    }
}

struct Slot {
    /// Address of the payload, in shared memory; the backend alone works on it.
    buffer: usize,
    submitted: u64,
    write: bool,
}

/// One queue with its slots and counters.
struct Driver<'a, Q> {
    queue: &'a mut Q,
    slots: Vec<Slot>,
    /// Slots whose completions this turn has reaped.
    reaped: Vec<u32>,
    record: QueueRecord,
    random: Random,
    pattern: Pattern,
    read_share: u64,
    block_size: usize,
    blocks: u64,
    next_block: u64,
    kicks_before: u64,
}

impl<'a, Q: LoadQueue> Driver<'a, Q> {
    fn new(config: &LoadConfig, queue: &'a mut Q, memory: &SharedMemory, blocks: u64) -> Self {
        let index = queue.index();
        let slots = (0..config.depth).map(|slot| {
            let offset = (index * config.depth + slot) * config.block_size;
            Slot { buffer: memory.at(offset, config.block_size) as usize, submitted: 0, write: false }
        });
        Self {
            queue,
            slots: slots.collect(),
            reaped: Vec::with_capacity(config.depth),
            record: QueueRecord::default(),
            random: Random::new(config.seed ^ (index as u64 + 1).wrapping_mul(0x9e37_79b9)),
            pattern: config.pattern,
            read_share: config.read_share.into(),
            block_size: config.block_size,
            blocks,
            // Sequential queues start a share of the volume apart.
            next_block: blocks / config.queues as u64 * index as u64,
            kicks_before: 0,
        }
    }

    #[inline(always)]
    fn submit(&mut self, slot: u32, now: u64) -> Result<(), LoadError> {
        let block = match self.pattern {
            Pattern::Random => self.random.below(self.blocks),
            Pattern::Sequential => {
                let block = self.next_block;
                self.next_block = if block + 1 == self.blocks { 0 } else { block + 1 };
                block
            }
        };
        let write = match self.read_share {
            100 => false,
            0 => true,
            share => self.random.below(100) >= share,
        };
        let state = &mut self.slots[slot as usize];
        (state.submitted, state.write) = (now, write);
        let sector = block * (self.block_size as u64 / 512);
        let data = [iovec { iov_base: state.buffer as *mut c_void, iov_len: self.block_size }];
        if write {
            self.queue.submit(kind::OUT, sector, &data, &[], slot)
        } else {
            self.queue.submit(kind::IN, sector, &[], &data, slot)
        }
    }

    fn start(&mut self, now: u64) -> Result<(), LoadError> {
        for slot in 0..self.slots.len() as u32 {
            self.submit(slot, now)?;
        }
        self.queue.kick_if_needed()
    }

    /// Takes every completion there is; the slots are left in `reaped`.
    #[inline(always)]
    fn reap(&mut self, clock: &Clock, now: u64) -> Result<(), LoadError> {
        while let Some(done) = self.queue.reap()? {
            let slot = &self.slots[done.tag as usize];
            self.record.record(slot.write, clock.nanoseconds(now - slot.submitted));
            self.record.errors += u64::from(done.status != 0);
            self.reaped.push(done.tag);
        }
        Ok(())
    }

    #[inline(always)]
    fn replace(&mut self, now: u64) -> Result<(), LoadError> {
        for index in 0..self.reaped.len() {
            self.submit(self.reaped[index], now)?;
        }
        self.reaped.clear();
        self.queue.kick_if_needed()
    }
}

fn drive<Q: LoadQueue>(
    config: &LoadConfig,
    clock: &Clock,
    window: Window,
    core: Option<usize>,
    mut drivers: Vec<Driver<'_, Q>>,
) -> Result<ThreadRecord, LoadError> {
    if let Some(core) = core {
        bind_current_thread(core)?;
    }
    for driver in &mut drivers {
        driver.queue.enable_calls(config.wait == Wait::Sleep);
        driver.start(clock.ticks())?;
    }
    let mut progress = Progress {
        window,
        last: clock.ticks(),
        began: None,
        turns: TurnRecord::default(),
        cpu_before: 0.0,
        calls: 0,
    };
    let mut empty_turns = 0u32;
    loop {
        let mut found = false;
        for driver in &mut drivers {
            if !driver.queue.has_completed() {
                continue;
            }
            found = true;
            let now = clock.ticks();
            driver.reap(clock, now)?;
            if now >= window.end {
                driver.reaped.clear();
                progress.last = now;
                continue;
            }
            driver.replace(now)?;
            progress.last = clock.ticks();
            progress.turns.busy(progress.last - now);
        }
        if found {
            empty_turns = 0;
            if progress.began.is_none() && progress.last >= window.begin {
                progress.begin(&mut drivers);
            }
            if progress.last >= window.end {
                break;
            }
            continue;
        }
        match config.wait {
            Wait::Poll => {
                empty_turns += 1;
                if empty_turns >= TURNS_PER_STALL_CHECK {
                    empty_turns = 0;
                    progress.check_stall(clock, &drivers)?;
                }
            }
            Wait::Sleep => progress.sleep(clock, &drivers)?,
        }
    }
    progress.finish(clock, drivers)
}

/// Where a thread is in its window.
struct Progress {
    window: Window,
    /// When the last turn that found a completion ended.
    last: u64,
    /// When counting began.
    began: Option<u64>,
    turns: TurnRecord,
    cpu_before: f64,
    calls: u64,
}

impl Progress {
    /// Ends the warm-up: what was counted so far is dropped.
    fn begin<Q: LoadQueue>(&mut self, drivers: &mut [Driver<'_, Q>]) {
        for driver in drivers {
            driver.record.clear();
            driver.kicks_before = driver.queue.kicks();
        }
        self.turns = TurnRecord::default();
        self.calls = 0;
        self.cpu_before = thread_cpu_seconds();
        self.began = Some(self.last);
    }

    fn check_stall<Q: LoadQueue>(&self, clock: &Clock, drivers: &[Driver<'_, Q>]) -> Result<(), LoadError> {
        let waited = clock.ticks().saturating_sub(self.last);
        if waited < self.window.stall_ticks {
            return Ok(());
        }
        let stuck = drivers.iter().max_by_key(|driver| driver.queue.in_flight());
        Err(LoadError::Stalled {
            queue: stuck.map_or(0, |driver| driver.queue.index()),
            seconds: clock.seconds(waited),
            in_flight: drivers.iter().map(|driver| driver.queue.in_flight()).sum(),
        })
    }

    fn sleep<Q: LoadQueue>(&mut self, clock: &Clock, drivers: &[Driver<'_, Q>]) -> Result<(), LoadError> {
        let calls: Vec<_> = drivers.iter().map(|driver| driver.queue.call()).collect();
        if wait_for_calls(&calls, Duration::from_millis(100))? {
            self.calls += 1;
            return Ok(());
        }
        self.check_stall(clock, drivers)
    }

    /// Lets what is in flight complete, so that the backend is left without work, and hands the counters over.
    fn finish<Q: LoadQueue>(
        mut self,
        clock: &Clock,
        drivers: Vec<Driver<'_, Q>>,
    ) -> Result<ThreadRecord, LoadError> {
        let cpu_seconds = thread_cpu_seconds() - self.cpu_before;
        let measured_ticks = self.last - self.began.unwrap_or(self.last);
        let mut queues = Vec::with_capacity(drivers.len());
        let mut kicks = 0;
        let mut drivers = drivers;
        for driver in &drivers {
            queues.push((driver.queue.index(), driver.record.clone()));
            kicks += driver.queue.kicks() - driver.kicks_before;
        }
        while drivers.iter().any(|driver| driver.queue.in_flight() > 0) {
            let mut found = false;
            for driver in &mut drivers {
                while driver.queue.reap()?.is_some() {
                    found = true;
                }
            }
            if found {
                self.last = clock.ticks();
            } else {
                self.check_stall(clock, &drivers)?;
            }
        }
        Ok(ThreadRecord { queues, turns: self.turns, measured_ticks, cpu_seconds, kicks, calls: self.calls })
    }
}

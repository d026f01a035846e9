//! Integrity: random requests whose results are checked against a model of the volume.
//!
//! Each block that is written says what it is (seed, block number, sequence number) and is filled from these, so a block
//! that turns up in the wrong place, an old one, or a torn one is told apart from the right one. This mode drives the
//! independent crate's own request layer (`VirtioBlkQueue`), not the one in `queue`.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::c_void;
use serde::Serialize;
use virtio_driver::{iovec, EventFd, QueueNotifier, VirtioBlkQueue, VirtioBlkReqBuf, VirtioTransport};

use crate::config::{check_timeout, Hugepages, VerifyConfig, Wait};
use crate::connection::{connect, describe, share, Device};
use crate::memory::SharedMemory;
use crate::queue::wait_for_calls;
use crate::random::Random;
use crate::LoadError;

mod shadow;

use shadow::{fill_block, Shadow};

/// Distance that is left free after each segment of a request.
const GAP: usize = 1024;
/// Findings that are written out; the rest is counted.
const MAX_FINDINGS: usize = 20;

#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Counts {
    pub read: u64,
    pub write: u64,
    pub flush: u64,
    pub discard: u64,
    pub write_zeroes: u64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct VerifyReport {
    pub mode: &'static str,
    /// No finding of any kind.
    pub passed: bool,
    pub operations: Counts,
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// Blocks whose content was known and compared.
    pub blocks_checked: u64,
    /// Requests that were completed with an error.
    pub failed_requests: u64,
    /// Blocks that did not hold what they must.
    pub wrong_blocks: u64,
    /// The first findings, as sentences.
    pub findings: Vec<String>,
    pub device: Device,
    pub regions: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write { sequence: u64 },
    Flush,
    Discard,
    WriteZeroes,
}

/// A request in flight: blocks `first .. first + count`, their data in `parts` (offset and length in shared memory).
struct Flight {
    kind: Kind,
    queue: usize,
    first: u64,
    count: u64,
    parts: Vec<(usize, usize)>,
}

struct Queue {
    ring: VirtioBlkQueue<'static, usize>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
}

pub(crate) fn run(config: &VerifyConfig) -> Result<VerifyReport, LoadError> {
    check_timeout("stall_seconds", config.stall_seconds)?;
    let descriptors = config.depth * (config.max_segments + 2);
    if config.depth == 0 || config.max_segments == 0 || descriptors > usize::from(config.queue_size) {
        return Err(LoadError::config(
            "depth",
            format!(
                "times (max_segments + 2) is {descriptors} but must be 1 to queue_size, {}",
                config.queue_size
            ),
        ));
    }
    let slot_bytes = (config.max_bytes + (config.max_segments + 1) * GAP).next_multiple_of(4096);
    // Dropped in reverse order: the queues first, then the transport, and the memory when nobody writes to it any more.
    let memory = SharedMemory::new(slot_bytes * config.depth, Hugepages::Off)?;
    let mut transport = connect::<VirtioBlkReqBuf>(&config.socket, config.event_idx)?;
    let device = describe(&transport, &config.socket)?;
    if device.queues < config.queues {
        let socket = config.socket.clone();
        return Err(LoadError::Queues { socket, offered: device.queues, asked: config.queues });
    }
    let regions = share(&mut transport, &memory, config.region_bytes, &config.socket)?;
    let rings =
        VirtioBlkQueue::setup_queues(&mut transport, config.queues, config.queue_size).map_err(|source| {
            LoadError::Setup { socket: config.socket.clone(), what: "a queue's set-up", source }
        })?;
    let queues = rings.into_iter().enumerate().map(|(index, ring)| Queue {
        ring,
        kick: transport.get_submission_notifier(index),
        call: transport.get_completion_fd(index),
    });
    let mut run = Run::new(config, queues.collect(), &memory, slot_bytes, device, regions)?;
    run.random_requests()?;
    run.read_everything()?;
    run.report.passed = run.report.failed_requests == 0 && run.report.wrong_blocks == 0;
    Ok(run.report)
}

struct Run<'a> {
    config: &'a VerifyConfig,
    queues: Vec<Queue>,
    memory: &'a SharedMemory,
    slot_bytes: usize,
    flights: Vec<Option<Flight>>,
    shadow: Shadow,
    random: Random,
    block_size: usize,
    max_blocks: u64,
    max_segments: usize,
    sequence: u64,
    report: VerifyReport,
}

impl<'a> Run<'a> {
    fn new(
        config: &'a VerifyConfig,
        mut queues: Vec<Queue>,
        memory: &'a SharedMemory,
        slot_bytes: usize,
        device: Device,
        regions: usize,
    ) -> Result<Self, LoadError> {
        let span = if config.span_bytes == 0 { device.capacity_bytes } else { config.span_bytes };
        if span > device.capacity_bytes {
            let problem = format!("is {span} but the volume has {} bytes", device.capacity_bytes);
            return Err(LoadError::config("span_bytes", problem));
        }
        let block_size = device.block_size as usize;
        let limit = |wanted: usize, most: u32| if most == 0 { wanted } else { wanted.min(most as usize) };
        let max_blocks = (limit(config.max_bytes, device.size_max) / block_size) as u64;
        let blocks = span / block_size as u64;
        if max_blocks == 0 || blocks == 0 {
            let problem = format!("and the span must hold at least one block of {block_size} bytes");
            return Err(LoadError::config("max_bytes", problem));
        }
        for queue in &mut queues {
            queue.ring.set_used_notif_enabled(config.wait == Wait::Sleep);
        }
        Ok(Self {
            config,
            queues,
            memory,
            slot_bytes,
            flights: (0..config.depth).map(|_| None).collect(),
            shadow: Shadow::new(blocks, config.starts_zeroed),
            random: Random::new(config.seed),
            block_size,
            max_blocks: max_blocks.min(blocks),
            max_segments: limit(config.max_segments, device.seg_max),
            sequence: 0,
            report: VerifyReport {
                mode: "verify",
                passed: false,
                operations: Counts::default(),
                bytes_read: 0,
                bytes_written: 0,
                blocks_checked: 0,
                failed_requests: 0,
                wrong_blocks: 0,
                findings: Vec::new(),
                device,
                regions,
            },
        })
    }

    fn random_requests(&mut self) -> Result<(), LoadError> {
        let mut left = self.config.operations;
        while left > 0 {
            while let (true, Some(slot)) = (left > 0, self.free_slot()) {
                let kind = self.random_kind();
                let Some((first, count)) = self.random_range(kind) else { break };
                let queue = self.random.below(self.queues.len() as u64) as usize;
                self.submit(slot, Flight { kind, queue, first, count, parts: Vec::new() })?;
                left -= 1;
            }
            self.wait_for_one()?;
        }
        self.drain()
    }

    fn read_everything(&mut self) -> Result<(), LoadError> {
        let mut first = 0;
        while first < self.shadow.blocks() {
            let Some(slot) = self.free_slot() else {
                self.wait_for_one()?;
                continue;
            };
            let count = self.max_blocks.min(self.shadow.blocks() - first);
            let queue = slot % self.queues.len();
            self.submit(slot, Flight { kind: Kind::Read, queue, first, count, parts: Vec::new() })?;
            first += count;
        }
        self.drain()
    }

    fn free_slot(&self) -> Option<usize> {
        self.flights.iter().position(Option::is_none)
    }

    fn random_kind(&mut self) -> Kind {
        let device = &self.report.device;
        match self.random.below(100) {
            _ if device.read_only => Kind::Read,
            0..=3 if device.flush => Kind::Flush,
            4..=8 if device.discard && self.config.discard => Kind::Discard,
            9..=14 if device.write_zeroes && self.config.write_zeroes => Kind::WriteZeroes,
            15..=55 => Kind::Read,
            _ => {
                self.sequence += 1;
                Kind::Write { sequence: self.sequence }
            }
        }
    }

    /// Blocks that no request in flight touches; None when the few tries all met one that does.
    fn random_range(&mut self, kind: Kind) -> Option<(u64, u64)> {
        if kind == Kind::Flush {
            return Some((0, 0));
        }
        let sectors = (self.block_size / 512) as u64;
        let most = match kind {
            Kind::Discard => u64::from(self.report.device.max_discard_sectors) / sectors,
            Kind::WriteZeroes => u64::from(self.report.device.max_write_zeroes_sectors) / sectors,
            _ => self.max_blocks,
        };
        let most = most.clamp(1, self.max_blocks);
        // A third small ones, which stress sharing a page or a filesystem block with others.
        let most = if self.random.below(3) == 0 { most.min(4) } else { most };
        for _ in 0..16 {
            let count = 1 + self.random.below(most);
            let first = self.random.below(self.shadow.blocks() - count + 1);
            let overlaps =
                |flight: &Flight| flight.first < first + count && first < flight.first + flight.count;
            if !self.flights.iter().flatten().any(overlaps) {
                return Some((first, count));
            }
        }
        None
    }

    /// Cuts `len` bytes into segments in the slot's memory: half the requests in multiples of 512 at aligned addresses,
    /// the others anywhere and of any length.
    fn segments(&mut self, slot: usize, len: usize) -> Vec<(usize, usize)> {
        let unit = if self.random.below(2) == 0 { 512 } else { 1 };
        let most = self.max_segments.min(len / unit) as u64;
        let pieces = 1 + self.random.below(most) as usize;
        let mut at = slot * self.slot_bytes + self.random.below(512 / unit as u64) as usize * unit;
        let mut left = len;
        let mut parts = Vec::with_capacity(pieces);
        for piece in (0..pieces).rev() {
            let spare = (left - piece * unit) / unit;
            let part = if piece == 0 { left } else { (1 + self.random.below(spare as u64) as usize) * unit };
            parts.push((at, part));
            at = (at + part).next_multiple_of(unit)
                + self.random.below((GAP / unit / 2) as u64) as usize * unit;
            left -= part;
        }
        parts
    }

    fn submit(&mut self, slot: usize, mut flight: Flight) -> Result<(), LoadError> {
        let len = flight.count as usize * self.block_size;
        if matches!(flight.kind, Kind::Read | Kind::Write { .. }) {
            flight.parts = self.segments(slot, len);
        }
        if let Kind::Write { sequence } = flight.kind {
            let mut data = vec![0; len];
            for (block, bytes) in (flight.first..).zip(data.chunks_exact_mut(self.block_size)) {
                fill_block(self.config.seed, block, sequence, bytes);
            }
            let mut rest = data.as_slice();
            for &(offset, part) in &flight.parts {
                let (now, later) = rest.split_at(part);
                self.memory.store(offset, now);
                rest = later;
            }
        } else {
            // Left-overs of an earlier request in this slot must not pass for data that was read.
            flight.parts.iter().for_each(|&(offset, part)| self.memory.store(offset, &vec![0xa5; part]));
        }
        let memory = self.memory;
        let iovec_of = |&(offset, part): &(usize, usize)| iovec {
            iov_base: memory.at(offset, part).cast::<c_void>(),
            iov_len: part,
        };
        let iov: Vec<iovec> = flight.parts.iter().map(iovec_of).collect();
        let offset = flight.first * self.block_size as u64;
        let unmap = self.random.below(2) == 0;
        let queue = &mut self.queues[flight.queue];
        let counts = &mut self.report.operations;
        let submitted = match flight.kind {
            Kind::Read => {
                counts.read += 1;
                // SAFETY: the segments lie in shared memory that outlives the connection, and belong to this slot alone.
                unsafe { queue.ring.readv(offset, iov.as_ptr(), iov.len(), slot) }
            }
            Kind::Write { .. } => {
                counts.write += 1;
                // SAFETY: as for the read.
                unsafe { queue.ring.writev(offset, iov.as_ptr(), iov.len(), slot) }
            }
            Kind::Flush => {
                counts.flush += 1;
                queue.ring.flush(slot)
            }
            Kind::Discard => {
                counts.discard += 1;
                queue.ring.discard(offset, len as u64, slot)
            }
            Kind::WriteZeroes => {
                counts.write_zeroes += 1;
                queue.ring.write_zeroes(offset, len as u64, unmap, slot)
            }
        };
        submitted.map_err(|source| LoadError::Submit { queue: flight.queue, source })?;
        // See RequestQueue::kick_if_needed: without EVENT_IDX the crate has no fence here.
        fence(Ordering::SeqCst);
        if queue.ring.avail_notif_needed() {
            queue
                .kick
                .notify()
                .map_err(|source| LoadError::System { what: "kicking the backend", source })?;
        }
        self.flights[slot] = Some(flight);
        Ok(())
    }

    fn drain(&mut self) -> Result<(), LoadError> {
        while self.flights.iter().any(Option::is_some) {
            self.wait_for_one()?;
        }
        Ok(())
    }

    /// Waits until at least one request has completed, and takes all that have.
    fn wait_for_one(&mut self) -> Result<(), LoadError> {
        let started = Instant::now();
        let stall = Duration::from_secs_f64(self.config.stall_seconds);
        loop {
            let mut done = Vec::new();
            for queue in &mut self.queues {
                done.extend(queue.ring.completions().map(|completion| (completion.context, completion.ret)));
            }
            if !done.is_empty() {
                for (slot, ret) in done {
                    let flight = self.flights[slot].take().expect("a request in flight");
                    self.completed(&flight, ret);
                }
                return Ok(());
            }
            let Some(left) = stall.checked_sub(started.elapsed()) else {
                let mut stuck = self.flights.iter().flatten();
                return Err(LoadError::Stalled {
                    queue: stuck.next().map_or(0, |flight| flight.queue),
                    seconds: self.config.stall_seconds,
                    in_flight: self.flights.iter().flatten().count(),
                });
            };
            if self.config.wait == Wait::Sleep {
                let calls: Vec<RawFd> = self.queues.iter().map(|queue| queue.call.as_raw_fd()).collect();
                wait_for_calls(&calls, left)?;
            }
        }
    }

    fn completed(&mut self, flight: &Flight, ret: i32) {
        let range = flight.first..flight.first + flight.count;
        if ret != 0 {
            self.report.failed_requests += 1;
            self.find(format!("{:?} of blocks {range:?} completed with errno {}", flight.kind, -ret));
            if flight.kind != Kind::Read {
                self.shadow.forget(range);
            }
            return;
        }
        let bytes = flight.count * self.block_size as u64;
        match flight.kind {
            Kind::Flush => {}
            Kind::Write { sequence } => {
                self.report.bytes_written += bytes;
                self.shadow.written(range, sequence);
            }
            Kind::Discard => self.shadow.discarded(range),
            Kind::WriteZeroes => self.shadow.zeroed(range),
            Kind::Read => {
                self.report.bytes_read += bytes;
                let data: Vec<u8> =
                    flight.parts.iter().flat_map(|&(offset, part)| self.memory.load(offset, part)).collect();
                for (block, bytes) in range.zip(data.chunks_exact(self.block_size)) {
                    match self.shadow.check(self.config.seed, block, bytes) {
                        Ok(known) => self.report.blocks_checked += u64::from(known),
                        Err(finding) => {
                            self.report.wrong_blocks += 1;
                            self.find(finding);
                        }
                    }
                }
            }
        }
    }

    fn find(&mut self, finding: String) {
        if self.report.findings.len() < MAX_FINDINGS {
            self.report.findings.push(finding);
        }
    }
}

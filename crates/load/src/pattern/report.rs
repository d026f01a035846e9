//! The report of a pattern job. Times in ns.

use serde::Serialize;

use crate::connection::Device;
use crate::pattern::driver::QueueRecord;
use crate::pattern::gaps::{Gap, Gaps};
use crate::report::Latency;
use crate::Histogram;

/// Findings that are written out; the rest is counted.
const MAX_SENTENCES: usize = 20;

/// Requests answered.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Counts {
    pub read: u64,
    pub write: u64,
    pub flush: u64,
}

impl Counts {
    #[inline(always)]
    pub fn count(&mut self, read: bool, flush: bool) {
        self.read += u64::from(read);
        self.flush += u64::from(flush);
        self.write += u64::from(!read && !flush);
    }

    fn all(&self) -> u64 {
        self.read + self.write + self.flush
    }
}

/// What was not as it must be, by kind, and the first of it in words.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Findings {
    /// Requests completed with a status other than ok.
    pub errors: u64,
    /// Reads that returned something older than what was acknowledged.
    pub lost: u64,
    /// Reads that returned another block, or what was never written.
    pub wrong: u64,
    /// Reads that returned part of a write with none in flight.
    pub torn: u64,
    /// Completions of requests that were not in flight. The queue is used no more after the first.
    pub doubled: u64,
    /// Requests that did not complete in `stall_seconds`.
    pub stuck: u64,
    /// The first ones, as sentences.
    #[serde(rename = "findings")]
    sentences: Vec<String>,
}

impl Findings {
    pub fn error(&mut self, sentence: String) {
        self.errors += 1;
        self.say(sentence);
    }
    pub fn lost(&mut self, sentence: String) {
        self.lost += 1;
        self.say(sentence);
    }
    pub fn wrong(&mut self, sentence: String) {
        self.wrong += 1;
        self.say(sentence);
    }
    pub fn torn(&mut self, sentence: String) {
        self.torn += 1;
        self.say(sentence);
    }
    pub fn doubled(&mut self, sentence: String) {
        self.doubled += 1;
        self.say(sentence);
    }
    pub fn stuck(&mut self, sentence: String) {
        self.stuck += 1;
        self.say(sentence);
    }

    fn say(&mut self, sentence: String) {
        if self.sentences.len() < MAX_SENTENCES {
            self.sentences.push(sentence);
        }
    }

    fn merge(&mut self, other: Self) {
        self.errors += other.errors;
        self.lost += other.lost;
        self.wrong += other.wrong;
        self.torn += other.torn;
        self.doubled += other.doubled;
        self.stuck += other.stuck;
        other.sentences.into_iter().for_each(|sentence| self.say(sentence));
    }

    fn none(&self) -> bool {
        self.errors + self.lost + self.wrong + self.torn + self.doubled + self.stuck == 0
    }
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct PatternReport {
    pub mode: &'static str,
    /// No finding of any kind.
    pub passed: bool,
    /// From the start until the last request of the load completed.
    pub seconds: f64,
    /// CLOCK_MONOTONIC at the start.
    pub started_monotonic_ns: u64,
    pub operations: Counts,
    pub iops: f64,
    #[serde(flatten)]
    pub findings: Findings,
    /// Reads of the load whose block was known and compared.
    pub reads_checked: u64,
    /// Reads that overlapped a write and returned part of it: allowed, as a write of many sectors is not atomic.
    pub mixed: u64,
    /// Blocks that held an acknowledged write after the load, and those of them that were read back.
    pub blocks_written: u64,
    pub blocks_checked: u64,
    /// Whether the backend keeps requests in flight in a region that survives it.
    pub inflight_region: bool,
    pub reconnects: u64,
    /// From each end of the socket until every queue was set up again.
    pub outages: Vec<Gap>,
    /// Completions that a sleeping thread found without having been called.
    pub missed_calls: u64,
    pub latency: Latency,
    /// The longest time in which nothing of the whole job completed while something was in flight.
    pub longest_gap_ns: u64,
    /// The same for each queue.
    pub queue_gaps_ns: Vec<u64>,
    /// And the latency of each queue's requests.
    pub queue_latency: Vec<Latency>,
    /// The longest gaps of the whole job above 2 ms, by their start.
    pub gaps: Vec<Gap>,
    /// Completions of every 10 ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throughput_windows: Option<Vec<u64>>,
    pub cpu_seconds: f64,
    pub device: Device,
}

/// What is known beside the queues.
pub(super) struct Circumstances {
    pub started: u64,
    pub inflight_region: bool,
    pub outages: Vec<Gap>,
    pub missed_calls: u64,
    pub cpu_seconds: f64,
    pub windows: bool,
    pub device: Device,
}

impl PatternReport {
    /// `queues` by their index.
    pub(super) fn new(queues: Vec<QueueRecord>, circumstances: Circumstances) -> Self {
        let Circumstances { started, inflight_region, outages, missed_calls, cpu_seconds, windows, device } =
            circumstances;
        let mut operations = Counts::default();
        let mut latency = Histogram::default();
        let mut gaps = Gaps::default();
        let mut findings = Findings::default();
        let mut throughput = Vec::new();
        let (mut reads_checked, mut mixed, mut blocks_written, mut blocks_checked) = (0, 0, 0, 0);
        let queue_gaps_ns = queues.iter().map(|queue| queue.longest_gap).collect();
        let queue_latency = queues.iter().map(|queue| Latency::from(&queue.latency)).collect();
        let last = queues.iter().map(|queue| queue.last_completion).max().unwrap_or(started);
        for queue in queues {
            operations.read += queue.counts.read;
            operations.write += queue.counts.write;
            operations.flush += queue.counts.flush;
            latency.merge(&queue.latency);
            gaps.merge(&queue.gaps);
            findings.merge(queue.findings);
            reads_checked += queue.reads_checked;
            mixed += queue.mixed;
            blocks_written += queue.blocks_written;
            blocks_checked += queue.blocks_checked;
            throughput.resize(throughput.len().max(queue.windows.len()), 0);
            for (all, &own) in throughput.iter_mut().zip(&queue.windows) {
                *all += u64::from(own);
            }
        }
        let seconds = (last - started) as f64 / 1e9;
        Self {
            mode: "pattern",
            passed: findings.none(),
            seconds,
            started_monotonic_ns: started,
            iops: if seconds > 0.0 { operations.all() as f64 / seconds } else { 0.0 },
            operations,
            findings,
            reads_checked,
            mixed,
            blocks_written,
            blocks_checked,
            inflight_region,
            reconnects: outages.len() as u64,
            outages,
            missed_calls,
            latency: Latency::from(&latency),
            longest_gap_ns: gaps.longest(),
            queue_gaps_ns,
            queue_latency,
            gaps: gaps.into_listed(),
            throughput_windows: windows.then_some(throughput),
            cpu_seconds,
            device,
        }
    }
}

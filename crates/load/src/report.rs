//! Reports as they go out. Times in ns unless the name says otherwise.

use serde::Serialize;

use crate::clock::Clock;
use crate::connection::Device;
use crate::recorder::{QueueRecord, TurnRecord};
use crate::Histogram;

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Latency {
    pub count: u64,
    pub mean_ns: f64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub p999_ns: u64,
    pub max_ns: u64,
}

impl From<&Histogram> for Latency {
    fn from(histogram: &Histogram) -> Self {
        Self {
            count: histogram.count(),
            mean_ns: histogram.mean(),
            p50_ns: histogram.percentile(0.5),
            p99_ns: histogram.percentile(0.99),
            p999_ns: histogram.percentile(0.999),
            max_ns: histogram.max(),
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct QueueReport {
    pub index: usize,
    pub operations: u64,
    pub errors: u64,
    pub iops: f64,
    pub latency: Latency,
}

/// How the client side fared. `busy_share` near 1 means that the client, not the backend, was the limit.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ClientReport {
    pub threads: usize,
    /// Share of the time spent on reaping and submitting; the rest was spent with the full depth in flight and
    /// nothing completed.
    pub busy_share: f64,
    /// Completions found per busy turn.
    pub batch: f64,
    pub cpu_seconds: f64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct MemoryReport {
    pub bytes: usize,
    pub hugepages: bool,
    pub regions: usize,
}

/// Result of a load or limit job.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LoadReport {
    pub mode: &'static str,
    pub seconds: f64,
    pub operations: u64,
    pub iops: f64,
    pub bytes: u64,
    pub errors: u64,
    pub latency: Latency,
    pub read: Latency,
    pub write: Latency,
    /// (lower edge in ns, count) of the buckets that are not empty, all requests.
    pub histogram: Vec<(u64, u64)>,
    pub queues: Vec<QueueReport>,
    pub client: ClientReport,
    pub memory: MemoryReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kicks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
}

/// What one client thread brings home.
#[derive(Debug, Clone)]
pub(crate) struct ThreadRecord {
    /// By queue index.
    pub queues: Vec<(usize, QueueRecord)>,
    pub turns: TurnRecord,
    pub measured_ticks: u64,
    pub cpu_seconds: f64,
    pub kicks: u64,
    pub calls: u64,
}

impl LoadReport {
    pub(crate) fn new(
        mode: &'static str,
        clock: &Clock,
        threads: &[ThreadRecord],
        block_size: usize,
        memory: MemoryReport,
    ) -> Self {
        let measured = threads.iter().map(|thread| thread.measured_ticks).max().unwrap_or(0);
        let seconds = clock.seconds(measured);
        let rate = |operations: u64| if seconds > 0.0 { operations as f64 / seconds } else { 0.0 };
        let (mut reads, mut writes) = (Histogram::default(), Histogram::default());
        let mut queues = Vec::new();
        for (index, record) in threads.iter().flat_map(|thread| &thread.queues) {
            reads.merge(&record.reads);
            writes.merge(&record.writes);
            let mut both = record.reads.clone();
            both.merge(&record.writes);
            queues.push(QueueReport {
                index: *index,
                operations: record.operations(),
                errors: record.errors,
                iops: rate(record.operations()),
                latency: Latency::from(&both),
            });
        }
        queues.sort_by_key(|queue| queue.index);
        let mut all = reads.clone();
        all.merge(&writes);
        let busy_ticks: u64 = threads.iter().map(|thread| thread.turns.busy_ticks).sum();
        let busy_turns: u64 = threads.iter().map(|thread| thread.turns.busy_turns).sum();
        let thread_ticks: u64 = threads.iter().map(|thread| thread.measured_ticks).sum();
        Self {
            mode,
            seconds,
            operations: all.count(),
            iops: rate(all.count()),
            bytes: all.count() * block_size as u64,
            errors: queues.iter().map(|queue| queue.errors).sum(),
            latency: Latency::from(&all),
            read: Latency::from(&reads),
            write: Latency::from(&writes),
            histogram: all.buckets(),
            queues,
            client: ClientReport {
                threads: threads.len(),
                busy_share: busy_ticks as f64 / thread_ticks.max(1) as f64,
                batch: all.count() as f64 / busy_turns.max(1) as f64,
                cpu_seconds: threads.iter().map(|thread| thread.cpu_seconds).sum(),
            },
            memory,
            kicks: None,
            calls: None,
            connect_ns: None,
            device: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_and_queues_add_up() {
        let clock = Clock::calibrated();
        let thread = |index, reads: u64, writes: u64| {
            let mut record = QueueRecord { errors: 1, ..Default::default() };
            (0..reads).for_each(|_| record.record(false, 1000));
            (0..writes).for_each(|_| record.record(true, 3000));
            ThreadRecord {
                queues: vec![(index, record)],
                turns: TurnRecord { busy_ticks: clock.ticks_in(0.5), busy_turns: 2 },
                measured_ticks: clock.ticks_in(2.0),
                cpu_seconds: 2.0,
                kicks: 0,
                calls: 0,
            }
        };
        let memory = MemoryReport { bytes: 0, hugepages: false, regions: 1 };
        let report = LoadReport::new("load", &clock, &[thread(1, 4, 0), thread(0, 2, 2)], 512, memory);
        assert_eq!((report.operations, report.bytes, report.errors), (8, 4096, 2));
        assert!((report.iops - 4.0).abs() < 1e-6 && (report.client.busy_share - 0.25).abs() < 1e-6);
        assert_eq!((report.client.batch, report.client.cpu_seconds), (2.0, 4.0));
        assert_eq!(report.queues.iter().map(|queue| queue.index).collect::<Vec<_>>(), [0, 1]);
        assert_eq!((report.read.count, report.write.count), (6, 2));
        assert_eq!(report.latency.mean_ns, 1500.0);
    }
}

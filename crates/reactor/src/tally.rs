//! What a batch of requests adds to the counters.

use ringstone_telemetry::{Latency, QueueCounter, QueueStats};
use ringstone_virtio_blk::{Operation, Request};

/// Requests done in one go, counted together.
#[derive(Default)]
pub(crate) struct Tally {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub zeroes: u64,
    pub others: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub bytes_discarded: u64,
    pub errors: u64,
}

impl Tally {
    #[inline(always)]
    pub fn add(&mut self, request: &Request, ok: bool) {
        let bytes = if ok { request.len } else { 0 };
        match request.operation {
            Operation::Read => {
                self.reads += 1;
                self.bytes_read += bytes;
            }
            Operation::Write => {
                self.writes += 1;
                self.bytes_written += bytes;
            }
            Operation::Flush => self.flushes += 1,
            Operation::GetId => self.others += 1,
            Operation::Discard => {
                self.discards += 1;
                self.bytes_discarded += bytes;
            }
            Operation::WriteZeroes | Operation::WriteZeroesUnmap => {
                self.zeroes += 1;
                self.bytes_discarded += bytes;
            }
        }
        self.errors += u64::from(!ok);
    }

    #[inline(always)]
    fn rare(&self) -> bool {
        self.flushes + self.discards + self.zeroes + self.others + self.errors > 0
    }

    /// Add it to a queue's counters; each request took `ns`.
    #[inline(always)]
    pub fn count(&self, stats: &QueueStats, ns: u64) {
        let each = [
            (QueueCounter::Reads, self.reads, Some(Latency::Read)),
            (QueueCounter::Writes, self.writes, Some(Latency::Write)),
            (QueueCounter::BytesRead, self.bytes_read, None),
            (QueueCounter::BytesWritten, self.bytes_written, None),
        ];
        for (counter, n, latency) in each {
            if n > 0 {
                stats.add(counter, n);
                if let Some(kind) = latency {
                    stats.latency(kind, ns, n);
                }
            }
        }
        if self.rare() {
            self.count_rare(stats, ns);
        }
    }

    #[cold]
    fn count_rare(&self, stats: &QueueStats, ns: u64) {
        stats.add(QueueCounter::Flushes, self.flushes);
        stats.add(QueueCounter::Discards, self.discards);
        stats.add(QueueCounter::WriteZeroes, self.zeroes);
        stats.add(QueueCounter::Others, self.others);
        stats.add(QueueCounter::BytesDiscarded, self.bytes_discarded);
        stats.add(QueueCounter::Errors, self.errors);
        let others = self.flushes + self.discards + self.zeroes + self.others;
        if others > 0 {
            stats.latency(Latency::Other, ns, others);
        }
    }
}

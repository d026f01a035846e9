//! Counters and latency histograms that reactors write and anybody may read without stopping them.
//!
//! A [`StatsPage`] is one memory-mapped file (docs/formats/stats-page.md). Reactors hold [`ReactorStats`] and [`QueueReader, QueueStats`],
//! handles into it with exactly one writing thread each, so a counter is raised by a plain load, add and store.
//! [`Clock`] turns the processor's time stamp counter into nanoseconds.

mod clock;
mod error;
mod histogram;
mod page;

pub use clock::Clock;
pub use error::TelemetryError;
pub use histogram::{bucket_lower_edge, bucket_of, BUCKETS};
pub use page::{
    Latency, QueueCounter, QueueReader, QueueStats, ReactorCounter, ReactorStats, ReactorView, StatsPage,
    MAX_QUEUE_SLOTS, MAX_REACTORS,
};

//! The jobs as they come in: JSON with a `mode`, each with its own fields and defaults.

use serde::Deserialize;

use crate::LoadError;

/// One job, told apart by its field `mode`.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "mode", rename_all = "lowercase")]
pub enum Job {
    Load(LoadConfig),
    Verify(VerifyConfig),
    Script(ScriptConfig),
    Hold(HoldConfig),
    Pattern(PatternConfig),
}

/// Order of the offsets a generator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    Random,
    Sequential,
}

/// How a client thread learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wait {
    /// Read the used rings in a loop, with the backend's calls suppressed.
    Poll,
    /// Block on the call eventfds.
    Sleep,
}

/// Whether shared memory comes from hugetlbfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hugepages {
    /// Where enough pages are free.
    Auto,
    On,
    Off,
}

/// Load on one backend. Sizes are bytes, times seconds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadConfig {
    pub socket: String,
    #[serde(default = "default_seconds")]
    pub seconds: f64,
    #[serde(default = "default_warmup")]
    pub warmup_seconds: f64,
    #[serde(default = "one")]
    pub queues: usize,
    /// Ring entries; 0 chooses the smallest power of two (at least 128) that holds `depth` requests.
    #[serde(default)]
    pub queue_size: u16,
    /// Requests in flight in each queue.
    #[serde(default = "one")]
    pub depth: usize,
    #[serde(default = "default_block")]
    pub block_size: usize,
    /// Percent of requests that read; the others write.
    #[serde(default = "all_reads")]
    pub read_share: u32,
    #[serde(default = "random")]
    pub pattern: Pattern,
    /// Cores to bind the client threads to, in turn; empty leaves them where the scheduler puts them.
    #[serde(default)]
    pub cores: Vec<usize>,
    /// 1 (one thread drives all queues) up to `queues`.
    #[serde(default = "one")]
    pub threads: usize,
    #[serde(default = "poll")]
    pub wait: Wait,
    #[serde(default = "yes")]
    pub event_idx: bool,
    #[serde(default)]
    pub packed: bool,
    /// Give the backend an in-flight region, or not. Said either way, the connection is the pattern job's, so that the
    /// two compare.
    #[serde(default)]
    pub inflight: Option<bool>,
    /// Give the backend a dirty log, as a live migration does.
    #[serde(default)]
    pub dirty_log: bool,
    #[serde(default = "one_u64")]
    pub seed: u64,
    #[serde(default = "auto")]
    pub hugepages: Hugepages,
    /// Largest memory region given to the backend; 0: one region for all buffers.
    #[serde(default)]
    pub region_bytes: usize,
    /// How much of the volume is used, from its start; 0: all of it.
    #[serde(default)]
    pub span_bytes: u64,
    /// Give up when no request completes for so long.
    #[serde(default = "default_stall")]
    pub stall_seconds: f64,
}

/// Random requests whose results are checked against a model of the volume.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyConfig {
    pub socket: String,
    /// Requests to make before the final pass that reads everything back.
    #[serde(default = "default_operations")]
    pub operations: u64,
    #[serde(default = "one")]
    pub queues: usize,
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Requests in flight over all queues.
    #[serde(default = "default_verify_depth")]
    pub depth: usize,
    /// Largest request.
    #[serde(default = "default_max_bytes")]
    pub max_bytes: usize,
    /// Most data segments of one request.
    #[serde(default = "default_segments")]
    pub max_segments: usize,
    /// How much of the volume is used, from its start; 0: all of it.
    #[serde(default)]
    pub span_bytes: u64,
    #[serde(default = "one_u64")]
    pub seed: u64,
    /// The volume is known to read as zeros at the start.
    #[serde(default)]
    pub starts_zeroed: bool,
    #[serde(default = "yes")]
    pub discard: bool,
    #[serde(default = "yes")]
    pub write_zeroes: bool,
    #[serde(default = "yes")]
    pub event_idx: bool,
    #[serde(default = "sleep")]
    pub wait: Wait,
    #[serde(default)]
    pub region_bytes: usize,
    #[serde(default = "default_stall")]
    pub stall_seconds: f64,
}

/// A list of single requests with a result for each.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptConfig {
    pub socket: String,
    pub operations: Vec<Operation>,
    #[serde(default = "one")]
    pub queues: usize,
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Requests in flight; 1 makes one after the other.
    #[serde(default = "one")]
    pub depth: usize,
    #[serde(default = "yes")]
    pub event_idx: bool,
    #[serde(default)]
    pub region_bytes: usize,
    /// A request that takes longer is reported as timed out, and the script ends there.
    #[serde(default = "default_stall")]
    pub timeout_seconds: f64,
}

/// What a write carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fill {
    /// Every byte this value.
    Byte(u8),
    /// Bytes of a generator started with this seed, the same for the same seed and length.
    Seed(u64),
}

/// One request of a script. `segments` splits the data into several descriptors and overrides `len`.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Operation {
    Read {
        offset: u64,
        #[serde(default)]
        len: usize,
        #[serde(default)]
        segments: Vec<usize>,
        #[serde(default)]
        queue: usize,
    },
    Write {
        offset: u64,
        #[serde(default)]
        len: usize,
        #[serde(default)]
        segments: Vec<usize>,
        #[serde(default)]
        queue: usize,
        fill: Fill,
    },
    Flush {
        #[serde(default)]
        queue: usize,
    },
    Discard {
        offset: u64,
        len: u64,
        #[serde(default)]
        queue: usize,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        #[serde(default)]
        unmap: bool,
        #[serde(default)]
        queue: usize,
    },
    GetId {
        #[serde(default)]
        queue: usize,
    },
    /// Any request: header (type, sector), device-readable bytes, device-writable lengths, status.
    Raw {
        #[serde(rename = "type")]
        kind: u32,
        #[serde(default)]
        sector: u64,
        /// Device-readable data segments, each as hexadecimal digits.
        #[serde(default)]
        readable: Vec<String>,
        /// Lengths of device-writable data segments.
        #[serde(default)]
        writable: Vec<usize>,
        #[serde(default)]
        queue: usize,
    },
}

/// Connections that are made, set up and left idle until `release_fd` ends.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HoldConfig {
    pub sockets: Vec<String>,
    #[serde(default = "one")]
    pub queues: usize,
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// One byte is written here once every connection is set up.
    pub ready_fd: i32,
    /// The connections are closed when this descriptor becomes readable or its other end closes.
    pub release_fd: i32,
}

/// Load whose every answer is checked, on a backend that may go away and come back. Sizes are bytes, times seconds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatternConfig {
    pub socket: String,
    #[serde(default = "default_seconds")]
    pub seconds: f64,
    #[serde(default = "default_pattern_queues")]
    pub queues: usize,
    /// Ring entries; 0 chooses the smallest power of two (at least 128) that holds `depth` requests.
    #[serde(default)]
    pub queue_size: u16,
    /// Requests in flight in each queue.
    #[serde(default = "default_pattern_depth")]
    pub depth: usize,
    #[serde(default = "default_block")]
    pub block_size: usize,
    /// How much of the volume is used, from its start; 0: all of it.
    #[serde(default)]
    pub span_bytes: u64,
    /// Percent of requests that read.
    #[serde(default = "default_pattern_reads")]
    pub read_share: u32,
    /// Percent of requests that flush; the rest writes.
    #[serde(default = "default_flush_share")]
    pub flush_share: u32,
    #[serde(default = "one_u64")]
    pub seed: u64,
    #[serde(default)]
    pub packed: bool,
    #[serde(default = "yes")]
    pub event_idx: bool,
    /// 1 (one thread drives all queues) up to `queues`.
    #[serde(default = "one")]
    pub threads: usize,
    /// Cores to bind the client threads to, in turn; empty leaves them where the scheduler puts them.
    #[serde(default)]
    pub cores: Vec<usize>,
    #[serde(default = "sleep")]
    pub wait: Wait,
    /// Requests a second over all queues; 0 makes them as fast as they complete.
    #[serde(default)]
    pub rate: f64,
    /// Milliseconds between two attempts to connect again.
    #[serde(default = "default_reconnect_ms")]
    pub reconnect_ms: u64,
    /// Give up when the backend cannot be reached again, or completes nothing, for so long.
    #[serde(default = "default_pattern_stall")]
    pub stall_seconds: f64,
    /// One byte is written here once every queue has completed a request.
    #[serde(default)]
    pub ready_fd: Option<i32>,
    /// The load ends early when this descriptor becomes readable or its other end closes.
    #[serde(default)]
    pub release_fd: Option<i32>,
    /// Report the completions of every 10 ms.
    #[serde(default)]
    pub windows: bool,
    /// Whenever the backend goes, the drive may lose what was not flushed before.
    #[serde(default)]
    pub volatile: bool,
    /// As a driver that does not flush: what is acknowledged is durable.
    #[serde(default)]
    pub write_through: bool,
}

/// The bare ring between two cores.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitConfig {
    #[serde(default = "default_seconds")]
    pub seconds: f64,
    #[serde(default = "default_warmup")]
    pub warmup_seconds: f64,
    #[serde(default = "one")]
    pub depth: usize,
    #[serde(default = "default_block")]
    pub block_size: usize,
    #[serde(default = "all_reads")]
    pub read_share: u32,
    #[serde(default = "random")]
    pub pattern: Pattern,
    #[serde(default = "default_volume")]
    pub volume_bytes: usize,
    pub server_core: usize,
    pub client_core: usize,
    #[serde(default = "one_u64")]
    pub seed: u64,
    #[serde(default = "auto")]
    pub hugepages: Hugepages,
}

/// Ring entries for `depth` requests of three descriptors each; `queue_size` 0 leaves the choice here.
fn ring_entries(depth: usize, queue_size: u16) -> Result<u16, LoadError> {
    let needed = depth.saturating_mul(3);
    let entries = match queue_size {
        0 => needed.next_power_of_two().max(128),
        size => usize::from(size),
    };
    if entries > 32768 || entries < needed {
        return Err(LoadError::config(
            "depth",
            format!("{depth} needs {needed} ring entries (three a request) but the ring has {entries}; lower it or raise queue_size (at most 32768)"),
        ));
    }
    Ok(entries as u16)
}

fn check_threads(queues: usize, threads: usize) -> Result<(), LoadError> {
    if queues == 0 || threads == 0 || threads > queues {
        return Err(LoadError::config("threads", "must be between 1 and `queues`: a queue has one thread"));
    }
    Ok(())
}

impl LoadConfig {
    /// Ring entries that are really used.
    pub(crate) fn ring_entries(&self) -> Result<u16, LoadError> {
        ring_entries(self.depth, self.queue_size)
    }

    pub(crate) fn check(&self) -> Result<(), LoadError> {
        check_shape(self.seconds, self.warmup_seconds, self.depth, self.block_size, self.read_share)?;
        check_timeout("stall_seconds", self.stall_seconds)?;
        if self.needs_tracked() && self.region_bytes != 0 {
            return Err(LoadError::config(
                "region_bytes",
                "does not go with `packed`, `inflight` or `dirty_log`",
            ));
        }
        check_threads(self.queues, self.threads)
    }

    /// Whether the job asks for what only the pattern job's connection has.
    pub(crate) fn needs_tracked(&self) -> bool {
        self.packed || self.inflight.is_some() || self.dirty_log
    }
}

impl PatternConfig {
    /// Ring entries that are really used.
    pub(crate) fn ring_entries(&self) -> Result<u16, LoadError> {
        ring_entries(self.depth, self.queue_size)
    }

    pub(crate) fn check(&self) -> Result<(), LoadError> {
        check_shape(self.seconds, 0.0, self.depth, self.block_size, self.read_share)?;
        check_timeout("stall_seconds", self.stall_seconds)?;
        check_threads(self.queues, self.threads)?;
        if self.read_share + self.flush_share > 100 {
            return Err(LoadError::config("flush_share", "and read_share are percentages of one whole"));
        }
        if !(0.0..=1e9).contains(&self.rate) {
            return Err(LoadError::config("rate", "must be between 0 (no limit) and 1e9 requests a second"));
        }
        if !(1..=60_000).contains(&self.reconnect_ms) {
            return Err(LoadError::config("reconnect_ms", "must be between 1 and 60000"));
        }
        if self.write_through && self.flush_share > 0 {
            return Err(LoadError::config(
                "flush_share",
                "must be 0 with write_through, which does not flush",
            ));
        }
        Ok(())
    }
}

impl LimitConfig {
    pub(crate) fn check(&self) -> Result<(), LoadError> {
        check_shape(self.seconds, self.warmup_seconds, self.depth, self.block_size, self.read_share)?;
        if self.depth > crate::limit::MAX_DEPTH {
            return Err(LoadError::config("depth", format!("can be at most {}", crate::limit::MAX_DEPTH)));
        }
        if self.volume_bytes < self.block_size {
            return Err(LoadError::config("volume_bytes", "must hold at least one block"));
        }
        if self.server_core == self.client_core {
            return Err(LoadError::config(
                "client_core",
                "must be another core than server_core: both threads poll",
            ));
        }
        Ok(())
    }
}

fn check_shape(
    seconds: f64,
    warmup: f64,
    depth: usize,
    block_size: usize,
    read_share: u32,
) -> Result<(), LoadError> {
    if !(seconds > 0.0 && seconds <= 86_400.0) {
        return Err(LoadError::config("seconds", "must be above 0 and at most 86400"));
    }
    if !(0.0..=3600.0).contains(&warmup) {
        return Err(LoadError::config("warmup_seconds", "must be between 0 and 3600"));
    }
    if depth == 0 {
        return Err(LoadError::config("depth", "must be at least 1"));
    }
    if block_size == 0 || !block_size.is_multiple_of(512) || block_size > 16 << 20 {
        return Err(LoadError::config("block_size", "must be a multiple of 512 of at most 16 MiB"));
    }
    if read_share > 100 {
        return Err(LoadError::config("read_share", "is a percentage: give 0 to 100"));
    }
    Ok(())
}

pub(crate) fn check_timeout(field: &'static str, seconds: f64) -> Result<(), LoadError> {
    if seconds > 0.0 && seconds <= 86_400.0 {
        Ok(())
    } else {
        Err(LoadError::config(field, "must be above 0 and at most 86400"))
    }
}

fn default_seconds() -> f64 {
    5.0
}
fn default_warmup() -> f64 {
    0.5
}
fn one() -> usize {
    1
}
fn one_u64() -> u64 {
    1
}
fn default_block() -> usize {
    4096
}
fn all_reads() -> u32 {
    100
}
fn random() -> Pattern {
    Pattern::Random
}
fn poll() -> Wait {
    Wait::Poll
}
fn sleep() -> Wait {
    Wait::Sleep
}
fn yes() -> bool {
    true
}
fn auto() -> Hugepages {
    Hugepages::Auto
}
fn default_stall() -> f64 {
    10.0
}
fn default_operations() -> u64 {
    2000
}
fn default_queue_size() -> u16 {
    128
}
fn default_verify_depth() -> usize {
    8
}
fn default_max_bytes() -> usize {
    256 << 10
}
fn default_segments() -> usize {
    8
}
fn default_volume() -> usize {
    1 << 30
}
fn default_pattern_queues() -> usize {
    4
}
fn default_pattern_depth() -> usize {
    32
}
fn default_pattern_reads() -> u32 {
    50
}
fn default_flush_share() -> u32 {
    1
}
fn default_reconnect_ms() -> u64 {
    20
}
fn default_pattern_stall() -> f64 {
    30.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(json: &str) -> LoadConfig {
        match serde_json::from_str::<Job>(json).expect("a job") {
            Job::Load(config) => config,
            other => panic!("not a load job: {other:?}"),
        }
    }

    #[test]
    fn ring_entries_hold_three_descriptors_a_request() {
        assert_eq!(load(r#"{"mode":"load","socket":"s"}"#).ring_entries().unwrap(), 128);
        assert_eq!(load(r#"{"mode":"load","socket":"s","depth":128}"#).ring_entries().unwrap(), 512);
        let error = load(r#"{"mode":"load","socket":"s","depth":100,"queue_size":256}"#).ring_entries();
        assert!(error.unwrap_err().to_string().contains("300 ring entries"));
    }

    #[test]
    fn wrong_values_are_named() {
        for (json, field) in [
            (r#"{"mode":"load","socket":"s","read_share":101}"#, "read_share"),
            (r#"{"mode":"load","socket":"s","block_size":1000}"#, "block_size"),
            (r#"{"mode":"load","socket":"s","threads":2}"#, "threads"),
            (r#"{"mode":"load","socket":"s","seconds":0}"#, "seconds"),
            (r#"{"mode":"load","socket":"s","packed":true,"region_bytes":4096}"#, "region_bytes"),
        ] {
            let error = load(json).check().unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn wrong_values_of_a_pattern_are_named() {
        for (field, value) in [
            ("flush_share", "51"),
            ("rate", "-1"),
            ("reconnect_ms", "0"),
            ("stall_seconds", "0"),
            ("threads", "5"),
            ("depth", "0"),
        ] {
            let json = format!(r#"{{"mode":"pattern","socket":"s","{field}":{value}}}"#);
            let Job::Pattern(config) = serde_json::from_str(&json).expect("a job") else {
                panic!("not a pattern job")
            };
            let error = config.check().unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let error = crate::run_json(r#"{"mode":"load","socket":"s","dept":4}"#).unwrap_err();
        assert!(error.to_string().contains("dept"), "{error}");
    }
}

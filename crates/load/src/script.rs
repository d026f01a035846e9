//! Scripts: single requests as a test writes them down, with a result for each.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use libc::c_void;
use serde::Serialize;
use virtio_driver::iovec;

use crate::config::{check_timeout, Fill, Hugepages, Operation, ScriptConfig};
use crate::connection::{Connection, Device, Request};
use crate::memory::SharedMemory;
use crate::queue::{kind, status_name, wait_for_calls, RequestQueue};
use crate::random::Random;
use crate::LoadError;

/// Length of the answer to GET_ID (VIRTIO 1.2, 5.2.6).
const ID_BYTES: usize = 20;
/// Distance between segments, so that no two of one request touch.
const GAP: usize = 512;

#[derive(Debug, Clone, Serialize)]
pub(crate) struct ScriptReport {
    pub mode: &'static str,
    pub device: Device,
    pub regions: usize,
    pub connect_ns: u64,
    pub kicks: u64,
    /// In the order of the operations; shorter when a request timed out.
    pub results: Vec<OperationResult>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct OperationResult {
    /// ok, ioerr, unsupp, unknown, "not written" (completed without a status) or timeout.
    pub status: &'static str,
    pub status_byte: Option<u8>,
    pub latency_ns: u64,
    /// CRC-32 (IEEE) of the data written or read.
    pub crc32: Option<u32>,
    /// Whether all data that was read is zero.
    pub zero: Option<bool>,
    /// GET_ID: the serial number without its padding. Raw: what the device wrote, as hexadecimal digits.
    pub text: Option<String>,
}

/// A request laid out in shared memory.
struct Prepared {
    queue: usize,
    kind: u32,
    sector: u64,
    readable: Vec<(usize, usize)>,
    writable: Vec<(usize, usize)>,
    crc32: Option<u32>,
    submitted: Instant,
}

/// A bump allocator over the payload memory; it starts anew when nothing is in flight.
struct Arena<'a> {
    memory: &'a SharedMemory,
    next: usize,
}

pub(crate) fn run(config: &ScriptConfig) -> Result<ScriptReport, LoadError> {
    check_timeout("timeout_seconds", config.timeout_seconds)?;
    if config.depth == 0 {
        return Err(LoadError::config("depth", "must be at least 1"));
    }
    let largest = config.operations.iter().map(footprint).max().unwrap_or(0);
    let memory = SharedMemory::new((largest * config.depth).max(4096), Hugepages::Off)?;
    let request = Request {
        socket: &config.socket,
        queues: config.queues,
        queue_size: config.queue_size,
        event_idx: config.event_idx,
    };
    let mut connection = Connection::open(request, Some(memory), config.region_bytes)?;
    let results = execute(config, &mut connection)?;
    Ok(ScriptReport {
        mode: "script",
        device: connection.device.clone(),
        regions: connection.regions,
        connect_ns: connection.connect_ns,
        kicks: connection.queues().iter().map(|queue| queue.kicks()).sum(),
        results,
    })
}

fn execute(config: &ScriptConfig, connection: &mut Connection) -> Result<Vec<OperationResult>, LoadError> {
    let timeout = Duration::from_secs_f64(config.timeout_seconds);
    let (queues, memory) = connection.parts();
    queues.iter_mut().for_each(|queue| queue.enable_calls(true));
    let mut results: Vec<Option<OperationResult>> = vec![None; config.operations.len()];
    let mut arena = Arena { memory, next: 0 };
    let mut flights: Vec<Option<Prepared>> = config.operations.iter().map(|_| None).collect();
    let mut waiting: VecDeque<usize> = (0..config.operations.len()).collect();
    let mut last = Instant::now();
    loop {
        // Rounds of `depth` requests: the arena is handed out anew only when nothing is in flight.
        if queues.iter().all(|queue| queue.in_flight() == 0) {
            if waiting.is_empty() {
                break;
            }
            arena.next = 0;
            for _ in 0..config.depth.min(waiting.len()) {
                let index = waiting.pop_front().expect("an operation that waits");
                let prepared = arena.prepare(&config.operations[index])?;
                submit(queues, memory, &prepared, index as u32)?;
                flights[index] = Some(prepared);
            }
            for queue in queues.iter_mut().filter(|queue| queue.in_flight() > 0) {
                queue.kick_if_needed()?;
            }
            last = Instant::now();
        }
        let mut found = false;
        for queue in queues.iter_mut() {
            while let Some(done) = queue.reap()? {
                found = true;
                let index = done.tag as usize;
                let prepared = flights[index].take().expect("a request in flight");
                results[index] = Some(outcome(&config.operations[index], &prepared, done.status, memory));
            }
        }
        if found {
            last = Instant::now();
            continue;
        }
        let Some(left) = timeout.checked_sub(last.elapsed()) else {
            for (result, flight) in results.iter_mut().zip(&flights) {
                if let Some(prepared) = flight {
                    *result = Some(timed_out(prepared));
                }
            }
            break;
        };
        let calls: Vec<_> = queues.iter().map(|queue| queue.call()).collect();
        wait_for_calls(&calls, left)?;
    }
    Ok(results.into_iter().map_while(|result| result).collect())
}

fn submit(
    queues: &mut [RequestQueue],
    memory: &SharedMemory,
    prepared: &Prepared,
    tag: u32,
) -> Result<(), LoadError> {
    let count = queues.len();
    let queue = queues.get_mut(prepared.queue).ok_or_else(|| {
        LoadError::config("queue", format!("{} does not exist: the script sets up {count}", prepared.queue))
    })?;
    let iovecs = |parts: &[(usize, usize)]| -> Vec<iovec> {
        let iovec_of = |&(offset, len): &(usize, usize)| iovec {
            iov_base: memory.at(offset, len).cast::<c_void>(),
            iov_len: len,
        };
        parts.iter().map(iovec_of).collect()
    };
    queue.submit(
        prepared.kind,
        prepared.sector,
        &iovecs(&prepared.readable),
        &iovecs(&prepared.writable),
        tag,
    )
}

impl Arena<'_> {
    fn take(&mut self, lengths: &[usize]) -> Vec<(usize, usize)> {
        let mut parts = Vec::with_capacity(lengths.len());
        for &len in lengths {
            parts.push((self.next, len));
            self.next += len + GAP;
        }
        parts
    }

    fn prepare(&mut self, operation: &Operation) -> Result<Prepared, LoadError> {
        let none = Vec::new;
        let (queue, kind, sector, readable, writable) = match operation {
            Operation::Read { offset, len, segments, queue } => {
                (*queue, kind::IN, sector_of(*offset)?, none(), self.take(&lengths(*len, segments)))
            }
            Operation::Write { offset, len, segments, queue, fill } => {
                let parts = self.take(&lengths(*len, segments));
                let total = parts.iter().map(|part| part.1).sum();
                self.scatter(&parts, &bytes_of(*fill, total));
                (*queue, kind::OUT, sector_of(*offset)?, parts, none())
            }
            Operation::Flush { queue } => (*queue, kind::FLUSH, 0, none(), none()),
            Operation::Discard { offset, len, queue } => {
                let range = self.range(*offset, *len, 0)?;
                (*queue, kind::DISCARD, 0, range, none())
            }
            Operation::WriteZeroes { offset, len, unmap, queue } => {
                let range = self.range(*offset, *len, u32::from(*unmap))?;
                (*queue, kind::WRITE_ZEROES, 0, range, none())
            }
            Operation::GetId { queue } => (*queue, kind::GET_ID, 0, none(), self.take(&[ID_BYTES])),
            Operation::Raw { kind, sector, readable, writable, queue } => {
                let data = readable.iter().map(|digits| from_hex(digits)).collect::<Result<Vec<_>, _>>()?;
                let parts = self.take(&data.iter().map(Vec::len).collect::<Vec<_>>());
                self.scatter(&parts, &data.concat());
                (*queue, *kind, *sector, parts, self.take(writable))
            }
        };
        // What a device does not write must not look like zeros that it wrote.
        for &(offset, len) in &writable {
            self.memory.store(offset, &vec![0xa5; len]);
        }
        let crc32 = matches!(operation, Operation::Write { .. })
            .then(|| crc32fast::hash(&gather(self.memory, &readable)));
        Ok(Prepared { queue, kind, sector, readable, writable, crc32, submitted: Instant::now() })
    }

    /// struct virtio_blk_discard_write_zeroes (VIRTIO 1.2, 5.2.6).
    fn range(&mut self, offset: u64, len: u64, flags: u32) -> Result<Vec<(usize, usize)>, LoadError> {
        let sectors = u32::try_from(sector_of(len)?)
            .map_err(|_| LoadError::config("len", format!("{len} is more than 2^32 sectors")))?;
        let mut bytes = Vec::with_capacity(16);
        bytes.extend(sector_of(offset)?.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        let parts = self.take(&[bytes.len()]);
        self.scatter(&parts, &bytes);
        Ok(parts)
    }

    fn scatter(&self, parts: &[(usize, usize)], bytes: &[u8]) {
        let mut rest = bytes;
        for &(offset, len) in parts {
            let (now, later) = rest.split_at(len);
            self.memory.store(offset, now);
            rest = later;
        }
    }
}

fn gather(memory: &SharedMemory, parts: &[(usize, usize)]) -> Vec<u8> {
    parts.iter().flat_map(|&(offset, len)| memory.load(offset, len)).collect()
}

fn outcome(operation: &Operation, prepared: &Prepared, status: u8, memory: &SharedMemory) -> OperationResult {
    let data = gather(memory, &prepared.writable);
    let read = matches!(operation, Operation::Read { .. });
    OperationResult {
        status: status_name(status),
        status_byte: Some(status),
        latency_ns: prepared.submitted.elapsed().as_nanos() as u64,
        crc32: if read { Some(crc32fast::hash(&data)) } else { prepared.crc32 },
        zero: read.then(|| data.iter().all(|&byte| byte == 0)),
        text: match operation {
            Operation::GetId { .. } => {
                let end = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
                Some(String::from_utf8_lossy(&data[..end]).into_owned())
            }
            Operation::Raw { .. } => Some(data.iter().map(|byte| format!("{byte:02x}")).collect()),
            _ => None,
        },
    }
}

fn timed_out(prepared: &Prepared) -> OperationResult {
    OperationResult {
        status: "timeout",
        status_byte: None,
        latency_ns: prepared.submitted.elapsed().as_nanos() as u64,
        crc32: None,
        zero: None,
        text: None,
    }
}

fn lengths(len: usize, segments: &[usize]) -> Vec<usize> {
    if segments.is_empty() {
        vec![len]
    } else {
        segments.to_vec()
    }
}

fn sector_of(bytes: u64) -> Result<u64, LoadError> {
    if bytes.is_multiple_of(512) {
        Ok(bytes / 512)
    } else {
        Err(LoadError::config(
            "offset",
            format!("{bytes} is no multiple of 512; use a raw request for odd ones"),
        ))
    }
}

fn bytes_of(fill: Fill, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    match fill {
        Fill::Byte(value) => bytes.fill(value),
        Fill::Seed(seed) => Random::new(seed).fill(&mut bytes),
    }
    bytes
}

fn from_hex(digits: &str) -> Result<Vec<u8>, LoadError> {
    let wrong = || LoadError::config("readable", format!("{digits:?} is not pairs of hexadecimal digits"));
    if !digits.is_ascii() || !digits.len().is_multiple_of(2) {
        return Err(wrong());
    }
    let pair = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| wrong());
    (0..digits.len()).step_by(2).map(pair).collect()
}

/// Memory an operation takes from the arena.
fn footprint(operation: &Operation) -> usize {
    let taken = |lengths: &[usize]| lengths.iter().map(|len| len + GAP).sum::<usize>();
    match operation {
        Operation::Read { len, segments, .. } | Operation::Write { len, segments, .. } => {
            taken(&lengths(*len, segments))
        }
        Operation::Flush { .. } => 0,
        Operation::Discard { .. } | Operation::WriteZeroes { .. } => taken(&[16]),
        Operation::GetId { .. } => taken(&[ID_BYTES]),
        Operation::Raw { readable, writable, .. } => {
            taken(&readable.iter().map(|digits| digits.len() / 2).collect::<Vec<_>>()) + taken(writable)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_take_the_memory_they_were_counted_for() {
        let operations: Vec<Operation> = serde_json::from_str(
            r#"[{"op":"read","offset":0,"len":4096},
                {"op":"write","offset":512,"segments":[512,1024],"fill":{"seed":3}},
                {"op":"flush"},{"op":"get_id"},
                {"op":"discard","offset":0,"len":4096},
                {"op":"write_zeroes","offset":0,"len":512,"unmap":true},
                {"op":"raw","type":77,"sector":5,"readable":["00ff"],"writable":[7,9]}]"#,
        )
        .unwrap();
        let memory = SharedMemory::new(64 << 10, Hugepages::Off).unwrap();
        for operation in &operations {
            let mut arena = Arena { memory: &memory, next: 0 };
            arena.prepare(operation).unwrap();
            assert_eq!(arena.next, footprint(operation), "{operation:?}");
        }
    }

    #[test]
    fn a_range_is_laid_out_as_the_specification_says() {
        let memory = SharedMemory::new(4096, Hugepages::Off).unwrap();
        let mut arena = Arena { memory: &memory, next: 0 };
        let parts = arena.range(0x0102 * 512, 8 * 512, 1).unwrap();
        assert_eq!(gather(&memory, &parts), [2, 1, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn odd_values_are_refused_with_the_way_out() {
        assert!(sector_of(100).unwrap_err().to_string().contains("raw request"));
        assert!(from_hex("0g").is_err() && from_hex("abc").is_err() && from_hex("é").is_err());
        assert_eq!(from_hex("00fF").unwrap(), [0, 255]);
    }
}

//! The stats page: layout in docs/formats/stats-page.md.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::error::TelemetryError;
use crate::histogram::{bucket_of, BUCKETS};

/// Reactor slots of a page: reactors may be added while it is in use.
pub const MAX_REACTORS: usize = 256;
/// Queue slots of a page. The file is sparse, so unused slots cost nothing.
pub const MAX_QUEUE_SLOTS: usize = 4096;

const HEADER_SIZE: usize = 4096;
const REACTOR_SLOT: usize = 256;
const QUEUE_SLOT: usize = 8192;
const QUEUES_AT: usize = HEADER_SIZE + MAX_REACTORS * REACTOR_SLOT;
const HISTOGRAMS: usize = 512;
const NO_REACTOR: u32 = u32::MAX;

/// Counters of a reactor slot; the value is the offset in the slot.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum ReactorCounter {
    BusyNs = 8,
    IdleNs = 16,
    AsleepNs = 24,
    Turns = 32,
    Enters = 40,
    Submitted = 48,
    Reaped = 56,
    WakeUps = 64,
    Messages = 72,
    Queues = 80,
    Calls = 88,
}

/// Counters of a queue slot; the value is the offset in the slot.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum QueueCounter {
    InFlight = 88,
    Reads = 96,
    Writes = 104,
    Flushes = 112,
    Discards = 120,
    WriteZeroes = 128,
    Others = 136,
    BytesRead = 144,
    BytesWritten = 152,
    BytesDiscarded = 160,
    Errors = 168,
    Bounces = 176,
    Kicks = 184,
    Calls = 192,
    BusyNs = 200,
    Moves = 208,
    Resubmitted = 216,
}

/// Which latency histogram a request counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Latency {
    Read = 0,
    Write = 1,
    Other = 2,
}

struct Map {
    base: *mut u8,
    len: usize,
}

// SAFETY: shared memory reached only through atomics.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: we own the mapping; every handle holds an Arc of it.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

impl Map {
    #[inline(always)]
    fn u64_at(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: every offset is computed from the layout, inside the mapping and aligned; the memory is only ever used atomically.
        unsafe { &*self.base.add(offset).cast::<AtomicU64>() }
    }

    #[inline(always)]
    fn u32_at(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && offset + 4 <= self.len);
        // SAFETY: as in `u64_at`.
        unsafe { &*self.base.add(offset).cast::<AtomicU32>() }
    }

    fn zero(&self, offset: usize, len: usize) {
        for at in (offset..offset + len).step_by(8) {
            self.u64_at(at).store(0, Ordering::Relaxed);
        }
    }
}

/// The page itself, owned by the engine's control side.
pub struct StatsPage {
    map: Arc<Map>,
    reactors: AtomicUsize,
    taken: Arc<Mutex<Vec<bool>>>,
}

impl StatsPage {
    /// Make the page at `path` anew for `cores.len()` reactors.
    ///
    /// # Errors
    /// The file cannot be made or mapped, or there are more reactors than slots.
    pub fn create(path: &Path, cores: &[usize]) -> Result<Self, TelemetryError> {
        if cores.len() > MAX_REACTORS {
            return Err(TelemetryError::Reactors { limit: MAX_REACTORS });
        }
        let fail = |source| TelemetryError::Create { path: path.to_owned(), source };
        let queues_at = QUEUES_AT;
        let len = queues_at + MAX_QUEUE_SLOTS * QUEUE_SLOT;
        // A reader may still map the page of an engine before us: give it a new file, never a changed one.
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
            _ => {}
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            // Names of volumes, and what their guests do, are nobody's business but the operator's.
            .mode(0o640)
            .open(path)
            .map_err(fail)?;
        file.set_len(len as u64).map_err(fail)?;
        // SAFETY: a fresh shared mapping of our own file, of its full length.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(fail(std::io::Error::last_os_error()));
        }
        let map = Arc::new(Map { base: base.cast(), len });
        let started = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64);
        map.u32_at(8).store(1, Ordering::Relaxed);
        map.u32_at(12).store(HEADER_SIZE as u32, Ordering::Relaxed);
        map.u64_at(16).store(u64::from(std::process::id()), Ordering::Relaxed);
        map.u64_at(24).store(started, Ordering::Relaxed);
        map.u32_at(32).store(cores.len() as u32, Ordering::Relaxed);
        map.u32_at(36).store(REACTOR_SLOT as u32, Ordering::Relaxed);
        map.u64_at(40).store(HEADER_SIZE as u64, Ordering::Relaxed);
        map.u32_at(48).store(MAX_QUEUE_SLOTS as u32, Ordering::Relaxed);
        map.u32_at(52).store(QUEUE_SLOT as u32, Ordering::Relaxed);
        map.u64_at(56).store(queues_at as u64, Ordering::Relaxed);
        for (index, core) in cores.iter().enumerate() {
            map.u32_at(HEADER_SIZE + index * REACTOR_SLOT).store(*core as u32, Ordering::Relaxed);
        }
        // The magic goes in last: a reader that sees it sees the whole header.
        map.u64_at(0).store(u64::from_le_bytes(*b"RSSTATS1"), Ordering::Release);
        let reactors = AtomicUsize::new(cores.len());
        Ok(Self { map, reactors, taken: Arc::new(Mutex::new(vec![false; MAX_QUEUE_SLOTS])) })
    }

    /// The handle of reactor `index`; make one per reactor thread, and others to read.
    pub fn reactor(&self, index: usize) -> ReactorStats {
        let reactors = self.reactors.load(Ordering::Relaxed);
        assert!(index < reactors, "reactor {index} of {reactors}");
        ReactorStats { base: HEADER_SIZE + index * REACTOR_SLOT, map: self.map.clone() }
    }

    /// Begin the slot of reactor `index`, which is a removed one's or the next behind the last, for a thread on `core`.
    ///
    /// # Errors
    /// All slots are taken.
    pub fn add_reactor(&self, index: usize, core: usize) -> Result<ReactorStats, TelemetryError> {
        if index >= MAX_REACTORS {
            return Err(TelemetryError::Reactors { limit: MAX_REACTORS });
        }
        let base = HEADER_SIZE + index * REACTOR_SLOT;
        self.map.zero(base, REACTOR_SLOT);
        self.map.u32_at(base).store(core as u32, Ordering::Relaxed);
        let reactors = self.reactors.load(Ordering::Relaxed).max(index + 1);
        self.reactors.store(reactors, Ordering::Relaxed);
        self.map.u32_at(32).store(reactors as u32, Ordering::Release);
        Ok(self.reactor(index))
    }

    /// Slot `index` of the reactors as others see it, whether there is one or not.
    pub fn view(&self, index: usize) -> ReactorView {
        assert!(index < MAX_REACTORS, "reactor {index} of {MAX_REACTORS}");
        ReactorView { base: HEADER_SIZE + index * REACTOR_SLOT, map: self.map.clone() }
    }

    /// Take a slot for queue `index` of `volume`; it is zeroed, and given back when the handle is dropped.
    ///
    /// # Errors
    /// All slots are taken.
    pub fn queue(&self, volume: &str, index: usize) -> Result<QueueStats, TelemetryError> {
        let slot = {
            let mut taken = self.taken.lock().unwrap_or_else(|e| e.into_inner());
            let slot =
                taken.iter().position(|t| !t).ok_or(TelemetryError::Full { limit: MAX_QUEUE_SLOTS })?;
            taken[slot] = true;
            slot
        };
        let base = QUEUES_AT + slot * QUEUE_SLOT;
        let map = &self.map;
        let generation = map.u32_at(base).load(Ordering::Relaxed);
        map.u32_at(base).store(generation | 1, Ordering::Release);
        map.zero(base + 8, QUEUE_SLOT - 8);
        let name = volume.as_bytes();
        for (at, chunk) in name.chunks(8).take(8).enumerate() {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            map.u64_at(base + 8 + at * 8).store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
        map.u32_at(base + 72).store(index as u32, Ordering::Relaxed);
        map.u32_at(base + 76).store(NO_REACTOR, Ordering::Relaxed);
        map.u32_at(base + 4).store(1, Ordering::Relaxed);
        map.u32_at(base).store((generation | 1).wrapping_add(1), Ordering::Release);
        Ok(QueueStats { map: self.map.clone(), base, slot, taken: self.taken.clone() })
    }
}

/// A reactor's counters. One thread writes.
pub struct ReactorStats {
    map: Arc<Map>,
    base: usize,
}

impl ReactorStats {
    #[inline(always)]
    pub fn add(&self, counter: ReactorCounter, by: u64) {
        raise(self.map.u64_at(self.base + counter as usize), by);
    }

    pub fn set(&self, counter: ReactorCounter, value: u64) {
        self.map.u64_at(self.base + counter as usize).store(value, Ordering::Relaxed);
    }

    pub fn get(&self, counter: ReactorCounter) -> u64 {
        self.map.u64_at(self.base + counter as usize).load(Ordering::Relaxed)
    }

    pub fn set_asleep(&self, asleep: bool) {
        self.map.u32_at(self.base + 4).store(if asleep { 2 } else { 1 }, Ordering::Relaxed);
    }

    /// The thread ends, or did not begin, and the slot is free.
    pub fn set_removed(&self) {
        self.map.u32_at(self.base + 4).store(3, Ordering::Relaxed);
    }
}

/// A reactor's counters, for reading.
#[derive(Clone)]
pub struct ReactorView {
    map: Arc<Map>,
    base: usize,
}

impl ReactorView {
    pub fn core(&self) -> u32 {
        self.map.u32_at(self.base).load(Ordering::Relaxed)
    }

    /// It has started and is not asleep.
    pub fn polling(&self) -> bool {
        self.map.u32_at(self.base + 4).load(Ordering::Relaxed) == 1
    }

    pub fn turns(&self) -> u64 {
        self.get(ReactorCounter::Turns)
    }

    pub fn wake_ups(&self) -> u64 {
        self.get(ReactorCounter::WakeUps)
    }

    pub fn get(&self, counter: ReactorCounter) -> u64 {
        self.map.u64_at(self.base + counter as usize).load(Ordering::Relaxed)
    }
}

/// A queue's counters and histograms. One thread writes at a time: the reactor that owns the queue.
pub struct QueueStats {
    map: Arc<Map>,
    base: usize,
    slot: usize,
    taken: Arc<Mutex<Vec<bool>>>,
}

impl QueueStats {
    #[inline(always)]
    pub fn add(&self, counter: QueueCounter, by: u64) {
        raise(self.map.u64_at(self.base + counter as usize), by);
    }

    #[inline(always)]
    pub fn set(&self, counter: QueueCounter, value: u64) {
        self.map.u64_at(self.base + counter as usize).store(value, Ordering::Relaxed);
    }

    /// A handle that reads the counters and lets go of nothing.
    pub fn reader(&self) -> QueueReader {
        QueueReader { map: self.map.clone(), base: self.base }
    }

    /// Count `count` requests that took `ns` each.
    #[inline(always)]
    pub fn latency(&self, kind: Latency, ns: u64, count: u64) {
        let at = self.base + HISTOGRAMS + (kind as usize * BUCKETS + bucket_of(ns)) * 8;
        raise(self.map.u64_at(at), count);
    }

    /// Say where the queue runs; `None` while it is stopped.
    pub fn placed(&self, reactor: Option<usize>, ring_entries: u16) {
        self.map.u32_at(self.base + 76).store(reactor.map_or(NO_REACTOR, |r| r as u32), Ordering::Relaxed);
        self.map.u32_at(self.base + 80).store(u32::from(ring_entries), Ordering::Relaxed);
    }
}

/// Reads what the queue's reactor counts.
pub struct QueueReader {
    map: Arc<Map>,
    base: usize,
}

impl QueueReader {
    pub fn get(&self, counter: QueueCounter) -> u64 {
        self.map.u64_at(self.base + counter as usize).load(Ordering::Relaxed)
    }
}

impl Drop for QueueStats {
    fn drop(&mut self) {
        let generation = self.map.u32_at(self.base).load(Ordering::Relaxed);
        self.map.u32_at(self.base).store(generation | 1, Ordering::Release);
        self.map.u32_at(self.base + 4).store(0, Ordering::Relaxed);
        self.map.u32_at(self.base).store((generation | 1).wrapping_add(1), Ordering::Release);
        self.taken.lock().unwrap_or_else(|e| e.into_inner())[self.slot] = false;
    }
}

#[inline(always)]
fn raise(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_in(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Every user of the host could read which volumes there are and what their guests do.
    #[test]
    fn strangers_cannot_read_the_page() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stats");
        let _page = StatsPage::create(&path, &[0]).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o007, 0);
    }

    #[test]
    fn counters_land_where_the_format_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stats");
        let page = StatsPage::create(&path, &[3, 5]).unwrap();
        let reactor = page.reactor(1);
        reactor.add(ReactorCounter::Calls, 7);
        let queue = page.queue("web-1", 2).unwrap();
        queue.placed(Some(1), 128);
        queue.add(QueueCounter::BytesWritten, 4096);
        queue.latency(Latency::Write, 1000, 1);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(&bytes[..8], b"RSSTATS1");
        assert_eq!(bytes[4096 + 256], 5);
        assert_eq!(u64_in(&bytes, 4096 + 256 + 88), 7);
        let slot = u64_in(&bytes, 56) as usize;
        assert_eq!(&bytes[slot + 8..slot + 14], b"web-1\0");
        assert_eq!(bytes[slot + 72], 2);
        assert_eq!(u64_in(&bytes, slot + 152), 4096);
        assert_eq!(u64_in(&bytes, slot + 3072 + 8 * bucket_of(1000)), 1);
    }

    /// The vector that the Python decoder is tested with too: every counter holds 1000 (reactors) or 2000 (queues) plus its
    /// offset in the slot.
    #[test]
    fn the_golden_vector_agrees_on_every_offset() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/formats/vectors/stats-page.bin");
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(&bytes[..8], b"RSSTATS1");
        assert_eq!(u64_in(&bytes, 40) as usize, HEADER_SIZE);
        let reactor = HEADER_SIZE;
        use ReactorCounter as R;
        for counter in [
            R::BusyNs,
            R::IdleNs,
            R::AsleepNs,
            R::Turns,
            R::Enters,
            R::Submitted,
            R::Reaped,
            R::WakeUps,
            R::Messages,
            R::Queues,
            R::Calls,
        ] {
            assert_eq!(u64_in(&bytes, reactor + counter as usize), 1000 + counter as u64, "{counter:?}");
        }
        let queue = u64_in(&bytes, 56) as usize;
        use QueueCounter as Q;
        for counter in [
            Q::InFlight,
            Q::Reads,
            Q::Writes,
            Q::Flushes,
            Q::Discards,
            Q::WriteZeroes,
            Q::Others,
            Q::BytesRead,
            Q::BytesWritten,
            Q::BytesDiscarded,
            Q::Errors,
            Q::Bounces,
            Q::Kicks,
            Q::Calls,
            Q::BusyNs,
            Q::Moves,
            Q::Resubmitted,
        ] {
            assert_eq!(u64_in(&bytes, queue + counter as usize), 2000 + counter as u64, "{counter:?}");
        }
        let bucket = |kind: Latency, at: usize| {
            u64_in(&bytes, queue + HISTOGRAMS + (kind as usize * BUCKETS + at) * 8)
        };
        assert_eq!((bucket(Latency::Read, 143), bucket(Latency::Write, 319)), (10, 2));
    }

    #[test]
    fn a_slot_is_zeroed_and_used_again_after_its_queue_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stats");
        let page = StatsPage::create(&path, &[0]).unwrap();
        let first = page.queue("a-name-that-is-long", 0).unwrap();
        first.add(QueueCounter::Reads, 9);
        drop(first);
        let _second = page.queue("b", 0).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let slot = u64_in(&bytes, 56) as usize;
        assert_eq!(u64_in(&bytes, slot + 96), 0);
        assert_eq!(&bytes[slot + 8..slot + 16], b"b\0\0\0\0\0\0\0");
    }
}

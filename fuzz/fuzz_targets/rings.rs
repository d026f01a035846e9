//! A guest writes whatever it likes into its memory, and a frontend into the in-flight region; the device side takes
//! requests from a ring, split or packed.
//!
//! The input is a short set-up (see `Setup`), the in-flight region if there is one, and the guest's memory from address 0
//! on. The memory is two regions that touch in guest addresses and nowhere else, so that buffers, tables and rings can
//! straddle them. Nothing may panic or reach outside the two, and what passes as a request must fit the disk. With an
//! in-flight region the ring is set up twice, the second time where a first process was killed.
#![no_main]

use std::cell::RefCell;
use std::os::fd::AsFd;
use std::sync::Arc;

use libfuzzer_sys::{fuzz_target, Corpus};
use ringstone_fuzz::{abandon, memory_file, serve};
use ringstone_mapping::Mapping;
use ringstone_virtio_blk::Geometry;
use ringstone_virtqueue::{
    Chain, DirtyLog, InflightRegion, MemoryRegion, MemoryTable, PackedRing, RingAddresses, RingError,
    RingSetup, SplitRing, VirtRing,
};

/// Bytes of each region.
const REGION: usize = 8192;
/// The frontend's address of guest address 0. The second region lies a gap further.
const USER: u64 = 0x7000_0000;
const USER_GAP: u64 = 0x10_0000;
const DISK: u64 = 1 << 20;
/// Entries of the in-flight region at most; a longer ring is refused.
const MOST_ENTRIES: u16 = 64;
const INFLIGHT: usize = 4096;
/// Where the region begins in its file.
const INFLIGHT_AT: usize = 64;
/// Bytes of the dirty bitmap: it covers guest memory and some more.
const LOG: usize = 2;

/// The first bytes of an input.
struct Setup {
    size: u32,
    event_idx: bool,
    indirect: bool,
    base: u32,
    packed: bool,
    inflight: bool,
    log: bool,
    addresses: RingAddresses,
    geometry: Geometry,
}

impl Setup {
    const LEN: usize = 10;

    fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let flags = bytes[1];
        let flag = |bit: u8| flags & (1 << bit) != 0;
        let word = |at: usize| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        let shift = u32::from(bytes[0] & 0x1f);
        // Sizes that are no power of two, and ones that are too large, are worth a try too.
        let size = if bytes[0] & 0x80 == 0 { 1 << shift.min(16) } else { u32::from(bytes[0]) };
        let packed = flag(6);
        // Both positions of a packed ring; the same one unless there are bytes to spare.
        let base = word(2) as u32 | (word(if flag(7) { 4 } else { 2 }) as u32) << 16;
        let addresses = if flag(7) && packed {
            let events = USER + 16 * u64::from(size);
            RingAddresses { descriptors: USER, available: events, used: events + 4 }
        } else if flag(7) {
            let n = u64::from(size);
            RingAddresses {
                descriptors: USER,
                available: USER + 16 * n,
                used: USER + (16 * n + 6 + 2 * n).next_multiple_of(4),
            }
        } else {
            RingAddresses { descriptors: user(word(4)), available: user(word(6)), used: user(word(8)) }
        };
        Self {
            size,
            event_idx: flag(0),
            indirect: flag(1),
            base,
            packed,
            inflight: bytes[0] & 0x20 != 0,
            log: bytes[0] & 0x40 != 0,
            addresses,
            geometry: Geometry {
                size: DISK,
                block_size: if flag(2) { 4096 } else { 512 },
                read_only: flag(3),
                discard: flag(4),
                write_zeroes: flag(5),
                max_discard: DISK / 2,
                max_write_zeroes: DISK / 4,
            },
        }
    }

    /// Entries of the in-flight region.
    fn entries(&self) -> u16 {
        self.size.min(MOST_ENTRIES.into()) as u16
    }
}

/// The frontend's address of guest address `guest`, the gap taken into account.
fn user(guest: u64) -> u64 {
    USER + guest + if guest >= REGION as u64 { USER_GAP } else { 0 }
}

struct Guest {
    memory: Arc<MemoryTable>,
    regions: [Arc<Mapping>; 2],
    inflight: Arc<Mapping>,
    log: Arc<Mapping>,
    chain: Chain,
}

impl Guest {
    fn new() -> Self {
        let map = |len: usize| {
            let mapping = Mapping::new(memory_file(len).as_fd(), 0, len as u64);
            Arc::new(mapping.expect("a mapping of a file in memory"))
        };
        let regions = [map(REGION), map(REGION)];
        let region = |index: usize| MemoryRegion {
            guest: (index * REGION) as u64,
            len: REGION as u64,
            user: user((index * REGION) as u64),
            mapping: regions[index].clone(),
        };
        let memory = MemoryTable::new(vec![region(0), region(1)]).expect("regions that do not overlap");
        Self {
            memory: Arc::new(memory),
            regions,
            inflight: map(INFLIGHT),
            log: map(LOG),
            chain: Chain::default(),
        }
    }

    /// Lay `bytes` into guest memory from address 0 on, zeroes behind.
    fn fill(&self, bytes: &[u8]) {
        let mut rest = bytes;
        for region in &self.regions {
            let (now, later) = rest.split_at(rest.len().min(REGION));
            // SAFETY: a region is REGION bytes long and nobody else touches it.
            unsafe {
                region.as_ptr().copy_from_nonoverlapping(now.as_ptr(), now.len());
                region.as_ptr().add(now.len()).write_bytes(0, REGION - now.len());
            }
            rest = later;
        }
    }

    /// Lay the begin of `bytes` into the in-flight region, zeroes behind. Answers the rest.
    fn fill_inflight<'a>(&self, bytes: &'a [u8], setup: &Setup) -> &'a [u8] {
        let len = InflightRegion::len(setup.entries(), setup.packed);
        let (now, rest) = bytes.split_at(bytes.len().min(len));
        // SAFETY: the region fits the mapping, which nobody else touches.
        unsafe {
            let at = self.inflight.as_ptr().add(INFLIGHT_AT);
            at.copy_from_nonoverlapping(now.as_ptr(), now.len());
            at.add(now.len()).write_bytes(0, len - now.len());
        }
        rest
    }

    fn setup(&self, setup: &Setup) -> RingSetup {
        let inflight = setup.inflight.then(|| {
            let region =
                InflightRegion::new(self.inflight.clone(), INFLIGHT_AT, setup.entries(), setup.packed);
            region.expect("a region that fits its mapping")
        });
        RingSetup {
            memory: self.memory.clone(),
            size: setup.size,
            addresses: setup.addresses,
            base: setup.base,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            inflight,
            log: setup.log.then(|| Arc::new(DirtyLog::new(self.log.clone()))),
        }
    }

    fn run<R: VirtRing>(&mut self, setup: &Setup, make: impl Fn(RingSetup) -> Result<R, RingError>) {
        // What each process leaves unanswered before it serves the rest.
        let processes: &[u16] = if setup.inflight { &[2, 0] } else { &[0] };
        for unanswered in processes {
            match make(self.setup(setup)) {
                Ok(mut ring) => {
                    abandon(&mut ring, &mut self.chain, *unanswered);
                    serve(&mut ring, &mut self.chain, &setup.geometry);
                    ring.base();
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    }
}

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::new());
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((setup, mut memory)) = input.split_first_chunk::<{ Setup::LEN }>() else {
        return Corpus::Reject;
    };
    let setup = Setup::decode(setup);
    GUEST.with_borrow_mut(|guest| {
        if setup.inflight {
            memory = guest.fill_inflight(memory, &setup);
        }
        guest.fill(memory);
        if setup.packed {
            guest.run(&setup, PackedRing::new);
        } else {
            guest.run(&setup, SplitRing::new);
        }
    });
    Corpus::Keep
});

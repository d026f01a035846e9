//! A guest writes whatever it likes into its memory; the device side takes requests from a split ring in it.
//!
//! The input is a short set-up (see `Setup`) and the guest's memory from address 0 on. The memory is two regions that
//! touch in guest addresses and nowhere else, so that buffers, tables and rings can straddle them. Nothing may panic or
//! reach outside the two, and what passes as a request must fit the disk.
#![no_main]

use std::cell::RefCell;
use std::os::fd::AsFd;
use std::sync::Arc;

use libfuzzer_sys::{fuzz_target, Corpus};
use ringstone_fuzz::{memory_file, serve};
use ringstone_mapping::Mapping;
use ringstone_virtio_blk::Geometry;
use ringstone_virtqueue::{Chain, MemoryRegion, MemoryTable, RingAddresses, SplitRing};

/// Bytes of each region.
const REGION: usize = 8192;
/// The frontend's address of guest address 0. The second region lies a gap further.
const USER: u64 = 0x7000_0000;
const USER_GAP: u64 = 0x10_0000;
const DISK: u64 = 1 << 20;

/// The first bytes of an input.
struct Setup {
    size: u32,
    event_idx: bool,
    indirect: bool,
    next_available: u16,
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
        let addresses = if flag(7) {
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
            next_available: word(2) as u16,
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
}

/// The frontend's address of guest address `guest`, the gap taken into account.
fn user(guest: u64) -> u64 {
    USER + guest + if guest >= REGION as u64 { USER_GAP } else { 0 }
}

struct Guest {
    memory: Arc<MemoryTable>,
    regions: [Arc<Mapping>; 2],
    chain: Chain,
}

impl Guest {
    fn new() -> Self {
        let regions = [(); 2].map(|()| {
            let mapping = Mapping::new(memory_file(REGION).as_fd(), 0, REGION as u64);
            Arc::new(mapping.expect("a mapping of guest memory"))
        });
        let region = |index: usize| MemoryRegion {
            guest: (index * REGION) as u64,
            len: REGION as u64,
            user: user((index * REGION) as u64),
            mapping: regions[index].clone(),
        };
        let memory = MemoryTable::new(vec![region(0), region(1)]).expect("regions that do not overlap");
        Self { memory: Arc::new(memory), regions, chain: Chain::default() }
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
}

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::new());
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((setup, memory)) = input.split_first_chunk::<{ Setup::LEN }>() else { return Corpus::Reject };
    let setup = Setup::decode(setup);
    GUEST.with_borrow_mut(|guest| {
        guest.fill(memory);
        let ring = SplitRing::new(
            guest.memory.clone(),
            setup.size,
            setup.addresses,
            setup.next_available,
            setup.event_idx,
            setup.indirect,
        );
        match ring {
            Ok(mut ring) => drop(serve(&mut ring, &mut guest.chain, &setup.geometry)),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
    Corpus::Keep
});

//! A guest writes whatever it likes into its memory; the device side takes requests from a split ring in it.
//!
//! The input is a short set-up (see `Setup`) and the guest's memory from address 0 on. The memory is two regions that
//! touch in guest addresses and nowhere else, so that buffers, tables and rings can straddle them. Nothing may panic or
//! reach outside the two, and what passes as a request must fit the disk.
#![no_main]

use std::cell::RefCell;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use libfuzzer_sys::{fuzz_target, Corpus};
use ringstone_mapping::Mapping;
use ringstone_virtio_blk::{parse, status, Geometry, Operation};
use ringstone_virtqueue::{
    total_len, Chain, MemoryRegion, MemoryTable, Notify, RingAddresses, Segment, SplitRing, MAX_SEGMENTS,
};

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
        let regions = [map(), map()];
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

    fn check_inside(&self, segments: &[Segment]) {
        for segment in segments.iter().filter(|segment| !segment.ptr.is_null()) {
            let inside = self.regions.iter().any(|region| {
                let start = region.as_ptr() as usize;
                let at = segment.ptr as usize;
                at >= start && at + segment.len as usize <= start + REGION
            });
            assert!(inside, "{segment:?} is outside guest memory");
            assert!(segment.len > 0, "an empty segment");
        }
    }

    /// Serve the ring as a reactor does: all that is available, then the used index, then the question for a call.
    fn serve(&mut self, ring: &mut SplitRing, geometry: &Geometry) {
        for _ in 0..4 {
            let Ok(waiting) = ring.available() else { return };
            assert!(waiting <= ring.size());
            ring.set_kicks(if waiting == 0 { Notify::Armed } else { Notify::Suppressed });
            for _ in 0..waiting {
                let Ok(head) = ring.peek(0) else { return };
                ring.prefetch_descriptors(head);
                ring.prefetch_first_buffer(head);
                ring.take();
                let mut chain = std::mem::take(&mut self.chain);
                let walked = ring.walk(head, &mut chain);
                let written = walked.ok().and_then(|()| self.complete(&mut chain, geometry));
                self.chain = chain;
                let Some(written) = written else { return };
                ring.push_used(head, written);
            }
            ring.publish();
            ring.wants_call();
        }
    }

    /// Check and answer one chain; `None` if there is nowhere to put a status.
    fn complete(&self, chain: &mut Chain, geometry: &Geometry) -> Option<u32> {
        assert!(chain.readable().len() + chain.writable().len() <= MAX_SEGMENTS);
        self.check_inside(chain.readable());
        self.check_inside(chain.writable());
        let (answer, byte) = match parse(chain, geometry) {
            Ok((request, byte)) => {
                self.check_inside(chain.readable());
                self.check_inside(chain.writable());
                assert!(request.offset + request.len <= geometry.size);
                let block = u64::from(geometry.block_size);
                match request.operation {
                    Operation::Read => assert_eq!(total_len(chain.writable()), request.len),
                    Operation::Write => assert_eq!(total_len(chain.readable()), request.len),
                    Operation::Discard => assert!(request.len <= geometry.max_discard),
                    Operation::WriteZeroes { .. } => assert!(request.len <= geometry.max_write_zeroes),
                    Operation::Flush | Operation::GetId => {}
                }
                if !matches!(request.operation, Operation::GetId) {
                    assert_eq!((request.offset | request.len) % block, 0);
                }
                if !matches!(request.operation, Operation::Read | Operation::Flush | Operation::GetId) {
                    assert!(!geometry.read_only, "a write to a read-only disk");
                }
                let data =
                    if request.operation == Operation::Write { chain.readable() } else { chain.writable() };
                touch(data, &request.operation);
                (status::OK, byte)
            }
            Err((Some(byte), refusal)) => (refusal.status(), byte),
            Err((None, _)) => return None,
        };
        // SAFETY: the memory table lives as long as the guest.
        unsafe { byte.set(answer) };
        Some(1)
    }
}

/// Read or write all of a request's data, as a drive would.
fn touch(segments: &[Segment], operation: &Operation) {
    for segment in segments.iter().filter(|segment| !segment.ptr.is_null()) {
        for at in [0, segment.len as usize - 1] {
            // SAFETY: the segment lies inside guest memory; `at` inside the segment.
            unsafe {
                let byte = segment.ptr.add(at);
                if *operation == Operation::Read {
                    byte.write_volatile(0xa5);
                } else {
                    byte.read_volatile();
                }
            }
        }
    }
}

fn map() -> Arc<Mapping> {
    // SAFETY: plain system calls; the descriptor is checked before it is owned.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create");
        OwnedFd::from_raw_fd(fd)
    };
    let file = std::fs::File::from(file);
    file.set_len(REGION as u64).expect("room for guest memory");
    Arc::new(Mapping::new(file.as_fd(), 0, REGION as u64).expect("a mapping of guest memory"))
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
            Ok(mut ring) => guest.serve(&mut ring, &setup.geometry),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
    Corpus::Keep
});

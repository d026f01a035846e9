//! The ring code against the crate `virtio-queue`, an independent reading of the specification.
//!
//! Both look at the same bytes of guest memory: descriptor tables, indirect tables and available rings filled at random,
//! mostly sensible and often not. What we accept, the oracle must have followed to its end with the same buffers; what the
//! oracle breaks off, we must have refused.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use ringstone_mapping::Mapping;
use ringstone_virtqueue::{
    Chain, MemoryRegion, MemoryTable, RingAddresses, RingError, RingSetup, Segment, SplitRing, VirtRing,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY: u64 = 0x10000;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const TABLES: u64 = 0x3000;
const SIZE: u16 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[derive(Clone, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

struct Guest {
    file: File,
    mapping: Arc<Mapping>,
    memory: Arc<MemoryTable>,
}

impl Guest {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY).unwrap();
        let mapping = Arc::new(Mapping::new(file.as_fd(), 0, MEMORY).unwrap());
        let region = MemoryRegion { guest: 0, len: MEMORY, user: 0, mapping: mapping.clone() };
        Self { file, mapping, memory: Arc::new(MemoryTable::new(vec![region]).unwrap()) }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    fn table(&self, at: u64, table: &[Descriptor]) {
        for (i, d) in table.iter().enumerate() {
            let mut bytes = d.address.to_le_bytes().to_vec();
            bytes.extend(d.len.to_le_bytes());
            bytes.extend(d.flags.to_le_bytes());
            bytes.extend(d.next.to_le_bytes());
            self.write(at + 16 * i as u64, &bytes);
        }
    }

    fn avail(&self, heads: &[u16]) {
        let mut bytes = vec![0, 0];
        bytes.extend((heads.len() as u16).to_le_bytes());
        heads.iter().for_each(|head| bytes.extend(head.to_le_bytes()));
        self.write(AVAILABLE, &bytes);
    }

    fn ring(&self, event_idx: bool) -> SplitRing {
        let addresses = RingAddresses { descriptors: DESCRIPTORS, available: AVAILABLE, used: USED };
        SplitRing::new(RingSetup { event_idx, ..self.setup(SIZE.into(), addresses) }).unwrap()
    }

    fn setup(&self, size: u32, addresses: RingAddresses) -> RingSetup {
        RingSetup {
            memory: self.memory.clone(),
            size,
            addresses,
            base: 0,
            event_idx: true,
            indirect: true,
            inflight: None,
            log: None,
        }
    }

    /// The same memory as the oracle sees it.
    fn oracle(&self) -> (GuestMemoryMmap, Queue) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let mut bytes = vec![0u8; MEMORY as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        (memory, queue)
    }
}

/// What the oracle makes of the chain at the front: buffers (address, length, writable), and whether it came to its end.
fn oracle_chain(guest: &Guest) -> (Vec<(u64, u32, bool)>, bool) {
    let (memory, mut queue) = guest.oracle();
    let Some(chain) = queue.pop_descriptor_chain(&memory) else { return (Vec::new(), false) };
    let all: Vec<_> = chain.collect();
    let complete = all.last().is_some_and(|d| !d.has_next());
    (all.iter().map(|d| (d.addr().0, d.len(), d.is_write_only())).collect(), complete)
}

fn expected_segments(guest: &Guest, buffers: &[(u64, u32, bool)], writable: bool) -> Vec<Segment> {
    let pieces = buffers.iter().filter(|(_, len, w)| *w == writable && *len > 0);
    let mut segments = Vec::new();
    for (address, len, _) in pieces {
        // Inside memory up to its end, and one segment without an address for what lies behind.
        let inside = MEMORY.saturating_sub(*address).min(u64::from(*len)) as u32;
        if inside > 0 {
            let ptr = guest.mapping.as_ptr().wrapping_add(*address as usize);
            segments.push(Segment { ptr, len: inside });
        }
        if inside < *len {
            segments.push(Segment { ptr: std::ptr::null_mut(), len: len - inside });
        }
    }
    segments
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![8 => 0x8000..MEMORY, 1 => MEMORY - 64..MEMORY + 64, 1 => any::<u64>()];
    let len = prop_oneof![8 => 1u32..4096, 1 => Just(0), 1 => any::<u32>()];
    let flags =
        prop_oneof![4 => Just(NEXT), 4 => Just(NEXT | WRITE), 2 => Just(0), 2 => Just(WRITE), 1 => 0u16..8];
    let next = prop_oneof![12 => 0..SIZE, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| Descriptor {
        address,
        len,
        flags,
        next,
    })
}

/// A descriptor that names an indirect table, mostly a usable one.
fn indirect() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![8 => Just(TABLES), 1 => Just(MEMORY - 32), 1 => any::<u64>()];
    let len = prop_oneof![8 => (1u32..=8).prop_map(|n| n * 16), 1 => 0u32..200];
    let flags = prop_oneof![8 => Just(INDIRECT), 1 => Just(INDIRECT | NEXT), 1 => Just(INDIRECT | WRITE)];
    (address, len, flags).prop_map(|(address, len, flags)| Descriptor { address, len, flags, next: 1 })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn any_chain_is_read_like_the_oracle_reads_it(
        mut table in prop::collection::vec(descriptor(), usize::from(SIZE)),
        inner in prop::collection::vec(descriptor(), 8),
        first in prop::option::of(indirect()),
        head in prop_oneof![12 => 0..SIZE, 1 => any::<u16>()],
    ) {
        let guest = Guest::new();
        if let (Some(first), Some(place)) = (first, table.get_mut(usize::from(head))) {
            *place = first;
        }
        guest.table(DESCRIPTORS, &table);
        guest.table(TABLES, &inner);
        guest.avail(&[head]);
        let (buffers, complete) = oracle_chain(&guest);
        let mut ring = guest.ring(false);
        let mut chain = Chain::default();
        prop_assert_eq!(ring.available(), Ok(1));
        match ring.walk_next(&mut chain) {
            Ok(_) => {
                // The oracle refuses more than 2^32 bytes while it walks; we do when the request is parsed.
                let total: u64 = table.iter().chain(&inner).map(|d| u64::from(d.len)).sum();
                if total > u64::from(u32::MAX) && !complete {
                    return Ok(());
                }
                prop_assert!(complete, "the oracle breaks off what we accept: {:?}", buffers);
                prop_assert_eq!(chain.readable(), &expected_segments(&guest, &buffers, false)[..]);
                prop_assert_eq!(chain.writable(), &expected_segments(&guest, &buffers, true)[..]);
            }
            // Stricter than the oracle, as the specification is (2.7.4.2, 2.7.5.3).
            Err(RingError::Order { .. } | RingError::Indirect { .. }) => {}
            Err(error) => prop_assert!(!complete, "{error} in what the oracle reads to its end: {buffers:?}"),
        }
    }

    #[test]
    fn used_entries_and_calls_are_what_a_driver_expects(
        batches in prop::collection::vec((1u16..=SIZE, any::<u16>()), 1..40),
        event_idx in any::<bool>(),
    ) {
        let guest = Guest::new();
        let mut ring = guest.ring(event_idx);
        let (memory, mut oracle) = guest.oracle();
        oracle.set_event_idx(event_idx);
        for (count, used_event) in batches {
            guest.write(AVAILABLE + 4 + 2 * u64::from(SIZE), &used_event.to_le_bytes());
            memory.write_obj(used_event, GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE))).unwrap();
            for i in 0..count {
                ring.push_used(i, u32::from(i) + 1);
                oracle.add_used(&memory, i, u32::from(i) + 1).unwrap();
            }
            ring.publish();
            prop_assert_eq!(ring.wants_call(), oracle.needs_notification(&memory).unwrap());
            let mut ours = vec![0u8; 4 + 8 * usize::from(SIZE)];
            let mut theirs = ours.clone();
            guest.file.read_exact_at(&mut ours, USED).unwrap();
            memory.read_slice(&mut theirs, GuestAddress(USED)).unwrap();
            prop_assert_eq!(ours, theirs);
        }
    }
}

#[test]
fn an_available_index_that_runs_ahead_of_the_ring_is_refused() {
    let guest = Guest::new();
    guest.avail(&[0]);
    guest.write(AVAILABLE + 2, &(SIZE + 1).to_le_bytes());
    assert!(matches!(guest.ring(false).available(), Err(RingError::AvailableIndex { .. })));
}

#[test]
fn rings_outside_memory_or_misaligned_are_refused() {
    let guest = Guest::new();
    let new = |size, descriptors, available, used| {
        let addresses = RingAddresses { descriptors, available, used };
        SplitRing::new(guest.setup(size, addresses)).err()
    };
    assert_eq!(new(16, DESCRIPTORS, AVAILABLE, USED), None);
    assert!(matches!(new(15, DESCRIPTORS, AVAILABLE, USED), Some(RingError::BadSize { size: 15 })));
    assert!(matches!(new(65536, DESCRIPTORS, AVAILABLE, USED), Some(RingError::BadSize { .. })));
    assert!(matches!(new(16, 8, AVAILABLE, USED), Some(RingError::Misaligned { .. })));
    assert!(matches!(new(16, DESCRIPTORS, AVAILABLE + 1, USED), Some(RingError::Misaligned { .. })));
    assert!(matches!(new(16, DESCRIPTORS, AVAILABLE, MEMORY - 4), Some(RingError::OutsideMemory { .. })));
    assert!(matches!(new(16, u64::MAX - 15, AVAILABLE, USED), Some(RingError::OutsideMemory { .. })));
    assert!(matches!(new(32768, DESCRIPTORS, AVAILABLE, USED), Some(RingError::OutsideMemory { .. })));
}

#[test]
fn the_status_byte_and_the_header_come_off_whatever_the_layout() {
    let guest = Guest::new();
    let part = |address, len, flags, next| Descriptor { address, len, flags, next };
    // A header in three pieces with data behind it in the same descriptor; data and status in one descriptor.
    guest.table(
        DESCRIPTORS,
        &[
            part(0x8000, 5, NEXT, 1),
            part(0x8100, 10, NEXT, 2),
            part(0x8200, 1 + 512, NEXT, 3),
            part(0x9000, 1024 + 1, WRITE, 0),
        ],
    );
    guest.write(0x8000, b"abcde");
    guest.write(0x8100, b"fghijklmno");
    guest.write(0x8200, b"p");
    guest.avail(&[0]);
    let mut ring = guest.ring(false);
    let mut chain = Chain::default();
    ring.walk_next(&mut chain).unwrap();
    assert_eq!(&chain.take_front::<16>().unwrap(), b"abcdefghijklmnop");
    let at = |address: usize| guest.mapping.as_ptr().wrapping_add(address);
    assert_eq!(chain.readable(), [Segment { ptr: at(0x8201), len: 512 }]);
    let status = chain.take_last_byte().unwrap();
    assert_eq!(chain.writable(), [Segment { ptr: at(0x9000), len: 1024 }]);
    // SAFETY: the memory table is alive.
    unsafe { status.set(0x5a) };
    let mut byte = [0u8];
    guest.file.read_exact_at(&mut byte, 0x9000 + 1024).unwrap();
    assert_eq!(byte, [0x5a]);
    assert!(chain.take_front::<4096>().is_none());
}

//! The packed ring on rings written by hand, good and bad.

mod common;

use common::{setup, Memory, GUEST};
use proptest::prelude::*;
use ringstone_virtqueue::{Chain, Notify, PackedRing, RingError, RingSetup, Segment, VirtRing};

const SIZE: u16 = 8;
const DRIVER: u64 = 0x400;
const DEVICE: u64 = 0x404;
const TABLE: u64 = 0x800;
const DATA: u64 = 0x1000;
const MEMORY: u64 = 0x4000;
/// Where a ring begins: descriptor 0, both wrap counters 1.
const BEGIN: u32 = 0x8000_8000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

struct Guest {
    memory: Memory,
}

impl Guest {
    fn new() -> Self {
        Self { memory: Memory::new(MEMORY) }
    }

    fn setup(&self) -> RingSetup {
        RingSetup { base: BEGIN, ..setup(self.memory.table(), SIZE.into(), [0, DRIVER, DEVICE]) }
    }

    fn ring(&self) -> PackedRing {
        PackedRing::new(self.setup()).unwrap()
    }

    fn descriptor(&self, at: u64, address: u64, len: u32, id: u16, flags: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        self.memory.write(at, &bytes);
    }

    /// An available descriptor in the first lap, with a buffer of its own.
    fn offer(&self, index: u16, id: u16, flags: u16) {
        let at = u64::from(index);
        self.descriptor(16 * at, GUEST + DATA + 0x100 * at, 0x10, id, flags | AVAIL);
    }

    fn segment(&self, index: u64, len: u32) -> Segment {
        Segment { ptr: self.memory.ptr(DATA + 0x100 * index), len }
    }

    fn flags(&self, index: u16) -> u16 {
        self.memory.u16(16 * u64::from(index) + 14)
    }

    fn walk(&self) -> Result<u16, RingError> {
        self.ring().walk_next(&mut Chain::default())
    }
}

#[test]
fn a_chain_lies_in_consecutive_descriptors_and_its_last_one_has_the_id() {
    let guest = Guest::new();
    guest.offer(0, 7, NEXT);
    guest.offer(1, 6, NEXT | WRITE);
    guest.offer(2, 5, WRITE);
    let mut ring = guest.ring();
    let mut chain = Chain::default();
    assert_eq!(ring.available(), Ok(1));
    assert_eq!(ring.walk_next(&mut chain), Ok(5));
    assert_eq!(chain.readable(), [guest.segment(0, 0x10)]);
    assert_eq!(chain.writable(), [guest.segment(1, 0x10), guest.segment(2, 0x10)]);
    ring.take();
    assert_eq!(ring.available(), Ok(0));
    assert_eq!(ring.base(), 0x8000_8003, "taken, and nothing used");
    ring.push_used(5, 0x20);
    assert_eq!(guest.flags(0), NEXT | AVAIL, "shown before it was published");
    ring.publish();
    assert_eq!(guest.memory.read::<8>(8), [0x20, 0, 0, 0, 5, 0, WRITE as u8 | AVAIL as u8, 0x80]);
    assert_eq!(guest.flags(1), NEXT | WRITE | AVAIL, "one used descriptor for the whole chain");
    assert_eq!(ring.base(), 0x8003_8003);
}

#[test]
fn a_used_descriptor_says_whether_anything_was_written() {
    let guest = Guest::new();
    guest.offer(0, 0, 0);
    let mut ring = guest.ring();
    ring.walk_next(&mut Chain::default()).unwrap();
    ring.take();
    ring.push_used(0, 0);
    ring.publish();
    assert_eq!(guest.flags(0), AVAIL | USED);
}

#[test]
fn a_chain_may_go_round_the_end_of_the_ring() {
    let guest = Guest::new();
    // Descriptor 7 in the first lap and 0 in the second.
    guest.offer(7, 0, NEXT);
    guest.descriptor(0, GUEST + DATA, 0x20, 3, USED | WRITE);
    let mut ring = PackedRing::new(RingSetup { base: 0x8007_8007, ..guest.setup() }).unwrap();
    let mut chain = Chain::default();
    assert_eq!(ring.available(), Ok(1));
    assert_eq!(ring.walk_next(&mut chain), Ok(3));
    assert_eq!(
        (chain.readable(), chain.writable()),
        (&[guest.segment(7, 0x10)][..], &[guest.segment(0, 0x20)][..])
    );
    ring.take();
    ring.push_used(3, 1);
    ring.publish();
    assert_eq!(guest.flags(7), AVAIL | USED | WRITE);
    assert_eq!(ring.base(), 0x0001_0001, "both wrap counters turned");
}

#[test]
fn of_an_indirect_table_only_the_write_flags_count() {
    let guest = Guest::new();
    guest.descriptor(0, GUEST + TABLE, 48, 2, AVAIL | INDIRECT);
    // No NEXT on the first, NEXT on the last, INDIRECT and the ring's own bits in between: all ignored (2.8.7).
    guest.descriptor(TABLE, GUEST + DATA, 1, 9, 0);
    guest.descriptor(TABLE + 16, GUEST + DATA + 0x100, 2, 9, WRITE | INDIRECT | USED);
    guest.descriptor(TABLE + 32, GUEST + DATA + 0x200, 3, 9, WRITE | NEXT);
    let mut chain = Chain::default();
    assert_eq!(guest.ring().walk_next(&mut chain), Ok(2));
    assert_eq!(chain.readable(), [guest.segment(0, 1)]);
    assert_eq!(chain.writable(), [guest.segment(1, 2), guest.segment(2, 3)]);

    let mut plain = PackedRing::new(RingSetup { indirect: false, ..guest.setup() }).unwrap();
    assert!(matches!(plain.walk_next(&mut chain), Err(RingError::Indirect { .. })));
    for (address, len) in
        [(GUEST + TABLE, 0), (GUEST + TABLE, 40), (GUEST + TABLE + 4, 16), (GUEST + MEMORY, 16)]
    {
        guest.descriptor(0, address, len, 2, AVAIL | INDIRECT);
        assert!(matches!(guest.walk(), Err(RingError::Indirect { .. })), "{address:#x} {len}");
    }
    guest.descriptor(0, GUEST + TABLE, 48, 2, AVAIL | INDIRECT | NEXT);
    assert!(matches!(guest.walk(), Err(RingError::Indirect { .. })));
    guest.offer(0, 0, NEXT);
    guest.descriptor(16, GUEST + TABLE, 48, 2, AVAIL | INDIRECT);
    assert!(matches!(guest.walk(), Err(RingError::Indirect { .. })));
}

#[test]
fn what_no_driver_may_do_is_refused() {
    let guest = Guest::new();
    assert_eq!(guest.walk(), Err(RingError::NotAvailable { index: 0 }));
    guest.offer(0, SIZE, 0);
    assert_eq!(guest.walk(), Err(RingError::BufferId { id: SIZE, size: SIZE }));
    guest.offer(0, 0, NEXT | WRITE);
    guest.offer(1, 0, 0);
    assert!(matches!(guest.walk(), Err(RingError::Order { .. })));
    // A chain that never ends.
    (0..SIZE).for_each(|index| guest.offer(index, 0, NEXT));
    assert_eq!(guest.walk(), Err(RingError::Overrun { index: 0, size: 0 }));

    // An id that is in flight.
    let mut ring = guest.ring();
    let mut chain = Chain::default();
    guest.offer(0, 4, 0);
    guest.offer(1, 4, 0);
    assert_eq!(ring.walk_next(&mut chain), Ok(4));
    ring.take();
    assert_eq!(ring.walk_next(&mut chain), Err(RingError::HeadInFlight { head: 4 }));

    // A descriptor made available for the next lap while the device still has it.
    let mut ring = guest.ring();
    (0..SIZE).for_each(|index| guest.offer(index, index, 0));
    for id in 0..SIZE {
        assert_eq!(ring.walk_next(&mut chain), Ok(id));
        ring.take();
    }
    guest.descriptor(0, GUEST + DATA, 1, 0, USED);
    assert_eq!(ring.available(), Ok(1));
    assert_eq!(ring.walk_next(&mut chain), Err(RingError::Overrun { index: 0, size: SIZE }));
}

#[test]
fn rings_outside_memory_or_misaligned_and_bases_outside_the_ring_are_refused() {
    let guest = Guest::new();
    let new = |size, parts| {
        PackedRing::new(RingSetup { base: BEGIN, ..setup(guest.memory.table(), size, parts) }).err()
    };
    assert_eq!(new(8, [0, DRIVER, DEVICE]), None);
    assert!(matches!(new(6, [0, DRIVER, DEVICE]), Some(RingError::BadSize { size: 6 })));
    assert!(matches!(new(8, [8, DRIVER, DEVICE]), Some(RingError::Misaligned { .. })));
    assert!(matches!(new(8, [0, DRIVER + 2, DEVICE]), Some(RingError::Misaligned { .. })));
    assert!(matches!(new(8, [0, DRIVER, MEMORY]), Some(RingError::OutsideMemory { .. })));
    assert!(matches!(new(8, [MEMORY - 64, DRIVER, DEVICE]), Some(RingError::OutsideMemory { .. })));
    let based = |base| PackedRing::new(RingSetup { base, ..guest.setup() }).map(|ring| ring.base());
    for base in [0x8000_8000, 0x8003_8005, 0x0000_0000, 0x8005_0003, 0x8005_0005] {
        assert_eq!(based(base), Ok(base));
    }
    // Outside the ring, used ahead of available, or more than a lap behind it.
    for base in [0x8000_8008, 0x8008_8000, 0x8005_8003, 0x8003_0005, 0x0003_8005] {
        assert_eq!(based(base), Err(RingError::Base { base, size: SIZE }));
    }
}

#[test]
fn no_more_than_a_batch_is_looked_ahead_and_a_long_chain_counts_as_one() {
    let memory = Memory::new(MEMORY);
    let guest = Guest { memory };
    let size = 64;
    let ring = || {
        PackedRing::new(RingSetup { base: BEGIN, ..setup(guest.memory.table(), size, [0, DRIVER, DEVICE]) })
    };
    (0..64).for_each(|index| guest.offer(index, index, 0));
    assert_eq!(ring().unwrap().available(), Ok(32));
    (0..40).for_each(|index| guest.offer(index, 0, NEXT));
    assert_eq!(ring().unwrap().available(), Ok(1));
}

#[test]
fn the_device_asks_for_kicks_as_negotiated() {
    let guest = Guest::new();
    let device = || guest.memory.read::<4>(DEVICE);
    let mut ring = PackedRing::new(RingSetup { base: 0x8005_0003, ..guest.setup() }).unwrap();
    ring.set_kicks(Notify::Suppressed);
    assert_eq!(device(), [0, 0, 1, 0]);
    ring.set_kicks(Notify::Armed);
    assert_eq!(device(), [3, 0, 2, 0], "the next available descriptor, wrap counter 0");
    let mut ring = PackedRing::new(RingSetup { base: 0x8005_8005, ..guest.setup() }).unwrap();
    ring.set_kicks(Notify::Armed);
    assert_eq!(device(), [5, 0x80, 2, 0]);
    let mut plain = PackedRing::new(RingSetup { event_idx: false, ..guest.setup() }).unwrap();
    plain.set_kicks(Notify::Armed);
    assert_eq!(device(), [0, 0, 0, 0]);
}

/// Every other lap, the first among them, has wrap counter 1. `place` counts on over all laps.
fn wrap_counter(place: u32) -> bool {
    (place / u32::from(SIZE)).is_multiple_of(2)
}

proptest! {
    /// 2.8.10: a call is wanted if the event is on, or if it names one of the descriptors just published.
    #[test]
    fn a_call_is_made_when_the_named_descriptor_is_reached(
        batches in prop::collection::vec((1u16..=SIZE, 0u16..4, 0..SIZE, any::<bool>()), 1..40),
        event_idx in any::<bool>(),
    ) {
        let guest = Guest::new();
        let mut ring = PackedRing::new(RingSetup { event_idx, ..guest.setup() }).unwrap();
        let mut chain = Chain::default();
        let mut place = 0u32;
        for (count, flags, event, wrap) in batches {
            guest.memory.write(DRIVER, &(event | u16::from(wrap) << 15).to_le_bytes());
            guest.memory.write(DRIVER + 2, &flags.to_le_bytes());
            let begin = place;
            for _ in 0..count {
                let index = (place % u32::from(SIZE)) as u16;
                let flags = if wrap_counter(place) { AVAIL } else { USED };
                guest.descriptor(16 * u64::from(index), GUEST + DATA, 1, index, flags);
                prop_assert_eq!(ring.walk_next(&mut chain), Ok(index));
                ring.take();
                place += 1;
            }
            // Out of order, for good measure.
            for back in 1..=u32::from(count) {
                ring.push_used(((place - back) % u32::from(SIZE)) as u16, 0);
            }
            prop_assert!(!ring.wants_call(), "nothing was published");
            ring.publish();
            let named = |at: u32| {
                at % u32::from(SIZE) == u32::from(event) && wrap_counter(at) == wrap
            };
            let wanted = match flags {
                1 => false,
                2 if event_idx => (begin..place).any(named),
                _ => true,
            };
            prop_assert_eq!(ring.wants_call(), wanted);
            prop_assert!(!ring.wants_call(), "asked twice");
        }
    }
}

//! The in-flight region to the byte, and what other backends or a hostile frontend may have left in it.
//!
//! Offsets are those of `QueueRegionSplit` and `QueueRegionPacked` in the vhost-user specification.

mod common;

use common::{setup, Memory, GUEST};
use proptest::prelude::*;
use ringstone_virtqueue::{Chain, InflightRegion, PackedRing, RingError, RingSetup, SplitRing, VirtRing};

const SIZE: u16 = 4;
const DRIVER: u64 = 0x400;
const DEVICE: u64 = 0x500;
const MEMORY: u64 = 0x1000;
const PACKED_BEGIN: u32 = 0x8000_8000;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

struct Guest {
    memory: Memory,
    region: Memory,
}

impl Guest {
    fn new() -> Self {
        Self { memory: Memory::new(MEMORY), region: Memory::new(MEMORY) }
    }

    fn setup(&self, base: u32, packed: bool) -> RingSetup {
        let inflight = self.region.inflight(SIZE, packed);
        RingSetup { base, inflight, ..setup(self.memory.table(), SIZE.into(), [0, DRIVER, DEVICE]) }
    }

    fn split(&self) -> Result<SplitRing, RingError> {
        SplitRing::new(self.setup(0, false))
    }

    fn packed(&self) -> Result<PackedRing, RingError> {
        PackedRing::new(self.setup(PACKED_BEGIN, true))
    }

    /// One-descriptor chains with these heads in a split ring's available ring, from entry 0 on.
    fn offer_split(&self, heads: &[u16]) {
        for head in 0..u64::from(SIZE) {
            self.memory.write(16 * head, &GUEST.to_le_bytes());
            self.memory.write(16 * head + 8, &[1, 0, 0, 0]);
        }
        for (at, head) in heads.iter().enumerate() {
            self.memory.write(DRIVER + 4 + 2 * at as u64, &head.to_le_bytes());
        }
        self.memory.write(DRIVER + 2, &(heads.len() as u16).to_le_bytes());
    }

    /// A descriptor of a packed ring, in the first lap.
    fn offer_packed(&self, index: u16, id: u16, flags: u16) {
        let mut bytes = (GUEST + u64::from(index)).to_le_bytes().to_vec();
        bytes.extend((u32::from(index) + 1).to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.extend((flags | AVAIL).to_le_bytes());
        self.memory.write(16 * u64::from(index), &bytes);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.region.write(at, bytes);
    }
}

fn take(ring: &mut impl VirtRing) -> u16 {
    let head = ring.walk_next(&mut Chain::default()).unwrap();
    ring.take();
    head
}

fn take_all(ring: &mut impl VirtRing) -> Vec<u16> {
    let mut heads = Vec::new();
    while ring.available().unwrap() > 0 {
        heads.push(take(ring));
    }
    heads
}

#[test]
fn a_queue_takes_a_multiple_of_64_bytes_and_has_to_fit_its_mapping() {
    assert_eq!(InflightRegion::len(4, false), 128);
    assert_eq!(InflightRegion::len(128, false), 2112);
    assert_eq!(InflightRegion::len(4, true), 192);
    assert_eq!(InflightRegion::len(128, true), 4160);
    let memory = Memory::new(0x1000);
    let new = |offset, entries, packed| InflightRegion::new(memory.mapping.clone(), offset, entries, packed);
    assert!(new(0x1000 - 128, 4, false).is_some());
    assert!(new(0x1000 - 64, 4, false).is_none());
    assert!(new(usize::MAX, 4, false).is_none());
    assert!(new(4, 4, false).is_none());
    assert!(new(0, 128, true).is_none());
}

#[test]
fn the_region_of_a_split_ring_is_as_the_specification_lays_it_out() {
    let guest = Guest::new();
    // features u64, version, desc_num, last_batch_head, used_idx.
    let header = |last: u8, used: u8| [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 4, 0, last, 0, used, 0];
    // inflight u8, padding, next u16, counter u64.
    let entry = |inflight: u8, next: u8, counter: u8| {
        [inflight, 0, 0, 0, 0, 0, next, 0, counter, 0, 0, 0, 0, 0, 0, 0]
    };
    guest.offer_split(&[2, 0, 1]);
    let mut ring = guest.split().unwrap();
    assert_eq!(guest.region.read(0), header(0, 0));
    assert_eq!(take_all(&mut ring), [2, 0, 1]);
    assert_eq!(guest.region.read(16 + 16 * 2), entry(1, 0, 0));
    assert_eq!(guest.region.read(16), entry(1, 0, 1));
    assert_eq!(guest.region.read(16 + 16), entry(1, 0, 2));
    ring.push_used(1, 1);
    ring.push_used(2, 1);
    assert_eq!(guest.region.read(0), header(2, 0));
    assert_eq!(guest.region.read(16 + 16 * 2), entry(1, 1, 0));
    ring.publish();
    assert_eq!(guest.region.read(0), header(2, 2));
    assert_eq!(guest.region.read(16 + 16 * 2), entry(0, 1, 0));
    assert_eq!(guest.region.read(16 + 16), entry(0, 0, 2));
    assert_eq!(guest.region.read(16), entry(1, 0, 1));
    // The next process: one to do again, and the available index follows from the region.
    let mut ring = SplitRing::new(guest.setup(77, false)).unwrap();
    assert_eq!((ring.base(), ring.resubmitting(), ring.available()), (3, 1, Ok(1)));
    guest.offer_split(&[2, 0, 1, 2]);
    assert_eq!(ring.available(), Ok(2));
    assert_eq!(take_all(&mut ring), [0, 2]);
    assert_eq!(guest.region.read(16 + 16 * 2), entry(1, 1, 2), "counters go on above the highest in flight");
}

#[test]
fn the_region_of_a_packed_ring_is_as_the_specification_lays_it_out() {
    let guest = Guest::new();
    guest.offer_packed(0, 3, 1);
    guest.offer_packed(1, 3, 2);
    guest.offer_packed(2, 1, 0);
    let mut ring = guest.packed().unwrap();
    // version, desc_num, free_head, old_free_head, used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter.
    let header = |free: u8, used: u8| {
        let mut bytes = [0; 32];
        bytes[8..22].copy_from_slice(&[1, 0, 4, 0, free, 0, free, 0, used, 0, used, 0, 1, 1]);
        bytes
    };
    assert_eq!(guest.region.read(0), header(0, 0));
    for index in 0..4 {
        assert_eq!(guest.region.u16(32 + 32 * index + 2), index as u16 + 1, "the free list");
    }
    assert_eq!(take_all(&mut ring), [3, 1]);
    assert_eq!(guest.region.read(0), header(3, 0));
    // inflight, padding, next, last, num, counter, id, flags, len, addr.
    let head = |next: u8, last: u8, num: u8, counter: u8| {
        [1, 0, next, 0, last, 0, num, 0, counter, 0, 0, 0, 0, 0, 0, 0]
    };
    let copy = |id: u8, flags: u16, index: u8| {
        let mut bytes = [0; 16];
        bytes[0] = id;
        bytes[2..4].copy_from_slice(&(flags | AVAIL).to_le_bytes());
        bytes[4] = index + 1;
        bytes[8..].copy_from_slice(&(GUEST + u64::from(index)).to_le_bytes());
        bytes
    };
    assert_eq!(guest.region.read(32), head(1, 1, 2, 0));
    assert_eq!(guest.region.read(48), copy(3, 1, 0));
    assert_eq!(guest.region.read(80), copy(3, 2, 1));
    assert_eq!(guest.region.read(96), head(3, 2, 1, 1));
    assert_eq!(guest.region.read(112), copy(1, 0, 2));
    ring.push_used(1, 0);
    assert_eq!(guest.region.read(0), header(3, 0), "nothing is given back before it is published");
    ring.publish();
    assert_eq!(guest.region.read(0), header(2, 1));
    assert_eq!(guest.region.read::<4>(96), [0, 0, 3, 0]);
    let ring = PackedRing::new(guest.setup(0x1234_5678, true)).unwrap();
    assert_eq!((ring.base(), ring.resubmitting()), (0x8001_8003, 1));
}

#[test]
fn a_base_counts_only_where_nobody_used_the_region_before() {
    let guest = Guest::new();
    assert_eq!(SplitRing::new(guest.setup(7, false)).unwrap().base(), 7);
    assert_eq!(
        SplitRing::new(guest.setup(7, false)).unwrap().base(),
        0,
        "the used index, and nothing is in flight"
    );
    let guest = Guest::new();
    let refused = PackedRing::new(guest.setup(0x8000_8004, true)).err();
    assert_eq!(refused, Some(RingError::Base { base: 0x8000_8004, size: SIZE }));
    assert_eq!(guest.region.u16(8), 0, "a region refused is a region not used");
    assert_eq!(PackedRing::new(guest.setup(0x0003_0003, true)).unwrap().base(), 0x0003_0003);
    assert_eq!(PackedRing::new(guest.setup(0x8000_8004, true)).unwrap().base(), 0x0003_0003);
}

#[test]
fn a_batch_that_another_backend_was_publishing_is_finished() {
    let guest = Guest::new();
    guest.offer_split(&[0, 1, 2, 3]);
    let mut ring = guest.split().unwrap();
    take_all(&mut ring);
    // It linked 1 and 3 and showed both to the driver, then cleared one.
    guest.put(16 + 16 * 3 + 6, &1u16.to_le_bytes());
    guest.put(12, &3u16.to_le_bytes());
    guest.put(16 + 16 * 3, &[0]);
    guest.memory.write(DEVICE + 2, &2u16.to_le_bytes());
    let mut ring = guest.split().unwrap();
    assert_eq!(guest.region.u16(14), 2);
    assert_eq!((ring.base(), ring.resubmitting()), (4, 2));
    assert_eq!(take_all(&mut ring), [0, 2]);
}

/// A backend that stores the old used index and the old wrap counter one after the other may be killed in between. With
/// the index alone compared, the next process would go on with the wrong wrap counter.
#[test]
fn a_backend_killed_between_index_and_wrap_counter_had_published() {
    let guest = Guest::new();
    guest.offer_packed(3, 0, 0);
    let mut ring = PackedRing::new(guest.setup(0x8003_8003, true)).unwrap();
    take_all(&mut ring);
    ring.push_used(0, 0);
    ring.publish();
    assert_eq!(ring.base(), 0, "the ring went round");
    // The descriptor at 0 was skipped in the last lap: it looks available with the old wrap counter.
    guest.offer_packed(0, 0, 0);
    guest.put(21, &[1]);
    assert_eq!(guest.packed().unwrap().base(), 0);
}

#[test]
fn regions_that_do_not_fit_are_refused_with_a_sentence() {
    let guest = Guest::new();
    let size = |entries, packed| {
        let inflight = guest.region.inflight(entries, packed);
        let setup = |base| RingSetup { inflight: inflight.clone(), ..guest.setup(base, packed) };
        (SplitRing::new(setup(0)).err(), PackedRing::new(setup(PACKED_BEGIN)).err())
    };
    let small = RingError::InflightSize { entries: 2, size: SIZE };
    assert_eq!(size(2, false), (Some(small), Some(RingError::InflightLayout)));
    assert_eq!(size(2, true), (Some(RingError::InflightLayout), Some(small)));
    assert_eq!(size(8, false).0, None);
    guest.put(8, &2u16.to_le_bytes());
    assert_eq!(guest.split().err(), Some(RingError::InflightVersion { version: 2 }));
    assert_eq!(guest.packed().err(), Some(RingError::InflightVersion { version: 2 }));
    assert!(small.to_string().contains("has 2 entries and the ring 4"));
}

#[test]
fn a_region_that_contradicts_itself_is_refused() {
    let damaged = |error: Option<RingError>| matches!(error, Some(RingError::InflightContent { .. }));
    let guest = Guest::new();
    guest.offer_split(&[0, 1]);
    take_all(&mut guest.split().unwrap());
    guest.memory.write(DEVICE + 2, &1u16.to_le_bytes());
    guest.put(12, &4u16.to_le_bytes());
    assert!(damaged(guest.split().err()), "the last batch begins outside the ring");
    guest.memory.write(DEVICE + 2, &5u16.to_le_bytes());
    assert!(damaged(guest.split().err()), "a batch larger than the ring");

    // Each of these bytes spoils a region in which entries 0 and 1 are one request and entry 2 is another.
    let spoils = [(14, 1), (14, 4), (16, 4), (18, 9), (34, 0), (34, 2), (36, 2), (38, 0), (38, 3)];
    // These say nothing: a free list that was never committed, fields of entries that are not the first of a request.
    let means_nothing = [(12, 0), (98, 0), (64, 1), (71, 9)];
    for (at, value) in spoils.into_iter().chain(means_nothing) {
        let guest = Guest::new();
        guest.offer_packed(0, 3, 1);
        guest.offer_packed(1, 3, 0);
        guest.offer_packed(2, 1, 0);
        take_all(&mut guest.packed().unwrap());
        assert_eq!(guest.packed().unwrap().resubmitting(), 2);
        guest.put(at, &[value]);
        let refused = damaged(guest.packed().err());
        assert_eq!(refused, spoils.contains(&(at, value)), "byte {at} set to {value}");
    }
}

#[test]
fn flags_of_a_batch_that_was_never_shown_are_taken_back() {
    // The story: a process writes two used descriptors and is killed before the flags of the first. The next one uses the
    // first place for another request, and the driver finds behind it the second descriptor of the process before.
    let guest = Guest::new();
    (0..3).for_each(|index| guest.offer_packed(index, index, 0));
    let mut ring = guest.packed().unwrap();
    take_all(&mut ring);
    ring.push_used(2, 0);
    ring.push_used(1, 0);
    let flags = |index: u64| guest.memory.u16(16 * index + 14) & (AVAIL | USED);
    assert_eq!([flags(0), flags(1)], [AVAIL, AVAIL | USED]);
    let mut ring = guest.packed().unwrap();
    assert_eq!([flags(0), flags(1), flags(2)], [AVAIL; 3]);
    assert_eq!(take_all(&mut ring), [0, 1, 2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Whatever a frontend leaves in the region, nothing panics and nothing is reached outside of ring and region.
    #[test]
    fn any_region_is_either_refused_or_served(
        mut region in prop::collection::vec(prop_oneof![4 => Just(0u8), 2 => 0u8..6, 1 => any::<u8>()], 192),
        ring in prop::collection::vec(prop_oneof![4 => Just(0u8), 2 => 0u8..6, 1 => any::<u8>()], 64),
        flags in prop::collection::vec(prop_oneof![Just(0u16), Just(AVAIL), Just(USED), Just(AVAIL | USED)], 4),
        used in 0u16..6,
        known in prop::bool::weighted(0.9),
        packed in any::<bool>(),
    ) {
        let guest = Guest::new();
        if known {
            region[8..10].copy_from_slice(&1u16.to_le_bytes());
        }
        guest.put(0, &region);
        guest.put(192, &[0xa5; 64]);
        guest.memory.write(0, &ring);
        guest.memory.write(DEVICE + 2, &used.to_le_bytes());
        if packed {
            flags.iter().zip(0..).for_each(|(flags, index)| guest.memory.write(16 * index + 14, &flags.to_le_bytes()));
            serve(guest.packed());
        } else {
            serve(guest.split());
        }
        prop_assert_eq!(guest.region.read::<64>(192), [0xa5; 64]);
    }
}

fn serve(ring: Result<impl VirtRing, RingError>) {
    let Ok(mut ring) = ring else { return };
    let mut chain = Chain::default();
    for _ in 0..20 {
        if !matches!(ring.available(), Ok(1..)) {
            break;
        }
        let Ok(head) = ring.walk_next(&mut chain) else { break };
        ring.take();
        ring.push_used(head, 1);
        if head % 2 == 0 {
            ring.publish();
        }
    }
    ring.publish();
    ring.base();
}

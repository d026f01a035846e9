//! The dirty log: which bits are set, and that both rings mark all they write.

mod common;

use std::sync::Arc;

use common::{setup, Memory, GUEST, USER};
use ringstone_virtqueue::{
    Chain, DirtyLog, MemoryRegion, MemoryTable, Notify, PackedRing, RingSetup, SplitRing, VirtRing,
};

const PAGE: u64 = 4096;

/// Pages marked, taken out of the bitmap as a frontend does.
fn harvest(bitmap: &Memory) -> Vec<u64> {
    let len = bitmap.mapping.len() as u64;
    let mut pages = Vec::new();
    for at in 0..len {
        let [byte] = bitmap.read(at);
        pages.extend((0..8).filter(|bit| byte & 1 << bit != 0).map(|bit| at * 8 + bit));
        bitmap.write(at, &[0]);
    }
    pages
}

#[test]
fn bit_n_of_the_bitmap_is_page_n_of_guest_memory() {
    let bitmap = Memory::new(16);
    let log = DirtyLog::new(bitmap.mapping.clone());
    log.mark_guest(0, 1);
    assert_eq!(bitmap.read::<2>(0), [1, 0]);
    log.mark_guest(9 * PAGE, 1);
    assert_eq!(bitmap.read::<2>(0), [1, 2]);
    harvest(&bitmap);
    log.mark_guest(3 * PAGE - 1, 2);
    assert_eq!(harvest(&bitmap), [2, 3]);
    log.mark_guest(3 * PAGE, PAGE);
    assert_eq!(harvest(&bitmap), [3]);
    log.mark_guest(5 * PAGE, 0);
    assert_eq!(harvest(&bitmap), [] as [u64; 0]);
    // The bitmap ends behind page 127; what lies behind is none of its business.
    log.mark_guest(126 * PAGE, 100 * PAGE);
    assert_eq!(harvest(&bitmap), [126, 127]);
    log.mark_guest(u64::MAX - 10, 11);
    log.mark_guest(u64::MAX, u64::MAX);
    assert_eq!(harvest(&bitmap), [] as [u64; 0]);
}

#[test]
fn a_host_address_is_marked_where_the_guest_has_it() {
    let (low, high) = (Memory::new(2 * PAGE), Memory::new(2 * PAGE));
    let region = |memory: &Memory, guest| MemoryRegion {
        guest,
        len: 2 * PAGE,
        user: USER + guest,
        mapping: memory.mapping.clone(),
    };
    let table = MemoryTable::new(vec![region(&low, 0), region(&high, 0x10 * PAGE)]).unwrap();
    let bitmap = Memory::new(8);
    let log = DirtyLog::new(bitmap.mapping.clone());
    log.mark(&table, low.ptr(PAGE), 1);
    log.mark(&table, high.ptr(2 * PAGE - 1), 1);
    assert_eq!(harvest(&bitmap), [1, 0x11]);
    log.mark(&table, bitmap.ptr(0), 1);
    log.mark(&table, std::ptr::null(), 1);
    assert_eq!(harvest(&bitmap), [] as [u64; 0]);
}

/// A guest whose three ring parts and buffers are each on pages of their own, counted from `GUEST`.
const DESCRIPTORS: u64 = 0;
const DRIVER: u64 = 2;
const DEVICE: u64 = 4;
const BUFFER: u64 = 6;
/// A ring whose used entries end on the next page.
const SIZE: u16 = 512;

struct Guest {
    memory: Memory,
    bitmap: Memory,
}

impl Guest {
    fn new() -> Self {
        Self { memory: Memory::new(16 * PAGE), bitmap: Memory::new(64) }
    }

    fn setup(&self) -> RingSetup {
        let log = Some(Arc::new(DirtyLog::new(self.bitmap.mapping.clone())));
        let parts = [DESCRIPTORS * PAGE, DRIVER * PAGE, DEVICE * PAGE];
        RingSetup { log, ..setup(self.memory.table(), SIZE.into(), parts) }
    }

    fn marked(&self) -> Vec<u64> {
        harvest(&self.bitmap).into_iter().map(|page| page - GUEST / PAGE).collect()
    }

    fn descriptor(&self, index: u64, rest: u64) {
        self.memory.write(DESCRIPTORS * PAGE + 16 * index, &(GUEST + BUFFER * PAGE).to_le_bytes());
        self.memory.write(DESCRIPTORS * PAGE + 16 * index + 8, &rest.to_le_bytes());
    }
}

#[test]
fn a_split_ring_marks_entries_index_and_event() {
    let guest = Guest::new();
    guest.descriptor(0, 1);
    guest.memory.write(DRIVER * PAGE + 2, &1u16.to_le_bytes());
    guest.memory.write(DEVICE * PAGE + 2, &511u16.to_le_bytes());
    let mut ring = SplitRing::new(guest.setup()).unwrap();
    assert_eq!(guest.marked(), [DEVICE, DEVICE + 1], "what a process before may have written unmarked");
    assert_eq!(ring.available(), Ok(1));
    ring.walk_next(&mut Chain::default()).unwrap();
    ring.take();
    assert_eq!(guest.marked(), [] as [u64; 0]);
    ring.push_used(0, 1);
    assert_eq!(guest.marked(), [DEVICE, DEVICE + 1], "entry 511 lies across the end of the page");
    ring.publish();
    assert_eq!(guest.marked(), [DEVICE]);
    ring.set_kicks(Notify::Armed);
    assert_eq!(guest.marked(), [DEVICE + 1], "the event index behind the ring");
    ring.publish();
    ring.set_kicks(Notify::Suppressed);
    assert_eq!(guest.marked(), [DEVICE + 1], "the event index, taken back");
    let mut plain = SplitRing::new(RingSetup { event_idx: false, ..guest.setup() }).unwrap();
    guest.marked();
    plain.set_kicks(Notify::Suppressed);
    assert_eq!(guest.marked(), [DEVICE], "the flags");
}

#[test]
fn a_packed_ring_marks_descriptors_and_its_event_area() {
    let guest = Guest::new();
    let available = |id: u64| 1 | id << 32 | 1 << (48 + 7);
    guest.descriptor(255, available(0));
    guest.descriptor(256, available(1));
    let mut ring = PackedRing::new(RingSetup { base: 0x80ff_80ff, ..guest.setup() }).unwrap();
    assert_eq!(guest.marked(), [DESCRIPTORS, DESCRIPTORS + 1, DEVICE]);
    for id in 0..2 {
        assert_eq!(ring.walk_next(&mut Chain::default()), Ok(id));
        ring.take();
    }
    ring.push_used(1, 0);
    assert_eq!(guest.marked(), [DESCRIPTORS]);
    ring.push_used(0, 0);
    assert_eq!(guest.marked(), [DESCRIPTORS + 1]);
    ring.publish();
    assert_eq!(guest.marked(), [DESCRIPTORS], "the flags of the first");
    ring.set_kicks(Notify::Suppressed);
    assert_eq!(guest.marked(), [DEVICE]);
}

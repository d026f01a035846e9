//! Both ring layouts against the driver side of the crate `virtio-driver`, an independent reading of the specification.
//!
//! The driver offers requests of random shapes; the device takes them, completes them in any order and any batches, and is
//! now and then killed and made anew from the in-flight region. The driver itself insists, of a packed ring, on the length
//! that a used descriptor tells.

mod common;
mod identity;

use std::collections::VecDeque;
use std::sync::Arc;

use common::{setup, Memory, USER};
use identity::translator;
use proptest::prelude::*;
use ringstone_virtqueue::{
    Chain, MemoryRegion, MemoryTable, Notify, PackedRing, RingError, RingSetup, SplitRing, VirtRing,
};
use virtio_driver::virtqueue::Virtqueue;
use virtio_driver::{iovec, VirtioFeatureFlags};

const MEMORY: u64 = 1 << 16;
const DATA: u64 = 0x8000;
/// The vring base of a packed ring that nothing was done with.
const PACKED_BEGIN: u32 = 0x8000_8000;

/// What a request begins with: the number it was given.
#[derive(Clone, Copy)]
#[repr(C)]
struct Tag(u64);

#[derive(Clone, Debug)]
enum Step {
    /// Offer a request with so many readable and writable buffers behind the tag.
    Offer(usize, usize),
    Take,
    /// Complete one of those in flight.
    Complete(usize),
    Publish,
    /// See what was completed.
    Reap,
    /// Ask for kicks if there is nothing to do, else do without.
    Look,
    /// Do without kicks, as after something else has woken the device.
    Poll,
    /// Kill the device and make it anew.
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..4, 1usize..4).prop_map(|(readable, writable)| Step::Offer(readable, writable)),
        6 => Just(Step::Take),
        5 => any::<usize>().prop_map(Step::Complete),
        3 => Just(Step::Publish),
        3 => Just(Step::Reap),
        1 => Just(Step::Look),
        1 => Just(Step::Poll),
        1 => Just(Step::Kill),
    ]
}

/// A request in flight: its head, its number, and the length of its writable buffers.
type Held = (u16, u64, u32);

struct Machine<R> {
    driver: Virtqueue<'static, Tag>,
    memory: Memory,
    region: Option<Memory>,
    packed: bool,
    event_idx: bool,
    make: fn(RingSetup) -> Result<R, RingError>,
    ring: R,
    chain: Chain,
    /// Number and buffers, by head as the driver knows it.
    offered: Vec<Option<(u64, usize)>>,
    next: u64,
    /// Offered and not taken, in order.
    waiting: VecDeque<u64>,
    held: Vec<Held>,
    unpublished: Vec<Held>,
    /// Published and not reaped, in order.
    published: VecDeque<u64>,
    /// The driver was told to kick, or not to.
    kicks: Option<Notify>,
}

impl<R: VirtRing> Machine<R> {
    fn new(
        packed: bool,
        event_idx: bool,
        keeps: bool,
        size: u16,
        make: fn(RingSetup) -> Result<R, RingError>,
    ) -> Self {
        let memory = Memory::new(MEMORY);
        let mut features = VirtioFeatureFlags::VERSION_1;
        features.set(VirtioFeatureFlags::RING_PACKED, packed);
        features.set(VirtioFeatureFlags::RING_EVENT_IDX, event_idx);
        // SAFETY: the machine keeps the mapping as long as the driver, and what both sides touch is never read as a whole.
        let bytes = unsafe { std::slice::from_raw_parts_mut(memory.ptr(0), DATA as usize) };
        let mut driver = Virtqueue::new(translator(), bytes, size, features).unwrap();
        driver.set_used_notif_enabled(true);
        let region = keeps.then(|| Memory::new(MEMORY));
        let base = if packed { PACKED_BEGIN } else { 0 };
        let ring = make(Self::setup(&memory, region.as_ref(), &driver, packed, event_idx, base)).unwrap();
        Self {
            driver,
            memory,
            region,
            packed,
            event_idx,
            make,
            ring,
            chain: Chain::default(),
            offered: vec![None; size.into()],
            next: 0,
            waiting: VecDeque::new(),
            held: Vec::new(),
            unpublished: Vec::new(),
            published: VecDeque::new(),
            kicks: None,
        }
    }

    fn setup(
        memory: &Memory,
        region: Option<&Memory>,
        driver: &Virtqueue<'static, Tag>,
        packed: bool,
        event_idx: bool,
        base: u32,
    ) -> RingSetup {
        let at = |ptr: *const u8| ptr as u64 - memory.ptr(0) as u64;
        // The crate's names for the driver's and the device's area are swapped.
        let layout = driver.layout();
        let parts =
            [at(driver.desc_table_ptr()), layout.driver_area_offset as u64, layout.device_area_offset as u64];
        let size = driver.queue_size();
        let inflight = region.and_then(|region| region.inflight(size, packed));
        assert_eq!(inflight.is_some(), region.is_some());
        // To this driver, guest addresses are those of this process.
        let (guest, len) = (memory.ptr(0) as u64, MEMORY);
        let region = MemoryRegion { guest, len, user: USER, mapping: memory.mapping.clone() };
        let table = Arc::new(MemoryTable::new(vec![region]).unwrap());
        RingSetup { base, event_idx, inflight, ..setup(table, size.into(), parts) }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Offer(readable, writable) => self.offer(readable, writable),
            Step::Take => self.take(),
            Step::Complete(which) => {
                if !self.held.is_empty() {
                    let held = self.held.remove(which % self.held.len());
                    self.ring.push_used(held.0, held.2);
                    self.unpublished.push(held);
                }
            }
            Step::Publish => self.publish(),
            Step::Reap => self.reap(),
            Step::Look => {
                let notify = match self.ring.available().unwrap() {
                    0 => Notify::Armed,
                    _ => Notify::Suppressed,
                };
                self.ring.set_kicks(notify);
                self.kicks = Some(notify);
            }
            Step::Poll => {
                self.ring.set_kicks(Notify::Suppressed);
                self.kicks = Some(Notify::Suppressed);
            }
            Step::Kill => self.kill(),
        }
    }

    fn offer(&mut self, readable: usize, writable: usize) {
        // When a request turns out not to fit, the crate leaves the descriptors that did available, all but the first.
        let buffers = 1 + readable + writable;
        if self.offered.iter().flatten().map(|(_, buffers)| buffers).sum::<usize>() + buffers
            > self.offered.len()
        {
            return;
        }
        let number = self.next;
        let data = self.memory.ptr(DATA);
        let added = self.driver.add_request(|tag, add| {
            *tag = Tag(number);
            add(iovec { iov_base: std::ptr::from_mut(tag).cast(), iov_len: size_of::<Tag>() }, false)?;
            for slot in 0..readable + writable {
                let iov_base = data.wrapping_add(slot * 64).cast();
                add(iovec { iov_base, iov_len: slot + 1 }, slot >= readable)?;
            }
            Ok(())
        });
        self.offered[usize::from(added.unwrap())] = Some((number, buffers));
        self.next += 1;
        self.waiting.push_back(number);
        let kicked = self.driver.avail_notif_needed();
        match self.kicks.take() {
            Some(Notify::Armed) => assert!(kicked, "the device sleeps and was not kicked"),
            Some(Notify::Suppressed) => assert!(!kicked, "the device polls and was kicked"),
            None => {}
        }
    }

    fn take(&mut self) {
        let available = self.ring.available().unwrap();
        assert_eq!(available > 0, !self.waiting.is_empty());
        if available == 0 {
            return;
        }
        assert!(usize::from(available) <= self.waiting.len());
        self.ring.prefetch_batch(0, available);
        let head = self.ring.walk_next(&mut self.chain).unwrap();
        let number = u64::from_le_bytes(self.chain.take_front().unwrap());
        assert_eq!(Some(number), self.waiting.pop_front());
        let readable = self.chain.readable();
        for (slot, segment) in readable.iter().chain(self.chain.writable()).enumerate() {
            let ptr = self.memory.ptr(DATA + slot as u64 * 64);
            assert_eq!((segment.ptr, segment.len as usize), (ptr, slot + 1));
        }
        let len = self.chain.writable().iter().map(|segment| segment.len).sum();
        self.ring.take();
        self.held.push((head, number, len));
    }

    fn publish(&mut self) {
        let asleep = self.published.is_empty() && !self.unpublished.is_empty();
        self.ring.publish();
        self.published.extend(self.unpublished.drain(..).map(|(_, number, _)| number));
        let called = self.ring.wants_call();
        assert!(called || !asleep, "the driver sleeps and was not called");
    }

    fn reap(&mut self) {
        for done in self.driver.completions() {
            let offered = self.offered[usize::from(done.id)].take();
            assert_eq!(offered.map(|(number, _)| number), Some(done.req.0));
            assert_eq!(self.published.pop_front(), Some(done.req.0));
        }
        assert!(self.published.is_empty(), "completions that the driver does not see");
    }

    fn kill(&mut self) {
        // Without a region nothing tells what was in flight.
        if self.region.is_none() && !(self.held.is_empty() && self.unpublished.is_empty()) {
            return;
        }
        // Those of the process before that were not taken again yet are still at the front of those waiting.
        let resubmitting = usize::from(self.ring.resubmitting());
        let mut again: Vec<u64> = self.waiting.drain(..resubmitting).collect();
        again.extend(self.held.drain(..).chain(self.unpublished.drain(..)).map(|(_, number, _)| number));
        again.sort_unstable();
        let base = if self.region.is_some() { 0 } else { self.ring.base() };
        let setup =
            Self::setup(&self.memory, self.region.as_ref(), &self.driver, self.packed, self.event_idx, base);
        self.ring = (self.make)(setup).unwrap();
        assert_eq!(usize::from(self.ring.resubmitting()), again.len());
        again.into_iter().rev().for_each(|number| self.waiting.push_front(number));
        self.kicks = None;
    }

    /// Finish everything that was offered.
    fn drain(&mut self) {
        while !self.waiting.is_empty() {
            self.take();
        }
        while !self.held.is_empty() {
            self.step(&Step::Complete(0));
        }
        self.publish();
        self.reap();
        assert_eq!(self.offered.iter().flatten().count(), 0, "requests that were never completed");
        assert_eq!(self.ring.available(), Ok(0));
    }
}

fn run<R: VirtRing>(mut machine: Machine<R>, steps: &[Step]) {
    steps.iter().for_each(|step| machine.step(step));
    machine.drain();
    // And on, from wherever in the ring that was.
    steps.iter().rev().for_each(|step| machine.step(step));
    machine.drain();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn an_independent_driver_gets_every_request_back_from_a_split_ring(
        steps in prop::collection::vec(step(), 1..300),
        event_idx in any::<bool>(),
        keeps in any::<bool>(),
        shift in 3u32..7,
    ) {
        run(Machine::new(false, event_idx, keeps, 1 << shift, SplitRing::new), &steps);
    }

    #[test]
    fn an_independent_driver_gets_every_request_back_from_a_packed_ring(
        steps in prop::collection::vec(step(), 1..300),
        event_idx in any::<bool>(),
        keeps in any::<bool>(),
        shift in 3u32..7,
    ) {
        run(Machine::new(true, event_idx, keeps, 1 << shift, PackedRing::new), &steps);
    }
}

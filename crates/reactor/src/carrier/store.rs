//! A volume of a store: in place where the map says so, else by way of the keeper.

use ringstone_blockdev::StoreVolume;
use ringstone_store::{Request, RequestKind, Run};
use ringstone_virtio_blk::Operation;
use ringstone_virtqueue::VirtRing;

use std::sync::atomic::Ordering;

use super::{for_bytes, Carrier};
use crate::core::Shared;
use crate::queue::RingQueue;
use crate::uring::Tag;

impl Carrier for StoreVolume {
    #[inline]
    fn transfer<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        queue.end_hold(head, shared);
        let slot = &mut queue.slots[usize::from(head)];
        let at = slot.offset + slot.done;
        let most = (slot.len - slot.done).min(shared.quota.step);
        let run = match slot.operation {
            Operation::Read => Some(self.read(at, most)),
            _ => self.write(at, most),
        };
        match run {
            Some(Run::At { at, len }) => {
                slot.epoch = shared.reader.hold() + 1;
                queue.transfer_on(head, self.drive(), at, len, shared);
            }
            Some(Run::Zero { len }) => queue.read_zeroes(head, len, shared),
            None => queue.ask(head, self, RequestKind::Write, most, shared),
        }
    }

    fn flush<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        match self.flush_is_the_keepers() {
            true => queue.ask(head, self, RequestKind::Flush, 0, shared),
            false => queue.sync(head, self.drive().fd(), shared),
        }
    }

    fn discard<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        self.write_zeroes(head, true, queue, shared);
    }

    fn write_zeroes<R: VirtRing>(
        &self,
        head: u16,
        unmap: bool,
        queue: &mut RingQueue<R>,
        shared: &mut Shared,
    ) {
        let slot = &queue.slots[usize::from(head)];
        queue.ask(head, self, RequestKind::Zero { unmap }, slot.len - slot.done, shared);
    }
}

impl<R: VirtRing> RingQueue<R> {
    /// The request holds nothing of an epoch any more.
    #[inline(always)]
    pub(crate) fn end_hold(&mut self, head: u16, shared: &mut Shared) {
        let slot = &mut self.slots[usize::from(head)];
        if slot.epoch != 0 {
            shared.reader.end(&shared.epochs, slot.epoch - 1);
            slot.epoch = 0;
        }
    }

    /// Nothing was written there: as much as takes half of a turn, and the rest in another one.
    fn read_zeroes(&mut self, head: u16, len: u64, shared: &mut Shared) {
        let slot = &mut self.slots[usize::from(head)];
        let step = len.min(shared.quota.turn / 2) as usize;
        shared.budget.copied(step as u64);
        let (log, memory) = (self.ring.log(), self.ring.memory());
        for_bytes(slot.iovecs(&mut shared.pools), step, |guest, _, n| {
            // SAFETY: parse checked that the segment lies inside guest memory, which the ring keeps alive.
            unsafe { std::ptr::write_bytes(guest, 0, n) };
            if let Some(log) = log {
                log.mark(memory, guest, n);
            }
        });
        slot.advance(step, &mut shared.pools);
        match slot.done == slot.len {
            true => self.complete(head, true, shared),
            false => self.partial.push_back(head),
        }
    }

    /// Have the keeper do the next `most` bytes of a request, or as many as it likes.
    fn ask(&mut self, head: u16, volume: &StoreVolume, kind: RequestKind, most: u64, shared: &mut Shared) {
        let tag = Tag::Request { place: self.place, generation: self.generation, head }.encode();
        let slot = &mut self.slots[usize::from(head)];
        let offset = slot.offset + slot.done;
        let durable = !self.parts.writeback.load(Ordering::Relaxed);
        let (iovecs, len): (&[libc::iovec], u64) = match kind {
            RequestKind::Write => slot.step(most, &mut shared.pools),
            _ => (&[], most),
        };
        shared.budget.submitted(if kind == RequestKind::Write { len } else { 0 });
        let request = Request { token: 0, volume: volume.id(), kind, offset, len, durable };
        let errand = &self.errands[usize::from(head)];
        // SAFETY: the errand lies beside its slot in the queue, and iovecs in their block or slot, until the queue is drained.
        unsafe { errand.send(request, iovecs, volume.inbox(), &shared.returned, tag) };
    }

    /// What the keeper answered to the request in `head`'s slot: bytes, or a negated errno.
    pub(crate) fn answered(&mut self, head: u16, result: i64, shared: &mut Shared) {
        let Some(slot) = self.slots.get_mut(usize::from(head)).filter(|slot| slot.busy) else {
            debug_assert!(false, "a request came back that is not in flight");
            return;
        };
        if result < 0 {
            return self.failed(head, result as i32, shared);
        }
        match slot.operation {
            Operation::Write => slot.advance(result as usize, &mut shared.pools),
            Operation::Flush => return self.complete(head, true, shared),
            _ => slot.done += result as u64,
        }
        match slot.done < slot.len {
            true => self.partial.push_back(head),
            false => self.complete(head, true, shared),
        }
    }
}

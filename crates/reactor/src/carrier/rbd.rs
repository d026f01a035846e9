//! An image of a Ceph cluster: given to librbd, whose threads put it into the reactor's completions.

use ringstone_rbd::{Image, Transfer};
use ringstone_virtio_blk::Operation;
use ringstone_virtqueue::VirtRing;

use super::Carrier;
use crate::core::Shared;
use crate::queue::RingQueue;
use crate::uring::Tag;

impl Carrier for Image {
    fn transfer<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        let tag = queue.tag(head).encode();
        let slot = &mut queue.slots[usize::from(head)];
        let transfer = if slot.operation == Operation::Read { Transfer::Read } else { Transfer::Write };
        let (offset, ticket) = (slot.offset + slot.done, &queue.tickets[usize::from(head)]);
        let (iovecs, step) = slot.step(shared.quota.step, &mut shared.pools);
        // librbd copies what is written before it returns.
        shared.budget.submitted(step);
        // SAFETY: the buffers lie in guest memory, which the ring keeps alive until this queue is drained; iovecs stay in
        // their block or slot and the ticket in its queue until the request is back.
        let asked = unsafe { self.transfer(transfer, offset, iovecs, ticket, &shared.returned, tag) };
        queue.asked(head, asked, shared);
    }

    fn flush<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        let (tag, ticket) = (queue.tag(head).encode(), &queue.tickets[usize::from(head)]);
        // SAFETY: the ticket stays in its queue until the request is back.
        let asked = unsafe { self.flush(ticket, &shared.returned, tag) };
        queue.asked(head, asked, shared);
    }

    /// Zeroed rather than discarded: librbd passes over what is not a multiple of its discard granularity, and guests are told
    /// that what they discard reads as zeroes, to the block. Whole objects go either way.
    fn discard<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        Carrier::write_zeroes(self, head, true, queue, shared);
    }

    fn write_zeroes<R: VirtRing>(
        &self,
        head: u16,
        unmap: bool,
        queue: &mut RingQueue<R>,
        shared: &mut Shared,
    ) {
        let (tag, ticket) = (queue.tag(head).encode(), &queue.tickets[usize::from(head)]);
        let slot = &queue.slots[usize::from(head)];
        // SAFETY: as above.
        let asked = unsafe { self.write_zeroes(slot.offset, slot.len, unmap, ticket, &shared.returned, tag) };
        queue.asked(head, asked, shared);
    }
}

impl<R: VirtRing> RingQueue<R> {
    fn tag(&self, head: u16) -> Tag {
        Tag::Request { place: self.place, generation: self.generation, head }
    }

    /// A request was given to librbd, or refused at once.
    fn asked(&mut self, head: u16, asked: Result<(), i32>, shared: &mut Shared) {
        match asked {
            Ok(()) => shared.at_librbd += 1,
            Err(code) => self.failed(head, code, shared),
        }
    }

    /// What librbd answered to the request in `head`'s slot.
    pub(crate) fn returned(&mut self, head: u16, result: i64, shared: &mut Shared) {
        let Some(slot) = self.slots.get_mut(usize::from(head)).filter(|slot| slot.busy) else {
            debug_assert!(false, "a request came back that is not in flight");
            return;
        };
        // The cluster shut this client out, or another has the lock: the volume has another owner.
        let shut_out = result == -i64::from(libc::ESHUTDOWN)
            || result == -i64::from(libc::EROFS) && !self.parts.volume.read_only();
        if shut_out {
            self.parts.volume.fence();
        }
        if self.parts.volume.is_fenced() {
            return self.disown(head, shared);
        }
        let result = match (slot.operation, result) {
            // librbd has no short writes.
            (Operation::Write, 0..) => slot.under_way as i32,
            (_, result) => result.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32,
        };
        self.completed(head, result, shared);
    }
}

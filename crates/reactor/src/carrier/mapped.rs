//! Memory: copied in steps.

use ringstone_blockdev::MappedDrive;
use ringstone_virtio_blk::Operation;
use ringstone_virtqueue::VirtRing;

use super::file::PUNCH;
use super::{for_bytes, Carrier};
use crate::core::Shared;
use crate::queue::RingQueue;

impl Carrier for MappedDrive {
    /// Copy as much as takes half of a turn; the rest waits for another one.
    fn transfer<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        let slot = &mut queue.slots[usize::from(head)];
        let step = (slot.len - slot.done).min(shared.quota.turn / 2) as usize;
        shared.budget.copied(step as u64);
        let at = slot.offset + slot.done;
        let reading = slot.operation == Operation::Read;
        let (log, memory) = (queue.ring.log(), queue.ring.memory());
        let mut sound = true;
        for_bytes(slot.iovecs(&mut shared.pools), step, |guest, done, n| {
            // SAFETY: parse checked the range on the volume and the segment in guest memory.
            let result = unsafe {
                if reading {
                    self.read(at + done as u64, guest, n)
                } else {
                    self.write(at + done as u64, guest, n)
                }
            };
            sound &= result.is_ok();
            if let (Some(log), true) = (log, reading) {
                log.mark(memory, guest, n);
            }
        });
        if !sound {
            return queue.failed(head, -libc::EIO, shared);
        }
        slot.advance(step, &mut shared.pools);
        if slot.done == slot.len {
            queue.complete(head, true, shared);
        } else {
            queue.partial.push_back(head);
        }
    }

    fn flush<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        // Memory is as stable as it gets.
        queue.complete(head, true, shared);
    }

    fn discard<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        let slot = &queue.slots[usize::from(head)];
        match self.begin_discard(slot.offset, slot.len) {
            Ok(Some((from, len))) => queue.fallocate(head, self.fd(), PUNCH, from, len, shared),
            Ok(None) => queue.complete(head, true, shared),
            Err(_) => queue.complete(head, false, shared),
        }
    }

    fn write_zeroes<R: VirtRing>(
        &self,
        head: u16,
        _unmap: bool,
        queue: &mut RingQueue<R>,
        shared: &mut Shared,
    ) {
        self.discard(head, queue, shared);
    }
}

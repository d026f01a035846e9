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

    /// The ragged ends are zeroed in steps, like the data of a write.
    fn discard<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        let slot = &mut queue.slots[usize::from(head)];
        let discard = self.plan_discard(slot.offset, slot.len);
        if let Some((from, len)) = discard.ragged(slot.done) {
            let step = len.min(shared.quota.turn / 2);
            shared.budget.copied(step);
            if self.zero(from, step).is_err() {
                return queue.failed(head, -libc::EIO, shared);
            }
            slot.done += step;
            return queue.partial.push_back(head);
        }
        match discard.whole {
            Some(whole) if self.forget(whole).is_ok() => {
                queue.fallocate(head, self.fd(), PUNCH, whole.0, whole.1, shared)
            }
            Some(_) => queue.failed(head, -libc::EIO, shared),
            None => queue.complete(head, true, shared),
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

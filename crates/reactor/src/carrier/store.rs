//! A volume of a store: in place where the map says so, else by way of the keeper.

use ringstone_blockdev::{Drive, StoreVolume};
use ringstone_store::{checksum, Request, RequestKind, Run, Sums, BLOCK};
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
        let run = match (slot.operation, self.sums()) {
            (Operation::Read, _) => Some(self.read(at, most)),
            (_, None) => self.write(at, most),
            (_, Some(_)) => None,
        };
        let is_whole = at.is_multiple_of(BLOCK) && most.is_multiple_of(BLOCK);
        match run {
            Some(Run::At { .. }) if self.sums().is_some() && !is_whole => {
                queue.ask(head, self, RequestKind::Read, most, shared)
            }
            Some(Run::At { at, len }) => {
                slot.place = at;
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
            RequestKind::Read | RequestKind::Write => slot.step(most, &mut shared.pools),
            RequestKind::Zero { .. } | RequestKind::Flush => (&[], most),
        };
        shared.budget.submitted(if iovecs.is_empty() { 0 } else { len });
        let request = Request { token: 0, volume: volume.id(), kind, offset, len, durable };
        let errand = &self.errands[usize::from(head)];
        // SAFETY: the errand lies beside its slot in the queue, and iovecs in their block or slot, until the queue is drained.
        unsafe { errand.send(request, iovecs, volume.inbox(), &shared.returned, tag) };
    }

    /// The first `len` bytes of a read are here. If they are not what was written, and they may just be being written, ask the
    /// keeper, which waits for that. True if it is asked.
    pub(crate) fn reads_again(&mut self, head: u16, len: u64, shared: &mut Shared) -> bool {
        let Drive::Store(volume) = self.drive() else { return false };
        let Some(sums) = volume.sums() else { return false };
        let slot = &self.slots[usize::from(head)];
        let (place, left) = (slot.place, slot.len - slot.done);
        if is_sound(sums, place, slot.iovecs(&mut shared.pools), len as usize) {
            return false;
        }
        self.ask(head, volume, RequestKind::Read, left.min(shared.quota.step), shared);
        true
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
            Operation::Read => {
                if let Some(log) = self.ring.log() {
                    let memory = self.ring.memory();
                    for_bytes(slot.iovecs(&mut shared.pools), result as usize, |guest, _, n| {
                        log.mark(memory, guest, n);
                    });
                }
                slot.advance(result as usize, &mut shared.pools);
            }
            Operation::Flush => return self.complete(head, true, shared),
            _ => slot.done += result as u64,
        }
        match slot.done < slot.len {
            true => self.partial.push_back(head),
            false => self.complete(head, true, shared),
        }
    }
}

/// The blocks that were read from byte `place` of the drive are those that were written.
fn is_sound(sums: &Sums, place: u64, iovecs: &[libc::iovec], len: usize) -> bool {
    if !len.is_multiple_of(BLOCK as usize) {
        return false;
    }
    // The guest may change its memory at any moment, so a checksum is made of a copy.
    let mut block = [0u8; BLOCK as usize];
    let (mut at, mut sound) = (place, true);
    let mut filled = 0;
    for_bytes(iovecs, len, |guest, _, n| {
        let mut taken = 0;
        while taken < n {
            let piece = (n - taken).min(block.len() - filled);
            // SAFETY: parse checked that the segment lies inside guest memory, which the ring keeps alive; the piece ends in the block.
            unsafe { std::ptr::copy_nonoverlapping(guest.add(taken), block.as_mut_ptr().add(filled), piece) };
            taken += piece;
            filled += piece;
            if filled == block.len() {
                sound &= sums.at(at) == Some(checksum(&block));
                at += BLOCK;
                filled = 0;
            }
        }
    });
    sound
}

//! A volume of a store: in place where the map says so, else by way of the keeper.

use ringstone_blockdev::{Drive, StoreVolume};
use ringstone_store::{checksum, Block, Cipher, Request, RequestKind, Run, BLOCK};
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
        let (is_read, volume_at) = (slot.operation == Operation::Read, at);
        let run = match (is_read, self.sums()) {
            (true, _) => Some(self.read(at, most)),
            (_, None) => self.write(at, most),
            (_, Some(_)) => None,
        };
        let is_whole = at.is_multiple_of(BLOCK) && most.is_multiple_of(BLOCK);
        match run {
            Some(Run::At { .. }) if self.is_sealed() && !is_whole => {
                let kind = if is_read { RequestKind::Read } else { RequestKind::Write };
                queue.ask(head, self, kind, most, shared)
            }
            Some(Run::At { at, len }) => {
                slot.place = at;
                slot.epoch = shared.reader.hold() + 1;
                match self.cipher().filter(|_| !is_read) {
                    None => queue.transfer_on(head, self.drive(), at, len, shared),
                    Some(cipher) => {
                        let sealing = Some((cipher, volume_at / BLOCK));
                        queue.transfer_bounced(head, self.drive(), at, len, sealing, shared);
                    }
                }
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

    /// The first `len` bytes of a read are here as the drive has them. If they are not what was written, and they may just be
    /// being written, ask the keeper, which waits for that. True if it is asked; else they are decrypted.
    pub(crate) fn reads_again(&mut self, head: u16, len: u64, shared: &mut Shared) -> bool {
        let Drive::Store(volume) = self.drive() else { return false };
        if !volume.is_sealed() {
            return false;
        }
        let slot = &self.slots[usize::from(head)];
        let (place, left) = (slot.place, slot.len - slot.done);
        let first = (slot.offset + slot.done) / BLOCK;
        shared.budget.copied(len);
        if unseal(volume, place, first, slot.iovecs(&mut shared.pools), len as usize) {
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

/// The blocks that were read from byte `place` of the drive, which are the volume's from block `first` on, are those that were
/// written. Then they are decrypted.
fn unseal(volume: &StoreVolume, place: u64, first: u64, iovecs: &[libc::iovec], len: usize) -> bool {
    if !len.is_multiple_of(BLOCK as usize) {
        return false;
    }
    // The guest may change its memory at any moment, so each block is looked at in a copy.
    let mut block = Block::default();
    let mut begin = Place::default();
    for number in 0..len as u64 / BLOCK {
        let end = for_block(iovecs, begin, |guest, from, n| {
            // SAFETY: parse checked that the segment lies inside guest memory, which the ring keeps alive; the piece is the block's.
            unsafe { std::ptr::copy_nonoverlapping(guest, block.0.as_mut_ptr().add(from), n) };
        });
        let wanted = volume.sums().map(|sums| sums.at(place + number * BLOCK));
        if wanted.is_some_and(|wanted| wanted != Some(checksum(&block.0))) {
            return false;
        }
        if let Some(cipher) = volume.cipher() {
            cipher.decrypt(first + number, std::slice::from_mut(&mut block));
            for_block(iovecs, begin, |guest, from, n| {
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(block.0.as_ptr().add(from), guest, n) };
            });
        }
        begin = end;
    }
    true
}

/// Of a byte in the memory that iovecs name.
#[derive(Clone, Copy, Default)]
struct Place {
    iovec: usize,
    at: usize,
}

/// Call `with(pointer, bytes before it, bytes)` for the pieces of the block that begins at `place`. Returns where the next begins.
fn for_block(iovecs: &[libc::iovec], place: Place, mut with: impl FnMut(*mut u8, usize, usize)) -> Place {
    let Place { mut iovec, mut at } = place;
    let mut done = 0;
    while let (Some(iov), true) = (iovecs.get(iovec), done < BLOCK as usize) {
        let n = (iov.iov_len - at).min(BLOCK as usize - done);
        with(iov.iov_base.cast::<u8>().wrapping_add(at), done, n);
        (done, at) = (done + n, at + n);
        if at == iov.iov_len {
            (iovec, at) = (iovec + 1, 0);
        }
    }
    Place { iovec, at }
}

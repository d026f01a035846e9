//! Carrying out a request that has a slot, step by step, whatever its drive.

use ringstone_blockdev::{Drive, Fault};
use ringstone_virtio_blk::Operation;
use ringstone_virtqueue::{scatter, Segment, VirtRing};

use crate::carrier::{for_bytes, Carrier};
use crate::core::Shared;
use crate::queue::RingQueue;

impl<R: VirtRing> RingQueue<R> {
    /// Do the next step of the request in `head`'s slot; it completes when there is none left.
    pub(crate) fn execute(&mut self, head: u16, shared: &mut Shared) {
        let slot = &self.slots[usize::from(head)];
        match slot.fault {
            Fault::Error => return self.complete(head, false, shared),
            Fault::Lost => return self.complete(head, true, shared),
            Fault::None | Fault::Torn => {}
        }
        if slot.len == slot.done && matches!(slot.operation, Operation::Read | Operation::Write) {
            return self.complete(head, true, shared);
        }
        match (slot.operation, self.drive()) {
            (Operation::GetId, _) => {
                self.answer_serial(head, shared);
                self.complete(head, true, shared);
            }
            (_, Drive::Null) => self.complete(head, true, shared),
            (_, Drive::Mapped(drive)) => self.carry(head, drive, shared),
            (_, Drive::File(drive)) => self.carry(head, drive, shared),
            (_, Drive::Rbd(drive)) => self.carry(head, drive, shared),
            (_, Drive::Store(drive)) => self.carry(head, drive, shared),
        }
    }

    #[inline(always)]
    fn carry<C: Carrier>(&mut self, head: u16, carrier: &C, shared: &mut Shared) {
        match self.slots[usize::from(head)].operation {
            Operation::Read | Operation::Write => carrier.transfer(head, self, shared),
            Operation::Flush => carrier.flush(head, self, shared),
            Operation::Discard => carrier.discard(head, self, shared),
            Operation::WriteZeroes => carrier.write_zeroes(head, false, self, shared),
            Operation::WriteZeroesUnmap => carrier.write_zeroes(head, true, self, shared),
            Operation::GetId => debug_assert!(false, "GET_ID never goes to the drive"),
        }
    }

    /// A step of the request in `head`'s slot came back: `result` is bytes or a negated errno.
    pub(crate) fn completed(&mut self, head: u16, result: i32, shared: &mut Shared) {
        if !self.slots.get(usize::from(head)).is_some_and(|slot| slot.busy) {
            debug_assert!(false, "completion of a request that is not in flight");
            return;
        }
        self.end_hold(head, shared);
        if self.left(head, result, shared) {
            return;
        }
        let slot = &mut self.slots[usize::from(head)];
        if matches!(-result, libc::EAGAIN | libc::EINTR) {
            return self.partial.push_back(head);
        }
        match slot.operation {
            Operation::Write if slot.syncing => self.settled(head, result, shared),
            Operation::Read | Operation::Write => {
                // Nothing read or written where something should be: the file ends before the volume does.
                if result <= 0 {
                    return self.failed(head, result, shared);
                }
                if slot.operation == Operation::Read {
                    if let Some(bounce) = slot.bounce.take() {
                        let from = shared.pools.bounce(&bounce);
                        for_bytes(slot.iovecs(&mut shared.pools), result as usize, |guest, at, n| {
                            // SAFETY: the iovec lies in guest memory, the bytes in the bounce buffer, which was as long.
                            unsafe { std::ptr::copy_nonoverlapping(from.add(at), guest, n) };
                        });
                        shared.pools.give_bounce(bounce);
                        shared.held[usize::from(self.guest)].bounces -= 1;
                    }
                    // What is not the guest's data yet is not marked: it would go over as it is.
                    if self.reads_again(head, result as u64, shared) {
                        return;
                    }
                    if let Some(log) = self.ring.log() {
                        let slot = &self.slots[usize::from(head)];
                        let memory = self.ring.memory();
                        for_bytes(slot.iovecs(&mut shared.pools), result as usize, |guest, _, n| {
                            log.mark(memory, guest, n);
                        });
                    }
                }
                let slot = &mut self.slots[usize::from(head)];
                slot.advance(result as usize, &mut shared.pools);
                if slot.done < slot.len {
                    return self.partial.push_back(head);
                }
                if slot.operation == Operation::Write && self.sync_if_due(head, shared) {
                    return;
                }
                self.complete(head, true, shared);
            }
            Operation::Flush => self.settled(head, result, shared),
            Operation::Discard | Operation::WriteZeroes | Operation::WriteZeroesUnmap if slot.syncing => {
                self.settled(head, result, shared)
            }
            Operation::Discard | Operation::WriteZeroes | Operation::WriteZeroesUnmap => {
                self.range_done(head, result, shared)
            }
            Operation::GetId => debug_assert!(false, "GET_ID never goes to the drive"),
        }
    }

    fn settled(&mut self, head: u16, result: i32, shared: &mut Shared) {
        if result < 0 {
            return self.failed(head, result, shared);
        }
        self.complete(head, true, shared);
    }

    #[cold]
    pub(crate) fn failed(&mut self, head: u16, result: i32, shared: &mut Shared) {
        let slot = &self.slots[usize::from(head)];
        shared.report_error(&self.parts, self.errors, slot.operation, slot.offset, slot.asked, result);
        self.complete(head, false, shared);
    }

    fn answer_serial(&mut self, head: u16, shared: &mut Shared) {
        let slot = &self.slots[usize::from(head)];
        let mut rest: &[u8] = self.parts.volume.serial();
        for iov in slot.iovecs(&mut shared.pools) {
            let n = iov.iov_len.min(rest.len());
            let one = Segment { ptr: iov.iov_base.cast(), len: n as u32 };
            // SAFETY: parse checked that the segment lies inside guest memory, which the ring keeps alive.
            unsafe { scatter(std::slice::from_ref(&one), &rest[..n]) };
            if let Some(log) = self.ring.log() {
                log.mark(self.ring.memory(), one.ptr, n);
            }
            rest = &rest[n..];
        }
    }

    /// Go on with what waits for its turn (the next step of a long request) or for a bounce buffer. True if there was
    /// something.
    #[cold]
    pub(crate) fn carry_on(&mut self, shared: &mut Shared) -> bool {
        let mut work = false;
        shared.work_found();
        if let Some(head) = self.partial.pop_front() {
            self.execute(head, shared);
            work = true;
        }
        while !shared.budget.is_spent()
            && shared.held[usize::from(self.guest)].bounces < shared.quota.bounces
            && shared.pools.has_bounce()
        {
            let Some(head) = self.starved.pop_front() else { break };
            self.execute(head, shared);
            work = true;
        }
        work
    }
}

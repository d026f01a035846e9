//! Carrying out a request that has a slot: on the io_uring, or by copying in steps.

use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use ringstone_blockdev::{Drive, Fault, FileDrive, MappedDrive};
use ringstone_telemetry::QueueCounter;
use ringstone_virtio_blk::Operation;
use ringstone_virtqueue::{scatter, Segment, VirtRing};

use crate::core::Shared;
use crate::pools::{BOUNCE_LEN, ZEROES_LEN};
use crate::queue::{RingQueue, TURN_BYTES};
use crate::uring::Tag;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

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
            (Operation::Read | Operation::Write, Drive::Mapped(drive)) => self.copy_step(head, drive, shared),
            (Operation::Read | Operation::Write, Drive::File(drive)) => self.transfer(head, drive, shared),
            (Operation::Flush, Drive::Mapped(_)) => self.complete(head, true, shared),
            (Operation::Flush, Drive::File(drive)) => self.sync(head, drive.fd(), shared),
            (
                Operation::Discard | Operation::WriteZeroes | Operation::WriteZeroesUnmap,
                Drive::Mapped(drive),
            ) => {
                let (offset, len) = (slot.offset, slot.len);
                match drive.begin_discard(offset, len) {
                    Ok(Some((from, len))) => self.fallocate(head, drive.fd(), PUNCH, from, len, shared),
                    Ok(None) => self.complete(head, true, shared),
                    Err(_) => self.complete(head, false, shared),
                }
            }
            (Operation::Discard, Drive::File(drive)) => {
                let (offset, len) = (slot.offset, slot.len);
                self.fallocate(head, drive.fd(), PUNCH, offset, len, shared);
            }
            (Operation::WriteZeroes, Drive::File(drive)) => self.zero(head, false, drive, shared),
            (Operation::WriteZeroesUnmap, Drive::File(drive)) => self.zero(head, true, drive, shared),
        }
    }

    /// A completion of the io_uring for `head`: `result` is bytes or a negated errno.
    pub(crate) fn completed(&mut self, head: u16, result: i32, shared: &mut Shared) {
        if !self.slots.get(usize::from(head)).is_some_and(|slot| slot.busy) {
            debug_assert!(false, "completion of a request that is not in flight");
            return;
        }
        if self.left(head, result, shared) {
            return;
        }
        let slot = &mut self.slots[usize::from(head)];
        if matches!(-result, libc::EAGAIN | libc::EINTR) {
            return self.execute(head, shared);
        }
        match slot.operation {
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
                        self.bounces -= 1;
                    }
                    if let Some(log) = self.ring.log() {
                        let memory = self.ring.memory();
                        for_bytes(slot.iovecs(&mut shared.pools), result as usize, |guest, _, n| {
                            log.mark(memory, guest, n);
                        });
                    }
                }
                slot.advance(result as usize, &mut shared.pools);
                self.execute(head, shared);
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
    fn failed(&mut self, head: u16, result: i32, shared: &mut Shared) {
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

    /// Copy up to `TURN_BYTES` bytes from or to memory; the rest waits for the next turn.
    fn copy_step(&mut self, head: u16, drive: &MappedDrive, shared: &mut Shared) {
        let slot = &mut self.slots[usize::from(head)];
        let step = (slot.len - slot.done).min(TURN_BYTES) as usize;
        let at = slot.offset + slot.done;
        let reading = slot.operation == Operation::Read;
        let (log, memory) = (self.ring.log(), self.ring.memory());
        let mut sound = true;
        for_bytes(slot.iovecs(&mut shared.pools), step, |guest, done, n| {
            // SAFETY: parse checked the range on the volume and the segment in guest memory.
            let result = unsafe {
                if reading {
                    drive.read(at + done as u64, guest, n)
                } else {
                    drive.write(at + done as u64, guest, n)
                }
            };
            sound &= result.is_ok();
            if let (Some(log), true) = (log, reading) {
                log.mark(memory, guest, n);
            }
        });
        if !sound {
            return self.failed(head, -libc::EIO, shared);
        }
        slot.advance(step, &mut shared.pools);
        if slot.done == slot.len {
            self.complete(head, true, shared);
        } else {
            self.partial.push_back(head);
        }
    }

    /// Put a read or write on the io_uring: in place if the drive takes the buffers, else through a bounce buffer.
    #[inline]
    fn transfer(&mut self, head: u16, drive: &FileDrive, shared: &mut Shared) {
        let slot = &mut self.slots[usize::from(head)];
        let reading = slot.operation == Operation::Read;
        let fd = types::Fd(drive.fd());
        let offset = slot.offset + slot.done;
        let sync = !reading && !self.parts.writeback.load(Ordering::Relaxed);
        let rw_flags = if sync { libc::RWF_DSYNC } else { 0 };
        let iovecs = slot.iovecs(&mut shared.pools);
        let entry = match iovecs {
            [one] if drive.takes(one.iov_base.cast(), one.iov_len) => {
                let (pointer, len) = (one.iov_base.cast::<u8>(), one.iov_len as u32);
                match (reading, shared.fixed.find(pointer, one.iov_len)) {
                    (true, Some(buffer)) => {
                        opcode::ReadFixed::new(fd, pointer, len, buffer).offset(offset).build()
                    }
                    (true, None) => opcode::Read::new(fd, pointer, len).offset(offset).build(),
                    (false, Some(buffer)) => opcode::WriteFixed::new(fd, pointer, len, buffer)
                        .offset(offset)
                        .rw_flags(rw_flags)
                        .build(),
                    (false, None) => {
                        opcode::Write::new(fd, pointer, len).offset(offset).rw_flags(rw_flags).build()
                    }
                }
            }
            many if many.iter().all(|iov| drive.takes(iov.iov_base.cast(), iov.iov_len)) => {
                let (pointer, count) = (many.as_ptr(), many.len() as u32);
                if reading {
                    opcode::Readv::new(fd, pointer, count).offset(offset).build()
                } else {
                    opcode::Writev::new(fd, pointer, count).offset(offset).rw_flags(rw_flags).build()
                }
            }
            _ => return self.transfer_bounced(head, drive, offset, rw_flags, shared),
        };
        // SAFETY: the buffers lie in guest memory, which the ring keeps alive until this queue is drained; iovecs stay in
        // their block until the slot is released.
        unsafe { self.submit(head, entry, shared) };
    }

    /// Put an entry of the request in `head`'s slot on the io_uring.
    ///
    /// # Safety
    /// As for [`Uring::push`](crate::uring::Uring::push).
    #[inline(always)]
    unsafe fn submit(&self, head: u16, entry: Entry, shared: &mut Shared) {
        let tag = Tag::Request { place: self.place, generation: self.generation, head };
        // SAFETY: the caller's promise.
        unsafe { shared.uring.push(entry, tag) };
    }

    #[cold]
    fn transfer_bounced(
        &mut self,
        head: u16,
        drive: &FileDrive,
        offset: u64,
        rw_flags: i32,
        shared: &mut Shared,
    ) {
        let slot = &mut self.slots[usize::from(head)];
        if slot.bounce.is_none() && self.bounces < shared.quota.bounces {
            slot.bounce = shared.pools.take_bounce();
            self.bounces += u32::from(slot.bounce.is_some());
        }
        let Some(bounce) = &slot.bounce else {
            self.starved.push_back(head);
            return;
        };
        if slot.done == 0 {
            self.parts.stats.add(QueueCounter::Bounces, 1);
        }
        let buffer = shared.pools.bounce(bounce);
        let len = (slot.len - slot.done).min(BOUNCE_LEN as u64) as usize;
        let fd = types::Fd(drive.fd());
        let entry = if slot.operation == Operation::Read {
            opcode::Read::new(fd, buffer, len as u32).offset(offset).build()
        } else {
            for_bytes(slot.iovecs(&mut shared.pools), len, |guest, at, n| {
                // SAFETY: the iovec lies in guest memory and the buffer is at least `len` long.
                unsafe { std::ptr::copy_nonoverlapping(guest, buffer.add(at), n) };
            });
            opcode::Write::new(fd, buffer, len as u32).offset(offset).rw_flags(rw_flags).build()
        };
        // SAFETY: the slot holds the bounce buffer until the completion.
        unsafe { self.submit(head, entry, shared) };
    }

    fn sync(&mut self, head: u16, fd: RawFd, shared: &mut Shared) {
        let entry = opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: no buffers.
        unsafe { self.submit(head, entry, shared) };
    }

    fn fallocate(&mut self, head: u16, fd: RawFd, mode: i32, offset: u64, len: u64, shared: &mut Shared) {
        let entry = opcode::Fallocate::new(types::Fd(fd), len).offset(offset).mode(mode).build();
        // SAFETY: no buffers.
        unsafe { self.submit(head, entry, shared) };
    }

    fn zero(&mut self, head: u16, unmap: bool, drive: &FileDrive, shared: &mut Shared) {
        let slot = &mut self.slots[usize::from(head)];
        let (offset, len) = (slot.offset, slot.len);
        if !slot.zero_by_writing {
            if unmap && drive.can_punch() {
                return self.fallocate(head, drive.fd(), PUNCH, offset, len, shared);
            }
            if drive.can_zero_range() {
                return self.fallocate(head, drive.fd(), ZERO, offset, len, shared);
            }
            slot.zero_by_writing = true;
        }
        let n = (len - slot.done).min(ZEROES_LEN as u64) as u32;
        let entry = opcode::Write::new(types::Fd(drive.fd()), shared.pools.zeroes(), n)
            .offset(offset + slot.done)
            .build();
        // SAFETY: the zeroes live as long as the reactor.
        unsafe { self.submit(head, entry, shared) };
    }

    /// A step of a discard or of zeroing came back.
    fn range_done(&mut self, head: u16, result: i32, shared: &mut Shared) {
        let drive = self.drive();
        let slot = &mut self.slots[usize::from(head)];
        let zeroing = matches!(slot.operation, Operation::WriteZeroes | Operation::WriteZeroesUnmap);
        if result == -libc::EOPNOTSUPP && !slot.zero_by_writing {
            if !zeroing {
                // A discard is a hint (virtio 1.2, 5.2.6.2).
                return self.complete(head, true, shared);
            }
            match (slot.operation, drive) {
                // The next attempt of this request tries ZERO_RANGE, then writing; later ones go straight there.
                (Operation::WriteZeroesUnmap, Drive::File(file)) if file.can_zero_range() => {
                    slot.operation = Operation::WriteZeroes;
                }
                (_, Drive::File(file)) => {
                    file.zero_range_refused();
                    slot.zero_by_writing = true;
                }
                _ => slot.zero_by_writing = true,
            }
            return self.execute(head, shared);
        }
        if result < 0 || slot.zero_by_writing && result == 0 {
            return self.failed(head, result, shared);
        }
        if slot.zero_by_writing {
            slot.done += result as u64;
            if slot.done < slot.len {
                return self.execute(head, shared);
            }
        }
        if let (Drive::File(drive), false) = (drive, self.parts.writeback.load(Ordering::Relaxed)) {
            slot.syncing = true;
            return self.sync(head, drive.fd(), shared);
        }
        self.complete(head, true, shared);
    }

    /// Go on with what waits for its turn (a step of a long copy) or for a bounce buffer. True if there was something.
    #[cold]
    pub(crate) fn carry_on(&mut self, shared: &mut Shared) -> bool {
        let mut work = false;
        shared.work_found();
        if let Some(head) = self.partial.pop_front() {
            self.execute(head, shared);
            work = true;
        }
        while self.bounces < shared.quota.bounces && shared.pools.has_bounce() {
            let Some(head) = self.starved.pop_front() else { break };
            self.execute(head, shared);
            work = true;
        }
        work
    }
}

/// Call `with(pointer, bytes before it, bytes)` for the pieces of the first `len` bytes of `iovecs`.
fn for_bytes(iovecs: &[libc::iovec], len: usize, mut with: impl FnMut(*mut u8, usize, usize)) {
    let mut done = 0;
    for iov in iovecs {
        let n = iov.iov_len.min(len - done);
        with(iov.iov_base.cast(), done, n);
        done += n;
        if done == len {
            return;
        }
    }
}

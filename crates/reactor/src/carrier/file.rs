//! A file or block device: on the reactor's io_uring.

use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types};
use ringstone_blockdev::{Drive, FileDrive};
use ringstone_cipher::Xts;
use ringstone_store::{Block, Cipher};
use ringstone_telemetry::QueueCounter;
use ringstone_virtio_blk::Operation;
use ringstone_virtqueue::VirtRing;

use super::{for_bytes, Carrier};
use crate::core::Shared;
use crate::pools::{BOUNCE_LEN, ZEROES_LEN};
use crate::queue::{QueueParts, RingQueue};
use crate::uring::Tag;

pub(super) const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl Carrier for FileDrive {
    #[inline]
    fn transfer<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        let slot = &queue.slots[usize::from(head)];
        let (offset, most) = (slot.offset + slot.done, shared.quota.step);
        queue.transfer_on(head, self, offset, most, shared);
    }

    fn flush<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        queue.sync(head, self.fd(), shared);
    }

    fn discard<R: VirtRing>(&self, head: u16, queue: &mut RingQueue<R>, shared: &mut Shared) {
        let slot = &queue.slots[usize::from(head)];
        let (offset, len) = (slot.offset, slot.len);
        queue.fallocate(head, self.fd(), PUNCH, offset, len, shared);
    }

    fn write_zeroes<R: VirtRing>(
        &self,
        head: u16,
        unmap: bool,
        queue: &mut RingQueue<R>,
        shared: &mut Shared,
    ) {
        let slot = &mut queue.slots[usize::from(head)];
        let (offset, len) = (slot.offset, slot.len);
        if !slot.zero_by_writing {
            if unmap && self.can_punch() {
                return queue.fallocate(head, self.fd(), PUNCH, offset, len, shared);
            }
            if self.can_zero_range() {
                return queue.fallocate(head, self.fd(), ZERO, offset, len, shared);
            }
            slot.zero_by_writing = true;
        }
        let n = (len - slot.done).min(ZEROES_LEN as u64) as u32;
        let entry = opcode::Write::new(types::Fd(self.fd()), shared.pools.zeroes(), n)
            .offset(offset + slot.done)
            .build();
        shared.budget.submitted(n.into());
        // SAFETY: the zeroes live as long as the reactor.
        unsafe { queue.submit(head, unwaited(self, entry), shared) };
    }
}

/// A read or write of `drive` that nobody is kept waiting by.
#[inline(always)]
pub(crate) fn unwaited(drive: &FileDrive, entry: Entry) -> Entry {
    match drive.keeps_waiting() {
        true => entry.flags(Flags::ASYNC),
        false => entry,
    }
}

/// Flags of a request of `parts`' queue.
#[inline(always)]
fn rw_flags(reading: bool, parts: &QueueParts) -> i32 {
    match reading || parts.writeback.load(Ordering::Relaxed) {
        true => 0,
        false => libc::RWF_DSYNC,
    }
}

impl<R: VirtRing> RingQueue<R> {
    /// Move the next bytes of a read or write, `most` at a time, from or to byte `offset` of `drive`: in place if that takes the
    /// buffers, else through a bounce buffer.
    #[inline]
    pub(super) fn transfer_on(
        &mut self,
        head: u16,
        drive: &FileDrive,
        offset: u64,
        most: u64,
        shared: &mut Shared,
    ) {
        let slot = &mut self.slots[usize::from(head)];
        let reading = slot.operation == Operation::Read;
        let fd = types::Fd(drive.fd());
        let rw_flags = rw_flags(reading, &self.parts);
        let (iovecs, step) = slot.step(most, &mut shared.pools);
        let entry = match iovecs {
            [one] if drive.takes(one.iov_base.cast(), one.iov_len) => {
                let (pointer, len) = (one.iov_base.cast::<u8>(), one.iov_len as u32);
                if reading {
                    opcode::Read::new(fd, pointer, len).offset(offset).build()
                } else {
                    opcode::Write::new(fd, pointer, len).offset(offset).rw_flags(rw_flags).build()
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
            _ => return self.transfer_bounced(head, drive, offset, most, None, shared),
        };
        shared.budget.submitted(step);
        // SAFETY: the buffers lie in guest memory, which the ring keeps alive until this queue is drained; iovecs stay in
        // their block until the slot is released.
        unsafe { self.submit(head, unwaited(drive, entry), shared) };
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

    /// As [`transfer_on`](Self::transfer_on) by way of a bounce buffer. `sealing`: what is written is encrypted there, and the
    /// number in the volume of its first block.
    pub(super) fn transfer_bounced(
        &mut self,
        head: u16,
        drive: &FileDrive,
        offset: u64,
        most: u64,
        sealing: Option<(&Xts, u64)>,
        shared: &mut Shared,
    ) {
        let slot = &mut self.slots[usize::from(head)];
        let held = &mut shared.held[usize::from(self.guest)];
        if slot.bounce.is_none() && held.bounces < shared.quota.bounces {
            slot.bounce = shared.pools.take_bounce();
            held.bounces += u32::from(slot.bounce.is_some());
        }
        let Some(bounce) = &slot.bounce else {
            self.starved.push_back(head);
            return;
        };
        if slot.done == 0 {
            self.parts.stats.add(QueueCounter::Bounces, 1);
        }
        let buffer = shared.pools.bounce(bounce);
        let len = (slot.len - slot.done).min(most).min(BOUNCE_LEN as u64) as usize;
        shared.budget.copied(len as u64);
        let fd = types::Fd(drive.fd());
        let reading = slot.operation == Operation::Read;
        let rw_flags = rw_flags(reading, &self.parts);
        let entry = if reading {
            opcode::Read::new(fd, buffer, len as u32).offset(offset).build()
        } else {
            for_bytes(slot.iovecs(&mut shared.pools), len, |guest, at, n| {
                // SAFETY: the iovec lies in guest memory and the buffer is at least `len` long.
                unsafe { std::ptr::copy_nonoverlapping(guest, buffer.add(at), n) };
            });
            if let Some((cipher, first)) = sealing {
                // It takes longer than copying them did.
                shared.budget.copied(2 * len as u64);
                // SAFETY: the slot has the buffer to itself, of whole blocks and aligned as those.
                let blocks =
                    unsafe { std::slice::from_raw_parts_mut(buffer.cast(), len / size_of::<Block>()) };
                cipher.encrypt(first, blocks);
            }
            opcode::Write::new(fd, buffer, len as u32).offset(offset).rw_flags(rw_flags).build()
        };
        // SAFETY: the slot holds the bounce buffer until the completion.
        unsafe { self.submit(head, unwaited(drive, entry), shared) };
    }

    pub(super) fn sync(&mut self, head: u16, fd: RawFd, shared: &mut Shared) {
        let entry = opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: no buffers.
        unsafe { self.submit(head, entry, shared) };
    }

    pub(super) fn fallocate(
        &mut self,
        head: u16,
        fd: RawFd,
        mode: i32,
        offset: u64,
        len: u64,
        shared: &mut Shared,
    ) {
        let entry = opcode::Fallocate::new(types::Fd(fd), len).offset(offset).mode(mode).build();
        // SAFETY: no buffers.
        unsafe { self.submit(head, entry, shared) };
    }

    /// Have what a write brought made durable, where its own flag does not do that. False when there is nothing to wait for.
    #[inline(always)]
    pub(crate) fn sync_if_due(&mut self, head: u16, shared: &mut Shared) -> bool {
        let drive = match self.drive() {
            Drive::File(drive) => drive,
            Drive::Store(volume) => volume.drive(),
            _ => return false,
        };
        if drive.honours_dsync() || self.parts.writeback.load(Ordering::Relaxed) {
            return false;
        }
        self.slots[usize::from(head)].syncing = true;
        self.sync(head, drive.fd(), shared);
        true
    }

    /// A step of a discard or of zeroing came back.
    pub(crate) fn range_done(&mut self, head: u16, result: i32, shared: &mut Shared) {
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
                return self.partial.push_back(head);
            }
        }
        if let (Drive::File(drive), false) = (drive, self.parts.writeback.load(Ordering::Relaxed)) {
            slot.syncing = true;
            return self.sync(head, drive.fd(), shared);
        }
        self.complete(head, true, shared);
    }
}

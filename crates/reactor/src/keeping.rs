//! A store's keeper on its reactor: takes requests from all reactors, carries out the I/O that the keeper wants, gives answers.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::Sender;
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use ringstone_blockdev::FileDrive;
use ringstone_rbd::Completions;
use ringstone_store::{errno, zeroed, Action, Answer, Block, Command, Data, Io, Keeper, StoreError, BLOCK};

use crate::carrier::{for_bytes, unwaited};
use crate::core::Shared;
use crate::errand::Errand;
use crate::uring::Tag;

/// What comes back of a command.
pub type Answered = Sender<Result<Answer, StoreError>>;

/// See the module.
pub struct Keeping {
    /// The control side's name for the store.
    id: u64,
    keeper: Keeper,
    drive: Arc<FileDrive>,
    inbox: Arc<Completions>,
    /// Rings when somebody asks while the reactor sleeps.
    bell: OwnedFd,
    answers: HashMap<u64, Answered>,
    commands: u64,
    under_way: Vec<Option<UnderWay>>,
    free: Vec<u32>,
    place: u16,
    stopping: bool,
    /// The keeper had nothing to do, and nobody has told it anything since.
    rests: bool,
}

/// An I/O that the drive has.
struct UnderWay {
    io: Io,
    /// The guest's memory, as far as this I/O goes.
    iovecs: Vec<libc::iovec>,
    /// A copy of it, where the drive does not take it.
    bounce: Option<Box<[Block]>>,
    /// The bytes are written; what is under way makes them durable.
    syncing: bool,
}

// SAFETY: iovecs point into guest memory that a queue with a request in flight keeps alive; all else is Send.
unsafe impl Send for UnderWay {}

impl Keeping {
    /// `bell`: what `inbox` rings.
    pub fn new(
        id: u64,
        keeper: Keeper,
        drive: Arc<FileDrive>,
        inbox: Arc<Completions>,
        bell: OwnedFd,
    ) -> Self {
        Self {
            id,
            keeper,
            drive,
            inbox,
            bell,
            answers: HashMap::new(),
            commands: 0,
            under_way: Vec::new(),
            free: Vec::new(),
            place: 0,
            stopping: false,
            rests: false,
        }
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn begin_at(&mut self, place: u16, shared: &mut Shared) {
        (self.place, self.stopping, self.rests) = (place, false, false);
        self.keeper.pause(false);
        shared.uring.watch(self.bell.as_raw_fd(), Tag::StoreBell { place });
    }

    /// It rang.
    pub(crate) fn rung(&self, more: bool, shared: &mut Shared) {
        let mut count = 0u64;
        // SAFETY: eight bytes of a live local from our own non-blocking eventfd. An empty one rang before.
        unsafe { libc::read(self.bell.as_raw_fd(), (&raw mut count).cast(), 8) };
        if !more {
            shared.uring.watch(self.bell.as_raw_fd(), Tag::StoreBell { place: self.place });
        }
    }

    /// Come to rest; [`is_at_rest`](Self::is_at_rest) tells when.
    pub(crate) fn stop(&mut self) {
        (self.stopping, self.rests) = (true, false);
        self.keeper.pause(true);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Nothing is under way.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.free.len() == self.under_way.len() && self.keeper.is_quiet() && !self.inbox.pending()
    }

    pub(crate) fn end(&mut self, shared: &mut Shared) {
        shared.uring.cancel(Tag::StoreBell { place: self.place });
    }

    /// The reactor wants to sleep. False if there is something to do.
    pub(crate) fn may_sleep(&self) -> bool {
        self.inbox.may_sleep()
    }

    pub(crate) fn awake(&self) {
        self.inbox.awake();
    }

    /// It has to look at the clock, or at other reactors, again.
    pub(crate) fn needs_turns(&self) -> bool {
        self.keeper.needs_turns()
    }

    pub(crate) fn command(&mut self, command: Command, answer: Answered) {
        self.rests = false;
        self.commands += 1;
        self.answers.insert(self.commands, answer);
        self.keeper.command(self.commands, command);
    }

    /// True if there was something to do.
    pub(crate) fn turn(&mut self, shared: &mut Shared) -> bool {
        let mut work = false;
        if self.inbox.pending() {
            shared.work_found();
            work = true;
            let keeper = &mut self.keeper;
            // SAFETY: the inbox gives each errand once, and its queue waits for the answer.
            self.inbox.take(|token, _| keeper.submit(unsafe { Errand::of(token) }.request()));
        }
        if !work && (self.rests || !self.keeper.wants_turn()) {
            self.rests = true;
            return false;
        }
        self.rests = false;
        let now = if work { shared.now } else { shared.clock.now() };
        work |= self.keeper.turn(shared.clock.ns(now));
        while let Some(io) = self.keeper.next_io() {
            self.carry_out(io, shared);
        }
        self.give_answers();
        work
    }

    fn give_answers(&mut self) {
        while let Some(done) = self.keeper.next_done() {
            let result = match done.result {
                Ok(bytes) => bytes as i64,
                Err(errno) => -i64::from(errno),
            };
            // SAFETY: the token is an errand's that was submitted and is answered here for the first time.
            unsafe { Errand::of(done.token) }.answer(result);
        }
        while let Some((number, answer)) = self.keeper.next_answer() {
            if let Some(answered) = self.answers.remove(&number) {
                // Whoever asked may have gone.
                let _ = answered.send(answer);
            }
        }
    }

    pub(crate) fn next_event(&mut self) -> Option<String> {
        self.keeper.next_event()
    }

    fn carry_out(&mut self, mut io: Io, shared: &mut Shared) {
        if let (Action::Fill { token, skip, at }, Data::Own(buffer)) = (io.action, &mut io.data) {
            // SAFETY: the token is an errand's that has no answer yet.
            let errand = unsafe { Errand::of(token) };
            copy_from_guest(errand.iovecs(), skip, io.len as usize, buffer, at);
            return self.keeper.completed(io, Ok(()));
        }
        if let (Action::Give { token, at }, Data::Own(buffer)) = (io.action, &io.data) {
            // SAFETY: as above.
            let errand = unsafe { Errand::of(token) };
            copy_to_guest(errand.iovecs(), io.len as usize, buffer, at);
            return self.keeper.completed(io, Ok(()));
        }
        let one = UnderWay { io, iovecs: Vec::new(), bounce: None, syncing: false };
        let index = match self.free.pop() {
            Some(index) => {
                self.under_way[index as usize] = Some(one);
                index
            }
            None => {
                self.under_way.push(Some(one));
                self.under_way.len() as u32 - 1
            }
        };
        self.submit(index, shared);
    }

    fn submit(&mut self, index: u32, shared: &mut Shared) {
        let Some(one) = self.under_way[index as usize].as_mut() else { return };
        let entry = unwaited(&self.drive, entry(one, &self.drive, shared));
        // SAFETY: buffers are the I/O's own, the reactor's page of zeroes, or guest memory that the errand's queue keeps alive
        // until it is answered; the I/O stays in its place until the completion.
        unsafe { shared.uring.push(entry, Tag::Store { place: self.place, io: index }) };
    }

    /// The drive is done with I/O number `index`: bytes, or a negated errno.
    pub(crate) fn completed(&mut self, index: u32, result: i32, shared: &mut Shared) {
        if matches!(-result, libc::EAGAIN | libc::EINTR) {
            return self.submit(index, shared);
        }
        let Some(one) = self.under_way.get_mut(index as usize).and_then(Option::as_mut) else { return };
        let transfers = matches!(one.io.action, Action::Read | Action::Write { .. }) && !one.syncing;
        let result = match result {
            ..0 => Err(-result),
            // The drive ends where the store does not.
            n if transfers && n as u64 != one.io.len => Err(errno::EIO),
            _ => Ok(()),
        };
        let durable = one.io.action == Action::Write { durable: true };
        if result.is_ok() && durable && !one.syncing && !self.drive.honours_dsync() {
            one.syncing = true;
            return self.submit(index, shared);
        }
        self.free.push(index);
        if let Some(one) = self.under_way[index as usize].take() {
            self.rests = false;
            self.keeper.completed(one.io, result);
        }
    }
}

/// The io_uring's entry for what is next of an I/O.
fn entry(one: &mut UnderWay, drive: &FileDrive, shared: &mut Shared) -> Entry {
    let fd = types::Fd(drive.fd());
    let (offset, len) = (one.io.offset, one.io.len);
    let durable = one.io.action == Action::Write { durable: true };
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    let write = |pointer: *const u8| {
        opcode::Write::new(fd, pointer, len as u32).offset(offset).rw_flags(flags).build()
    };
    match (one.io.action, &mut one.io.data) {
        _ if one.syncing => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        (Action::Read, Data::Own(buffer)) => {
            opcode::Read::new(fd, buffer.as_mut_ptr().cast(), len as u32).offset(offset).build()
        }
        (Action::Write { .. }, Data::Own(buffer)) => write(buffer.as_ptr().cast()),
        (Action::Write { .. }, Data::Zeroes) => write(shared.pools.zeroes()),
        (Action::Write { .. }, Data::Guest { token, skip }) => {
            // SAFETY: the token is an errand's that has no answer yet.
            let errand = unsafe { Errand::of(*token) };
            cut(errand.iovecs(), *skip, len, &mut one.iovecs);
            if one.iovecs.iter().all(|iov| drive.takes(iov.iov_base.cast(), iov.iov_len)) {
                return opcode::Writev::new(fd, one.iovecs.as_ptr(), one.iovecs.len() as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build();
            }
            let mut bounce = zeroed((len.div_ceil(BLOCK)) as usize);
            copy_from_guest(&one.iovecs, 0, len as usize, &mut bounce, 0);
            let entry = write(bounce.as_ptr().cast());
            one.bounce = Some(bounce);
            entry
        }
        _ => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

/// `len` bytes of `iovecs`, from byte `skip` on, into `cut`.
fn cut(iovecs: &[libc::iovec], mut skip: u64, mut len: u64, cut: &mut Vec<libc::iovec>) {
    cut.clear();
    for iov in iovecs {
        let before = skip.min(iov.iov_len as u64);
        skip -= before;
        let n = (iov.iov_len as u64 - before).min(len);
        if n > 0 {
            let iov_base = iov.iov_base.cast::<u8>().wrapping_add(before as usize).cast();
            cut.push(libc::iovec { iov_base, iov_len: n as usize });
            len -= n;
        }
    }
}

/// Copy `len` bytes of guest memory, from byte `skip` of `iovecs` on, to byte `at` of `buffer`.
fn copy_from_guest(iovecs: &[libc::iovec], skip: u64, len: usize, buffer: &mut [Block], at: usize) {
    let mut parts = Vec::new();
    cut(iovecs, skip, len as u64, &mut parts);
    debug_assert!(at + len <= buffer.len() * BLOCK as usize);
    let to = buffer.as_mut_ptr().cast::<u8>();
    for_bytes(&parts, len, |guest, done, n| {
        // SAFETY: the guest's memory is kept alive by its queue, and the buffer has `at + len` bytes.
        unsafe { std::ptr::copy_nonoverlapping(guest, to.add(at + done), n) };
    });
}

/// Copy `len` bytes of `buffer`, from its byte `at` on, to the begin of guest memory.
fn copy_to_guest(iovecs: &[libc::iovec], len: usize, buffer: &[Block], at: usize) {
    debug_assert!(at + len <= buffer.len() * BLOCK as usize);
    let from = buffer.as_ptr().cast::<u8>();
    for_bytes(iovecs, len, |guest, done, n| {
        // SAFETY: the guest's memory is kept alive by its queue, and the buffer has `at + len` bytes.
        unsafe { std::ptr::copy_nonoverlapping(from.add(at + done), guest, n) };
    });
}

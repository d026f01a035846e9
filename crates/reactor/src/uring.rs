//! The reactor's io_uring.

use std::io;
use std::os::fd::RawFd;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{opcode, types, IoUring};

/// Submission entries; when they run out in a turn, the turn submits early.
const ENTRIES: u32 = 512;
/// Completion entries: more than the submissions, as requests stay in flight over turns. The kernel keeps an overflow.
const COMPLETIONS: u32 = 8192;

/// What a completion belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// A request: queue place, its generation, and the head of its chain.
    Request { place: u16, generation: u16, head: u16 },
    /// A kick descriptor became readable.
    Kick { place: u16, generation: u16 },
    /// Something that a store's keeper wanted of its drive, by number.
    Store { place: u16, io: u32 },
    /// Somebody asks a store's keeper, while its reactor sleeps.
    StoreBell { place: u16 },
    /// Mail.
    Mail,
    /// Nobody waits for it.
    Ignore,
}

impl Tag {
    pub fn encode(self) -> u64 {
        let pack = |kind: u64, place: u16, generation: u16, head: u16| {
            kind << 56 | u64::from(place) << 32 | u64::from(generation) << 16 | u64::from(head)
        };
        match self {
            Self::Ignore => 0,
            Self::Request { place, generation, head } => pack(1, place, generation, head),
            Self::Kick { place, generation } => pack(2, place, generation, 0),
            Self::Mail => pack(3, 0, 0, 0),
            Self::Store { place, io } => pack(4, place, (io >> 16) as u16, io as u16),
            Self::StoreBell { place } => pack(5, place, 0, 0),
        }
    }

    #[inline(always)]
    pub fn decode(data: u64) -> Self {
        let (place, generation, head) = ((data >> 32) as u16, (data >> 16) as u16, data as u16);
        match data >> 56 {
            1 => Self::Request { place, generation, head },
            2 => Self::Kick { place, generation },
            3 => Self::Mail,
            4 => Self::Store { place, io: data as u32 },
            5 => Self::StoreBell { place },
            _ => Self::Ignore,
        }
    }
}

/// One completion.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    pub tag: Tag,
    /// Bytes, or a negated errno.
    pub result: i32,
    /// A multishot poll goes on.
    pub more: bool,
}

/// The ring and how much of it waits to be submitted.
pub struct Uring {
    ring: IoUring,
    queued: u32,
    /// Requests submitted or queued whose completions were not reaped.
    in_flight: u32,
    /// Turns to let pass before the kernel is asked again for completions it seemed to have.
    patience: u32,
    pub enters: u64,
    pub submitted: u64,
}

impl Uring {
    /// Made disabled on the control side, so that errors surface at start; the reactor's thread must call
    /// [`enable`](Self::enable) and is the only one to use it from then on.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_cqsize(COMPLETIONS)
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_r_disabled()
            .dontfork()
            .build(ENTRIES)?;
        Ok(Self { ring, queued: 0, in_flight: 0, patience: 0, enters: 0, submitted: 0 })
    }

    pub fn enable(&mut self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()
    }

    /// Add an entry to this turn's batch.
    ///
    /// # Safety
    /// Buffers that the entry names must live until its completion is reaped.
    #[inline(always)]
    pub unsafe fn push(&mut self, entry: Entry, tag: Tag) {
        let entry = entry.user_data(tag.encode());
        // SAFETY: the caller's promise.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.enter();
        }
        self.queued += 1;
        self.in_flight += u32::from(matches!(tag, Tag::Request { .. } | Tag::Store { .. }));
    }

    /// Wake whoever waits on eventfd `fd`. It goes through the ring, so a descriptor that blocks cannot hold the reactor.
    pub fn signal(&mut self, fd: RawFd) {
        static ONE: u64 = 1;
        let entry =
            opcode::Write::new(types::Fd(fd), (&raw const ONE).cast(), 8).build().flags(Flags::SKIP_SUCCESS);
        // SAFETY: the buffer is static.
        unsafe { self.push(entry, Tag::Ignore) };
    }

    /// Report `tag` whenever `fd` becomes readable, until [`cancel`](Self::cancel).
    pub fn watch(&mut self, fd: RawFd, tag: Tag) {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
        // SAFETY: no buffers.
        unsafe { self.push(entry, tag) };
    }

    pub fn cancel(&mut self, tag: Tag) {
        let entry = opcode::AsyncCancel::new(tag.encode()).build();
        // SAFETY: no buffers.
        unsafe { self.push(entry, Tag::Ignore) };
    }

    /// Submit what waits, and let the kernel post completions of requests if it has any; no system call otherwise.
    ///
    /// The kernel's "task work pending" flag can stay set with nothing pending (work that arrives while older work is run is
    /// taken along without clearing it), so asking in vain makes us wait a few turns. Completions other than requests' can
    /// wait: while we poll nobody needs a kick.
    #[inline(always)]
    pub fn turn(&mut self) {
        if self.queued > 0 {
            self.enter();
        } else if self.in_flight > 0 {
            self.collect();
        }
    }

    #[inline(always)]
    fn collect(&mut self) {
        const PATIENCE: u32 = 16;
        if self.patience > 0 {
            self.patience -= 1;
        } else if self.ring.submission().taskrun() {
            self.enter();
            if self.ring.completion().is_empty() {
                self.patience = PATIENCE;
            }
        }
    }

    /// Submit everything that waits, whatever it takes.
    pub fn submit_all(&mut self) {
        while self.queued > 0 {
            self.enter();
        }
    }

    fn enter(&mut self) {
        const GETEVENTS: u32 = 1;
        // SAFETY: no argument structure is passed.
        let result =
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(self.queued, 0, GETEVENTS, None) };
        self.account(result);
    }

    /// Sleep until something completes or `timeout_ns` passed.
    pub fn sleep(&mut self, timeout_ns: Option<u64>) {
        let result = match timeout_ns {
            None => self.ring.submitter().submit_and_wait(1),
            Some(ns) => {
                let timespec = Timespec::new().sec(ns / 1_000_000_000).nsec((ns % 1_000_000_000) as u32);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        if let Err(error) = &result {
            if error.raw_os_error() == Some(libc::ETIME) {
                // The timeout says nothing of how much was submitted; the ring does.
                self.enters += 1;
                self.queued = self.ring.submission().len() as u32;
                return;
            }
        }
        self.account(result);
    }

    fn account(&mut self, result: io::Result<usize>) {
        self.enters += 1;
        // On EINTR, EBUSY and EAGAIN nothing is lost: what was not taken waits for the next turn.
        if let Ok(taken) = result {
            self.queued -= (taken as u32).min(self.queued);
            self.submitted += taken as u64;
        }
    }

    /// Take one completion that was posted.
    #[inline(always)]
    pub fn reap(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        let tag = Tag::decode(entry.user_data());
        self.in_flight -= u32::from(matches!(tag, Tag::Request { .. } | Tag::Store { .. }));
        Some(Completion { tag, result: entry.result(), more: io_uring::cqueue::more(entry.flags()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_survive_the_way_through_user_data() {
        for tag in [
            Tag::Ignore,
            Tag::Mail,
            Tag::Kick { place: 7, generation: 65535 },
            Tag::Request { place: 65535, generation: 1, head: 32767 },
            Tag::Store { place: 65535, io: 0xfedc_ba98 },
            Tag::StoreBell { place: 3 },
        ] {
            assert_eq!(Tag::decode(tag.encode()), tag);
        }
    }
}

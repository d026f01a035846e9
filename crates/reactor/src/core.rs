//! The loop of one reactor.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use ringstone_rbd::Completions;
use ringstone_store::{Epochs, Reader};
use ringstone_telemetry::{Clock, QueueCounter, ReactorCounter, ReactorStats};
use ringstone_virtio_blk::Operation;
use ringstone_virtqueue::{Chain, Notify};

use crate::guests::{Budget, Guests, Held, Quota};
use crate::handle::{Command, Outbox, Reply};
use crate::keepers::Keepers;
use crate::mailbox::Receiver;
use crate::patience::{Awaited, Patience};
use crate::pools::Pools;
use crate::queue::{each, Queue, QueueParts};
use crate::uring::{Completion, Tag, Uring};

/// Turns without work between two looks at the clock.
const TURNS_BETWEEN_LOOKS: u32 = 16;
/// Completions handled in one turn before the rings have theirs.
const REAP: usize = 256;

/// What all queues of a reactor use.
pub struct Shared {
    pub uring: Uring,
    pub pools: Pools,
    pub chain: Chain,
    pub clock: Clock,
    /// The tick that requests are begun and completed at; read once for many of them.
    pub now: u64,
    /// Tick at which the present turn found its first work; 0 before.
    pub began: u64,
    pub stats: ReactorStats,
    /// Places of queues whose used ring has entries the driver was not shown.
    pub dirty: Vec<u16>,
    pub quota: Quota,
    /// Of the guest whose turn it is.
    pub budget: Budget,
    /// What each guest has of the pools, by its number.
    pub held: Vec<Held>,
    pub delayed: Delayed,
    pub outbox: Outbox,
    /// What librbd's threads and keepers give back.
    pub returned: Arc<Completions>,
    /// Requests that librbd has.
    pub at_librbd: u32,
    /// When places of stores may be used again, and this reactor's part in that.
    pub epochs: Arc<Epochs>,
    pub reader: Reader,
}

/// Requests that a faulty drive holds back, by the tick at which they go on.
#[derive(Default)]
pub struct Delayed(BinaryHeap<Reverse<(u64, u16, u16, u16)>>);

impl Delayed {
    pub fn push(&mut self, until: u64, place: u16, generation: u16, head: u16) {
        self.0.push(Reverse((until, place, generation, head)));
    }

    fn due(&mut self, now: u64) -> Option<(u16, u16, u16)> {
        let Reverse((until, place, generation, head)) = *self.0.peek()?;
        if until > now {
            return None;
        }
        self.0.pop();
        Some((place, generation, head))
    }

    fn next(&self) -> Option<u64> {
        self.0.peek().map(|Reverse((until, ..))| *until)
    }
}

impl Shared {
    /// There is work in this turn: read the clock.
    #[inline(always)]
    pub fn work_found(&mut self) {
        self.now = self.clock.now();
        if self.began == 0 {
            self.began = self.now;
        }
    }

    /// Tell the control thread of an I/O error: the first of a queue, and then whenever their number doubles.
    #[cold]
    pub fn report_error(
        &mut self,
        parts: &QueueParts,
        before: u64,
        operation: Operation,
        offset: u64,
        len: u64,
        result: i32,
    ) {
        if !(before + 1).is_power_of_two() {
            return;
        }
        let why = if result == 0 {
            "the file ends before the volume does".to_string()
        } else {
            std::io::Error::from_raw_os_error(-result).to_string()
        };
        let message = format!(
            "{operation:?} of {len} bytes at {offset} failed: {why} ({} errors on queue {} so far)",
            before + 1,
            parts.key.vring
        );
        self.outbox.send(Reply::Trouble { key: parts.key, message });
    }
}

/// One reactor: the thread's whole state.
pub struct Reactor {
    shared: Shared,
    inbox: Receiver<Command>,
    wake: OwnedFd,
    places: Vec<Option<Box<Queue>>>,
    generations: Vec<u16>,
    /// Places in use.
    active: Vec<u16>,
    guests: Guests,
    patience: Patience,
    keepers: Keepers,
    /// Every queue here is of an image.
    only_images: bool,
    running: bool,
}

impl Reactor {
    pub fn new(shared: Shared, inbox: Receiver<Command>, wake: OwnedFd, idle_ticks: u64) -> Self {
        Self {
            patience: Patience::new(idle_ticks, |ns| shared.clock.ticks(ns)),
            only_images: false,
            shared,
            inbox,
            wake,
            places: Vec::new(),
            generations: Vec::new(),
            active: Vec::new(),
            guests: Guests::default(),
            keepers: Keepers::default(),
            running: true,
        }
    }

    /// Run until told to stop, and until every queue was drained and given back.
    pub fn run(&mut self) {
        self.shared.uring.watch(self.wake.as_raw_fd(), Tag::Mail);
        self.shared.stats.set_asleep(false);
        let mut accounted = self.shared.clock.now();
        let mut last_work = accounted;
        let mut idle_turns = 0u32;
        let mut awaited = Awaited::Work;
        while self.running || !self.active.is_empty() || !self.keepers.are_at_rest() {
            self.shared.began = 0;
            let had = self.shared.at_librbd;
            if self.turn() {
                // From the first work found to here is busy, before it idle.
                let ended = self.shared.clock.now();
                let began = self.shared.began.max(accounted);
                self.account(began - accounted, ended - began, u64::from(idle_turns) + 1);
                self.publish_uring_counts();
                (accounted, last_work, idle_turns) = (ended, ended, 0);
                self.patience.found(awaited);
                awaited = self.awaited(had);
                continue;
            }
            idle_turns += 1;
            if idle_turns == TURNS_BETWEEN_LOOKS {
                // An idle turn is so short that reading the clock in each would double it.
                let now = self.shared.clock.now();
                self.account(now - accounted, 0, u64::from(idle_turns));
                if self.patience.looked(awaited, now - accounted, now) {
                    // Whoever else wants this core is on the way to librbd's answer, or is to give it.
                    std::thread::yield_now();
                }
                (accounted, idle_turns) = (now, 0);
                if now - last_work > self.patience.limit(awaited, now) && self.running {
                    self.patience.missed(awaited);
                    awaited = Awaited::Work;
                    self.sleep();
                    accounted = self.shared.clock.now();
                    last_work = accounted;
                }
            }
        }
        self.shared.reader.leave(&self.shared.epochs);
        // Last of all, as whoever watches takes a reactor that polls and does not turn for one that is stuck.
        self.shared.stats.set_removed();
    }

    /// What it waits for after a turn before which librbd `had` so many requests.
    fn awaited(&self, had: u32) -> Awaited {
        match self.shared.at_librbd {
            of @ 1.. if self.only_images => Awaited::Answers { of, drivers: of < had },
            _ => Awaited::Work,
        }
    }

    #[inline(always)]
    fn account(&self, idle: u64, busy: u64, turns: u64) {
        let (clock, stats) = (self.shared.clock, &self.shared.stats);
        stats.add(ReactorCounter::IdleNs, clock.ns(idle));
        stats.add(ReactorCounter::BusyNs, clock.ns(busy));
        stats.add(ReactorCounter::Turns, turns);
    }

    /// One turn; true if there was anything to do.
    #[inline]
    fn turn(&mut self) -> bool {
        // Before any map is looked into.
        self.shared.reader.begin(&self.shared.epochs);
        let mut work = self.mail();
        work |= self.reap();
        if self.shared.returned.pending() {
            work = true;
            self.reap_returned();
        }
        let mut stopping = false;
        let mut guest = self.guests.rotate();
        for _ in 0..self.guests.numbers() {
            work |= self.serve(guest, &mut stopping);
            guest = if guest + 1 < self.guests.numbers() { guest + 1 } else { 0 };
        }
        work |= self.resume_delayed();
        work |= self.keepers.turn(&mut self.shared);
        self.flush_dirty();
        self.shared.uring.turn();
        if stopping {
            self.release_drained();
        }
        work
    }

    /// Serve the queues of one guest until they have nothing more or its budget is spent. A queue that is not reached has its
    /// turn first the next time.
    #[inline(always)]
    fn serve(&mut self, guest: usize, stopping: &mut bool) -> bool {
        let mut work = false;
        self.shared.budget = Budget::new(&self.shared.quota);
        for _ in 0..self.guests.queues(guest) {
            let place = self.guests.next_queue(guest);
            if let Some(queue) = &mut self.places[place] {
                each!(&mut **queue, queue => {
                    work |= queue.serve(&mut self.shared);
                    *stopping |= queue.is_stopping();
                });
            }
            if self.shared.budget.is_spent() {
                break;
            }
        }
        work
    }

    /// Requests that a faulty drive held back go on.
    #[inline(always)]
    fn resume_delayed(&mut self) -> bool {
        !self.shared.delayed.0.is_empty() && self.resume_due()
    }

    #[cold]
    fn resume_due(&mut self) -> bool {
        let mut work = false;
        self.shared.now = self.shared.clock.now();
        while let Some((place, generation, head)) = self.shared.delayed.due(self.shared.now) {
            work = true;
            self.resume(place, generation, head);
        }
        work
    }

    fn resume(&mut self, place: u16, generation: u16, head: u16) {
        if let Some(queue) = &mut self.places[usize::from(place)] {
            each!(&mut **queue, queue => {
                if queue.generation == generation {
                    queue.resume(head, &mut self.shared);
                }
            });
        }
    }

    #[inline(always)]
    fn reap(&mut self) -> bool {
        let mut reaped = 0;
        while reaped < REAP {
            let Some(completion) = self.shared.uring.reap() else { break };
            if reaped == 0 {
                self.shared.work_found();
            }
            reaped += 1;
            self.dispatch(completion);
        }
        if reaped > 0 {
            self.flush_dirty();
            self.shared.stats.add(ReactorCounter::Reaped, reaped as u64);
        }
        reaped > 0
    }

    /// What librbd and keepers have done.
    fn reap_returned(&mut self) {
        self.shared.work_found();
        let mut reaped = 0;
        let mut of_images = 0;
        let returned = self.shared.returned.clone();
        returned.take(|tag, result| {
            reaped += 1;
            if let Tag::Request { place, generation, head } = Tag::decode(tag) {
                if let Some(queue) = &mut self.places[usize::from(place)] {
                    let of_image = queue.is_of_image();
                    of_images += u32::from(of_image);
                    each!(&mut **queue, queue => {
                        if queue.generation == generation {
                            match of_image {
                                true => queue.returned(head, result, &mut self.shared),
                                false => queue.answered(head, result, &mut self.shared),
                            }
                        }
                    });
                }
            }
        });
        self.shared.at_librbd -= of_images;
        self.flush_dirty();
        self.shared.stats.add(ReactorCounter::Reaped, reaped);
    }

    #[inline(always)]
    fn dispatch(&mut self, completion: Completion) {
        match completion.tag {
            Tag::Request { place, generation, head } => {
                if let Some(queue) = &mut self.places[usize::from(place)] {
                    each!(&mut **queue, queue => {
                        if queue.generation == generation {
                            queue.completed(head, completion.result, &mut self.shared);
                        }
                    });
                }
            }
            Tag::Kick { place, generation } => {
                if let Some(queue) = &mut self.places[usize::from(place)] {
                    let (now, parts) = each!(&mut **queue, queue => (queue.generation, &queue.parts));
                    if now == generation {
                        parts.stats.add(QueueCounter::Kicks, 1);
                        if !completion.more && completion.result != -libc::ECANCELED {
                            if let Some(kick) = &parts.kick {
                                self.shared.uring.watch(kick.as_raw_fd(), completion.tag);
                            }
                        }
                    }
                }
            }
            Tag::Mail => {
                if !completion.more {
                    self.shared.uring.watch(self.wake.as_raw_fd(), Tag::Mail);
                }
            }
            Tag::Store { place, io } => {
                if let Some(keeping) = self.keepers.at(place) {
                    keeping.completed(io, completion.result, &mut self.shared);
                }
            }
            Tag::StoreBell { place } => {
                if let Some(keeping) = self.keepers.at(place) {
                    keeping.rung(completion.more, &mut self.shared);
                }
            }
            Tag::Ignore => {}
        }
    }

    #[inline(always)]
    fn flush_dirty(&mut self) {
        while let Some(place) = self.shared.dirty.pop() {
            if let Some(queue) = &mut self.places[usize::from(place)] {
                each!(&mut **queue, queue => queue.flush(&mut self.shared));
            }
        }
    }

    #[inline(always)]
    fn mail(&mut self) -> bool {
        let mut work = false;
        while let Some(command) = self.inbox.receive() {
            self.shared.work_found();
            work = true;
            self.shared.stats.add(ReactorCounter::Messages, 1);
            self.obey(command);
        }
        work
    }

    #[cold]
    fn obey(&mut self, command: Command) {
        match command {
            Command::Start(queue) => self.start(queue),
            Command::Stop { key, leave } => {
                if let Some(place) = self.place_of(key) {
                    if let Some(queue) = &mut self.places[place] {
                        each!(&mut **queue, queue => match leave {
                            true => queue.leave(&mut self.shared),
                            false => queue.stop(),
                        });
                    }
                }
            }
            Command::SetCall(key, call) => {
                // A call may be queued with the old descriptor's number: submit it before that is closed.
                self.shared.uring.submit_all();
                if let Some(place) = self.place_of(key) {
                    if let Some(queue) = &mut self.places[place] {
                        each!(&mut **queue, queue => {
                            queue.parts.call = call;
                            // What completed between the old descriptor and the new one may have gone unheard.
                            queue.call(&mut self.shared);
                        });
                    }
                }
            }
            Command::SetKick(key, kick) => {
                if let Some(place) = self.place_of(key) {
                    if let Some(queue) = &mut self.places[place] {
                        each!(&mut **queue, queue => {
                            let tag = Tag::Kick { place: queue.place, generation: queue.generation };
                            self.shared.uring.cancel(tag);
                            if let Some(kick) = &kick {
                                self.shared.uring.watch(kick.as_raw_fd(), tag);
                            }
                            // The cancelled poll refers to the descriptor's file, not to its number; it may be closed now.
                            queue.parts.kick = kick;
                        });
                    }
                }
            }
            Command::Keep(keeping) => self.keepers.add(keeping, &mut self.shared),
            Command::StopKeeping(id) => {
                if let Some(keeping) = self.keepers.of(id) {
                    keeping.stop();
                }
            }
            Command::Store { id, command, answered } => {
                // Where there is none, whoever waits hears that the other end is gone.
                if let Some(keeping) = self.keepers.of(id) {
                    keeping.command(command, answered);
                }
            }
            Command::Pass(outgrown) => self.shared.outbox.send(Reply::Passed(outgrown)),
            Command::Shutdown => {
                self.running = false;
                self.keepers.stop();
            }
        }
    }

    fn start(&mut self, mut queue: Box<Queue>) {
        let place = self.places.iter().position(Option::is_none).unwrap_or_else(|| {
            self.places.push(None);
            self.generations.push(0);
            self.places.len() - 1
        });
        self.generations[place] = self.generations[place].wrapping_add(1);
        let (place_number, generation) = (place as u16, self.generations[place]);
        let guest = self.guests.add(queue.key().session, place_number);
        self.shared.held.resize(self.guests.numbers(), Held::default());
        each!(&mut *queue, queue => {
            queue.begin_at(place_number, generation, guest);
            if let Some(kick) = &queue.parts.kick {
                let tag = Tag::Kick { place: place_number, generation };
                self.shared.uring.watch(kick.as_raw_fd(), tag);
            }
            // A driver that waits for something an earlier process completed must look again.
            queue.call(&mut self.shared);
        });
        self.places[place] = Some(queue);
        self.active.push(place as u16);
        self.count_queues();
    }

    #[cold]
    fn release_drained(&mut self) {
        let mut at = 0;
        while at < self.active.len() {
            let place = usize::from(self.active[at]);
            let Some(queue) = self.places[place].as_mut() else {
                at += 1;
                continue;
            };
            let key = queue.key();
            let (failure, drained) = each!(&mut **queue, queue => (queue.take_failure(), queue.drained()));
            if let Some(message) = failure {
                self.shared.outbox.send(Reply::Failed { key, message });
            }
            if drained {
                self.give_back(at, place);
            } else {
                at += 1;
            }
        }
    }

    #[cold]
    fn give_back(&mut self, at: usize, place: usize) {
        let Some(mut queue) = self.places[place].take() else { return };
        self.active.swap_remove(at);
        each!(&mut *queue, queue => {
            self.guests.remove(queue.guest, queue.place);
            if queue.parts.kick.is_some() {
                self.shared.uring.cancel(Tag::Kick { place: queue.place, generation: queue.generation });
            }
        });
        // A last call may still be queued with the descriptor's number: submit it before that is closed.
        self.shared.uring.submit_all();
        self.count_queues();
        self.shared.outbox.send(Reply::Stopped(queue));
    }

    fn count_queues(&mut self) {
        self.only_images = self.places.iter().flatten().all(|queue| queue.is_of_image());
        self.shared.quota = Quota::share(self.guests.present());
        self.shared.stats.set(ReactorCounter::Queues, self.active.len() as u64);
    }

    fn place_of(&self, key: crate::QueueKey) -> Option<usize> {
        self.active
            .iter()
            .map(|place| usize::from(*place))
            .find(|place| self.places[*place].as_ref().is_some_and(|queue| queue.key() == key))
    }

    /// Arm every kick, look once more, and sleep until something happens.
    #[cold]
    fn sleep(&mut self) {
        let queues = self.active.iter().map(|place| usize::from(*place));
        let mut waiting = false;
        for place in queues.clone() {
            if let Some(queue) = &mut self.places[place] {
                each!(&mut **queue, queue => queue.set_kicks(Notify::Armed));
            }
        }
        for place in queues.clone() {
            if let Some(queue) = &mut self.places[place] {
                // A ring whose driver never kicks must be polled.
                waiting |= each!(&mut **queue, queue => {
                    queue.has_work() || queue.parts.kick.is_none() && !queue.is_stopping()
                });
            }
        }
        waiting |= !self.keepers.may_sleep();
        if !waiting && self.shared.returned.may_sleep() {
            let before = self.shared.clock.now();
            let delayed =
                self.shared.delayed.next().map(|until| self.shared.clock.ns(until.saturating_sub(before)));
            let timeout = delayed.into_iter().chain(self.keepers.patience()).min();
            self.shared.reader.leave(&self.shared.epochs);
            self.publish_uring_counts();
            self.shared.stats.set_asleep(true);
            self.shared.uring.sleep(timeout);
            self.shared.returned.awake();
            self.shared.stats.set_asleep(false);
            let asleep = self.shared.clock.ns(self.shared.clock.now() - before);
            self.shared.stats.add(ReactorCounter::AsleepNs, asleep);
            self.shared.stats.add(ReactorCounter::WakeUps, 1);
        }
        self.keepers.awake();
        for place in queues {
            if let Some(queue) = &mut self.places[place] {
                each!(&mut **queue, queue => queue.set_kicks(Notify::Suppressed));
            }
        }
    }

    fn publish_uring_counts(&self) {
        self.shared.stats.set(ReactorCounter::Enters, self.shared.uring.enters);
        self.shared.stats.set(ReactorCounter::Submitted, self.shared.uring.submitted);
    }
}

//! The keeper: the one that changes what is where. It does no I/O and reads no clock; see the crate's documentation.
//!
//! | file | concern |
//! |---|---|
//! | `mod.rs` | what it has, and the order of a turn |
//! | `requests.rs` | what guests ask: which step comes next, and what it changes |
//! | `operations.rs` | a step from its first I/O to its answer |
//! | `sealing.rs` | checksums and encryption of what comes and goes |
//! | `failing.rs` | writes in place that the drive refused |
//! | `exclusive.rs` | parts of encrypted blocks |
//! | `apply.rs` | changes that count now: slots, maps, places to be used again |
//! | `flushing.rs` | what is made durable, and how the journal says so |
//! | `checkpoint.rs` | the table, the catalog and the superblock |
//! | `commands.rs` | what an operator asks: volumes, snapshots, clones |
//! | `snapshots.rs` | writes that wait for a snapshot |
//! | `deletion.rs`, `weigh.rs` | snapshots on their way out, and what they would free |
//! | `opening.rs` | the map of a volume that is opened |
//! | `diff.rs` | what differs between two points of a volume |
//! | `reap.rs` | layers that nobody names any more |
//! | `flatten.rs` | copying what a clone has of others |
//! | `scrub.rs`, `inventory.rs` | reading all that is in use, to find what has rotted |

mod apply;
mod checkpoint;
mod commands;
mod deletion;
mod diff;
mod exclusive;
mod failing;
mod figures;
mod flatten;
mod flushing;
mod inventory;
mod opening;
mod operations;
mod reap;
mod requests;
mod scrub;
mod sealing;
mod snapshots;
mod weigh;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

pub use commands::{Answer, Command};
pub use deletion::DeletionInfo;
pub use diff::Ranges;
pub use figures::{Figures, SnapshotInfo, VolumeInfo};
pub use scrub::{ScrubEnd, ScrubInfo};

use crate::allocator::Allocator;
use crate::catalog::{Catalog, Change};
use crate::cipher::Cipher;
use crate::epochs::{Epochs, Reader};
use crate::error::StoreError;
use crate::format::{Entry, SlotSums, Superblock};
use crate::geometry::{Extents, Layout};
use crate::io::{errno, Done, Io, Request};
use crate::journal::Journal;
use crate::map::{Map, Node, NodeNames, Places};
use crate::recovery::Recovered;
use crate::slots::Slots;
use crate::sums::Sums;
use apply::Retired;
use checkpoint::Checkpoint;
use commands::Running;
use deletion::Deletions;
use exclusive::Exclusive;
use flatten::Flatten;
use flushing::{Flushing, Waiter};
use inventory::Mending;
use operations::Operation;
use reap::Reap;
use scrub::Scrub;

/// Nanoseconds that a first write waits for room before it is answered with ENOSPC.
pub const FULL_WAIT_NS: u64 = 30_000_000_000;

/// Slots, or words of a map, that a turn looks at while it goes through all of them: some 10 us. Other guests of the reactor wait
/// for that long.
const LOOKS: u32 = 1024;

/// What a carrier looks at without asking.
#[derive(Default)]
pub struct Shared {
    /// Some change of a map is not known to be durable: a flush has to go through the keeper.
    pub unmarked: AtomicBool,
}

/// What is to count all at once when its record is written.
#[derive(Default)]
pub(crate) struct Commit {
    slots: Vec<(u32, Entry)>,
    sums: Vec<SlotSums>,
    maps: Vec<MapChange>,
    catalog: Vec<Change>,
    /// It counts only when it is durable.
    durable: bool,
    then: Then,
}

#[derive(Clone, Copy)]
struct MapChange {
    volume: u32,
    vextent: u32,
    edit: Edit,
}

#[derive(Clone, Copy)]
enum Edit {
    /// These granules are in this slot, and the live layer's.
    Put {
        slot: u32,
        mask: u16,
    },
    Remove {
        mask: u16,
    },
    /// The slot belongs to this layer now.
    Retag {
        slot: u32,
        layer: u32,
    },
}

#[derive(Default)]
enum Then {
    #[default]
    Nothing,
    Operation(u32),
    Command,
    Reap,
    Flatten,
    Marked(Vec<Waiter>),
}

/// A volume that is served.
struct Open {
    map: Arc<Map>,
    names: NodeNames,
    /// Of a volume that has a key.
    cipher: Option<Arc<dyn Cipher>>,
    /// The live layer's tag.
    tag: u16,
    /// Who opened it, and how often. Nobody yet while its map is made.
    users: u32,
    /// Tombstones of the live layer: the slot, and how many extents and which granules it speaks of.
    tombs: BTreeMap<u32, (u32, u32, u16)>,
    /// Steps under way.
    busy: u32,
    /// Writes wait here while a snapshot is made.
    parked: Option<Vec<Request>>,
    /// Reactors write nothing in place.
    exclusive: Option<Exclusive>,
}

/// Locks of a job that is no operation.
const JOB: u32 = u32::MAX;

/// See the module.
pub struct Keeper {
    superblock: Superblock,
    catalog: Catalog,
    slots: Slots,
    sums: Arc<Sums>,
    allocator: Allocator,
    journal: Journal<Commit>,
    epochs: Arc<Epochs>,
    /// Holds the steps under way.
    reader: Reader,
    places: Arc<Places>,
    shared: Arc<Shared>,
    open: BTreeMap<u32, Open>,
    operations: Vec<Option<Operation>>,
    free_operations: Vec<u32>,
    /// Extents that a step or a job is changing, by volume.
    locks: HashMap<(u32, u32), u32>,
    /// Requests that wait for whoever has a lock.
    blocked: HashMap<u32, Vec<Request>>,
    requests: VecDeque<Request>,
    /// Requests that wait for the journal to have room.
    throttled: VecDeque<Request>,
    /// Requests that wait for a free place, and until when.
    starved: VecDeque<(Request, u64)>,
    /// Until when those wait that look once more: what was freed may go to others.
    until: HashMap<u64, u64>,
    flushing: Flushing,
    /// How many in-place writes of volumes with integrity are under way, by the journal's block that says what they write.
    in_place: BTreeMap<u64, u32>,
    /// How many began since a flush.
    unsettled: u32,
    /// Slots that gave up granules and have others yet, with the journal's block that says so.
    given_up: HashMap<u32, u64>,
    /// Places of blocks that were told of as bad.
    bad: HashSet<u64>,
    /// Checksums are to be in a checkpoint before the journal is written.
    checkpoint_first: bool,
    checkpoint: Option<Checkpoint>,
    /// When a checkpoint that failed is tried again.
    checkpoint_after: u64,
    /// The last one failed, and an event says so.
    checkpoint_troubled: bool,
    highest_generation: u64,
    retired_slots: VecDeque<Retired<u32>>,
    retired_nodes: VecDeque<Retired<(u32, Node)>>,
    commands: VecDeque<(u64, Command)>,
    running: Option<(u64, Running)>,
    reap: Option<Reap>,
    deletions: Deletions,
    /// Layers changed since somebody looked for some that can go.
    maybe_reapable: bool,
    /// Jobs rest.
    paused: bool,
    /// The superblock on the drive names this opener.
    possessed: bool,
    /// Behind the record of the last command that changed the catalog.
    named: u64,
    flatten: Option<Flatten>,
    scrub: Option<Scrub>,
    /// The last one that has ended.
    scrubbed: Option<ScrubInfo>,
    mending: Mending,
    /// How many a turn has, and the present one has left.
    looks_a_turn: u32,
    looks: u32,
    out: VecDeque<Io>,
    done: VecDeque<Done>,
    answers: VecDeque<(u64, Result<Answer, StoreError>)>,
    events: VecDeque<String>,
    now: u64,
    /// The journal could not be written, with this errno.
    failed: Option<i32>,
    closing: bool,
}

impl Keeper {
    /// Of a store as it was read. Nothing may be asked of it but to open volumes, until [`Command::Possess`] was answered: it
    /// is another's until then.
    ///
    /// # Errors
    /// Too many stores are open.
    pub fn new(recovered: Recovered, boot: [u8; 16], epochs: Arc<Epochs>) -> Result<Self, StoreError> {
        let Recovered {
            mut superblock,
            slots,
            catalog,
            sums,
            torn,
            unsettled,
            next,
            highest_generation,
            dropped,
        } = recovered;
        let reader = Reader::of_keeper(&epochs)
            .ok_or_else(|| StoreError::Impossible("a process has 64 of them open at most".into()))?;
        superblock.take_possession(next, boot);
        let layout = &superblock.layout;
        let allocator = Allocator::new(layout, |slot| slots.get(slot).kind != crate::format::Kind::Free);
        let journal = Journal::new(
            superblock.uuid,
            layout.journal_blocks,
            superblock.incarnation,
            next,
            superblock.replay_from,
            superblock.covered,
        );
        let places = Arc::new(Places::default());
        places.learn(&layout.zones);
        let mut events = VecDeque::new();
        if dropped > 0 {
            events.push_back(format!(
                "power was lost: {dropped} blocks of the journal that no flush had made durable were dropped"
            ));
        }
        if !torn.is_empty() {
            let places: Vec<String> = torn.iter().take(20).map(u64::to_string).collect();
            events.push_back(format!(
                "{} blocks that were being written when it ended hold neither what they held before nor what they were to hold, and count as they are; bytes of the drive: {}",
                torn.len(),
                places.join(", ")
            ));
        }
        let shared = Arc::<Shared>::default();
        Ok(Self {
            superblock,
            catalog,
            slots,
            sums: Arc::new(sums),
            allocator,
            journal,
            epochs,
            reader,
            places,
            shared,
            open: BTreeMap::new(),
            operations: Vec::new(),
            free_operations: Vec::new(),
            locks: HashMap::new(),
            blocked: HashMap::new(),
            requests: VecDeque::new(),
            throttled: VecDeque::new(),
            starved: VecDeque::new(),
            until: HashMap::new(),
            flushing: Flushing::default(),
            in_place: BTreeMap::new(),
            unsettled: 0,
            given_up: HashMap::new(),
            bad: HashSet::new(),
            checkpoint_first: unsettled,
            checkpoint: None,
            checkpoint_after: 0,
            checkpoint_troubled: false,
            highest_generation,
            retired_slots: VecDeque::new(),
            retired_nodes: VecDeque::new(),
            commands: VecDeque::new(),
            running: None,
            reap: None,
            deletions: Deletions::default(),
            maybe_reapable: true,
            paused: false,
            possessed: false,
            named: 0,
            flatten: None,
            scrub: None,
            scrubbed: None,
            mending: Mending::default(),
            looks_a_turn: LOOKS,
            looks: LOOKS,
            out: VecDeque::new(),
            done: VecDeque::new(),
            answers: VecDeque::new(),
            events,
            now: 0,
            failed: None,
            closing: false,
        })
    }

    /// Have a turn look at `looks` slots at most, in place of a number that suits a reactor.
    pub fn set_looks(&mut self, looks: u32) {
        self.looks_a_turn = looks;
    }

    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Take a guest's request, which its reactor does not hold any more (see [`Reader::hold`]). The answer comes out of
    /// [`next_done`](Self::next_done).
    pub fn submit(&mut self, request: Request) {
        self.requests.push_back(request);
    }

    /// Take a command. The answer comes out of [`next_answer`](Self::next_answer) with its number.
    pub fn command(&mut self, number: u64, command: Command) {
        self.commands.push_back((number, command));
    }

    /// Go on. `now`: nanoseconds of any clock that does not go back. True if there was something to do.
    pub fn turn(&mut self, now: u64) -> bool {
        self.now = now;
        self.looks = self.looks_a_turn;
        let before = (self.out.len(), self.done.len(), self.answers.len());
        self.recycle();
        self.reader.begin(&self.epochs);
        while let Some(request) = self.requests.pop_front() {
            self.plan(request);
        }
        self.until.clear();
        self.run_exclusive();
        self.run_commands();
        self.run_reap();
        let searches = self.run_flatten() | self.run_scrub();
        self.start_flush();
        self.run_checkpoint();
        self.write_journal();
        self.reader.leave(&self.epochs);
        // What is looked through goes on in the next turn, without an event.
        let scans = searches
            || matches!(
                self.running,
                Some((_, Running::Opening(_) | Running::Comparing(_) | Running::Weighing(_)))
            );
        scans || before != (self.out.len(), self.done.len(), self.answers.len())
    }

    /// The next thing to be done on the drive.
    pub fn next_io(&mut self) -> Option<Io> {
        self.out.pop_front()
    }

    pub fn next_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    pub fn next_answer(&mut self) -> Option<(u64, Result<Answer, StoreError>)> {
        self.answers.pop_front()
    }

    /// Something that a person should read.
    pub fn next_event(&mut self) -> Option<String> {
        self.events.pop_front()
    }

    /// Nothing is under way, and nothing will be unless somebody asks.
    pub fn is_idle(&self) -> bool {
        self.operations.len() == self.free_operations.len()
            && self.requests.is_empty()
            && self.throttled.is_empty()
            && self.starved.is_empty()
            && self.commands.is_empty()
            && self.running.is_none()
            && self.reap.is_none()
            && self.flatten.is_none()
            && self.scrub.is_none()
            && !self.is_waiting_for_others()
            && self.checkpoint.is_none()
            && self.flushing.is_idle()
            && self.journal.is_idle()
            && self.out.is_empty()
    }

    fn has_jobs(&self) -> bool {
        self.reap.is_some() || self.flatten.is_some() || self.scrub.is_some() || self.maybe_reapable
    }

    fn may_work(&self) -> bool {
        self.possessed && !self.paused && !self.closing && self.failed.is_none()
    }

    /// Let jobs rest, or go on. What guests and operators ask is done either way.
    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Nothing is under way. Jobs that are paused may have more to do.
    pub fn is_quiet(&self) -> bool {
        self.operations.len() == self.free_operations.len()
            && self.requests.is_empty()
            && !self.is_waiting_for_others()
            && self.running.is_none()
            && self.checkpoint.is_none()
            && self.flushing.is_idle()
            && self.journal.is_idle()
            && self.out.is_empty()
    }

    /// [`turn`](Self::turn) may find something to do.
    pub fn wants_turn(&self) -> bool {
        !self.requests.is_empty()
            || !self.out.is_empty()
            || !self.done.is_empty()
            || !self.answers.is_empty()
            || !self.commands.is_empty()
            || self.journal.pending() > 0
            || self.flushing.is_due()
            || self.needs_turns()
    }

    /// Waits for time to pass or for reactors to go on, so that somebody has to call [`turn`](Self::turn) again without an event.
    pub fn needs_turns(&self) -> bool {
        !self.starved.is_empty()
            || !self.throttled.is_empty()
            || self.has_to_recycle()
            || self.running.is_some()
            || self.has_exclusive()
            || self.may_work() && self.has_jobs()
            || self.checkpoint.is_some()
            || self.is_checkpoint_due()
    }

    fn layout(&self) -> &Layout {
        &self.superblock.layout
    }

    fn extents(&self) -> Extents {
        self.superblock.layout.extents
    }

    /// An I/O is done: `result` is an errno where it failed.
    pub fn completed(&mut self, io: Io, result: Result<(), i32>) {
        use crate::io::Purpose;
        match io.purpose {
            Purpose::Operation(id) => self.advance(id, io, result),
            Purpose::Journal(seq) => match result {
                Ok(()) => {
                    let commits = self.journal.written(seq);
                    // Before a map shows anything of it: whoever finds it there must know that it is not durable yet.
                    self.update_unmarked();
                    for (seq, commit) in commits {
                        self.apply(seq, commit);
                    }
                }
                Err(errno) => self.fail(errno),
            },
            Purpose::Flush => self.flushed(result),
            Purpose::PossessionFlush => self.write_possession(result),
            Purpose::Possession => self.possession_written(result),
            Purpose::Scrub => self.scrub_read(io, result),
            Purpose::Page { .. }
            | Purpose::SumsPage
            | Purpose::Catalog
            | Purpose::CheckpointFlush
            | Purpose::Superblock => {
                self.checkpointed(io.purpose, io.offset, result);
            }
        }
    }

    fn update_unmarked(&self) {
        self.shared.unmarked.store(self.journal.marked() < self.journal.spoken(), Ordering::Release);
    }

    /// The journal cannot be written. What it was to say does not count here; after a restart it may, if it got to the drive all
    /// the same. So nothing is written in place any more: it might go to where the journal then says that nothing is.
    fn fail(&mut self, errno: i32) {
        if self.failed.replace(errno).is_none() {
            let error = std::io::Error::from_raw_os_error(errno);
            self.events.push_back(format!(
                "the journal could not be written: {error}; nothing changes in maps any more"
            ));
        }
        self.open.values().for_each(|open| open.map.hold());
        for commit in self.journal.fail() {
            self.abandon(commit, errno);
        }
        if let Some((number, Running::Growing { .. } | Running::Closing)) = self.running {
            // They wait for a checkpoint, and there will be none.
            self.running = None;
            let error = StoreError::Failed(std::io::Error::from_raw_os_error(errno));
            self.answers.push_back((number, Err(error)));
        }
        for (request, _) in std::mem::take(&mut self.starved) {
            self.done.push_back(Done { token: request.token, result: Err(errno) });
        }
        for request in std::mem::take(&mut self.throttled) {
            self.done.push_back(Done { token: request.token, result: Err(errno) });
        }
    }

    fn abandon(&mut self, commit: Commit, errno: i32) {
        match commit.then {
            Then::Nothing => {}
            Then::Operation(id) => self.finish(id, Err(errno)),
            Then::Command => self.command_failed(errno),
            Then::Reap => self.reap_failed(),
            Then::Flatten => self.flatten_failed(errno),
            Then::Marked(waiters) => {
                waiters.into_iter().for_each(|waiter| self.answer_waiter(waiter, Err(errno)))
            }
        }
    }

    fn refuse(&mut self, request: &Request, errno: i32) {
        self.done.push_back(Done { token: request.token, result: Err(errno) });
    }

    fn gone(&mut self, request: &Request) {
        self.refuse(request, errno::ENODEV);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.reader.give_back(&self.epochs);
    }
}

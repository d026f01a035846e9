//! A store in use: a keeper, reactors with requests, an operator, and a drive whose I/Os end in any order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::Arc;

use ringstone_store::{
    begin, errno, format, recover, Action, Answer, Data, Epochs, Io, Keeper, Layout, Map, Reader, Request,
    RequestKind, Run, Seal, Shared, StoreError, Sums,
};

use crate::drive::{Bench, Crash, Drive, Flight, Owner, What};
use crate::guest;
use crate::reference::{sectors, Answered, Model, Moment, Wish, FILLER};
use crate::rng::Rng;

pub const REACTORS: usize = 3;

/// Which I/Os fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failing {
    Nothing,
    Anything,
    Data,
    Journal,
    Superblock,
    Flush,
    /// Pages and the catalog.
    Table,
}

#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub size: u64,
    pub extent: u64,
    pub journal_blocks: u32,
    /// Extents that are left when it begins.
    pub room: Option<u64>,
    /// Whole extents are written and discarded all the time.
    pub churn: bool,
    pub failing: Failing,
    /// Once in so many I/Os.
    pub fails_once_in: u64,
    /// Volumes have checksums, or are encrypted, or both.
    pub sealed: bool,
    /// Slots that the keeper looks at in a turn.
    pub looks: u32,
}

pub struct Opened {
    pub id: u32,
    pub map: Arc<Map>,
    pub seal: Seal,
    pub sums: Option<Arc<Sums>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Zero { unmap: bool },
    Flush,
}

/// A guest's request.
pub struct Asked {
    pub volume: String,
    pub kind: Kind,
    pub offset: u64,
    pub len: u64,
    pub done: u64,
    pub value: u64,
    pub durable: bool,
    pub issued: Moment,
    pub reactor: usize,
    /// While its own I/O is under way.
    pub held: Option<u8>,
    /// What the keeper was given: the byte from which on its data counts.
    pub submitted: u64,
}

pub struct World {
    pub setup: Setup,
    pub rng: Rng,
    pub drive: Drive,
    pub keeper: Keeper,
    pub epochs: Arc<Epochs>,
    shared: Arc<Shared>,
    pub readers: Vec<Reader>,
    pub model: Model,
    pub open: BTreeMap<String, Opened>,
    pub requests: BTreeMap<u64, Asked>,
    /// The command under way: its number, when it was asked, and whether it failed in a way that leaves open what became of it.
    pub wish: Option<(u64, Wish, Moment, bool)>,
    pub flatten: Option<u64>,
    /// Commands that begin or end a scrub.
    pub scrubs: BTreeSet<u64>,
    pub moment: Moment,
    pub clock: u64,
    pub next: u64,
    pub boot: [u8; 16],
    /// I/Os begun and ended.
    pub events: u64,
    pub fails: bool,
}

impl World {
    pub fn new(setup: Setup) -> Self {
        let mut drive = Drive::new(setup.size);
        let mut layout = Layout::new(setup.size, setup.extent).expect("a layout");
        layout.journal_blocks = setup.journal_blocks;
        let boot = [1; 16];
        let epochs = Arc::new(Epochs::default());
        let keeper = {
            let bench = Bench::new(&mut drive, u64::MAX);
            format(&bench, &layout, *b"crash model uuid").expect("formatted");
            begin(&bench, boot, epochs.clone()).expect("begun")
        };
        let mut world = Self {
            rng: Rng::new(setup.seed),
            drive,
            shared: keeper.shared(),
            keeper,
            epochs,
            readers: (0..REACTORS).map(Reader::new).collect(),
            model: Model::default(),
            open: BTreeMap::new(),
            requests: BTreeMap::new(),
            wish: None,
            flatten: None,
            scrubs: BTreeSet::new(),
            moment: 1,
            clock: 1,
            next: 1,
            boot,
            events: 0,
            fails: false,
            setup,
        };
        if let Some(room) = world.setup.room {
            world.fill(room);
        }
        world.fails = world.setup.failing != Failing::Nothing;
        world.keeper.set_looks(world.setup.looks);
        world
    }

    /// Have one volume take all but `room` extents.
    fn fill(&mut self, room: u64) {
        let layout = Layout::new(self.setup.size, self.setup.extent).expect("a layout");
        let size = (layout.capacity() - room) * self.setup.extent;
        let name = FILLER.to_string();
        self.ask(Wish::Create { name: name.clone(), size });
        self.drain();
        self.ask(Wish::Open { name: name.clone() });
        self.drain();
        self.request(0, &name, Kind::Write, 0, size, false);
        self.drain();
        self.request(0, &name, Kind::Flush, 0, 0, false);
        self.drain();
        self.ask(Wish::Close { name });
        self.drain();
    }

    pub fn tick(&mut self) -> Moment {
        self.moment += 1;
        self.moment
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if std::env::var_os("RINGSTONE_STORE_TRACE").is_some() {
            println!("{:>6} {}", self.moment, text());
        }
    }

    // Guests.

    /// Begin a request.
    pub fn request(
        &mut self,
        reactor: usize,
        volume: &str,
        kind: Kind,
        offset: u64,
        len: u64,
        durable: bool,
    ) {
        let token = self.next;
        self.next += 1;
        let issued = self.tick();
        let value = if kind == Kind::Write { token } else { 0 };
        self.note(|| format!("{token}: {kind:?} {volume} {offset}+{len} durable {durable}"));
        if matches!(kind, Kind::Write | Kind::Zero { .. }) {
            let range = sectors(offset)..sectors(offset + len);
            self.model.volume(volume).content.issue(range, value, issued);
        }
        let volume = volume.to_string();
        let (held, submitted, done) = (None, offset, 0);
        let asked =
            Asked { volume, kind, offset, len, done, value, durable, issued, reactor, held, submitted };
        self.requests.insert(token, asked);
        self.go_on(token);
    }

    /// Do the next part of a request, as a reactor does.
    fn go_on(&mut self, token: u64) {
        loop {
            let asked = self.requests.get_mut(&token).expect("a request");
            let (at, rest) = (asked.offset + asked.done, asked.len - asked.done);
            if rest == 0 && asked.kind != Kind::Flush {
                return self.ended(token, Ok(()));
            }
            let Some(open) = self.open.get(&asked.volume) else { panic!("{} is not open", asked.volume) };
            let reader = &mut self.readers[asked.reactor];
            reader.begin(&self.epochs);
            let through = |unmarked: &Shared| unmarked.unmarked.load(Ordering::Acquire);
            let whole = open.seal.is_none() || at.is_multiple_of(4096) && rest.is_multiple_of(4096);
            let run = match asked.kind {
                Kind::Read => {
                    let run = open.map.read(at, rest);
                    (whole || matches!(run, Run::Zero { .. })).then_some(run)
                }
                Kind::Write if !whole || open.seal.integrity => None,
                Kind::Write => open.map.write(at, rest).filter(|_| !asked.durable || !through(&self.shared)),
                Kind::Flush if !through(&self.shared) => {
                    let what = What::Flush { before: self.drive.flushable() };
                    return self.fly(Flight {
                        offset: 0,
                        len: 0,
                        what,
                        owner: Owner::Client(token),
                        slow: false,
                    });
                }
                Kind::Zero { .. } | Kind::Flush => None,
            };
            match (asked.kind, run) {
                (Kind::Read, Some(Run::Zero { len })) => {
                    self.saw(token, &vec![0; len as usize]);
                    self.requests.get_mut(&token).expect("a request").done += len;
                }
                (Kind::Read, Some(Run::At { at, len })) => {
                    assert!(len > 0 && len <= rest);
                    asked.held = Some(reader.hold());
                    return self.fly(Flight {
                        offset: at,
                        len,
                        what: What::Read,
                        owner: Owner::Client(token),
                        slow: false,
                    });
                }
                (Kind::Write, Some(Run::At { at: place, len })) => {
                    assert!(len > 0 && len <= rest);
                    asked.held = Some(reader.hold());
                    let mut bytes = guest::bytes(asked.value, at, len);
                    guest::turn(&open.seal, at, &mut bytes);
                    let what = What::Write { bytes: bytes.into(), durable: asked.durable };
                    return self.fly(Flight {
                        offset: place,
                        len,
                        what,
                        owner: Owner::Client(token),
                        slow: false,
                    });
                }
                _ => {
                    let kind = match asked.kind {
                        Kind::Zero { unmap } => RequestKind::Zero { unmap },
                        Kind::Flush => RequestKind::Flush,
                        Kind::Read => RequestKind::Read,
                        Kind::Write => RequestKind::Write,
                    };
                    asked.submitted = at;
                    let (volume, durable) = (open.id, asked.durable);
                    return self.keeper.submit(Request {
                        token,
                        volume,
                        kind,
                        offset: at,
                        len: rest,
                        durable,
                    });
                }
            }
        }
    }

    fn fly(&mut self, mut flight: Flight) {
        self.events += 1;
        flight.slow = self.rng.once_in(if self.setup.churn { 2 } else { 4 });
        self.drive.flights.push(flight);
    }

    /// A read has brought these bytes.
    fn saw(&mut self, token: u64, bytes: &[u8]) {
        let asked = &self.requests[&token];
        let at = asked.offset + asked.done;
        let content = &self.model.volumes[&asked.volume].content;
        match guest::values(bytes, at) {
            Err(error) => panic!("{} was read: {error}", asked.volume),
            Ok(values) => {
                for (sector, value) in (sectors(at)..).zip(values) {
                    assert!(
                        content.may_read(sector, value, asked.issued),
                        "read {token} of sector {sector} of {}: {value} instead of one of {}",
                        asked.volume,
                        content.describe(sector)
                    );
                }
            }
        }
    }

    /// When the oldest of what is under way began.
    fn oldest(&self) -> Moment {
        let wish = self.wish.as_ref().map_or(self.moment, |wish| wish.2);
        self.requests.values().map(|asked| asked.issued).fold(wish, Moment::min)
    }

    /// A request has its answer.
    fn ended(&mut self, token: u64, result: Result<(), i32>) {
        let now = self.tick();
        let oldest = self.oldest();
        let asked = self.requests.remove(&token).expect("a request");
        self.note(|| format!("{token}: {result:?}"));
        let content = &mut self.model.volume(&asked.volume).content;
        let range = sectors(asked.offset)..sectors(asked.offset + asked.len);
        match asked.kind {
            Kind::Read => {}
            Kind::Flush if result.is_ok() => content.flushed(asked.issued, oldest),
            Kind::Flush => {}
            Kind::Write | Kind::Zero { .. } => {
                let how = match (result, asked.durable) {
                    (Err(_), _) => Answered::Failed,
                    (Ok(()), false) => Answered::Done,
                    (Ok(()), true) => Answered::Durable,
                };
                content.answer(range, asked.issued, how, now, oldest);
            }
        }
        if let Err(errno) = result {
            let full = errno == errno::ENOSPC && self.setup.room.is_some();
            assert!(full || self.fails, "a request failed with errno {errno}");
        }
    }

    // The drive.

    fn is_bad(&self, flight: &Flight) -> bool {
        let superblock = flight.offset < 1 << 20;
        let journal_end = (1 << 20) + u64::from(self.setup.journal_blocks) * 4096;
        let data = Layout::new(self.setup.size, self.setup.extent).map_or(0, |layout| layout.zones[0].data);
        let is = match (&flight.what, flight.offset) {
            (What::Flush { .. }, _) => Failing::Flush,
            _ if superblock => Failing::Superblock,
            (_, at) if at < journal_end => Failing::Journal,
            (_, at) if at < data => Failing::Table,
            _ => Failing::Data,
        };
        self.fails && (self.setup.failing == is || self.setup.failing == Failing::Anything)
    }

    /// I/O `n` under way ends.
    pub fn complete(&mut self, n: usize) {
        self.events += 1;
        let fails = self.is_bad(&self.drive.flights[n]) && self.rng.once_in(self.setup.fails_once_in);
        let flight = self.drive.complete(n, fails, &mut self.rng);
        let result = if fails { Err(errno::EIO) } else { Ok(()) };
        let token = match flight.owner {
            Owner::Keeper(mut io) => {
                guest::read(&self.drive, &mut io, &mut self.rng);
                self.note(|| format!("done {result:?} {io:?}"));
                return self.keeper.completed(io, result);
            }
            Owner::Client(token) => token,
        };
        if matches!(flight.what, What::Read) && result.is_ok() {
            let mut bytes = vec![0; flight.len as usize];
            self.drive.read(flight.offset, &mut bytes);
            let asked = &self.requests[&token];
            let open = &self.open[&asked.volume];
            if !guest::is_sound(open.sums.as_deref(), flight.offset, &bytes) {
                return self.read_again(token);
            }
            guest::turn(&open.seal, asked.offset + asked.done, &mut bytes);
            self.saw(token, &bytes);
        }
        let asked = self.requests.get_mut(&token).expect("a request");
        if let Some(parity) = asked.held.take() {
            self.readers[asked.reactor].end(&self.epochs, parity);
        }
        asked.done += flight.len;
        match (result, asked.kind) {
            (Ok(()), Kind::Flush) | (Err(_), _) => self.ended(token, result),
            _ => self.go_on(token),
        }
    }

    /// What was read may have been written just then: the keeper waits for whoever writes.
    fn read_again(&mut self, token: u64) {
        let asked = self.requests.get_mut(&token).expect("a request");
        if let Some(parity) = asked.held.take() {
            self.readers[asked.reactor].end(&self.epochs, parity);
        }
        let (offset, len) = (asked.offset + asked.done, asked.len - asked.done);
        let volume = self.open[&asked.volume].id;
        self.keeper.submit(Request { token, volume, kind: RequestKind::Read, offset, len, durable: false });
    }

    // The keeper.

    /// A turn of the reactor that runs the keeper.
    pub fn turn(&mut self) -> bool {
        self.clock += 1000;
        let mut went_on = self.keeper.turn(self.clock);
        while let Some(io) = self.keeper.next_io() {
            went_on = true;
            self.start(io);
        }
        while let Some(done) = self.keeper.next_done() {
            went_on = true;
            let asked = self.requests.get_mut(&done.token).expect("a request");
            match (done.result, asked.kind) {
                (Err(errno), _) => self.ended(done.token, Err(errno)),
                (Ok(_), Kind::Flush) => self.ended(done.token, Ok(())),
                (Ok(bytes), _) => {
                    assert!(bytes > 0 && bytes <= asked.len - asked.done, "{bytes} bytes were done");
                    asked.done += bytes;
                    self.go_on(done.token);
                }
            }
        }
        while let Some((number, answer)) = self.keeper.next_answer() {
            went_on = true;
            self.answered(number, answer);
        }
        while let Some(event) = self.keeper.next_event() {
            self.note(|| event);
        }
        self.check_scrub();
        went_on
    }

    fn start(&mut self, io: Io) {
        if let (Action::Give { token, at }, Data::Own(buffer)) = (io.action, &io.data) {
            let bytes: Vec<u8> = buffer.iter().flat_map(|block| block.0).collect();
            self.saw(token, &bytes[at..at + io.len as usize]);
        }
        let requests = &self.requests;
        let bytes = |token: u64, skip: u64, len: u64| {
            let asked = &requests[&token];
            guest::bytes(asked.value, asked.submitted + skip, len)
        };
        let text = format!("{io:?}");
        match guest::start(&mut self.drive, io, bytes) {
            Some(io) => self.keeper.completed(io, Ok(())),
            None => {
                self.events += 1;
                let slow = self.rng.once_in(5);
                self.drive.flights.iter_mut().last().expect("just begun").slow = slow;
                self.note(|| format!("begin {text}"));
            }
        }
    }

    fn answered(&mut self, number: u64, answer: Result<Answer, StoreError>) {
        let now = self.tick();
        self.note(|| format!("command {number}: {:?}", answer.as_ref().map(|_| ())));
        if self.scrubs.remove(&number) {
            assert!(answer.is_ok() || self.fails || self.keeper.scrub_info().is_none());
            return;
        }
        if self.flatten == Some(number) {
            self.flatten = None;
            self.flattened(answer);
            return;
        }
        let (_, wish, since, _) =
            self.wish.take().filter(|wish| wish.0 == number).expect("an answer to a wish");
        match answer {
            Ok(answer) => {
                if let (Wish::Open { name }, Answer::Opened { volume, map, size, seal, sums }) =
                    (&wish, &answer)
                {
                    assert_eq!(*size, self.model.volumes[name].size);
                    let opened =
                        Opened { id: *volume, map: map.clone(), seal: seal.clone(), sums: sums.clone() };
                    self.open.insert(name.clone(), opened);
                }
                self.model.apply(&wish, since, now);
            }
            Err(StoreError::Failed(_)) if self.fails => self.wish = Some((number, wish, since, true)),
            Err(StoreError::Slow(_)) if self.fails => {}
            Err(StoreError::NoSnapshot { .. } | StoreError::Deleted { .. })
                if matches!(wish, Wish::KeepSnapshot { .. }) =>
            {
                // What is gone stays so.
                let Wish::KeepSnapshot { volume, name } = wish else { return };
                self.model.volume(&volume).deleted.remove(&name);
            }
            Err(error) => panic!("{wish:?} was refused: {error}"),
        }
    }

    fn flattened(&mut self, answer: Result<Answer, StoreError>) {
        let Some(name) = self.model.flattening.clone() else { return };
        match answer {
            Ok(_) => {
                self.model.volume(&name).origin = None;
                self.model.flattening = None;
            }
            // It may be flat, and stays in doubt until somebody looks.
            Err(StoreError::Drive { .. }) if self.fails => {}
            Err(StoreError::Failed(_)) if self.fails => self.model.flattening = None,
            Err(StoreError::Full { .. }) if self.setup.room.is_some() => self.model.flattening = None,
            Err(error) => panic!("flattening {name}: {error}"),
        }
    }

    /// Let all that was asked come to its end.
    pub fn drain(&mut self) {
        let mut idle = 0;
        while idle < 100 {
            let went_on = self.turn();
            for reader in &mut self.readers {
                reader.begin(&self.epochs);
                reader.leave(&self.epochs);
            }
            match self.drive.flights.is_empty() {
                false => {
                    let n = self.rng.below(self.drive.flights.len() as u64) as usize;
                    self.complete(n);
                    idle = 0;
                }
                true if went_on => idle = 0,
                true if self.is_at_rest() => return,
                true => {
                    // Whoever waits for room, or for a second try, waits for the clock.
                    self.clock += 1_000_000_000;
                    idle += 1;
                }
            }
        }
        let waits: Vec<u64> = self.requests.keys().copied().collect();
        panic!("requests {waits:?} and {:?} are never answered; idle: {}", self.wish, self.keeper.is_idle());
    }

    /// A loss of power would take something back.
    pub fn is_unmarked(&self) -> bool {
        self.shared.unmarked.load(Ordering::Acquire)
    }

    pub fn is_at_rest(&self) -> bool {
        let wish = self.wish.as_ref().is_none_or(|wish| wish.3);
        self.requests.is_empty()
            && wish
            && self.flatten.is_none()
            && self.drive.flights.is_empty()
            && (self.keeper.is_idle() || self.fails)
    }

    /// The process or the power ends now. The drive is as the next process finds it.
    pub fn crashed(&mut self, crash: Crash) -> Drive {
        self.drive.crashed(crash, &mut self.rng)
    }

    /// Begin anew on `drive`. `by_keeper`: the keeper takes possession by itself, which may end at any I/O too.
    pub fn restart(&mut self, mut drive: Drive, by_keeper: bool) {
        self.epochs = Arc::new(Epochs::default());
        let bench = Bench::new(&mut drive, u64::MAX);
        let begun = match by_keeper {
            true => recover(&bench, self.boot)
                .and_then(|recovered| Keeper::new(recovered, self.boot, self.epochs.clone())),
            false => begin(&bench, self.boot, self.epochs.clone()),
        };
        self.keeper = begun.unwrap_or_else(|error| panic!("it cannot be opened again: {error}"));
        self.keeper.set_looks(self.setup.looks);
        self.shared = self.keeper.shared();
        self.drive = drive;
        self.readers = (0..REACTORS).map(Reader::new).collect();
        self.open.clear();
        self.requests.clear();
        (self.wish, self.flatten) = (None, None);
        self.scrubs.clear();
        self.clock = 1;
        if by_keeper {
            self.ask(Wish::Possess);
        }
    }
}

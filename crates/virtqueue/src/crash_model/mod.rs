//! Every way in which a process can be killed over a small ring, and every way to go on from there.
//!
//! A world is the bytes of a ring and its in-flight region, a device (the ring code under test) and a driver. From each
//! world every step is tried that either side could make next: the driver offers a request or reaps a completion; the
//! device takes a request, writes a used entry for any it holds, or publishes. A device step is a list of stores; behind
//! each of them the process may be killed, also while it recovers from having been killed. Then the driver may go on for
//! a while by itself, and a new device is made from the bytes.
//!
//! What must hold: the new device is given again just the requests that were taken and that the driver cannot see
//! completed, in the order in which they were taken; the driver sees every request completed exactly once; and no world
//! comes to a stop before that.
//!
//! The test explores a few lists of request lengths. `RINGSTONE_MODEL=deep` takes longer lists, and minutes.

mod driver;
mod stage;

use std::collections::HashSet;
use std::hash::{Hash, Hasher};

use crate::{Chain, VirtRing};
use driver::{Driver, PackedDriver, SplitDriver};
use stage::{Image, Stage};

/// Times that a process is killed on one way; one more if the model goes deep.
const KILLED: u8 = 2;

/// What both sides know apart from the device's own state.
#[derive(Clone, Hash)]
struct Outside<D> {
    image: Image,
    driver: D,
    /// Requests offered so far; they are numbered in this order.
    offered: u8,
    /// Requests that the driver has seen completed, one bit each.
    seen: u32,
    /// Requests taken and not seen completed, in the order of taking.
    taken: Vec<u8>,
    /// How often the process was killed.
    killed: u8,
}

/// All of a world while a device runs.
struct World<D: Driver> {
    outside: Outside<D>,
    ring: D::Ring,
    /// Requests that the device must be given again, in this order.
    again: Vec<u8>,
    /// Requests that the device holds, with their heads.
    held: Vec<(u16, u8)>,
    /// Used entries written and not published.
    unpublished: Vec<u8>,
}

impl<D: Driver> Clone for World<D> {
    fn clone(&self) -> Self {
        Self {
            outside: self.outside.clone(),
            ring: self.ring.clone(),
            again: self.again.clone(),
            held: self.held.clone(),
            unpublished: self.unpublished.clone(),
        }
    }
}

struct Model<D: Driver> {
    stage: Stage,
    lens: &'static [u16],
    known: HashSet<u64>,
    todo: Vec<World<D>>,
    chain: Chain,
    /// Times that a process may be killed.
    killed: u8,
    recoveries: usize,
}

/// Good enough to tell some millions of worlds apart, and faster than the standard one without optimisation.
struct Folding(u64);

impl Hasher for Folding {
    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.0.rotate_left(23) ^ word) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product as u64) ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

fn fingerprint(value: impl Hash) -> u64 {
    let mut hasher = Folding(0x243f_6a88_85a3_08d3);
    value.hash(&mut hasher);
    hasher.finish()
}

impl<D: Driver> Outside<D> {
    fn offer(&mut self, lens: &[u16]) -> bool {
        let Some(len) = lens.get(usize::from(self.offered)) else { return false };
        let done = self.driver.offer(&mut self.image, self.offered, *len);
        self.offered += u8::from(done);
        done
    }

    fn reap(&mut self) -> Option<u8> {
        let (request, len) = self.driver.reap(&self.image)?;
        assert_eq!(len, u32::from(request) + 1, "the length of another request");
        assert_eq!(self.seen & 1 << request, 0, "request {request} was completed twice");
        self.seen |= 1 << request;
        let at = self.taken.iter().position(|taken| *taken == request);
        self.taken.remove(at.expect("a request was completed that was never taken"));
        Some(request)
    }

    /// Requests taken whose completion the driver cannot see, in the order of taking.
    fn waiting(&self) -> Vec<u8> {
        let mut later = self.clone();
        while later.reap().is_some() {}
        later.taken
    }
}

impl<D: Driver> Model<D> {
    fn explore(lens: &'static [u16], begin: u16) -> Self {
        let mut image = Stage::blank();
        let (driver, base) = D::new(&mut image, begin);
        let mut model = Self {
            stage: Stage::new(D::PACKED, base),
            lens,
            known: HashSet::new(),
            todo: Vec::new(),
            chain: Chain::default(),
            killed: KILLED + u8::from(deep()),
            recoveries: 0,
        };
        let outside = Outside { image, driver, offered: 0, seen: 0, taken: Vec::new(), killed: 0 };
        model.begin(outside, None);
        while let Some(world) = model.todo.pop() {
            model.steps(&world);
        }
        model
    }

    /// Make a device. `maybe` is a request that the process before was just taking.
    fn begin(&mut self, mut outside: Outside<D>, maybe: Option<u8>) {
        self.recoveries += 1;
        let before = outside.clone();
        let (ring, between) = self.stage.run(&mut outside.image, || D::device(&self.stage));
        for image in between {
            self.kill(&Outside { image, ..before.clone() }, maybe);
        }
        let ring = ring.expect("a region that the ring code itself wrote");
        let mut again = outside.waiting();
        if usize::from(ring.resubmitting()) != again.len() {
            again.extend(maybe);
            outside.taken.extend(maybe);
        }
        assert_eq!(usize::from(ring.resubmitting()), again.len(), "requests taken again: {again:?} expected");
        self.add(World { outside, ring, again, held: Vec::new(), unpublished: Vec::new() });
    }

    /// Kill the process, and begin anew at once or after the driver did all it could.
    fn kill(&mut self, outside: &Outside<D>, maybe: Option<u8>) {
        if outside.killed == self.killed || !self.known.insert(fingerprint((outside, maybe))) {
            return;
        }
        let mut now = outside.clone();
        now.killed += 1;
        let mut later = now.clone();
        let mut moved = false;
        while later.reap().is_some() || later.offer(self.lens) {
            moved = true;
        }
        self.begin(now, maybe);
        if moved {
            self.begin(later, maybe);
        }
    }

    fn add(&mut self, world: World<D>) {
        let inside = (D::state(&world.ring), &world.again, &world.held, &world.unpublished);
        if self.known.insert(fingerprint((&world.outside, inside))) {
            self.todo.push(world);
        }
    }

    fn steps(&mut self, world: &World<D>) {
        self.kill(&world.outside, None);
        let mut stuck = true;
        let mut next = world.clone();
        if next.outside.offer(self.lens) {
            stuck = false;
            self.add(next);
        }
        let mut next = world.clone();
        if next.outside.reap().is_some() {
            stuck = false;
            self.add(next);
        }
        stuck &= !self.take(world);
        for at in 0..world.held.len() {
            stuck = false;
            let mut next = world.clone();
            let (head, request) = next.held.remove(at);
            next.unpublished.push(request);
            self.device(next, None, |ring| ring.push_used(head, u32::from(request) + 1));
        }
        if !world.unpublished.is_empty() {
            stuck = false;
            let mut next = world.clone();
            next.unpublished.clear();
            self.device(next, None, VirtRing::publish);
        }
        if stuck {
            let all = (1 << self.lens.len()) - 1;
            assert_eq!(world.outside.seen, all, "requests were lost: these were seen completed");
        }
    }

    fn take(&mut self, world: &World<D>) -> bool {
        let mut next = world.clone();
        let stage = &self.stage;
        let chain = &mut self.chain;
        let mut image = next.outside.image.clone();
        let (walked, between) = stage.run(&mut image, || {
            (next.ring.available().unwrap() > 0).then(|| {
                let head = next.ring.walk_next(chain).unwrap();
                (head, stage.request_of(chain.readable()))
            })
        });
        assert!(between.is_empty(), "looking at a request changes the ring");
        let Some((head, request)) = walked else { return false };
        assert!(next.held.iter().all(|(held, _)| *held != head), "head {head} is in flight twice");
        assert_eq!(chain.readable().len(), usize::from(self.lens[usize::from(request)]));
        next.held.push((head, request));
        if next.again.is_empty() {
            assert!(!next.outside.taken.contains(&request), "request {request} was taken twice");
            next.outside.taken.push(request);
            self.device(next, Some(request), VirtRing::take);
        } else {
            assert_eq!(next.again.remove(0), request, "requests are given again out of order");
            self.device(next, None, VirtRing::take);
        }
        true
    }

    /// The device does `step`; `next` is the world behind it but for what the step stores. `taking`: a request that may or
    /// may not count as taken until it is over.
    fn device(&mut self, mut next: World<D>, taking: Option<u8>, step: impl FnOnce(&mut D::Ring)) {
        let before = next.outside.clone();
        let ((), between) = self.stage.run(&mut next.outside.image, || step(&mut next.ring));
        for image in between {
            let mut killed = Outside { image, ..before.clone() };
            if taking.is_some() {
                killed.taken.pop();
            }
            self.kill(&killed, taking);
        }
        self.add(next);
    }
}

fn deep() -> bool {
    std::env::var("RINGSTONE_MODEL").is_ok_and(|model| model == "deep")
}

/// Lists of request lengths, and where the ring begins.
type Lists = &'static [(&'static [u16], u16)];

fn explore_all<D: Driver>(usual: Lists, more: Lists) {
    let lists = usual.iter().chain(if deep() { more } else { &[] });
    for (lens, begin) in lists {
        let model = Model::<D>::explore(lens, *begin);
        println!("{lens:?} from {begin}: {} worlds, {} recoveries", model.known.len(), model.recoveries);
        assert!(model.recoveries > 100, "the model explores next to nothing");
    }
}

#[test]
fn a_split_ring_loses_and_doubles_nothing_wherever_the_process_is_killed() {
    // Indices run on to 65535 and begin again.
    const USUAL: Lists = &[(&[1, 1, 1], 0), (&[1, 2, 1, 3], 65534), (&[2, 2, 1, 3, 1, 2], 65533)];
    explore_all::<SplitDriver>(USUAL, &[(&[1, 1, 1, 1], 65534), (&[3, 1, 1, 2, 1], 0)]);
}

#[test]
fn a_packed_ring_loses_and_doubles_nothing_wherever_the_process_is_killed() {
    // Batches that fill the ring are among them, and such as go round its end.
    const USUAL: Lists =
        &[(&[1, 1, 1], 2), (&[1, 3, 2, 1], 0), (&[4, 1, 4], 0), (&[2, 1, 2, 1], 3), (&[2, 2, 3, 3, 2, 1], 1)];
    explore_all::<PackedDriver>(USUAL, &[(&[1, 1, 1, 1], 1), (&[1, 2, 1, 3, 1], 0)]);
}

//! A drive with a volatile cache. What was written is durable only when a flush that began after it has ended, or when the write
//! asked for it; what is under way when the process or the power ends is there, or not, or torn at 512 bytes.

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Arc;

use ringstone_store::{Block, Io, Medium};

use crate::rng::Rng;

pub const SECTOR: u64 = 512;
const BLOCK: usize = 4096;

/// Bytes by block; none are zeroes. Clones share their blocks.
#[derive(Clone)]
struct Image(Vec<Option<Arc<[u8; BLOCK]>>>);

impl Image {
    fn read(&self, offset: u64, into: &mut [u8]) {
        for (n, piece) in into.chunks_mut(SECTOR as usize).enumerate() {
            let at = offset as usize + n * SECTOR as usize;
            match &self.0[at / BLOCK] {
                Some(block) => piece.copy_from_slice(&block[at % BLOCK..][..piece.len()]),
                None => piece.fill(0),
            }
        }
    }

    fn write(&mut self, offset: u64, from: &[u8]) {
        for (n, piece) in from.chunks(SECTOR as usize).enumerate() {
            let at = offset as usize + n * SECTOR as usize;
            let block = self.0[at / BLOCK].get_or_insert_with(|| Arc::new([0; BLOCK]));
            Arc::make_mut(block)[at % BLOCK..][..piece.len()].copy_from_slice(piece);
        }
    }
}

/// Completed, and not durable.
#[derive(Clone)]
struct Cached {
    seq: u64,
    offset: u64,
    bytes: Arc<Vec<u8>>,
    /// The part of `bytes` that is not overwritten durably.
    from: usize,
    end: usize,
}

impl Cached {
    fn bytes(&self) -> (u64, &[u8]) {
        (self.offset + self.from as u64, &self.bytes[self.from..self.end])
    }
}

pub enum What {
    Read,
    Write {
        bytes: Arc<Vec<u8>>,
        durable: bool,
    },
    /// Makes durable what was completed before this number.
    Flush {
        before: u64,
    },
}

pub enum Owner {
    Keeper(Io),
    Client(u64),
}

/// An I/O under way.
pub struct Flight {
    pub offset: u64,
    pub len: u64,
    pub what: What,
    pub owner: Owner,
    /// It takes much longer than others.
    pub slow: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// The process was killed: what was completed is there.
    Killed,
    /// Power was lost: what is not durable may be there.
    Power,
}

pub struct Drive {
    size: u64,
    durable: Image,
    /// What a read sees.
    current: Image,
    cache: Vec<Cached>,
    seq: u64,
    pub flights: Vec<Flight>,
}

impl Drive {
    pub fn new(size: u64) -> Self {
        let image = Image(vec![None; (size / BLOCK as u64) as usize]);
        Self { size, durable: image.clone(), current: image, cache: Vec::new(), seq: 0, flights: Vec::new() }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn grow(&mut self, size: u64) {
        self.size = size;
        self.durable.0.resize((size / BLOCK as u64) as usize, None);
        self.current.0.resize((size / BLOCK as u64) as usize, None);
    }

    pub fn read(&self, offset: u64, into: &mut [u8]) {
        self.current.read(offset, into);
    }

    /// Some sectors of writes under way are there already.
    pub fn glimpse(&self, offset: u64, into: &mut [u8], rng: &mut Rng) {
        for flight in &self.flights {
            let What::Write { bytes, .. } = &flight.what else { continue };
            let (start, end) =
                (offset.max(flight.offset), (offset + into.len() as u64).min(flight.offset + flight.len));
            for at in (start..end).step_by(SECTOR as usize) {
                if rng.once_in(2) {
                    let (from, to) = ((at - flight.offset) as usize, (at - offset) as usize);
                    into[to..to + SECTOR as usize].copy_from_slice(&bytes[from..from + SECTOR as usize]);
                }
            }
        }
    }

    pub fn write(&mut self, offset: u64, bytes: Arc<Vec<u8>>, durable: bool) {
        self.current.write(offset, &bytes);
        if durable {
            self.cut(offset, offset + bytes.len() as u64);
            self.durable.write(offset, &bytes);
            return;
        }
        self.seq += 1;
        let end = bytes.len();
        self.cache.push(Cached { seq: self.seq, offset, bytes, from: 0, end });
    }

    /// What the cache has of these bytes is older than what is durable.
    fn cut(&mut self, start: u64, end: u64) {
        let mut kept = Vec::with_capacity(self.cache.len());
        for one in self.cache.drain(..) {
            let (first, last) = (one.offset + one.from as u64, one.offset + one.end as u64);
            if end <= first || last <= start {
                kept.push(one);
                continue;
            }
            if first < start {
                kept.push(Cached { end: (start - one.offset) as usize, ..one.clone() });
            }
            if end < last {
                kept.push(Cached { from: (end - one.offset) as usize, ..one });
            }
        }
        self.cache = kept;
    }

    /// A flush that begins now makes this durable.
    pub fn flushable(&self) -> u64 {
        self.seq + 1
    }

    pub fn flush(&mut self, before: u64) {
        for one in self.cache.iter().filter(|one| one.seq < before) {
            let (offset, bytes) = one.bytes();
            self.durable.write(offset, bytes);
        }
        self.cache.retain(|one| one.seq >= before);
    }

    /// Carry out flight `n` and take it away. `fails`: perhaps in part.
    pub fn complete(&mut self, n: usize, fails: bool, rng: &mut Rng) -> Flight {
        let flight = self.flights.swap_remove(n);
        match &flight.what {
            What::Read => {}
            What::Write { bytes, durable } if !fails => self.write(flight.offset, bytes.clone(), *durable),
            What::Write { bytes, .. } => self.tear(flight.offset, bytes, rng),
            What::Flush { before } if !fails => self.flush(*before),
            What::Flush { .. } => {}
        }
        flight
    }

    /// Some sectors of a write, all, or none.
    fn tear(&mut self, offset: u64, bytes: &[u8], rng: &mut Rng) {
        let kind = rng.below(4);
        for (n, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            if kind == 0 || kind > 1 && rng.once_in(2) {
                self.write(offset + n as u64 * SECTOR, Arc::new(sector.to_vec()), false);
            }
        }
    }

    /// The drive as the next process finds it.
    pub fn crashed(&self, crash: Crash, rng: &mut Rng) -> Self {
        let mut after = Self {
            size: self.size,
            durable: self.durable.clone(),
            current: self.current.clone(),
            cache: self.cache.clone(),
            seq: self.seq,
            flights: Vec::new(),
        };
        if crash == Crash::Power {
            after.current = self.durable.clone();
            after.cache.clear();
            // Mostly none or all of it tells most; else each sector by itself.
            let keep = rng.below(4);
            for one in &self.cache {
                let (offset, bytes) = one.bytes();
                let whole = rng.below(3);
                for (n, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                    let there = match keep {
                        0 => false,
                        1 => true,
                        _ => whole == 0 || whole == 1 && rng.once_in(2),
                    };
                    if there {
                        after.current.write(offset + n as u64 * SECTOR, sector);
                    }
                }
            }
        }
        for flight in &self.flights {
            if let What::Write { bytes, .. } = &flight.what {
                after.tear(flight.offset, bytes, rng);
            }
        }
        if crash == Crash::Power {
            // Whatever is there now stays.
            after.durable = after.current.clone();
            after.cache.clear();
        }
        after
    }

    /// As it is with nothing under way.
    pub fn fork(&self) -> Self {
        debug_assert!(self.flights.is_empty());
        self.crashed(Crash::Killed, &mut Rng::new(0))
    }
}

/// A drive for what is done at once. `left`: the process ends after so many writes and flushes.
pub struct Bench<'a> {
    pub drive: RefCell<&'a mut Drive>,
    pub left: Cell<u64>,
}

impl<'a> Bench<'a> {
    pub fn new(drive: &'a mut Drive, left: u64) -> Self {
        Self { drive: RefCell::new(drive), left: Cell::new(left) }
    }

    fn spend(&self) -> io::Result<()> {
        match self.left.get().checked_sub(1) {
            Some(left) => self.left.set(left),
            None => return Err(io::Error::other("the process ended here")),
        }
        Ok(())
    }
}

impl Medium for Bench<'_> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.drive.borrow().size)
    }

    fn read(&self, offset: u64, into: &mut [Block]) -> io::Result<()> {
        let drive = self.drive.borrow();
        for (n, block) in into.iter_mut().enumerate() {
            drive.read(offset + (n * BLOCK) as u64, &mut block.0);
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[Block]) -> io::Result<()> {
        self.spend()?;
        let bytes = from.iter().flat_map(|block| block.0).collect();
        self.drive.borrow_mut().write(offset, Arc::new(bytes), false);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.spend()?;
        let mut drive = self.drive.borrow_mut();
        let before = drive.flushable();
        drive.flush(before);
        Ok(())
    }
}

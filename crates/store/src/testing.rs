//! A store in memory and a reactor that does its I/O at once, for unit tests.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;

use crate::{
    Action, Answer, Block, Command, Data, Io, Keeper, Layout, Medium, Request, RequestKind, StoreError, BLOCK,
};

/// What guests write.
pub const WRITTEN: u8 = 0xa5;

/// Blocks that were written, of so many bytes; and those that cannot be read until they are written anew.
pub struct Memory(RefCell<HashMap<u64, Block>>, u64, RefCell<HashSet<u64>>);

impl Memory {
    pub fn new(size: u64) -> Self {
        Self(RefCell::default(), size, RefCell::default())
    }

    /// The first byte of the block at `offset`.
    pub fn byte(&self, offset: u64) -> u8 {
        self.0.borrow().get(&offset).map_or(0, |block| block.0[0])
    }

    /// A bit of the block at `offset` rots.
    pub fn rot(&self, offset: u64) {
        self.rot_at(offset, 40);
    }

    /// A bit of byte `byte` of the block at `offset` rots.
    pub fn rot_at(&self, offset: u64, byte: usize) {
        self.0.borrow_mut().entry(offset).or_default().0[byte] ^= 4;
    }

    /// The drive cannot read the block at `offset`.
    pub fn spoil(&self, offset: u64) {
        self.2.borrow_mut().insert(offset);
    }

    fn mend(&self, offset: u64, len: u64) {
        self.2.borrow_mut().retain(|at| !(offset..offset + len).contains(at));
    }

    fn fill(&self, offset: u64, len: u64, byte: u8) {
        self.mend(offset, len);
        let at = (offset..offset + len).step_by(BLOCK as usize);
        self.0.borrow_mut().extend(at.map(|at| (at, Block([byte; 4096]))));
    }
}

impl Medium for Memory {
    fn size(&self) -> io::Result<u64> {
        Ok(self.1)
    }

    fn read(&self, offset: u64, into: &mut [Block]) -> io::Result<()> {
        let blocks = self.0.borrow();
        let end = offset + into.len() as u64 * BLOCK;
        if self.2.borrow().iter().any(|at| (offset..end).contains(at)) {
            return Err(io::Error::from_raw_os_error(crate::errno::EIO));
        }
        for (block, at) in into.iter_mut().zip((offset..).step_by(BLOCK as usize)) {
            *block = blocks.get(&at).cloned().unwrap_or_default();
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[Block]) -> io::Result<()> {
        self.mend(offset, from.len() as u64 * BLOCK);
        self.0.borrow_mut().extend((offset..).step_by(BLOCK as usize).zip(from.iter().cloned()));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// It forgets what is written.
pub struct Deaf(pub Memory);

impl Medium for Deaf {
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn read(&self, offset: u64, into: &mut [Block]) -> io::Result<()> {
        self.0.read(offset, into)
    }

    fn write(&self, _: u64, _: &[Block]) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// See the module.
pub struct Calm {
    pub keeper: Keeper,
    pub memory: Memory,
    /// Bytes of the drive that cannot be written.
    pub refuses: Range<u64>,
    pub now: u64,
}

impl Calm {
    /// A new store of `size` bytes.
    pub fn new(size: u64, extent: u64) -> Self {
        let memory = Memory::new(size);
        crate::format(&memory, &Layout::new(size, extent).unwrap(), [7; 16]).unwrap();
        let keeper = crate::begin(&memory, [1; 16], Default::default()).unwrap();
        Self::of(keeper, memory)
    }

    /// `keeper` has the store in `memory`.
    pub fn of(keeper: Keeper, memory: Memory) -> Self {
        Self { keeper, memory, refuses: 0..0, now: 0 }
    }

    /// True if there was something to do.
    pub fn turn(&mut self) -> bool {
        self.now += 1000;
        let mut went_on = self.keeper.turn(self.now);
        while let Some(io) = self.keeper.next_io() {
            went_on = true;
            self.carry_out(io);
        }
        went_on
    }

    fn carry_out(&mut self, mut io: Io) {
        if matches!(io.action, Action::Write { .. }) && self.refuses.contains(&io.offset) {
            return self.keeper.completed(io, Err(crate::errno::EIO));
        }
        let mut result = Ok(());
        match (io.action, &mut io.data) {
            (Action::Read, Data::Own(buffer)) => result = self.memory.read(io.offset, buffer),
            (Action::Write { .. }, Data::Own(buffer)) => self.memory.write(io.offset, buffer).unwrap(),
            (Action::Write { .. }, Data::Zeroes) => self.memory.fill(io.offset, io.len, 0),
            (Action::Write { .. }, Data::Guest { .. }) => self.memory.fill(io.offset, io.len, WRITTEN),
            _ => {}
        }
        self.keeper.completed(io, result.map_err(|_| crate::errno::EIO));
    }

    pub fn ask(&mut self, command: Command) -> Result<Answer, StoreError> {
        self.keeper.command(1, command);
        for _ in 0..100_000 {
            self.turn();
            if let Some((_, answer)) = self.keeper.next_answer() {
                return answer;
            }
        }
        panic!("a command is never answered");
    }

    /// Have all of a request done.
    pub fn request(&mut self, volume: u32, kind: RequestKind, mut offset: u64, mut len: u64) {
        while len > 0 {
            self.keeper.submit(Request { token: 1, volume, kind, offset, len, durable: false });
            let done = loop {
                self.turn();
                if let Some(done) = self.keeper.next_done() {
                    break done.result.unwrap();
                }
            };
            (offset, len) = (offset + done, len - done);
        }
    }

    /// Volume `name` of `size` bytes, made and opened.
    pub fn volume(&mut self, name: &str, size: u64) -> Opened {
        self.volume_with(name, size, false)
    }

    /// `integrity`: its blocks have checksums.
    pub fn volume_with(&mut self, name: &str, size: u64, integrity: bool) -> Opened {
        let (name, seal) = (name.to_owned(), crate::Seal { integrity, ..Default::default() });
        self.ask(Command::Create { name: name.clone(), size, created_s: 1, seal }).unwrap();
        self.opened(&name)
    }

    pub fn opened(&mut self, name: &str) -> Opened {
        match self.ask(Command::Open { name: name.into(), cipher: None }).unwrap() {
            Answer::Opened { volume, map, .. } => (volume, map),
            _ => panic!("opened, and no volume"),
        }
    }

    pub fn snapshot(&mut self, volume: &str, name: &str) {
        self.ask(Command::Snapshot { volumes: vec![volume.into()], name: name.into(), created_s: 2 })
            .unwrap();
    }
}

/// A volume's number and map.
pub type Opened = (u32, std::sync::Arc<crate::Map>);

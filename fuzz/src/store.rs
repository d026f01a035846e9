//! A store in memory whose blocks say whatever the input likes, with checksums that are right.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use ringstone_store::{
    begin, format, zeroed, Action, Answer, Block, Command, Data, Epochs, Keeper, Layout, Medium, Request,
    RequestKind, Superblock, SMALLEST_STORE,
};

const BLOCK: u64 = 4096;
const EXTENT: u64 = 16 << 10;
const SUPERBLOCKS: [u64; 2] = [0, 128];
/// Turns until a keeper must have answered.
const TURNS: usize = 2000;

/// A drive. Clones of it share what was there.
#[derive(Clone, Default)]
pub struct Memory {
    base: Arc<BTreeMap<u64, Block>>,
    changed: RefCell<BTreeMap<u64, Block>>,
}

impl Memory {
    fn get(&self, block: u64) -> Block {
        let changed = self.changed.borrow();
        changed.get(&block).or_else(|| self.base.get(&block)).cloned().unwrap_or_default()
    }

    fn put(&self, block: u64, bytes: Block) {
        self.changed.borrow_mut().insert(block, bytes);
    }

    /// What there is, as what all copies begin with.
    fn settled(&self) -> Self {
        Self { base: Arc::new(self.changed.borrow().clone()), changed: RefCell::default() }
    }

    fn has(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= SMALLEST_STORE)
    }
}

impl Medium for Memory {
    fn size(&self) -> io::Result<u64> {
        Ok(SMALLEST_STORE)
    }

    fn read(&self, offset: u64, into: &mut [Block]) -> io::Result<()> {
        assert!(self.has(offset, into.len() as u64 * BLOCK), "read at {offset}");
        for (n, block) in (offset / BLOCK..).zip(into) {
            *block = self.get(n);
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[Block]) -> io::Result<()> {
        assert!(self.has(offset, from.len() as u64 * BLOCK), "written at {offset}");
        for (n, block) in (offset / BLOCK..).zip(from) {
            self.put(n, block.clone());
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A keeper whose I/O is done at once.
pub struct Served<'a> {
    pub keeper: Keeper,
    memory: &'a Memory,
    now: u64,
}

impl<'a> Served<'a> {
    pub fn new(keeper: Keeper, memory: &'a Memory) -> Self {
        Self { keeper, memory, now: 0 }
    }

    fn turn(&mut self) {
        self.now += 100_000_000;
        self.keeper.turn(self.now);
        while let Some(mut io) = self.keeper.next_io() {
            let blocks = io.offset / BLOCK..(io.offset + io.len).div_ceil(BLOCK);
            assert!(self.memory.has(io.offset, io.len), "{io:?}");
            match (&io.action, &mut io.data) {
                (Action::Read, Data::Own(buffer)) => {
                    blocks.zip(buffer).for_each(|(n, block)| *block = self.memory.get(n));
                }
                (Action::Write { .. }, Data::Own(buffer)) => {
                    blocks.zip(buffer).for_each(|(n, block)| self.memory.put(n, block.clone()));
                }
                _ => {}
            }
            self.keeper.completed(io, Ok(()));
        }
    }

    /// The answer, or None if it is refused.
    ///
    /// # Panics
    /// It is never answered.
    pub fn command(&mut self, command: Command) -> Option<Answer> {
        self.keeper.command(1, command);
        for _ in 0..TURNS {
            self.turn();
            if let Some((_, answer)) = self.keeper.next_answer() {
                return answer.ok();
            }
        }
        panic!("a command was never answered");
    }

    /// Have a request done, as far as one step does it.
    ///
    /// # Panics
    /// It is never answered.
    pub fn request(&mut self, volume: u32, kind: RequestKind, offset: u64, len: u64) {
        self.keeper.submit(Request { token: 1, volume, kind, offset, len, durable: true });
        for _ in 0..TURNS {
            self.turn();
            if self.keeper.next_done().is_some() {
                return;
            }
        }
        panic!("a request was never answered");
    }

    /// # Panics
    /// It never rests.
    pub fn rest(&mut self) {
        for _ in 0..TURNS {
            self.turn();
            if self.keeper.is_idle() {
                return;
            }
        }
        panic!("the keeper never rests");
    }
}

/// A store with volumes, snapshots and a clone, in the table and in the journal.
///
/// # Panics
/// It cannot be made.
pub fn example() -> Memory {
    let memory = Memory::default();
    let layout = Layout::new(SMALLEST_STORE, EXTENT).expect("a layout");
    format(&memory, &layout, *b"fuzzed store uid").expect("a store");
    for closes in [true, false] {
        let keeper = begin(&memory, [1; 16], Arc::new(Epochs::default())).expect("opened");
        let mut served = Served::new(keeper, &memory);
        let (name, clone) = if closes { ("a", "b") } else { ("c", "d") };
        served
            .command(Command::Create {
                name: name.into(),
                size: 10 * EXTENT,
                created_s: 1,
                seal: Default::default(),
            })
            .expect("made");
        let open = Command::Open { name: name.into(), cipher: None };
        let Some(Answer::Opened { volume, .. }) = served.command(open) else { panic!("not opened") };
        for snapshot in ["x", "y"] {
            served.request(volume, RequestKind::Write, 0, 3 * EXTENT);
            served.request(volume, RequestKind::Zero { unmap: true }, EXTENT, EXTENT / 2);
            let volumes = vec![name.to_string()];
            let command = Command::Snapshot { volumes, name: snapshot.into(), created_s: 2 };
            served.command(command).expect("snapped");
        }
        let snapshot = Some("x".into());
        let command = Command::Clone { volume: name.into(), snapshot, name: clone.into(), created_s: 3 };
        served.command(command).expect("cloned");
        if closes {
            served.command(Command::Shutdown).expect("closed");
        }
    }
    memory.settled()
}

/// Overwrite parts of the store with what the input has, a record after the other: the part (1 byte), the block in it (2), the byte of
/// that (2), how many bytes (1), and these. Checksums are right afterwards.
pub fn spoil(store: &Memory, mut input: &[u8]) -> Memory {
    let memory = store.clone();
    let layout = Layout::new(SMALLEST_STORE, EXTENT).expect("a layout");
    let zone = layout.zones[0];
    let pages = u64::from(zone.pages());
    while let Some((head, rest)) = input.split_at_checked(6) {
        let (bytes, rest) = rest.split_at(rest.len().min(head[5].into()));
        input = rest;
        let n = u64::from(u16::from_le_bytes([head[1], head[2]]));
        let at = usize::from(u16::from_le_bytes([head[3], head[4]])) % BLOCK as usize;
        let journal = layout.journal_at / BLOCK + n % u64::from(layout.journal_blocks);
        let block = match head[0] % 4 {
            0 => SUPERBLOCKS[(n % 2) as usize],
            1 => journal,
            2 => zone.table / BLOCK + n % (2 * pages),
            _ => layout.catalog_at / BLOCK + n % 2 * layout.catalog_len / BLOCK,
        };
        let mut changed = memory.get(block);
        let end = (at + bytes.len()).min(BLOCK as usize);
        changed.0[at..end].copy_from_slice(&bytes[..end - at]);
        if matches!(head[0] % 4, 1 | 2) {
            changed.0[4..8].fill(0);
            let crc = crc32c::crc32c(&changed.0);
            changed.0[4..8].copy_from_slice(&crc.to_le_bytes());
        }
        memory.put(block, changed);
    }
    for at in SUPERBLOCKS {
        seal(&memory, at);
    }
    memory
}

/// Make the checksums of a superblock and of the catalog that it names right.
fn seal(memory: &Memory, at: u64) {
    let crc_at = BLOCK as usize - 4;
    let mut block = memory.get(at);
    let sum = |block: &mut Block| {
        let crc = crc32c::crc32c(&block.0[..crc_at]);
        block.0[crc_at..].copy_from_slice(&crc.to_le_bytes());
    };
    if &block.0[..8] != b"RSTSTORE" {
        return;
    }
    sum(&mut block);
    if let Ok(Some(superblock)) = Superblock::decode(&block.0) {
        let len = superblock.catalog_bytes as usize;
        let mut blocks = zeroed(len.div_ceil(BLOCK as usize));
        if memory.read(superblock.layout.catalog_copy(superblock.catalog_copy), &mut blocks).is_ok() {
            let bytes: Vec<u8> = blocks.iter().flat_map(|block| block.0).take(len).collect();
            block.0[144..148].copy_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
            sum(&mut block);
        }
    }
    memory.put(at, block);
}

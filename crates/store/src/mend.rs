//! Copies that are bad beside good ones, in a store that nobody has open, and writing them anew.
//!
//! A bad copy may be mended only if it is known to say nothing that the good one does not: if it was the newer one, what it said is
//! lost, and to write the older one over it would hide that. Each repair writes one block of 4096 bytes whose content follows from the
//! good copy alone. So it may be made twice, and where it ends in its midst the copy is as bad as before.

use crate::error::StoreError;
use crate::format::{Block, JournalBlock, Page, Superblock};
use crate::geometry::{BLOCK, SUPERBLOCKS};
use crate::medium::{flush, read, read_into, write, Medium};

/// Blocks read at once.
const AT_ONCE: u32 = 256;

/// A block that can be written anew.
#[derive(Debug)]
pub struct Mend {
    at: u64,
    block: Block,
    what: String,
}

impl Mend {
    /// What is bad, as a sentence.
    pub fn what(&self) -> &str {
        &self.what
    }
}

/// What the copies of a store's superblock and pages are like.
#[derive(Debug, Default)]
pub struct Copies {
    /// What cannot be mended, as sentences.
    pub faults: Vec<String>,
    /// What may be in order.
    pub notes: Vec<String>,
    pub mends: Vec<Mend>,
}

/// Look at all copies; nothing is changed. `superblock`: the one that counts.
///
/// # Errors
/// The drive cannot be read.
pub fn copies(medium: &dyn Medium, superblock: &Superblock) -> Result<Copies, StoreError> {
    let mut found = Copies::default();
    look_at_superblocks(medium, superblock, &mut found)?;
    look_at_pages(medium, superblock, &mut found)?;
    Ok(found)
}

/// Write these anew, each durably before the next.
///
/// # Errors
/// The drive cannot be written, or does not keep what it was given.
pub fn mend(medium: &dyn Medium, mends: &[Mend]) -> Result<(), StoreError> {
    for Mend { at, block, what } in mends {
        write(medium, *at, std::slice::from_ref(block))?;
        flush(medium)?;
        if read(medium, *at, 1)?[0].0 != block.0 {
            return Err(StoreError::Damaged {
                what: format!("{what}, and the drive does not keep it"),
                offset: *at,
            });
        }
    }
    Ok(())
}

fn look_at_superblocks(
    medium: &dyn Medium,
    sound: &Superblock,
    found: &mut Copies,
) -> Result<(), StoreError> {
    let at = if sound.at() == SUPERBLOCKS[0] { SUPERBLOCKS[1] } else { SUPERBLOCKS[0] };
    let block = read(medium, at, 1)?;
    // The second one is written when the store is opened for the first time.
    if sound.generation < 2 || Superblock::decode(&block[0].0)?.is_some() {
        return Ok(());
    }
    if let Some(later) = written_after(medium, sound)? {
        found.faults.push(format!(
            "the superblock at byte {at} is bad, and it was the newer one: block {later} of the journal was written after it. What was changed since the older one may be lost"
        ));
        return Ok(());
    }
    let older = Superblock { generation: sound.generation - 1, ..sound.clone() };
    if Superblock::claimed(&block[0].0) == Some(older.generation) {
        let what =
            format!("the superblock at byte {at} is bad; the one at byte {} is newer, and sound", sound.at());
        found.mends.push(Mend { at, block: older.encode(), what });
        return Ok(());
    }
    found.notes.push(format!(
        "the superblock at byte {at} is bad, and whether it was the newer one is not known. A loss of power while it is written leaves that, and costs nothing. If there was none, what was changed last without a flush may be lost. The next opening of the store takes the one at byte {}, and writes the other anew",
        sound.at()
    ));
    Ok(())
}

/// A block of the journal that can only be there if a newer superblock was durable: of a later opener, or in the place of one that
/// this superblock needs.
fn written_after(medium: &dyn Medium, superblock: &Superblock) -> Result<Option<u64>, StoreError> {
    let layout = &superblock.layout;
    let end = superblock.replay_from + u64::from(layout.journal_blocks);
    let mut at = 0;
    while at < layout.journal_blocks {
        let count = AT_ONCE.min(layout.journal_blocks - at);
        let blocks = read(medium, layout.journal_at + u64::from(at) * BLOCK, count as usize)?;
        let heads = blocks.iter().filter_map(|block| JournalBlock::decode(&superblock.uuid, &block.0));
        let later = heads
            .map(|block| block.head)
            .find(|head| head.incarnation > superblock.incarnation || head.seq >= end);
        if let Some(head) = later {
            return Ok(Some(head.seq));
        }
        at += count;
    }
    Ok(None)
}

fn look_at_pages(medium: &dyn Medium, superblock: &Superblock, found: &mut Copies) -> Result<(), StoreError> {
    let mut copies = [0, 1].map(|_| crate::format::zeroed(AT_ONCE as usize));
    let mut first = 0;
    for zone in &superblock.layout.zones {
        let mut page = 0;
        while page < zone.pages() {
            let count = AT_ONCE.min(zone.pages() - page);
            for (copy, into) in (0..).zip(&mut copies) {
                read_into(medium, zone.page_at(page, copy), &mut into[..count as usize])?;
            }
            for n in 0..count {
                let both = [0, 1].map(|copy: usize| &copies[copy][n as usize]);
                let at = [0, 1].map(|copy| zone.page_at(page + n, copy));
                let mend = page_to_mend(superblock, first + page + n, at, both);
                found.mends.extend(mend);
            }
            page += count;
        }
        first += zone.pages();
    }
    Ok(())
}

/// Of a page one copy counts. The other one is bad, and was older, if it was a page of this store at all.
fn page_to_mend(superblock: &Superblock, number: u32, at: [u64; 2], both: [&Block; 2]) -> Option<Mend> {
    let uuid = &superblock.uuid;
    let good = |block: &Block| {
        let page = Page::decode(uuid, number, &block.0)?;
        (page.generation <= superblock.table_generation).then_some(page.generation)
    };
    let (bad, sound) = match both.map(good) {
        [Some(_), None] => (1, 0),
        [None, Some(_)] => (0, 1),
        _ => return None,
    };
    let claimed = Page::claimed(uuid, number, &both[bad].0)?;
    (claimed <= good(both[sound])? && Page::decode(uuid, number, &both[bad].0).is_none()).then(|| Mend {
        at: at[bad],
        block: both[sound].clone(),
        what: format!(
            "the copy at byte {} of page {number} of the table is bad; the one at byte {} is sound and counts",
            at[bad], at[sound]
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Calm, Memory};
    use crate::{begin, recover, Command, RequestKind};

    const BOOT: [u8; 16] = [1; 16];
    const EXTENT: u64 = 16 << 10;

    /// A store that was closed after some checkpoints, so that page 0 has two copies.
    fn store() -> Memory {
        let mut store = Calm::new(64 << 20, EXTENT);
        let (volume, _) = store.volume("a", 16 * EXTENT);
        for _ in 0..3 {
            store.request(volume, RequestKind::Write, 0, 16 * EXTENT);
            store.request(volume, RequestKind::Zero { unmap: true }, 0, 8 * EXTENT);
            store.ask(Command::Shutdown).unwrap();
            store.keeper = begin(&store.memory, BOOT, Default::default()).unwrap();
            store.opened("a");
        }
        store.ask(Command::Shutdown).unwrap();
        store.memory
    }

    fn look(memory: &Memory) -> Copies {
        let recovered = recover(memory, BOOT).unwrap();
        copies(memory, &recovered.superblock).unwrap()
    }

    fn block(memory: &Memory, at: u64) -> Block {
        read(memory, at, 1).unwrap()[0].clone()
    }

    /// The places of the older superblock and of the older copy of page 0; then of the newer ones.
    fn places(memory: &Memory) -> ([u64; 2], [u64; 2]) {
        let superblock = crate::superblock(memory).unwrap();
        let newer = usize::from(superblock.at() == SUPERBLOCKS[1]);
        let at = [0, 1].map(|copy| superblock.layout.zones[0].page_at(0, copy));
        let generation = |at: u64| Page::generation(&superblock.uuid, 0, &block(memory, at).0).unwrap();
        let page = usize::from(generation(at[1]) > generation(at[0]));
        ([SUPERBLOCKS[1 - newer], at[1 - page]], [SUPERBLOCKS[newer], at[page]])
    }

    #[test]
    fn the_older_of_two_copies_is_written_anew() {
        let memory = store();
        let before = recover(&memory, BOOT).unwrap();
        assert!(look(&memory).mends.is_empty());
        let (older, newer) = places(&memory);
        for (at, counts) in older.into_iter().zip(newer) {
            let good = block(&memory, counts);
            memory.rot_at(at, 3000);
            let found = look(&memory);
            assert!(found.faults.is_empty() && found.notes.is_empty());
            assert_eq!(found.mends.len(), 1);
            assert!(found.mends[0].what().contains(&format!("at byte {at} ")), "{}", found.mends[0].what());
            // Power is lost while it is written.
            let mut torn = block(&memory, at);
            torn.0[..512].copy_from_slice(&found.mends[0].block.0[..512]);
            memory.write(at, &[torn]).unwrap();
            let again = look(&memory).mends;
            assert_eq!(again[0].block.0, found.mends[0].block.0);
            mend(&memory, &again).unwrap();
            mend(&memory, &again).unwrap();
            assert!(look(&memory).mends.is_empty());
            assert_eq!(block(&memory, counts).0, good.0, "the good one stays as it is");
            let after = recover(&memory, BOOT).unwrap();
            assert!(after.slots.iter().eq(before.slots.iter()));
            assert_eq!(after.superblock, before.superblock);
        }
    }

    /// Volumes would have had what they had a checkpoint before, and nobody would have been told.
    #[test]
    fn an_older_page_does_not_count_for_the_newer_one() {
        let memory = store();
        let (_, [_, page]) = places(&memory);
        memory.rot_at(page, 3000);
        let Err(StoreError::Damaged { what, offset }) = recover(&memory, BOOT) else {
            panic!("it is opened")
        };
        assert_eq!((what.as_str(), offset), ("the newer copy of page 0 of the table is bad", page));
    }

    /// What an unended checkpoint has torn says that it is newer. Were it left there, it would seem to have counted once generations
    /// went on, and a sound store would be refused.
    #[test]
    fn a_torn_page_of_an_unended_checkpoint_is_written_over_by_the_next() {
        let memory = store();
        let ([_, at], _) = places(&memory);
        let superblock = crate::superblock(&memory).unwrap();
        let mut page = Page::decode(&superblock.uuid, 0, &block(&memory, at).0).unwrap();
        page.generation = superblock.table_generation + 1;
        // In a sector that was not written.
        page.entries[200] = crate::format::Entry::zero(1, 5, 1, 1);
        let (mut torn, mut newer) = (block(&memory, at), Block::default());
        page.encode(&superblock.uuid, &mut newer);
        torn.0[..512].copy_from_slice(&newer.0[..512]);
        memory.write(at, &[torn]).unwrap();
        let found = look(&memory);
        assert!(found.mends.is_empty() && found.faults.is_empty());
        let keeper = begin(&memory, BOOT, Default::default()).unwrap();
        let mut store = Calm::of(keeper, memory);
        store.volume("b", EXTENT);
        store.ask(Command::Shutdown).unwrap();
        let after = recover(&store.memory, BOOT).unwrap();
        assert!(after.superblock.table_generation > superblock.table_generation);
        assert!(Page::decode(&superblock.uuid, 0, &block(&store.memory, at).0).is_some());
    }

    #[test]
    fn a_superblock_that_was_the_newer_one_is_not_written_over() {
        let memory = store();
        let (_, [at, _]) = places(&memory);
        memory.rot_at(at, 3000);
        let found = look(&memory);
        assert!(found.mends.is_empty() && found.faults.is_empty());
        assert!(found.notes[0].contains("whether it was the newer one is not known"), "{:?}", found.notes);
        // Opened in spite of that, it is whole again.
        drop(begin(&memory, BOOT, Default::default()).unwrap());
        assert!(look(&memory).notes.is_empty());
        // The next opener has written to the journal, which only its own superblock allows.
        let keeper = begin(&memory, BOOT, Default::default()).unwrap();
        let mut store = Calm::of(keeper, memory);
        let (volume, _) = store.opened("a");
        store.request(volume, RequestKind::Write, 0, 8 * EXTENT);
        store.ask(Command::Flush).unwrap();
        let (_, [at, _]) = places(&store.memory);
        store.memory.rot_at(at, 3000);
        let found = look(&store.memory);
        assert!(found.mends.is_empty());
        assert!(found.faults[0].contains("it was the newer one"), "{:?}", found.faults);
    }

    #[test]
    fn a_drive_that_does_not_keep_what_it_is_given_is_told_of() {
        let memory = store();
        let ([at, _], _) = places(&memory);
        memory.rot_at(at, 3000);
        let mends = look(&memory).mends;
        let deaf = crate::testing::Deaf(memory);
        assert!(matches!(mend(&deaf, &mends), Err(StoreError::Damaged { offset, .. }) if offset == at));
    }
}

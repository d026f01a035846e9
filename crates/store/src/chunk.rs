//! What some slots in a row hold, in little memory.

use crate::format::{Entry, Kind};

/// Slots of a chunk.
pub const CHUNK: u32 = 256;
const LEN: usize = CHUNK as usize;
/// What stands for a free slot among extents. No slot holds that one, as what it holds ends before `u32::MAX`.
const NOTHING: u32 = u32::MAX;

/// From slot `first` of the chunk on: `entry`, and then what follows it (see [`follows`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    first: u8,
    entry: Entry,
}

/// See the module.
#[derive(Debug, Default)]
pub enum Chunk {
    #[default]
    Free,
    /// In order of their first slots, the first of which is 0.
    Runs(Box<[Run]>),
    /// Data of one layer, always the same granules, or nothing.
    Alike {
        layer: u32,
        mask: u16,
        vextents: Box<[u32; LEN]>,
    },
    Any(Box<[Entry; LEN]>),
}

/// `entry` continued by so many slots.
fn follows(entry: Entry, by: u32) -> Entry {
    match entry.kind {
        Kind::Data => Entry { vextent: entry.vextent.wrapping_add(by), ..entry },
        Kind::Free | Kind::Zero => entry,
    }
}

impl Chunk {
    pub fn is_free(&self) -> bool {
        matches!(self, Self::Free)
    }

    pub fn get(&self, at: u32) -> Entry {
        match self {
            Self::Free => Entry::default(),
            Self::Runs(runs) => {
                let run = runs[runs.partition_point(|run| u32::from(run.first) <= at) - 1];
                follows(run.entry, at - u32::from(run.first))
            }
            Self::Alike { layer, mask, vextents } => alike(*layer, *mask, vextents[at as usize]),
            Self::Any(entries) => entries[at as usize],
        }
    }

    /// All of them.
    fn entries(&self) -> [Entry; LEN] {
        let mut entries = [Entry::default(); LEN];
        match self {
            Self::Free => {}
            Self::Runs(runs) => {
                for (n, run) in runs.iter().enumerate() {
                    let end = runs.get(n + 1).map_or(LEN, |next| usize::from(next.first));
                    let slots = &mut entries[usize::from(run.first)..end];
                    slots.iter_mut().zip(0..).for_each(|(slot, by)| *slot = follows(run.entry, by));
                }
            }
            Self::Alike { layer, mask, vextents } => {
                let slots = entries.iter_mut().zip(vextents.iter());
                slots.for_each(|(slot, vextent)| *slot = alike(*layer, *mask, *vextent));
            }
            Self::Any(any) => entries = **any,
        }
        entries
    }

    /// Returns what was there.
    pub fn set(&mut self, at: u32, entry: Entry) -> Entry {
        let before = self.get(at);
        if before != entry {
            if !matches!(self, Self::Any(_)) {
                *self = Self::Any(Box::new(self.entries()));
            }
            if let Self::Any(entries) = self {
                entries[at as usize] = entry;
            }
        }
        before
    }

    /// From slot `at` on it holds `entries`, and is packed.
    pub fn put(&mut self, at: u32, entries: &[Entry]) {
        let mut all = self.entries();
        all[at as usize..at as usize + entries.len()].copy_from_slice(entries);
        *self = Self::packed(&all).unwrap_or_else(|| Self::Any(Box::new(all)));
    }

    /// Take the smallest form.
    pub fn pack(&mut self) {
        if let Self::Any(entries) = self {
            if let Some(packed) = Self::packed(entries) {
                *self = packed;
            }
        }
    }

    /// The smallest form of these; None if that is as they are.
    fn packed(entries: &[Entry; LEN]) -> Option<Self> {
        let starts = |n: &usize| *n == 0 || entries[*n] != follows(entries[*n - 1], 1);
        let runs = (0..LEN).filter(starts).count();
        if runs * size_of::<Run>() <= LEN * size_of::<u32>() {
            let run = |n: usize| Run { first: n as u8, entry: entries[n] };
            let runs: Box<[Run]> = (0..LEN).filter(starts).map(run).collect();
            return Some(if *runs == [Run::default()] { Self::Free } else { Self::Runs(runs) });
        }
        let first = entries.iter().find(|entry| entry.kind != Kind::Free)?;
        let (layer, mask) = (first.layer, first.mask);
        let mut vextents = Box::new([NOTHING; LEN]);
        for (vextent, entry) in vextents.iter_mut().zip(entries.iter()) {
            if entry.kind == Kind::Data {
                *vextent = entry.vextent;
            }
            if alike(layer, mask, *vextent) != *entry {
                return None;
            }
        }
        Some(Self::Alike { layer, mask, vextents })
    }
}

fn alike(layer: u32, mask: u16, vextent: u32) -> Entry {
    match vextent {
        NOTHING => Entry::default(),
        vextent => Entry::data(layer, vextent, mask),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(entry: impl Fn(u32) -> Entry) -> Chunk {
        let mut chunk = Chunk::default();
        (0..CHUNK).for_each(|n| {
            chunk.set(n, entry(n));
        });
        chunk
    }

    fn scattered(n: u32) -> u32 {
        n.wrapping_mul(2_654_435_761) >> 8
    }

    #[test]
    fn every_form_says_the_same() {
        type Case = (&'static str, fn(u32) -> Entry);
        let cases: [Case; 8] = [
            ("Free", |_| Entry::default()),
            ("Runs", |n| Entry::data(3, 1000 + n, 0xffff)),
            ("Runs", |n| if n < 77 { Entry::data(3, n, 0xffff) } else { Entry::default() }),
            ("Runs", |n| if n % 64 == 0 { Entry::zero(n, 5, 7, 1) } else { Entry::data(4, n, 3) }),
            ("Alike", |n| Entry::data(3, scattered(n), 1 << 7)),
            ("Alike", |n| if n % 2 == 0 { Entry::data(9, n, 1) } else { Entry::default() }),
            ("Any", |n| Entry::data(n % 2, scattered(n), 1)),
            ("Any", |n| Entry::data(3, if n == 9 { NOTHING } else { scattered(n) }, 1)),
        ];
        for (name, entry) in cases {
            let mut chunk = chunk(entry);
            chunk.pack();
            assert!(format!("{chunk:?}").starts_with(name), "{name}: {chunk:?}");
            let all: Vec<Entry> = (0..CHUNK).map(entry).collect();
            assert_eq!(chunk.entries()[..], all);
            assert_eq!((0..CHUNK).map(|n| chunk.get(n)).collect::<Vec<_>>(), all);
        }
    }

    #[test]
    fn a_packed_chunk_can_be_changed() {
        for n in [0, 100, CHUNK - 1] {
            let mut chunk = chunk(|n| Entry::data(3, n, 0xffff));
            chunk.pack();
            assert_eq!(chunk.set(n, Entry::zero(1, 2, 3, 4)), Entry::data(3, n, 0xffff));
            chunk.pack();
            assert_eq!(chunk.get(n), Entry::zero(1, 2, 3, 4));
            assert_eq!(chunk.set(n, Entry::data(3, n, 0xffff)), Entry::zero(1, 2, 3, 4));
            chunk.pack();
            assert!(matches!(&chunk, Chunk::Runs(runs) if runs.len() == 1));
        }
    }

    #[test]
    fn tombstones_do_not_count_on() {
        let mut chunk = chunk(|_| Entry::zero(3, 100, 2, 0xffff));
        chunk.pack();
        assert!(chunk.entries().iter().all(|entry| *entry == Entry::zero(3, 100, 2, 0xffff)));
    }
}

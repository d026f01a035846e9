//! Whether what the extents of a closed store hold is what was written there.

use crate::format::{zeroed, Block, Kind};
use crate::geometry::BLOCK;
use crate::medium::Medium;
use crate::recovery::Recovered;
use crate::sums::checksum;

/// Blocks of a read.
const AT_ONCE: u64 = 256;
/// Bytes between two words of progress.
const STEP: u64 = 16 << 20;
/// Faults that are told one by one.
const MOST_FAULTS: usize = 100;

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Blocks of 4096 bytes that were read, and of these the ones that have checksums.
    pub blocks: u64,
    pub verified: u64,
    /// Blocks that are not what was written, and those that the drive cannot read.
    pub bad: u64,
    pub unreadable: u64,
    /// The first of these, each with its place.
    pub faults: Vec<String>,
}

/// Read all that is in use, and hold blocks of volumes with integrity against their checksums. `progress` has the bytes that were
/// read and all that there are, now and then; None if it wants no more.
pub fn verify(
    medium: &dyn Medium,
    store: &Recovered,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Option<Verified> {
    let extents = store.superblock.layout.extents;
    let blocks_of = |mask: u16| u64::from(mask.count_ones()) << extents.granule_shift;
    let used = || store.slots.iter().filter(|(_, entry)| entry.kind == Kind::Data);
    let total = used().map(|(_, entry)| blocks_of(entry.mask)).sum();
    let mut walk = Walk {
        medium,
        store,
        sealed: store.catalog.layers_with_integrity(),
        found: Verified::default(),
        buffer: zeroed(AT_ONCE as usize),
    };
    let (mut run, mut done, mut told) = ((0, 0), 0, 0);
    for (slot, entry) in used() {
        let Some(place) = store.superblock.layout.place(slot) else { continue };
        let granules = (0..extents.granules()).filter(|granule| entry.mask >> granule & 1 == 1);
        for at in granules.map(|granule| place + (u64::from(granule) << extents.granule_shift)) {
            let (start, len) = run;
            if start + len == at && len + extents.granule() <= AT_ONCE * BLOCK {
                run = (start, len + extents.granule());
                continue;
            }
            walk.read(start, len);
            done += len;
            run = (at, extents.granule());
            if done - told >= STEP {
                told = done;
                if !progress(done, total) {
                    return None;
                }
            }
        }
    }
    walk.read(run.0, run.1);
    progress(total, total).then_some(walk.found)
}

struct Walk<'a> {
    medium: &'a dyn Medium,
    store: &'a Recovered,
    sealed: std::collections::HashSet<u32>,
    found: Verified,
    buffer: Box<[Block]>,
}

impl Walk<'_> {
    fn read(&mut self, start: u64, len: u64) {
        let count = (len / BLOCK) as usize;
        if self.medium.read(start, &mut self.buffer[..count]).is_ok() {
            return (0..count).for_each(|n| self.judge(start + n as u64 * BLOCK, n));
        }
        for at in (start..start + len).step_by(BLOCK as usize) {
            match self.medium.read(at, &mut self.buffer[..1]) {
                Ok(()) => self.judge(at, 0),
                Err(error) => {
                    self.found.unreadable += 1;
                    self.tell(at, &format!("cannot be read: {error}"));
                }
            }
        }
    }

    /// Block `n` of the buffer was read from byte `at`.
    fn judge(&mut self, at: u64, n: usize) {
        self.found.blocks += 1;
        let layout = &self.store.superblock.layout;
        let layer = layout.slot_at(at).map_or(0, |(slot, _)| self.store.slots.get(slot).layer);
        if !self.sealed.contains(&layer) {
            return;
        }
        self.found.verified += 1;
        if self.store.sums.at(at) != Some(checksum(&self.buffer[n].0)) {
            self.found.bad += 1;
            self.tell(at, "is not what was written there");
        }
    }

    fn tell(&mut self, at: u64, what: &str) {
        if self.found.faults.len() >= MOST_FAULTS {
            return;
        }
        let layout = &self.store.superblock.layout;
        let Some((slot, within)) = layout.slot_at(at) else { return };
        let entry = self.store.slots.get(slot);
        let byte = (u64::from(entry.vextent) << layout.extents.shift) + within;
        let whose = self.store.catalog.whose(entry.layer);
        self.found
            .faults
            .push(format!("the block at byte {byte} of {whose}, byte {at} of the drive, {what}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Calm;
    use crate::{recover, Command, RequestKind, Run};

    const EXTENT: u64 = 16 << 10;

    #[test]
    fn it_tells_of_each_bad_block_where_it_is() {
        let mut store = Calm::new(64 << 20, EXTENT);
        let (sealed, map) = store.volume_with("sealed", 16 * EXTENT, true);
        store.request(sealed, RequestKind::Write, 0, 6 * EXTENT);
        store.snapshot("sealed", "old");
        store.request(sealed, RequestKind::Write, BLOCK, EXTENT);
        let (plain, other) = store.volume("plain", 100 * EXTENT);
        store.request(plain, RequestKind::Write, 0, 40 * EXTENT);
        let place = |map: &crate::Map, at: u64| match map.read(at, BLOCK) {
            Run::At { at, .. } => at,
            Run::Zero { .. } => panic!("nothing is at {at}"),
        };
        let (live, frozen, lost) =
            (place(&map, EXTENT), place(&map, 5 * EXTENT), place(&other, 7 * EXTENT + BLOCK));
        for volume in [sealed, plain] {
            store.ask(Command::Close { volume }).unwrap();
        }
        store.ask(Command::Shutdown).unwrap();
        let look = |store: &Calm| {
            let mut last = (0, 1);
            let recovered = recover(&store.memory, [1; 16]).unwrap();
            let found = verify(&store.memory, &recovered, &mut |done, total| {
                assert!(done >= last.0 && done <= total);
                last = (done, total);
                true
            });
            assert_eq!((last.0, last.1), (47 * EXTENT, 47 * EXTENT));
            found.expect("nobody stops it")
        };
        let clean = look(&store);
        assert_eq!((clean.blocks, clean.verified, clean.faults.len()), (47 * 4, 28, 0));
        store.memory.rot(live);
        store.memory.rot(frozen);
        store.memory.rot(place(&other, 0));
        store.memory.spoil(lost);
        let mut found = look(&store);
        found.faults.sort();
        let (mine, theirs) = (EXTENT, 5 * EXTENT);
        let at = 7 * EXTENT + BLOCK;
        assert_eq!((found.bad, found.unreadable, found.blocks), (2, 1, 47 * 4 - 1));
        assert_eq!(
            found.faults,
            [
                format!("the block at byte {at} of volume \"plain\", byte {lost} of the drive, cannot be read: Input/output error (os error 5)"),
                format!("the block at byte {mine} of volume \"sealed\", byte {live} of the drive, is not what was written there"),
                format!("the block at byte {theirs} of snapshot \"old\" of volume \"sealed\", byte {frozen} of the drive, is not what was written there"),
            ]
        );
        let recovered = recover(&store.memory, [1; 16]).unwrap();
        assert_eq!(verify(&store.memory, &recovered, &mut |_, _| false), None);
    }
}

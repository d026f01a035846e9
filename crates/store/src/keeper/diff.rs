//! What differs between two points of a volume, looked for in steps.
//!
//! Layers that only one of the two has are told apart when it begins. A layer that is reaped meanwhile is one of these if and only
//! if the one that gets what is left of it is, so it does not matter which of the two a slot has when it is looked at.

use std::collections::HashSet;

use super::commands::{Answer, Running};
use super::Keeper;
use crate::error::StoreError;
use crate::format::Entry;
use crate::geometry::Extents;

/// Ranges of a volume that were written or discarded, as they were found.
#[derive(Clone, Debug, Default)]
pub struct Ranges {
    /// Bytes of the volume.
    size: u64,
    pieces: Vec<(u64, u64)>,
}

impl Ranges {
    /// Bytes: from, length; in order, apart, and none behind the volume's end. A volume of a TiB may have millions, so whoever asked
    /// sorts them, and not the keeper.
    pub fn sorted(mut self) -> Vec<(u64, u64)> {
        self.pieces.sort_unstable();
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (at, len) in self.pieces {
            let end = (at + len).min(self.size);
            match ranges.last_mut() {
                _ if at >= self.size => {}
                Some((start, before)) if at <= *start + *before => *before = (*before).max(end - *start),
                _ => ranges.push((at, end - at)),
            }
        }
        ranges
    }

    /// It lies behind the last one, or begins anew.
    fn push(&mut self, at: u64, len: u64) {
        match self.pieces.last_mut() {
            Some((start, before)) if *start + *before == at => *before += len,
            _ => self.pieces.push((at, len)),
        }
    }

    /// What `entry` speaks of.
    fn add(&mut self, extents: Extents, entry: &Entry) {
        let start = u64::from(entry.vextent) << extents.shift;
        if entry.mask == extents.full() {
            return self.push(start, u64::from(entry.count) << extents.shift);
        }
        for n in 0..u64::from(entry.count) {
            let granules = (0..extents.granules()).filter(|bit| entry.mask >> bit & 1 == 1);
            let at = start + (n << extents.shift);
            granules.for_each(|bit| self.push(at + u64::from(bit) * extents.granule(), extents.granule()));
        }
    }
}

/// A comparison under way.
pub(super) struct Comparing {
    /// Layers that only one of the points has.
    differ: HashSet<u32>,
    /// The next slot to look at.
    at: u32,
    ranges: Ranges,
}

impl Comparing {
    /// Slots before this one were looked at.
    #[cfg(test)]
    pub fn at(&self) -> u32 {
        self.at
    }
}

impl Keeper {
    /// Begin to look for ranges of `volume` that were written or discarded in layers that only one of the two points has.
    pub(super) fn compare(
        &mut self,
        number: u64,
        volume: &str,
        from: Option<String>,
        to: Option<String>,
    ) -> Result<(), StoreError> {
        let of = |name: Option<String>| match name {
            Some(name) => self.snapshot_of(volume, &name).map(|one| (one.layer, one.size)),
            None => self.volume(volume).map(|volume| (volume.live, volume.size)),
        };
        let old = from
            .map(|name| of(Some(name)))
            .transpose()?
            .map_or(Vec::new(), |(layer, _)| self.catalog.chain(layer));
        let (layer, size) = of(to)?;
        let old: HashSet<u32> = old.into_iter().collect();
        let new = self.catalog.chain(layer).into_iter().collect();
        let differ = old.symmetric_difference(&new).copied().collect();
        let ranges = Ranges { size, pieces: Vec::new() };
        self.running = Some((number, Running::Comparing(Box::new(Comparing { differ, at: 0, ranges }))));
        Ok(())
    }

    /// Go on, as far as one turn goes.
    pub(super) fn go_on_comparing(&mut self, number: u64, mut comparing: Box<Comparing>) {
        let extents = self.extents();
        let end = comparing.at.saturating_add(self.looks).min(self.slots.len());
        for (_, entry) in self.slots.range(comparing.at..end) {
            if comparing.differ.contains(&entry.layer) {
                comparing.ranges.add(extents, &entry);
            }
        }
        self.looks -= end - comparing.at;
        comparing.at = end;
        match end == self.slots.len() {
            true => self.answers.push_back((number, Ok(Answer::Ranges(comparing.ranges)))),
            false => self.running = Some((number, Running::Comparing(comparing))),
        }
    }

    /// Slot `slot` holds `entry` now. What a guest has given up and written anew may be where nobody looks any more.
    pub(super) fn note_for_comparing(&mut self, slot: u32, entry: &Entry) {
        let extents = self.extents();
        if let Some((_, Running::Comparing(comparing))) = &mut self.running {
            if slot < comparing.at && comparing.differ.contains(&entry.layer) {
                comparing.ranges.add(extents, entry);
            }
        }
    }
}

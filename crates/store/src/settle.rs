//! What blocks hold that were being written in place when the process or the power ended.
//!
//! The journal says durably what a block is about to hold before it is written. So it holds what it held before, or that, or, after
//! a loss of power, torn parts of both; anything else would be rot, and cannot be told from a torn block.

use std::collections::{BTreeMap, HashSet};

use crate::catalog::Catalog;
use crate::error::StoreError;
use crate::format::{Kind, SlotSums};
use crate::geometry::{Layout, BLOCK};
use crate::medium::{read, Medium};
use crate::slots::Slots;
use crate::sums::{checksum, Sums};

/// Blocks, by their byte on the drive, and the checksums that each may have.
#[derive(Default)]
pub struct Doubts(BTreeMap<u64, Vec<u32>>);

fn blocks<'a>(record: &'a SlotSums, layout: &Layout) -> impl Iterator<Item = (u64, u32)> + 'a {
    let place = layout.place(record.slot).unwrap_or(0) + u64::from(record.first) * BLOCK;
    (place..).step_by(BLOCK as usize).zip(record.sums.iter().copied())
}

impl Doubts {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A record counts. `settled`: what was written for it is on the drive.
    pub fn replay(
        &mut self,
        record: &SlotSums,
        settled: bool,
        layout: &Layout,
        sums: &Sums,
        slots: &mut Slots,
    ) {
        if record.in_place && !settled {
            return self.suspect(record, layout, sums);
        }
        for (at, sum) in blocks(record, layout) {
            self.0.remove(&at);
            sums.set(at, sum).into_iter().for_each(|page| slots.set_dirty_sums(page));
        }
    }

    /// These blocks may have been written.
    pub fn suspect(&mut self, record: &SlotSums, layout: &Layout, sums: &Sums) {
        for (at, sum) in blocks(record, layout) {
            self.0.entry(at).or_insert_with(|| sums.at(at).into_iter().collect()).push(sum);
        }
    }

    /// Look what they hold. Returns those that hold nothing of what they may; they have the checksum of what is there from here on.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn settle(
        self,
        medium: &dyn Medium,
        layout: &Layout,
        catalog: &Catalog,
        sums: &Sums,
        slots: &mut Slots,
    ) -> Result<Vec<u64>, StoreError> {
        let sealed = catalog.layers_with_integrity();
        let mut torn = Vec::new();
        for (at, may_be) in self.0 {
            if !is_in_use(at, layout, slots, &sealed) {
                continue;
            }
            let sum = checksum(&read(medium, at, 1)?[0].0);
            if !may_be.contains(&sum) {
                torn.push(at);
            }
            sums.set(at, sum).into_iter().for_each(|page| slots.set_dirty_sums(page));
        }
        Ok(torn)
    }
}

/// Some layer with integrity has the block at byte `at`.
fn is_in_use(at: u64, layout: &Layout, slots: &Slots, sealed: &HashSet<u32>) -> bool {
    let Some((slot, within)) = layout.slot_at(at) else { return false };
    let entry = slots.get(slot);
    let granule = within >> layout.extents.granule_shift;
    entry.kind == Kind::Data && sealed.contains(&entry.layer) && entry.mask >> granule & 1 == 1
}

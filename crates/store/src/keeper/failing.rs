//! Writes in place that the drive refused, of blocks that have checksums.
//!
//! The journal says what they were to hold, and the drive has that, or what was there before, or torn parts of both. Once the
//! journal says that what was being written is durable, nobody would look any more: so before that it says what is there.

use super::operations::Stage;
use super::sealing::{read, slot_sums};
use super::{Commit, Keeper, Then};
use crate::format::{zeroed, Block};
use crate::geometry::BLOCK;
use crate::sums::checksum;

impl Keeper {
    /// An I/O of step `id` failed.
    pub(super) fn step_failed(&mut self, id: u32, errno: i32) {
        let Some(operation) = self.operations[id as usize].as_mut() else { return };
        let in_place = operation.sealing.as_ref().is_some_and(|sealing| sealing.in_place);
        match (&operation.stage, &operation.overwrite) {
            (Stage::Record, Some(overwrite)) if in_place && self.failed.is_none() => {
                let (at, buffer) = (overwrite.at, zeroed(overwrite.sums.len()));
                operation.stage = Stage::Look { errno };
                self.out.push_back(read(id, at, buffer));
            }
            (Stage::Look { errno }, _) => {
                let errno = *errno;
                self.record_what_is_there(id, errno, &[]);
            }
            _ => self.finish(id, Err(errno)),
        }
    }

    /// Have the journal say which checksums the blocks of step `id` have, as they were `found`, or as they were before. Of a torn
    /// one that is an error for whoever reads it, as it should be.
    pub(super) fn record_what_is_there(&mut self, id: u32, errno: i32, found: &[Block]) {
        let Some(operation) = self.operations[id as usize].as_mut() else { return };
        let Some(overwrite) = &operation.overwrite else { return };
        let at = (overwrite.at..).step_by(BLOCK as usize);
        let sums: Vec<u32> = (at.zip(&overwrite.sums).enumerate())
            .map(|(n, (at, new))| match found.get(n).map(|block| checksum(&block.0)) {
                Some(sum) if sum == *new => sum,
                _ => self.sums.at(at).unwrap_or(0),
            })
            .collect();
        let sums = slot_sums(&self.superblock.layout, overwrite.at, &sums, false);
        operation.stage = Stage::Failed { errno };
        match self.failed {
            Some(errno) => self.finish(id, Err(errno)),
            None => self.record(Commit { sums, then: Then::Operation(id), ..Commit::default() }),
        }
    }
}

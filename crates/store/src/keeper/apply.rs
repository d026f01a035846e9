//! Changes that count now.

use super::{Commit, Edit, Keeper, MapChange, Then};
use crate::format::{Entry, JournalBlock, Kind, SLOT_RECORD_LEN};
use crate::geometry::BLOCK;
use crate::io::{Action, Data, Io, Purpose};
use crate::journal::{Item, Records};
use crate::map::{Node, FROZEN};
use crate::mutants::{self, Mutant};

/// Something out of reach, to be used again when `epoch` has passed and what freed it, block `seq` of the journal, is durable.
pub(super) struct Retired<T> {
    pub epoch: u64,
    pub seq: u64,
    pub what: T,
}

impl Keeper {
    /// Have the journal say what `commit` changes.
    pub(super) fn record(&mut self, commit: Commit) {
        let count = commit.slots.len() + commit.sums.len() + commit.catalog.len();
        let mut records = Records::with_capacity(count, commit.slots.len() * SLOT_RECORD_LEN);
        for (slot, entry) in &commit.slots {
            records.push(|out| JournalBlock::put_slot(out, *slot, entry));
        }
        for sums in &commit.sums {
            records.push(|out| JournalBlock::put_sums(out, sums));
        }
        for change in &commit.catalog {
            records.push(|out| JournalBlock::put_change(out, change));
        }
        let durable = commit.durable && !mutants::is(Mutant::IntentInCache);
        self.journal.push(Item { records, commit, durable });
    }

    pub(super) fn write_journal(&mut self) {
        if let (Some(errno), true) = (self.failed, self.journal.pending() > 0) {
            return self.fail(errno);
        }
        while let Some(out) = self.journal.next_block() {
            self.out.push_back(Io {
                action: Action::Write { durable: out.durable },
                offset: self.layout().journal_block(out.seq),
                len: BLOCK,
                data: Data::Own(out.block),
                purpose: Purpose::Journal(out.seq),
            });
        }
    }

    /// The record of `commit` is written, in block `seq`.
    pub(super) fn apply(&mut self, seq: u64, commit: Commit) {
        for sums in commit.sums.iter().filter(|sums| !sums.in_place) {
            let at = self.place(sums.slot) + u64::from(sums.first) * BLOCK;
            self.set_sums(at, &sums.sums);
        }
        for (slot, entry) in &commit.slots {
            self.note_given_up(*slot, entry, seq);
            self.slots.set(&self.superblock.layout, *slot, *entry);
            self.note_for_comparing(*slot, entry);
            if entry.kind != Kind::Free {
                self.note_for_reap(entry);
            }
        }
        self.maybe_reapable |= !commit.catalog.is_empty();
        if !commit.catalog.is_empty() && !matches!(commit.then, Then::Reap) {
            self.named = seq + 1;
        }
        if let (Some(scrub), false) = (&mut self.scrub, commit.catalog.is_empty()) {
            scrub.sealed = None;
        }
        for change in commit.catalog {
            self.catalog.apply(change);
        }
        for change in &commit.maps {
            self.edit_map(change);
        }
        let epoch = self.epochs.now();
        let freed = commit.slots.iter().filter(|(_, entry)| entry.kind == Kind::Free);
        self.retired_slots.extend(freed.map(|(slot, _)| Retired { epoch, seq, what: *slot }));
        if self.retired_slots.len() as u64 > self.allocator.free() / 4 {
            // They are of use only when the journal says that what freed them is durable.
            self.flushing.wait_once();
        }
        match commit.then {
            Then::Nothing => {}
            Then::Operation(id) => self.committed(id, seq),
            Then::Command => self.command_committed(),
            Then::Reap => self.reap_committed(),
            Then::Flatten => self.flatten_committed(),
            Then::Marked(waiters) => {
                waiters.into_iter().for_each(|waiter| self.answer_waiter(waiter, Ok(())))
            }
        }
    }

    fn edit_map(&mut self, change: &MapChange) {
        let Some(open) = self.open.get_mut(&change.volume) else { return };
        let mut parts = open.map.parts(change.vextent);
        match change.edit {
            Edit::Put { slot, mask } => {
                // While writes are held the map's own tag is none; the layer's is kept beside it.
                parts.put(crate::map::Part::new(slot, mask, open.tag));
            }
            Edit::Remove { mask } => parts.remove(mask),
            Edit::Retag { slot, layer } => {
                let live =
                    self.catalog.volumes.get(&change.volume).is_some_and(|volume| volume.live == layer);
                parts.retag(slot, if live { open.tag } else { FROZEN });
            }
        }
        if let Some(node) = open.map.publish(&mut open.names, change.vextent, &parts) {
            self.retire_node(change.volume, node);
        }
    }

    fn retire_node(&mut self, volume: u32, node: Node) {
        let epoch = self.epochs.now();
        self.retired_nodes.push_back(Retired { epoch, seq: 0, what: (volume, node) });
    }

    /// Extents that are free but for what may still touch them.
    pub(super) fn retired_extents(&self) -> u64 {
        self.retired_slots.iter().filter(|retired| self.layout().place(retired.what).is_some()).count() as u64
    }

    /// Something waits for reactors to go on.
    pub(super) fn has_to_recycle(&self) -> bool {
        !self.retired_nodes.is_empty()
            || self.retired_slots.front().is_some_and(|one| self.is_marked(one.seq))
    }

    fn may_reuse(&self, one: &Retired<u32>) -> bool {
        self.is_marked(one.seq) && (self.epochs.passed(one.epoch) || mutants::is(Mutant::ReuseBeforeEpoch))
    }

    fn is_marked(&self, seq: u64) -> bool {
        seq < self.journal.marked() || mutants::is(Mutant::ReuseBeforeMark)
    }

    /// Use again what nobody can touch any more.
    pub(super) fn recycle(&mut self) {
        self.give_up_waiting();
        if !self.has_to_recycle() {
            return;
        }
        let oldest = self.retired_slots.front().map(|one| one.epoch);
        let oldest = oldest.into_iter().chain(self.retired_nodes.front().map(|one| one.epoch)).min();
        if oldest.is_some_and(|epoch| !self.epochs.passed(epoch)) {
            self.epochs.advance();
        }
        while self.retired_nodes.front().is_some_and(|retired| self.epochs.passed(retired.epoch)) {
            let Some(Retired { what: (volume, node), .. }) = self.retired_nodes.pop_front() else { break };
            if let Some(open) = self.open.get_mut(&volume) {
                open.names.give(node);
            }
        }
        let mut freed = false;
        while self.retired_slots.front().is_some_and(|one| self.may_reuse(one)) {
            let Some(retired) = self.retired_slots.pop_front() else { break };
            self.allocator.give(retired.what);
            freed = true;
        }
        if freed {
            let starved = std::mem::take(&mut self.starved);
            self.until = starved.iter().map(|(request, until)| (request.token, *until)).collect();
            self.requests.extend(starved.into_iter().map(|(request, _)| request));
        }
    }

    /// The entry of `slot` without the granules in `mask`.
    pub(super) fn without(&self, slot: u32, mask: u16) -> Entry {
        let entry = self.slots.get(slot);
        match entry.mask & !mask {
            0 => Entry::default(),
            rest => Entry { mask: rest, ..entry },
        }
    }
}

//! A step of a request, from its first I/O to its answer.

use super::flushing::Waiter;
use super::sealing::{Overwrite, Sealing};
use super::{Commit, Keeper, Then};
use crate::format::Block;
use crate::io::{Action, Data, Done, Io, Purpose, Request, RequestKind};
use crate::mutants::{self, Mutant};

/// A step under way.
pub(super) struct Operation {
    /// None: a copy for [`flatten`](super::flatten).
    pub request: Option<Request>,
    pub volume: u32,
    /// Bytes of the request that the step does.
    pub bytes: u64,
    /// Extents that it has locked.
    pub locked: Vec<u32>,
    /// Slots taken for it, which are free again if it fails.
    pub taken: Vec<u32>,
    /// What changes when its data is there.
    pub commit: Commit,
    pub stage: Stage,
    /// Of the epoch in which it looked into the map.
    pub held: u8,
    pub sealing: Option<Sealing>,
    pub overwrite: Option<Overwrite>,
}

impl Operation {
    /// A snapshot waits for it.
    fn is_change(&self) -> bool {
        self.request.is_none_or(|request| request.kind != RequestKind::Read)
    }
}

/// What comes next when the I/O under way is done.
pub(super) enum Stage {
    /// The buffer is read, from byte `from`: put the request's bytes into it.
    Merge { merge: Merge, from: u64, to: u64 },
    /// The buffer is complete: write it to this byte.
    Write { to: u64 },
    /// The journal says what is to be there: write it.
    Intend { to: u64, buffer: Box<[Block]> },
    /// The data is written: have the journal say where it is.
    Record,
    /// The journal says it.
    Flush,
    /// The blocks of a read are here: see that they are what was written.
    Check { from: u64 },
    /// The guest has them.
    Give,
    /// The drive refused what was to be written in place, with this errno: see what is there.
    Look { errno: i32 },
    /// The journal says it.
    Failed { errno: i32 },
}

/// What a request changes in a granule.
#[derive(Clone, Copy)]
pub(super) enum Merge {
    /// `len` bytes of its data, from its begin, to byte `at`.
    Guest {
        at: usize,
        len: u64,
    },
    Zeroes {
        at: usize,
        len: u64,
    },
    /// Nothing: a copy.
    Copy,
}

impl Keeper {
    /// Begin a step with its first I/O.
    pub(super) fn begin(&mut self, operation: Operation, io: impl FnOnce(u32) -> Io) {
        let id = self.enter(operation);
        self.out.push_back(io(id));
        if mutants::is(Mutant::RecordBeforeData) && !self.is_merging(id) {
            self.record_operation(id);
        }
    }

    /// Begin a step that needs no I/O before its record.
    pub(super) fn begin_record(&mut self, operation: Operation) {
        let id = self.enter(operation);
        self.record_operation(id);
    }

    fn is_merging(&self, id: u32) -> bool {
        let operation = self.operations[id as usize].as_ref();
        operation.is_some_and(|operation| !matches!(operation.stage, Stage::Record))
    }

    pub(super) fn enter(&mut self, mut operation: Operation) -> u32 {
        operation.held = self.reader.hold();
        let id = self.free_operations.pop().unwrap_or_else(|| {
            self.operations.push(None);
            self.operations.len() as u32 - 1
        });
        for vextent in &operation.locked {
            self.locks.insert((operation.volume, *vextent), id);
        }
        if let Some(open) = self.open.get_mut(&operation.volume) {
            open.busy += u32::from(operation.is_change());
        }
        self.operations[id as usize] = Some(operation);
        id
    }

    /// An I/O of step `id` is done.
    pub(super) fn advance(&mut self, id: u32, io: Io, result: Result<(), i32>) {
        if let Err(errno) = result {
            return self.step_failed(id, errno);
        }
        let Some(operation) = self.operations[id as usize].as_mut() else { return };
        match operation.stage {
            Stage::Merge { merge, from, to } => {
                let Data::Own(mut buffer) = io.data else { return };
                operation.stage = Stage::Write { to };
                if let Err(errno) = self.unseal(id, from, &mut buffer) {
                    return self.finish(id, Err(errno));
                }
                let Some(operation) = self.operations[id as usize].as_ref() else { return };
                let token = operation.request.map_or(0, |request| request.token);
                match merge {
                    Merge::Guest { at, len } => {
                        self.out.push_back(Io {
                            action: Action::Fill { token, skip: 0, at },
                            offset: 0,
                            len,
                            data: Data::Own(buffer),
                            purpose: Purpose::Operation(id),
                        });
                        return;
                    }
                    Merge::Zeroes { at, len } => zero(&mut buffer, at, len as usize),
                    Merge::Copy => {}
                }
                self.write_buffer(id, to, buffer);
            }
            Stage::Write { to } => {
                let Data::Own(buffer) = io.data else { return };
                self.write_buffer(id, to, buffer);
            }
            Stage::Record => {
                if let Some(overwrite) = operation.overwrite.take() {
                    self.end_overwrite(&overwrite, true);
                }
                self.record_operation(id);
            }
            Stage::Check { from } => {
                let Data::Own(buffer) = io.data else { return };
                self.give_blocks(id, from, buffer);
            }
            Stage::Give => self.finish(id, Ok(())),
            Stage::Look { errno } => {
                let Data::Own(found) = io.data else { return };
                self.record_what_is_there(id, errno, &found);
            }
            Stage::Intend { .. } | Stage::Flush | Stage::Failed { .. } => {}
        }
    }

    pub(super) fn write_buffer(&mut self, id: u32, to: u64, buffer: Box<[Block]>) {
        let Some(buffer) = self.seal(id, to, buffer) else { return };
        if let Some(operation) = self.operations[id as usize].as_mut() {
            operation.stage = Stage::Record;
        }
        self.out.push_back(Io {
            action: Action::Write { durable: false },
            offset: to,
            len: buffer.len() as u64 * crate::geometry::BLOCK,
            data: Data::Own(buffer),
            purpose: Purpose::Operation(id),
        });
    }

    fn record_operation(&mut self, id: u32) {
        let Some(operation) = self.operations[id as usize].as_mut() else { return };
        operation.stage = Stage::Flush;
        let mut commit = std::mem::take(&mut operation.commit);
        if commit.slots.is_empty() && commit.maps.is_empty() && commit.sums.is_empty() {
            return self.counted(id);
        }
        if let Some(errno) = self.failed {
            return self.finish(id, Err(errno));
        }
        commit.then = Then::Operation(id);
        self.record(commit);
    }

    /// The record of step `id` is written, in block `seq` of the journal.
    pub(super) fn committed(&mut self, id: u32, seq: u64) {
        let Some(operation) = self.operations[id as usize].as_mut() else { return };
        match std::mem::replace(&mut operation.stage, Stage::Flush) {
            Stage::Intend { to, buffer } => self.overwrite(id, seq, to, buffer),
            Stage::Failed { errno } => self.finish(id, Err(errno)),
            _ => self.counted(id),
        }
    }

    /// What step `id` changed counts.
    fn counted(&mut self, id: u32) {
        self.update_unmarked();
        let Some(operation) = self.operations[id as usize].as_mut() else { return };
        operation.taken.clear();
        match operation.request.is_some_and(|request| request.durable) {
            true => self.flushing.wait(Waiter::Operation(id)),
            false => self.finish(id, Ok(())),
        }
    }

    /// Step `id` has ended.
    pub(super) fn finish(&mut self, id: u32, result: Result<(), i32>) {
        let Some(operation) = self.operations[id as usize].take() else { return };
        self.free_operations.push(id);
        self.reader.end(&self.epochs, operation.held);
        if let Some(overwrite) = &operation.overwrite {
            self.end_overwrite(overwrite, false);
        }
        for slot in &operation.taken {
            // No record ever named it.
            self.allocator.give(*slot);
        }
        for vextent in &operation.locked {
            self.locks.remove(&(operation.volume, *vextent));
        }
        self.unblock(id);
        if let Some(open) = self.open.get_mut(&operation.volume) {
            open.busy -= u32::from(operation.is_change());
        }
        match operation.request {
            Some(request) => {
                let result = result.map(|()| operation.bytes);
                self.done.push_back(Done { token: request.token, result });
            }
            None => self.copied(result),
        }
    }

    /// Whoever waited for the locks of `owner` may go on.
    pub(super) fn unblock(&mut self, owner: u32) {
        if let Some(waiting) = self.blocked.remove(&owner) {
            self.requests.extend(waiting);
        }
    }
}

fn zero(buffer: &mut [Block], at: usize, len: usize) {
    let size = crate::geometry::BLOCK as usize;
    for n in at..at + len {
        buffer[n / size].0[n % size] = 0;
    }
}

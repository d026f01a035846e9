//! What is made durable, and how the journal says so.
//!
//! A flush makes durable what was completed before it. If records are among that, a block of the journal then says so, durably:
//! after a loss of power replay takes no record that none of these blocks covers, since its data may not be there.

use super::{Commit, Keeper, Then};
use crate::io::{Action, Data, Done, Io, Purpose};
use crate::mutants::{self, Mutant};

/// Who waits for a flush.
#[derive(Debug)]
pub(super) enum Waiter {
    Request(u64),
    Operation(u32),
    Command,
    Flatten,
    Nobody,
}

#[derive(Default)]
pub(super) struct Flushing {
    waiting: Vec<Waiter>,
    /// What the flush under way covers of the journal, and of what is written in place; and who waits for it.
    under_way: Option<(u64, u64, Vec<Waiter>)>,
}

impl Flushing {
    pub fn wait(&mut self, waiter: Waiter) {
        self.waiting.push(waiter);
    }

    /// There is to be a flush, for nobody.
    pub fn wait_once(&mut self) {
        if self.waiting.is_empty() && self.under_way.is_none() {
            self.waiting.push(Waiter::Nobody);
        }
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_none()
    }

    /// Somebody waits for a flush that can begin.
    pub fn is_due(&self) -> bool {
        !self.waiting.is_empty() && self.under_way.is_none()
    }
}

impl Keeper {
    pub(super) fn start_flush(&mut self) {
        if self.flushing.under_way.is_some() || self.flushing.waiting.is_empty() {
            return;
        }
        let waiters = std::mem::take(&mut self.flushing.waiting);
        self.unsettled = self.in_place.values().sum();
        self.flushing.under_way = Some((self.journal.spoken(), self.ended_in_place(), waiters));
        if mutants::is(Mutant::MarkWithoutFlush) {
            return self.flushed(Ok(()));
        }
        self.out.push_back(Io {
            action: Action::Flush,
            offset: 0,
            len: 0,
            data: Data::None,
            purpose: Purpose::Flush,
        });
    }

    pub(super) fn flushed(&mut self, result: Result<(), i32>) {
        let Some((covers, ended, waiters)) = self.flushing.under_way.take() else { return };
        if result.is_ok() {
            self.journal.settle(ended);
        }
        match (result, self.failed) {
            (Err(errno), _) => waiters.into_iter().for_each(|waiter| self.answer_waiter(waiter, Err(errno))),
            (Ok(()), None) if covers > self.journal.marked() => {
                self.journal.mark(covers, Commit { then: Then::Marked(waiters), ..Commit::default() });
            }
            // After a failure the journal can say nothing, and what it said before is not known to be durable.
            (Ok(()), Some(errno)) if covers > self.journal.marked() => {
                waiters.into_iter().for_each(|waiter| self.answer_waiter(waiter, Err(errno)));
            }
            (Ok(()), _) => waiters.into_iter().for_each(|waiter| self.answer_waiter(waiter, Ok(()))),
        }
    }

    pub(super) fn answer_waiter(&mut self, waiter: Waiter, result: Result<(), i32>) {
        match waiter {
            Waiter::Request(token) => self.done.push_back(Done { token, result: result.map(|()| 0) }),
            Waiter::Operation(id) => self.finish(id, result),
            Waiter::Command => self.command_flushed(result),
            Waiter::Flatten => self.flatten_flushed(result),
            Waiter::Nobody => {}
        }
    }
}

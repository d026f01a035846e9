//! Having the blocks of a volume to oneself.
//!
//! A part of an encrypted block is written by reading the block, changing it and writing all of it. Reactors write whole blocks in
//! place by themselves, and what one of them wrote in between would be lost. So they are kept from it: writes come here while
//! there are such parts, and for a while after them. Volumes with integrity do not need it, as all their writes come here anyway.

use super::{Keeper, Open};
use crate::io::Request;

/// Nanoseconds after the last part of a block.
const LINGER_NS: u64 = 1_000_000_000;

pub(super) struct Exclusive {
    /// Whoever found a block in place before is done when this has passed.
    epoch: u64,
    begun: bool,
    until: u64,
    waiting: Vec<Request>,
}

impl Open {
    /// Reactors may write in place.
    pub(super) fn is_shared(&self) -> bool {
        self.exclusive.is_none()
    }
}

impl Keeper {
    /// Nobody else writes blocks of the request's volume. If somebody may, the request waits.
    pub(super) fn has_to_itself(&mut self, request: &Request) -> bool {
        let until = self.now + LINGER_NS;
        let Some(open) = self.open.get_mut(&request.volume) else { return true };
        match &mut open.exclusive {
            Some(exclusive) => {
                exclusive.until = until;
                if !exclusive.begun {
                    exclusive.waiting.push(*request);
                }
                exclusive.begun
            }
            None => {
                open.map.hold();
                let epoch = self.epochs.now();
                self.epochs.advance();
                open.exclusive = Some(Exclusive { epoch, begun: false, until, waiting: vec![*request] });
                false
            }
        }
    }

    pub(super) fn run_exclusive(&mut self) {
        for open in self.open.values_mut() {
            let Some(exclusive) = &mut open.exclusive else { continue };
            if !exclusive.begun {
                self.epochs.advance();
                exclusive.begun = self.epochs.passed(exclusive.epoch);
                if exclusive.begun {
                    self.requests.extend(exclusive.waiting.drain(..));
                }
            } else if exclusive.until <= self.now && open.busy == 0 && open.parked.is_none() {
                open.exclusive = None;
                if self.failed.is_none() {
                    open.map.set_live(open.tag);
                }
            }
        }
    }

    pub(super) fn is_waiting_for_others(&self) -> bool {
        self.open.values().any(|open| open.exclusive.as_ref().is_some_and(|one| !one.waiting.is_empty()))
    }

    pub(super) fn has_exclusive(&self) -> bool {
        self.open.values().any(|open| !open.is_shared())
    }
}

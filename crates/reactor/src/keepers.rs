//! The keepers of stores that one reactor has.

use crate::core::Shared;
use crate::handle::Reply;
use crate::keeping::Keeping;

/// Nanoseconds that a reactor sleeps at most while a keeper waits for something that rings no bell.
const PATIENCE_NS: u64 = 1_000_000;

/// See the module. A keeper has the same place for as long as it is here.
#[derive(Default)]
pub(crate) struct Keepers(Vec<Option<Box<Keeping>>>);

impl Keepers {
    fn all(&self) -> impl Iterator<Item = &Keeping> {
        self.0.iter().flatten().map(|keeping| &**keeping)
    }

    pub(crate) fn add(&mut self, mut keeping: Box<Keeping>, shared: &mut Shared) {
        let place = self.0.iter().position(Option::is_none).unwrap_or_else(|| {
            self.0.push(None);
            self.0.len() - 1
        });
        keeping.begin_at(place as u16, shared);
        self.0[place] = Some(keeping);
    }

    /// The one of the store that the control side calls `id`.
    pub(crate) fn of(&mut self, id: u64) -> Option<&mut Keeping> {
        self.0.iter_mut().flatten().find(|keeping| keeping.id() == id).map(|keeping| &mut **keeping)
    }

    pub(crate) fn at(&mut self, place: u16) -> Option<&mut Keeping> {
        self.0.get_mut(usize::from(place))?.as_deref_mut()
    }

    /// They have their turn, behind all who may have asked them for something. True if there was something to do.
    #[inline(always)]
    pub(crate) fn turn(&mut self, shared: &mut Shared) -> bool {
        !self.0.is_empty() && self.each_turn(shared)
    }

    fn each_turn(&mut self, shared: &mut Shared) -> bool {
        let mut work = false;
        for place in &mut self.0 {
            let Some(keeping) = place else { continue };
            work |= keeping.turn(shared);
            let id = keeping.id();
            while let Some(message) = keeping.next_event() {
                shared.outbox.send(Reply::StoreSays { id, message });
            }
            if keeping.is_stopping() && keeping.is_at_rest() {
                keeping.end(shared);
                // Its bell may be closed from here on.
                shared.uring.submit_all();
                if let Some(keeping) = place.take() {
                    shared.outbox.send(Reply::Kept(keeping));
                }
            }
        }
        work
    }

    pub(crate) fn stop(&mut self) {
        self.0.iter_mut().flatten().for_each(|keeping| keeping.stop());
    }

    pub(crate) fn are_at_rest(&self) -> bool {
        self.all().all(Keeping::is_at_rest)
    }

    /// The reactor wants to sleep: bells ring from here on. False if there is something to do.
    pub(crate) fn may_sleep(&self) -> bool {
        let mut may = true;
        for keeping in self.all() {
            // Each of them, so that each bell rings.
            may &= keeping.may_sleep();
        }
        may
    }

    pub(crate) fn awake(&self) {
        self.all().for_each(Keeping::awake);
    }

    /// Nanoseconds to sleep at most.
    pub(crate) fn patience(&self) -> Option<u64> {
        self.all().any(Keeping::needs_turns).then_some(PATIENCE_NS)
    }
}

//! A request on its way to a store's keeper, which may run on another reactor, and back.

use std::cell::Cell;
use std::sync::Arc;

use ringstone_rbd::{Completions, Ticket};
use ringstone_store::{Request, RequestKind};

/// One for each slot of a queue of a store's volume. It is its queue's, and the keeper's from [`send`](Self::send) until the
/// answer is back.
pub(crate) struct Errand {
    ask: Ticket,
    answer: Ticket,
    request: Cell<Request>,
    /// What is written. The queue keeps it where it is until the answer is back.
    iovecs: Cell<(*const libc::iovec, usize)>,
}

// SAFETY: the cells are read and written by whoever has the errand, which goes from one thread to another through the tickets'
// stacks alone; these order what is done before and after. The iovecs are guest memory, kept alive as the field says.
unsafe impl Send for Errand {}
// SAFETY: as above.
unsafe impl Sync for Errand {}

impl Default for Errand {
    fn default() -> Self {
        let request =
            Request { token: 0, volume: 0, kind: RequestKind::Flush, offset: 0, len: 0, durable: false };
        Self {
            ask: Ticket::default(),
            answer: Ticket::default(),
            request: Cell::new(request),
            iovecs: Cell::new((std::ptr::null(), 0)),
        }
    }
}

impl Errand {
    /// Ask the keeper behind `inbox`; the answer comes out of `returned` with `tag`: bytes, or a negated errno.
    ///
    /// # Safety
    /// The errand and the iovecs stay where they are until then.
    pub(crate) unsafe fn send(
        &self,
        request: Request,
        iovecs: &[libc::iovec],
        inbox: &Arc<Completions>,
        returned: &Arc<Completions>,
        tag: u64,
    ) {
        let token = std::ptr::from_ref(self).expose_provenance() as u64;
        self.request.set(Request { token, ..request });
        self.iovecs.set((iovecs.as_ptr(), iovecs.len()));
        self.answer.address_to(returned, tag);
        self.ask.address_to(inbox, token);
        self.ask.give_back(0);
    }

    /// The errand behind a token.
    ///
    /// # Safety
    /// The token came out of the keeper's inbox and was not answered yet.
    pub(crate) unsafe fn of<'a>(token: u64) -> &'a Self {
        // SAFETY: `send` made the token of a reference, and the caller promises that what it names is still there.
        unsafe { &*std::ptr::with_exposed_provenance::<Self>(token as usize) }
    }

    pub(crate) fn request(&self) -> Request {
        self.request.get()
    }

    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        let (first, count) = self.iovecs.get();
        if count == 0 {
            return &[];
        }
        // SAFETY: `send`'s caller keeps them where they are until the answer is back.
        unsafe { std::slice::from_raw_parts(first, count) }
    }

    /// Answer; it is its queue's again, and may be gone at once.
    pub(crate) fn answer(&self, result: i64) {
        self.answer.give_back(result);
    }
}

//! One polling thread per core.
//!
//! Enters: [`Queue`]s (a ring, its volume and its notification descriptors), handed over through a mailbox. A [`Reactor`]
//! takes requests from its rings, copies them to memory at once or puts them on its own io_uring, and writes used entries
//! when they are done. Leaves: the queues again, drained, when the control thread asks for them back.
//!
//! The loop, in the order of one turn: mailbox, completions of the io_uring, rings, one `io_uring_enter` for all of it.
//! Nothing in it allocates, locks or logs per request. A reactor with nothing to do asks the guests for kicks and sleeps in
//! `io_uring_enter`, where kicks, completions and mail all wake it.
//!
//! | file | concern |
//! |---|---|
//! | `core.rs` | the loop: turns, sleeping, time accounting |
//! | `queue.rs` | one queue: taking requests from the ring, completing them |
//! | `mover.rs` | requests that are done at once |
//! | `tally.rs` | counting a batch |
//! | `execute.rs` | carrying a request out, in steps where it must be |
//! | `carrier/` | what a kind of drive does with a request: one small interface, a file for each kind |
//! | `keepers.rs`, `keeping.rs`, `errand.rs` | stores' keepers on their reactor, and requests on their way to it |
//! | `guests.rs` | fairness: what one guest may have of a turn and of the pools |
//! | `slots.rs` | requests in flight |
//! | `pools.rs` | iovec blocks and bounce buffers shared by the queues of a reactor |
//! | `uring.rs` | the io_uring itself |
//! | `affinity.rs` | which cores threads run on |
//! | `mailbox.rs`, `handle.rs` | how the control thread and a reactor talk |

mod affinity;
mod carrier;
mod core;
mod errand;
mod error;
mod execute;
mod guests;
mod handle;
mod keepers;
mod keeping;
mod mailbox;
mod mover;
mod patience;
mod pools;
mod queue;
mod slots;
mod tally;
mod uring;

pub use error::ReactorError;
pub use handle::{Command, ReactorHandle, ReactorSettings, Reply};
pub use keeping::{Answered, Keeping};
pub use queue::{Queue, QueueKey, QueueParts, Ring};

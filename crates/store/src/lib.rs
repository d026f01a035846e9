//! Where volumes' blocks live on a drive of ours: thin volumes, snapshots and clones, without I/O.
//!
//! One write, from the map to the drive. A carrier asks the volume's [`Map`] where the bytes go. If the live layer has them, they
//! go there, from the guest's memory, and nobody else hears of it. If not, the carrier gives the request to the [`Keeper`], which
//! takes a place ([`allocator`]), has the data written there, has the journal say so ([`journal`]), publishes the map's new word
//! when the record is on the drive, and answers. What the journal says goes into the table at the next checkpoint.
//!
//! Who does what: the keeper decides and does no I/O. It gives out [`Io`]s, which the reactor that runs it carries out and gives
//! back; guests' memory is known to that reactor alone. Maps are read by every reactor, and changed by the keeper. A place is used
//! again when all reactors have passed the moment in which it was given up ([`Epochs`]) and the journal says durably that it was.
//!
//! The layout on the drive is in docs/formats/store.md, the reasons in ARCHITECTURE.md.
//!
//! | file | concern |
//! |---|---|
//! | `geometry.rs`, `format/` | where everything is, and what the bytes mean |
//! | `catalog.rs` | volumes, snapshots, layers |
//! | `slots.rs`, `chunk.rs`, `allocator.rs` | what each extent of the drive holds; which are free |
//! | `map.rs`, `segmented.rs` | where each extent of a volume is |
//! | `cipher.rs` | how blocks are encrypted, by somebody else |
//! | `sums.rs`, `settle.rs` | checksums of blocks, and which are right after a crash |
//! | `epochs.rs` | when something may be used again |
//! | `journal.rs` | records on their way to the drive |
//! | `keeper/` | what changes, in which order |
//! | `medium.rs`, `recovery.rs` | making, opening and reading a store |
//! | `check.rs`, `verify.rs` | what in a store cannot be, or is not what was written |
//! | `mend.rs` | bad copies beside good ones |
//! | `mutants.rs` | errors on purpose, in tests only |

#![forbid(unsafe_code)]

mod allocator;
mod catalog;
mod check;
mod chunk;
mod cipher;
mod epochs;
mod error;
mod format;
mod geometry;
mod io;
mod journal;
mod keeper;
mod map;
mod medium;
mod mend;
#[cfg(feature = "mutants")]
pub mod mutants;
#[cfg(not(feature = "mutants"))]
mod mutants;
mod recovery;
mod segmented;
mod settle;
mod slots;
mod sums;
#[cfg(test)]
mod testing;
mod verify;

use std::sync::Arc;

pub use catalog::Seal;
pub use check::check;
pub use cipher::Cipher;
pub use epochs::{Epochs, Reader, MOST_READERS};
pub use error::StoreError;
pub use format::{zeroed, Block, Superblock};
pub use geometry::{Layout, BLOCK, SMALLEST_STORE};
pub use io::{errno, Action, Data, Done, Io, Request, RequestKind, ZEROES};
pub use keeper::{
    Answer, Command, DeletionInfo, Figures, Keeper, Ranges, ScrubEnd, ScrubInfo, Shared, SnapshotInfo,
    VolumeInfo, FULL_WAIT_NS,
};
pub use map::{Map, Run};
pub use medium::Medium;
pub use mend::{copies, mend, Copies, Mend};
pub use recovery::{format, recover, superblock, Recovered};
pub use sums::{checksum, Sums};
pub use verify::{verify, Verified};

/// Take possession of the store on `medium`, which nobody else may have open: the superblock names a new opener from here on.
/// `boot`: the host's present boot; reactors that read maps take part in `epochs`.
///
/// # Errors
/// There is no store, it is damaged, or the drive fails; nothing has changed then but perhaps the superblock's opener.
pub fn begin(medium: &dyn Medium, boot: [u8; 16], epochs: Arc<Epochs>) -> Result<Keeper, StoreError> {
    let mut keeper = Keeper::new(recover(medium, boot)?, boot, epochs)?;
    keeper.command(0, Command::Possess);
    loop {
        keeper.turn(0);
        while let Some(mut io) = keeper.next_io() {
            let result = medium::carry_out(medium, &mut io);
            keeper.completed(io, result.map_err(|error| error.raw_os_error().unwrap_or(errno::EIO)));
        }
        if let Some((_, answer)) = keeper.next_answer() {
            return answer.map(|_| keeper);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Memory;

    /// An extent of 64 KiB has four pages of checksums for a page of the table; a drive may say what it likes.
    #[test]
    fn a_page_that_tells_of_checksums_that_cannot_be_is_damage() {
        let memory = Memory::new(SMALLEST_STORE);
        let (layout, uuid) = (Layout::new(SMALLEST_STORE, 64 << 10).unwrap(), [7; 16]);
        format(&memory, &layout, uuid).unwrap();
        let mut block = zeroed(1);
        memory.read(layout.zones[0].table, &mut block).unwrap();
        let mut page = format::Page::decode(&uuid, 0, &block[0].0).unwrap();
        page.sums.set(63, 0);
        page.encode(&uuid, &mut block[0]);
        memory.write(layout.zones[0].table, &block).unwrap();
        assert!(matches!(recover(&memory, [1; 16]), Err(StoreError::Damaged { .. })));
    }

    /// Until a process that hands a store over is told to go, it writes there; whoever wrote too would damage it.
    #[test]
    fn a_keeper_changes_nothing_before_the_store_is_its_own() {
        let memory = Memory::new(SMALLEST_STORE);
        format(&memory, &Layout::new(SMALLEST_STORE, 64 << 10).unwrap(), [7; 16]).unwrap();
        let mut keeper = Keeper::new(recover(&memory, [1; 16]).unwrap(), [1; 16], Arc::default()).unwrap();
        let create = |name: &str| Command::Create {
            name: name.into(),
            size: 1 << 20,
            created_s: 1,
            seal: Seal::default(),
        };
        keeper.command(1, create("early"));
        keeper.submit(Request {
            token: 5,
            volume: 1,
            kind: RequestKind::Write,
            offset: 0,
            len: 4096,
            durable: false,
        });
        keeper.turn(1);
        assert!(keeper.next_io().is_none(), "nothing is written");
        assert!(matches!(keeper.next_answer(), Some((1, Err(StoreError::NotPossessed)))));
        assert_eq!(keeper.next_done(), Some(Done { token: 5, result: Err(errno::EIO) }));
        keeper.command(2, Command::Possess);
        keeper.command(3, create("late"));
        for now in 2..50 {
            keeper.turn(now);
            while let Some(io) = keeper.next_io() {
                keeper.completed(io, Ok(()));
            }
        }
        assert!(matches!(keeper.next_answer(), Some((2, Ok(Answer::Done)))));
        assert!(matches!(keeper.next_answer(), Some((3, Ok(Answer::Done)))));
    }
}

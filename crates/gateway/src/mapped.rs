//! For measurements: a volume of a store that is mapped from end to end, though its data was never written.

use std::path::Path;
use std::sync::Arc;

use ringstone_blockdev::{Direct, DriveError, FileDrive};
use ringstone_store::{
    errno, zeroed, Action, Answer, Command, Data, Io, Keeper, Medium, Request, RequestKind, StoreError, BLOCK,
};

use crate::error::EngineError;
use crate::stores::boot_id;

/// Requests under way at one time, and the bytes of each.
const DEPTH: u64 = 64;
const STEP: u64 = 4 << 20;

/// Write volume `volume` of the store at `path`, which nobody has open, from its begin to byte `bytes`, as a guest would; but the
/// guest's data goes nowhere. All that the store itself writes is on the drive then. What the volume holds is whatever the drive
/// did.
///
/// # Errors
/// There is no store, somebody has it open, or the drive fails.
pub fn map_without_data(path: &Path, volume: &str, bytes: u64) -> Result<(), EngineError> {
    let drive = FileDrive::open(path, 0, BLOCK as u32, false, Direct::Auto)?;
    let keeper = ringstone_store::begin(&drive, boot_id()?, Arc::default()).map_err(DriveError::from)?;
    let mut mapping = Mapping { keeper, drive, clock: 0 };
    mapping.write(volume, bytes).map_err(|error| DriveError::from(error).into())
}

struct Mapping {
    keeper: Keeper,
    drive: FileDrive,
    clock: u64,
}

impl Mapping {
    fn write(&mut self, volume: &str, bytes: u64) -> Result<(), StoreError> {
        let Answer::Opened { volume: id, .. } =
            self.ask(Command::Open { name: volume.to_owned(), cipher: None })?
        else {
            return Err(StoreError::Closed);
        };
        // What each request has left: where it goes on, and how far.
        let mut left: Vec<(u64, u64)> = Vec::new();
        let mut next = 0;
        for token in 0..DEPTH {
            left.push((0, 0));
            next = self.submit(&mut left, token, id, next, bytes);
        }
        while left.iter().any(|(at, end)| at < end) {
            self.turn();
            while let Some(done) = self.keeper.next_done() {
                let wrote =
                    done.result.map_err(|errno| drive_error(std::io::Error::from_raw_os_error(errno)))?;
                left[done.token as usize].0 += wrote;
                next = self.submit(&mut left, done.token, id, next, bytes);
            }
        }
        self.ask(Command::Close { volume: id })?;
        self.ask(Command::Shutdown)?;
        Ok(())
    }

    /// Go on with a request, or with the next one in its place. Returns where the one after that begins.
    fn submit(&mut self, left: &mut [(u64, u64)], token: u64, volume: u32, next: u64, bytes: u64) -> u64 {
        let one = &mut left[token as usize];
        let mut after = next;
        if one.0 == one.1 && next < bytes {
            *one = (next, bytes.min(next + STEP));
            after = one.1;
        }
        let (offset, len) = (one.0, one.1 - one.0);
        if len > 0 {
            let kind = RequestKind::Write;
            self.keeper.submit(Request { token, volume, kind, offset, len, durable: false });
        }
        after
    }

    fn ask(&mut self, command: Command) -> Result<Answer, StoreError> {
        self.keeper.command(0, command);
        loop {
            self.turn();
            if let Some((_, answer)) = self.keeper.next_answer() {
                return answer;
            }
        }
    }

    fn turn(&mut self) {
        // Any clock will do, as nothing waits for time to pass but what failed.
        self.clock += 1_000_000;
        self.keeper.turn(self.clock);
        while let Some(mut io) = self.keeper.next_io() {
            let result = self.carry_out(&mut io);
            self.keeper.completed(io, result.map_err(|error| error.raw_os_error().unwrap_or(errno::EIO)));
        }
    }

    fn carry_out(&self, io: &mut Io) -> std::io::Result<()> {
        match (io.action, &mut io.data) {
            (Action::Read, Data::Own(buffer)) => self.drive.read(io.offset, buffer),
            (Action::Write { .. }, Data::Own(buffer)) => self.drive.write(io.offset, buffer),
            (Action::Write { .. }, Data::Zeroes) => {
                self.drive.write(io.offset, &zeroed(io.len.div_ceil(BLOCK) as usize))
            }
            (Action::Flush, _) => self.drive.flush(),
            // The guest's data.
            _ => Ok(()),
        }
    }
}

fn drive_error(source: std::io::Error) -> StoreError {
    StoreError::Drive { what: "written", offset: 0, source }
}

//! What a look into a volume's map takes, which is all that a read or an overwrite of a store does more than one of a file:
//! `cargo run --release -p ringstone-store --example lookup`. The drive is imagined, so nothing but the map is measured.

use std::collections::HashMap;
use std::hint::black_box;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use ringstone_store::{
    zeroed, Action, Answer, Block, Command, Data, Keeper, Layout, Map, Medium, Request, RequestKind,
    StoreError, BLOCK,
};

const VOLUME: u64 = 8 << 30;
const EXTENT: u64 = 64 << 10;
const LOOKS: u64 = 4_000_000;
/// The fastest of so many counts: others may have had the core in the rest.
const ROUNDS: usize = 9;

/// Keeps what the store writes of its own, and no data.
#[derive(Default)]
struct Imagined(Mutex<HashMap<u64, Block>>);

impl Medium for Imagined {
    fn size(&self) -> io::Result<u64> {
        Ok(5 * VOLUME)
    }

    fn read(&self, offset: u64, into: &mut [Block]) -> io::Result<()> {
        let blocks = self.0.lock().map_err(|_| io::ErrorKind::Other)?;
        for (block, at) in into.iter_mut().zip((offset..).step_by(BLOCK as usize)) {
            *block = blocks.get(&at).cloned().unwrap_or_default();
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[Block]) -> io::Result<()> {
        let mut blocks = self.0.lock().map_err(|_| io::ErrorKind::Other)?;
        blocks.extend((offset..).step_by(BLOCK as usize).zip(from.iter().cloned()));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Store {
    keeper: Keeper,
    drive: Imagined,
    clock: u64,
}

impl Store {
    fn turn(&mut self) -> io::Result<()> {
        self.clock += 1_000_000;
        self.keeper.turn(self.clock);
        while let Some(mut io) = self.keeper.next_io() {
            match (io.action, &mut io.data) {
                (Action::Read, Data::Own(buffer)) => self.drive.read(io.offset, buffer)?,
                (Action::Write { .. }, Data::Own(buffer)) => self.drive.write(io.offset, buffer)?,
                (Action::Write { .. }, Data::Zeroes) => self.drive.write(io.offset, &zeroed(1))?,
                _ => {}
            }
            self.keeper.completed(io, Ok(()));
        }
        Ok(())
    }

    fn ask(&mut self, command: Command) -> Result<Answer, Box<dyn std::error::Error>> {
        self.keeper.command(0, command);
        loop {
            self.turn()?;
            if let Some((_, answer)) = self.keeper.next_answer() {
                return Ok(answer?);
            }
        }
    }

    fn write(&mut self, volume: u32, mut offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        while offset < end {
            let kind = RequestKind::Write;
            let (token, len) = (0, end - offset);
            self.keeper.submit(Request { token, volume, kind, offset, len, durable: false });
            let done = loop {
                self.turn()?;
                if let Some(done) = self.keeper.next_done() {
                    break done;
                }
            };
            offset += done.result.map_err(io::Error::from_raw_os_error)?;
        }
        Ok(())
    }
}

/// Nanoseconds of a look at a random block.
fn looks(map: &Map, writing: bool) -> f64 {
    let blocks = VOLUME / BLOCK;
    let count = || {
        let began = Instant::now();
        let mut at = 1u64;
        for _ in 0..LOOKS {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let offset = (at >> 33) % blocks * BLOCK;
            if writing {
                black_box(map.write(black_box(offset), BLOCK));
            } else {
                black_box(map.read(black_box(offset), BLOCK));
            }
        }
        began.elapsed().as_nanos() as f64 / LOOKS as f64
    };
    (0..ROUNDS).map(|_| count()).fold(f64::INFINITY, f64::min)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let drive = Imagined::default();
    ringstone_store::format(&drive, &Layout::new(5 * VOLUME, EXTENT)?, [7; 16])?;
    let keeper = ringstone_store::begin(&drive, [1; 16], Arc::default())?;
    let mut store = Store { keeper, drive, clock: 0 };
    let name = "volume".to_owned();
    store.ask(Command::Create {
        name: name.clone(),
        size: VOLUME,
        created_s: 0,
        seal: Default::default(),
    })?;
    let Answer::Opened { volume, map, .. } = store.ask(Command::Open { name: name.clone(), cipher: None })?
    else {
        return Err(StoreError::Closed.into());
    };
    println!("{:<44}{:>8}{:>8}", "nanoseconds for a look", "read", "write");
    let say = |what: &str, map: &Map| println!("{what:<44}{:8.1}{:8.1}", looks(map, false), looks(map, true));
    say("an empty volume", &map);
    store.write(volume, 0, VOLUME)?;
    say("extents that are whole", &map);
    for parts in 1..=3 {
        let created_s = parts;
        store.ask(Command::Snapshot { volumes: vec![name.clone()], name: format!("s{parts}"), created_s })?;
        for extent in 0..VOLUME / EXTENT {
            store.write(volume, extent * EXTENT + parts * BLOCK, BLOCK)?;
        }
        say(&format!("extents in {} places, one after a snapshot each", parts + 1), &map);
    }
    Ok(())
}

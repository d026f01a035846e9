//! Runs that follow from a seed: what is asked when, where the process or the power ends, and what must be there then.

use ringstone_store::{begin, Epochs};

use crate::drive::{Bench, Crash, Drive};
use crate::look::Calm;
use crate::reference::{Model, Seen, Wish};
use crate::rng::Rng;
use crate::world::{Failing, Kind, Setup, World};

const MOST_REQUESTS: usize = 12;

/// What a seed means.
pub fn setup(seed: u64) -> Setup {
    let mut rng = Rng::new(seed ^ 0xa5a5);
    let churn = seed % 4 == 3;
    let extent = *rng.pick(&[16u64 << 10, 16 << 10, 64 << 10]).unwrap_or(&(16 << 10));
    let failing = match rng.below(4) {
        0 => *rng
            .pick(&[
                Failing::Anything,
                Failing::Data,
                Failing::Journal,
                Failing::Superblock,
                Failing::Flush,
                Failing::Table,
            ])
            .unwrap_or(&Failing::Anything),
        _ => Failing::Nothing,
    };
    Setup {
        seed,
        size: 16 << 20,
        extent,
        journal_blocks: *rng.pick(&[64, 64, 80, 256]).unwrap_or(&64),
        room: (churn || rng.once_in(6)).then(|| 2 + rng.below(if churn { 3 } else { 12 })),
        churn,
        failing,
        fails_once_in: 3 + rng.below(30),
        // What a write that failed has left is nobody's, and its checksum may be any.
        sealed: seed % 2 == 1 && !matches!(failing, Failing::Anything | Failing::Data),
        // A store of this size has some hundreds, so that much goes on while a volume is opened.
        looks: *rng.pick(&[1024, 200, 60, 20]).unwrap_or(&1024),
    }
}

/// One step of whatever may happen next.
fn step(world: &mut World) {
    match world.rng.below(100) {
        0..30 => drop(world.turn()),
        30..72 => {
            if !world.drive.flights.is_empty() {
                let n = world.rng.below(world.drive.flights.len() as u64) as usize;
                if !world.drive.flights[n].slow || world.rng.once_in(16) {
                    world.complete(n);
                }
            }
        }
        72..90 => ask_as_guest(world),
        90..94 => {
            let n = world.rng.below(world.readers.len() as u64) as usize;
            let leaves = world.rng.once_in(3);
            let epochs = world.epochs.clone();
            match leaves {
                true => world.readers[n].leave(&epochs),
                false => world.readers[n].begin(&epochs),
            }
        }
        94..99 if world.setup.churn && world.open.len() > 1 && !world.rng.once_in(8) => {}
        94..99 => world.ask_something(),
        _ => world.clock += world.rng.below(3) * 100_000_000,
    }
}

fn ask_as_guest(world: &mut World) {
    if world.requests.len() >= MOST_REQUESTS {
        return;
    }
    let names: Vec<String> = world.open.keys().cloned().collect();
    let Some(name) = world.rng.pick(&names).cloned() else { return world.ask_something() };
    let size = world.model.volumes[&name].size;
    let reactor = world.rng.below(world.readers.len() as u64) as usize;
    let extent = world.setup.extent;
    // Blocks, sectors, or some extents.
    let (unit, most) = match world.rng.below(6) {
        0..5 if world.setup.churn => (extent, 2),
        0 | 1 => (4096, 4),
        2 | 3 => (512, 20),
        4 => (extent, 3),
        _ => (512, 3 * extent / 512),
    };
    let end = if world.rng.once_in(3) { size } else { size.min(2 * extent) };
    let offset = world.rng.below(end / unit + 1) * unit;
    let len = ((1 + world.rng.below(most)) * unit).min(size.saturating_sub(offset));
    let kind = match world.rng.below(20) {
        5..=9 if unit == extent => Kind::Zero { unmap: true },
        0..=4 => Kind::Read,
        5..=13 => Kind::Write,
        14..=15 => Kind::Zero { unmap: true },
        16 => Kind::Zero { unmap: false },
        _ => Kind::Flush,
    };
    if kind == Kind::Flush {
        world.request(reactor, &name, kind, 0, 0, false);
    } else if len > 0 {
        let durable = world.rng.once_in(8);
        world.request(reactor, &name, kind, offset, len, durable);
    }
}

/// What a crashed store holds must be what the model allows, as it is or with what was asked last.
pub fn look(
    world: &World,
    drive: Drive,
    crash: Crash,
    boot: [u8; 16],
    thorough: bool,
) -> (Seen, Option<Model>) {
    let mut calm = Calm::open(drive, boot).unwrap_or_else(|error| panic!("after {crash:?}: {error}"));
    let seen = calm.look().unwrap_or_else(|error| panic!("after {crash:?}: {error}"));
    let first = world.model.allows(crash, &seen);
    let mut with = None;
    if let Err(first) = first {
        let Some((_, wish, since, _)) = &world.wish else { panic!("after {crash:?}: {first}") };
        let mut applied = world.model.clone();
        applied.apply(wish, *since, world.moment);
        if let Err(second) = applied.allows(crash, &seen) {
            panic!("after {crash:?}: {first}; had {wish:?} been done: {second}");
        }
        with = Some(applied);
    }
    if thorough {
        calm.compare_diffs(&seen).unwrap_or_else(|error| panic!("after {crash:?}: {error}"));
        calm.rest().unwrap_or_else(|error| panic!("after {crash:?}: {error}"));
        let again = calm.look().unwrap_or_else(|error| panic!("after {crash:?} and reaping: {error}"));
        assert!(seen == again, "what was there after {crash:?} changed while layers were reaped");
        calm.delete_all(boot).unwrap_or_else(|error| panic!("after {crash:?}: {error}"));
    }
    (seen, with)
}

fn other_boot(boot: [u8; 16]) -> [u8; 16] {
    let mut other = boot;
    other[0] = other[0].wrapping_add(1);
    other
}

fn boot_after(crash: Crash, boot: [u8; 16]) -> [u8; 16] {
    match crash {
        Crash::Killed => boot,
        Crash::Power => other_boot(boot),
    }
}

/// Look at what would be there if it ended now, and go on as if nothing had been.
pub fn look_aside(world: &mut World, states: &mut u64) {
    for crash in [Crash::Killed, Crash::Power] {
        let drive = world.crashed(crash);
        let thorough = world.rng.once_in(24);
        look(world, drive, crash, boot_after(crash, world.boot), thorough);
        *states += 1;
    }
}

/// It is closed as it should be: then even a loss of power takes nothing back.
fn shut_down(world: &mut World, states: &mut u64) {
    world.drain();
    if world.wish.is_some() || world.fails {
        return;
    }
    world.ask(Wish::Shutdown);
    world.drain();
    let drive = world.crashed(Crash::Power);
    world.boot = other_boot(world.boot);
    let (seen, _) = look(world, drive.fork(), Crash::Killed, world.boot, false);
    *states += 1;
    let now = world.tick();
    world.model.settle(Crash::Power, &seen, now);
    world.restart(drive, true);
    world.drain();
}

/// It ends now, perhaps once more while it is opened again; then go on with what is there.
fn crash(world: &mut World, states: &mut u64) {
    let mut worst = if world.rng.once_in(2) { Crash::Killed } else { Crash::Power };
    let mut drive = world.crashed(worst);
    world.note(|| format!("{worst:?}"));
    world.boot = boot_after(worst, world.boot);
    while world.rng.once_in(3) {
        let left = world.rng.below(4);
        let bench = Bench::new(&mut drive, left);
        let begun = begin(&bench, world.boot, std::sync::Arc::new(Epochs::default()));
        let again = if world.rng.once_in(2) { Crash::Killed } else { Crash::Power };
        world.note(|| format!("{again:?} after {left} I/Os of opening it, {:?}", begun.is_ok()));
        drive = drive.crashed(again, &mut world.rng);
        world.boot = boot_after(again, world.boot);
        if again == Crash::Power {
            worst = again;
        }
    }
    let (seen, with) = look(world, drive.fork(), worst, world.boot, world.rng.clone().once_in(8));
    *states += 1;
    // What a command did that nobody was told of is durable only when somebody has taken possession.
    let is_certain = worst == Crash::Power || world.wish.is_none() && world.model.flattening.is_none();
    let by_keeper = is_certain && !world.fails && world.rng.once_in(2);
    if let Some(model) = with {
        world.model = model;
    }
    let now = world.tick();
    world.model.settle(worst, &seen, now);
    world.restart(drive, by_keeper);
}

/// At rest: nothing is wrong with the store, and its figures add up.
fn inspect(world: &mut World, states: &mut u64) {
    world.drain();
    for crash in [Crash::Killed, Crash::Power] {
        let drive = world.crashed(crash);
        look(world, drive, crash, boot_after(crash, world.boot), world.rng.clone().once_in(4));
        *states += 1;
    }
    let figures = world.keeper.figures();
    let volumes = world.keeper.volumes();
    let own: u64 = volumes
        .iter()
        .map(|volume| volume.own + volume.snapshots.iter().map(|one| one.own).sum::<u64>())
        .sum();
    assert!(figures.used <= figures.capacity, "{figures:?}");
    assert!(own <= figures.used, "{own} bytes of {figures:?}");
    let promised: u64 = world.model.volumes.values().map(|volume| volume.size).sum();
    if world.wish.is_none() {
        assert_eq!(figures.promised, promised);
    }
    if !world.fails {
        assert_eq!(figures.reclaiming, 0, "all was reaped");
    }
}

/// `every`: look at each I/O what would be there; else now and then. Returns how many states were looked at.
pub fn run(setup: Setup, rounds: u64, steps: u64, every: bool) -> u64 {
    let mut world = World::new(setup);
    let mut states = 0;
    for _ in 0..rounds {
        let mut events = world.events;
        for _ in 0..steps {
            step(&mut world);
            let often = if world.is_unmarked() { 60 } else { 300 };
            if every && world.events != events || world.rng.once_in(often) {
                look_aside(&mut world, &mut states);
            }
            events = world.events;
        }
        if world.rng.once_in(3) {
            inspect(&mut world, &mut states);
        }
        if world.rng.once_in(4) {
            shut_down(&mut world, &mut states);
        }
        crash(&mut world, &mut states);
    }
    world.fails = false;
    inspect(&mut world, &mut states);
    states
}

//! Faults that the model has found, each as what was done when it showed.

use ringstone_store::{Layout, ScrubEnd};

use crate::drive::{Crash, Flight, What};
use crate::reference::Wish;
use crate::run::{look, look_aside, setup};
use crate::world::{Failing, Kind, Setup, World};

const EXTENT: u64 = 16 << 10;
const VOLUME: u64 = 10 * EXTENT;

fn world() -> World {
    with_room(None)
}

fn with_room(room: Option<u64>) -> World {
    World::new(Setup { extent: EXTENT, room, failing: Failing::Nothing, churn: false, ..setup(0) })
}

/// Go on with all but I/Os for which `waits` is true; look at each what would be there if it ended.
fn go_on_without(world: &mut World, steps: u64, waits: impl Fn(&Flight) -> bool) {
    for _ in 0..steps {
        world.turn();
        for reader in &mut world.readers {
            reader.begin(&world.epochs);
            reader.leave(&world.epochs);
        }
        if let Some(n) = world.drive.flights.iter().position(|flight| !waits(flight)) {
            world.complete(n);
        }
        look_aside(world, &mut 0);
    }
}

fn ask(world: &mut World, wish: Wish) {
    world.ask(wish);
    world.drain();
}

fn opened(world: &mut World, name: &str) {
    let name = name.to_string();
    ask(world, Wish::Create { name: name.clone(), size: VOLUME });
    ask(world, Wish::Open { name });
}

fn done(world: &mut World, name: &str, kind: Kind, offset: u64, len: u64) {
    world.request(0, name, kind, offset, len, false);
    world.drain();
}

fn snapshot(world: &mut World, volume: &str, name: &str) {
    ask(world, Wish::Snapshot { volumes: vec![volume.into()], name: name.into() });
}

/// End it, and go on with what is there.
fn end(world: &mut World, crash: Crash) {
    let drive = world.crashed(crash);
    if crash == Crash::Power {
        world.boot[0] += 1;
    }
    let (seen, _) = look(world, drive.fork(), crash, world.boot, true);
    let now = world.tick();
    world.model.settle(crash, &seen, now);
    world.restart(drive, false);
}

/// A discard left a tombstone in the live layer, and data was written over it. When the snapshot was deleted, that layer was the only
/// one; the volume's next opening took the tombstone behind the data, and read zeroes.
#[test]
fn a_tombstone_does_not_hide_data_of_a_layer_that_is_alone() {
    let mut world = world();
    opened(&mut world, "a");
    done(&mut world, "a", Kind::Write, 0, 2 * EXTENT);
    snapshot(&mut world, "a", "s");
    done(&mut world, "a", Kind::Zero { unmap: true }, 0, EXTENT);
    done(&mut world, "a", Kind::Write, 0, EXTENT);
    ask(&mut world, Wish::DeleteSnapshot { volume: "a".into(), name: "s".into() });
    end(&mut world, Crash::Killed);
}

/// The process was killed when a discard was not flushed. The next one gave the place to another volume; power was lost, the discard was
/// forgotten, and the first volume read what the other had written.
#[test]
pub fn what_an_opener_replayed_is_not_forgotten_later() {
    for seed in 0..20 {
        let mut world = world();
        world.rng = crate::rng::Rng::new(seed);
        opened(&mut world, "a");
        opened(&mut world, "b");
        done(&mut world, "a", Kind::Write, 0, VOLUME);
        done(&mut world, "a", Kind::Flush, 0, 0);
        done(&mut world, "a", Kind::Zero { unmap: true }, 0, VOLUME);
        end(&mut world, Crash::Killed);
        ask(&mut world, Wish::Open { name: "b".into() });
        done(&mut world, "b", Kind::Write, 0, VOLUME);
        end(&mut world, Crash::Power);
    }
}

/// A snapshot's deletion was not durable yet when the reaper gave its places to the live layer, which overwrote them in place. Power
/// was lost, and the snapshot was there again with another content.
#[test]
pub fn a_snapshot_that_comes_back_has_what_it_had() {
    for seed in 0..30 {
        let mut world = world();
        world.rng = crate::rng::Rng::new(seed);
        opened(&mut world, "a");
        done(&mut world, "a", Kind::Write, 0, VOLUME);
        snapshot(&mut world, "a", "s");
        done(&mut world, "a", Kind::Flush, 0, 0);
        world.ask(Wish::DeleteSnapshot { volume: "a".into(), name: "s".into() });
        for n in 0..60 {
            world.turn();
            // Flushes take their time.
            let quick = world.drive.flights.iter().position(|flight| flight.len > 0);
            if let Some(quick) = quick.or((n % 20 == 19 && !world.drive.flights.is_empty()).then_some(0)) {
                world.complete(quick);
            }
            if world.requests.is_empty() {
                world.request(1, "a", Kind::Write, n % 10 * EXTENT, 4096, false);
            }
            look_aside(&mut world, &mut 0);
        }
    }
}

/// No fault, but what must not be: a place is given to another volume before it is durable that the first one gave it up.
#[test]
pub fn a_place_is_used_again_when_that_is_durable() {
    for seed in 0..6 {
        let mut world = with_room(Some(2));
        world.rng = crate::rng::Rng::new(seed);
        opened(&mut world, "a");
        opened(&mut world, "b");
        done(&mut world, "a", Kind::Write, 0, 2 * EXTENT);
        done(&mut world, "a", Kind::Flush, 0, 0);
        world.request(0, "a", Kind::Zero { unmap: true }, 0, 2 * EXTENT, false);
        world.request(1, "b", Kind::Write, 0, 2 * EXTENT, false);
        go_on_without(&mut world, 30, |flight| matches!(flight.what, What::Flush { .. }));
        world.drain();
    }
}

/// Nor before a read of the first one has ended.
#[test]
pub fn a_place_is_used_again_when_nobody_reads_it() {
    let mut world = with_room(Some(2));
    opened(&mut world, "a");
    opened(&mut world, "b");
    done(&mut world, "a", Kind::Write, 0, 2 * EXTENT);
    world.request(0, "a", Kind::Read, 0, EXTENT, false);
    world.request(1, "a", Kind::Zero { unmap: true }, 0, 2 * EXTENT, false);
    go_on_without(&mut world, 20, |flight| matches!(flight.what, What::Read));
    world.request(1, "b", Kind::Write, 0, 2 * EXTENT, false);
    go_on_without(&mut world, 30, |flight| matches!(flight.what, What::Read));
    world.drain();
}

/// Zeroes that were asked for durably where an earlier discard, not flushed, had left nothing were answered at once.
#[test]
fn a_durable_zero_of_nothing_is_durable() {
    let mut world = world();
    opened(&mut world, "a");
    done(&mut world, "a", Kind::Write, 0, EXTENT);
    done(&mut world, "a", Kind::Flush, 0, 0);
    done(&mut world, "a", Kind::Zero { unmap: true }, 0, EXTENT);
    world.request(0, "a", Kind::Zero { unmap: true }, 512, 512, true);
    world.drain();
    end(&mut world, Crash::Power);
}

/// A snapshot of many volumes with long names takes several blocks of the journal, and counts with the last of them.
#[test]
fn a_snapshot_of_many_volumes_is_whole_or_not_there() {
    let mut world = world();
    let names: Vec<String> = (0..24).map(|n| format!("{n:0>120}")).collect();
    for name in &names {
        ask(&mut world, Wish::Create { name: name.clone(), size: EXTENT });
    }
    for name in names.iter().step_by(5) {
        ask(&mut world, Wish::Open { name: name.clone() });
        done(&mut world, name, Kind::Write, 0, EXTENT);
    }
    world.ask(Wish::Snapshot { volumes: names.clone(), name: "s".repeat(120) });
    while world.wish.is_some() {
        world.turn();
        look_aside(&mut world, &mut 0);
        if !world.drive.flights.is_empty() {
            let n = world.rng.below(world.drive.flights.len() as u64) as usize;
            world.complete(n);
        }
    }
    world.drain();
    end(&mut world, Crash::Power);
}

/// A journal that was exactly half full had neither room for the reaper nor a checkpoint that would make some. And a step of a
/// request that was parked for a snapshot held the epoch for which the snapshot waited, so that it came too late.
#[test]
fn the_smallest_journal_goes_on_and_on() {
    let mut world = world();
    world.setup.journal_blocks = 64;
    opened(&mut world, "a");
    for n in 0..80 {
        done(&mut world, "a", Kind::Write, n % 10 * EXTENT, 4096);
        let name = format!("s{n}");
        world.request(0, "a", Kind::Write, 0, VOLUME, false);
        snapshot(&mut world, "a", &name);
        ask(&mut world, Wish::DeleteSnapshot { volume: "a".into(), name });
    }
    end(&mut world, Crash::Killed);
}

/// A checkpoint ends while a block with a checksum is being written in place: the journal has to keep what the block is to be.
#[test]
pub fn a_checkpoint_does_not_forget_what_is_being_written_in_place() {
    let mut world = World::new(Setup { sealed: true, ..world().setup });
    let data = ringstone_store::Layout::new(world.setup.size, EXTENT).expect("a layout").zones[0].data;
    opened(&mut world, "a");
    done(&mut world, "a", Kind::Write, 0, 4096);
    done(&mut world, "a", Kind::Flush, 0, 0);
    assert!(world.open["a"].sums.is_some());
    world.request(0, "a", Kind::Write, 0, 4096, false);
    let size = world.setup.size + (2 << 20);
    let in_place = |flight: &Flight| {
        (data..size - (2 << 20)).contains(&flight.offset) && matches!(flight.what, What::Write { .. })
    };
    go_on_without(&mut world, 10, in_place);
    world.ask(Wish::Grow { size });
    go_on_without(&mut world, 60, in_place);
    assert!(world.wish.is_none(), "the checkpoint has ended");
    assert!(world.drive.flights.iter().any(in_place), "and the write has not");
    world.drain();
    end(&mut world, Crash::Killed);
}

/// A scrub reads a block that is being written, and some of what is written is there already.
#[test]
pub fn a_scrub_waits_for_whoever_writes() {
    let mut world = World::new(Setup { sealed: true, ..world().setup });
    let data = Layout::new(world.setup.size, EXTENT).expect("a layout").zones[0].data;
    opened(&mut world, "a");
    assert!(world.open["a"].sums.is_some());
    done(&mut world, "a", Kind::Write, 0, EXTENT);
    world.request(0, "a", Kind::Write, 0, EXTENT, false);
    let in_place = |flight: &Flight| flight.offset >= data && matches!(flight.what, What::Write { .. });
    go_on_without(&mut world, 10, in_place);
    assert!(world.drive.flights.iter().any(in_place));
    world.scrub(Some(1 << 40));
    go_on_without(&mut world, 60, in_place);
    let info = world.keeper.scrub_info().expect("a scrub");
    assert!(info.end.is_none(), "it has come to what is being written");
    world.drain();
    let info = world.keeper.scrub_info().expect("a scrub");
    assert_eq!((info.end, info.verified), (Some(ScrubEnd::Done), EXTENT / 4096));
    end(&mut world, Crash::Killed);
}

/// A scrub reads a block of a frozen layer once more, which needs no lock. Meanwhile the layer is reaped, its place is the live layer's,
/// and a guest writes there.
#[test]
fn a_scrub_believes_no_block_that_has_become_another_layers() {
    let mut world = World::new(Setup { sealed: true, ..world().setup });
    let data = Layout::new(world.setup.size, EXTENT).expect("a layout").zones[0].data;
    opened(&mut world, "a");
    done(&mut world, "a", Kind::Write, 0, EXTENT);
    let in_place = |flight: &Flight| flight.offset >= data && matches!(flight.what, What::Write { .. });
    let again =
        |flight: &Flight| flight.offset >= data && flight.len == 4096 && matches!(flight.what, What::Read);
    // The scrub has doubts, as the guest writes.
    world.request(0, "a", Kind::Write, 0, EXTENT, false);
    go_on_without(&mut world, 10, in_place);
    world.scrub(Some(1 << 40));
    go_on_without(&mut world, 60, in_place);
    world.keeper.pause(true);
    go_on_without(&mut world, 20, again);
    world.ask(Wish::Snapshot { volumes: vec!["a".into()], name: "s".into() });
    go_on_without(&mut world, 40, again);
    world.keeper.pause(false);
    go_on_without(&mut world, 10, again);
    assert!(world.wish.is_none() && world.drive.flights.iter().any(again));
    world.ask(Wish::DeleteSnapshot { volume: "a".into(), name: "s".into() });
    go_on_without(&mut world, 80, again);
    world.request(0, "a", Kind::Write, 0, EXTENT, false);
    go_on_without(&mut world, 40, |flight| again(flight) || in_place(flight));
    assert!(world.drive.flights.iter().any(in_place) && world.drive.flights.iter().any(again));
    go_on_without(&mut world, 10, in_place);
    world.drain();
    let info = world.keeper.scrub_info().expect("a scrub");
    assert_eq!((info.end, info.verified), (Some(ScrubEnd::Done), EXTENT / 4096));
    end(&mut world, Crash::Killed);
}

/// While a volume was opened in steps, one of its layers was reaped: its data was found before it went to the next layer, and a tombstone
/// that it counts over behind. Taken as they were found, the tombstone would have hidden the data.
#[test]
pub fn a_layer_is_reaped_while_a_volume_is_opened() {
    for looks in (1..=40).map(|n| 20 * n) {
        let mut world = world();
        opened(&mut world, "a");
        done(&mut world, "a", Kind::Write, 0, VOLUME);
        snapshot(&mut world, "a", "old");
        done(&mut world, "a", Kind::Zero { unmap: true }, 0, VOLUME);
        done(&mut world, "a", Kind::Write, EXTENT, 2 * EXTENT);
        snapshot(&mut world, "a", "reaped");
        done(&mut world, "a", Kind::Write, 2 * EXTENT, 2 * EXTENT);
        ask(&mut world, Wish::Close { name: "a".into() });
        world.keeper.set_looks(looks);
        world.ask(Wish::DeleteSnapshot { volume: "a".into(), name: "reaped".into() });
        while world.wish.is_some() {
            world.turn();
            (0..world.drive.flights.len()).for_each(|_| world.complete(0));
        }
        world.ask(Wish::Open { name: "a".into() });
        world.drain();
        for n in 0..VOLUME / EXTENT {
            done(&mut world, "a", Kind::Read, n * EXTENT, EXTENT);
            // In place where the live layer has it.
            done(&mut world, "a", Kind::Write, n * EXTENT + 512, 512);
        }
        end(&mut world, Crash::Killed);
    }
}

/// No fault, but what must not be: a slot was found for a volume that is being opened, was reaped, and got another volume's data before
/// it came into the map.
#[test]
pub fn a_place_is_another_volume_s_before_it_is_in_the_map() {
    const LOOKS: u64 = 3;
    let places = Layout::new(setup(0).size, EXTENT).expect("a layout").capacity();
    // The volume's slots are the last ones with a place, and behind them are those for tombstones.
    for turns in (places / LOOKS - 3..places / LOOKS + 24).step_by(3) {
        let mut world = with_room(Some(10));
        opened(&mut world, "a");
        opened(&mut world, "b");
        done(&mut world, "a", Kind::Write, 0, VOLUME / 2);
        snapshot(&mut world, "a", "s");
        done(&mut world, "a", Kind::Write, 0, VOLUME / 2);
        ask(&mut world, Wish::Close { name: "a".into() });
        world.keeper.pause(true);
        ask(&mut world, Wish::DeleteSnapshot { volume: "a".into(), name: "s".into() });
        world.keeper.set_looks(LOOKS as u32);
        world.ask(Wish::Open { name: "a".into() });
        world.request(1, "b", Kind::Write, VOLUME / 2, VOLUME / 2, false);
        for _ in 0..turns {
            world.turn();
            (0..world.drive.flights.len()).for_each(|_| world.complete(0));
        }
        world.keeper.pause(false);
        world.drain();
        done(&mut world, "a", Kind::Read, 0, VOLUME);
        done(&mut world, "b", Kind::Read, 0, VOLUME);
    }
}

//! The store under a drive that forgets: random use, ended at every I/O by the end of the process or of the power, beside a
//! reference in memory.
//!
//! `RINGSTONE_STORE_SEEDS=1000` runs so many seeds (`FIRST..END` those); `RINGSTONE_STORE_TRACE=1` prints what happens in each.

mod drive;
mod guest;
mod look;
mod operator;
mod reference;
mod rng;
mod run;
mod stories;
mod world;

use std::panic::{catch_unwind, AssertUnwindSafe};

use ringstone_store::mutants::{set, Mutant};

/// Run `seed`; on failure say how to run it again.
fn seed(seed: u64, every: bool) -> u64 {
    let setup = run::setup(seed);
    let (rounds, steps) = if every { (2, 120) } else { (4, 400) };
    let run = catch_unwind(AssertUnwindSafe(|| run::run(setup.clone(), rounds, steps, every)));
    run.unwrap_or_else(|_| {
        let test = if every { "every_cut" } else { "long_runs" };
        panic!(
            "seed {seed} failed: RINGSTONE_STORE_SEEDS={seed}..{} cargo test -p ringstone-store --test crash_model {test} ({setup:?})",
            seed + 1
        );
    })
}

/// The seeds that the environment asks for, or the first `few`.
fn seeds(few: u64) -> std::ops::Range<u64> {
    match std::env::var("RINGSTONE_STORE_SEEDS") {
        Err(_) => 0..few,
        Ok(text) => match text.split_once("..") {
            Some((first, end)) => first.parse().expect("a number")..end.parse().expect("a number"),
            None => 0..text.parse().expect("RINGSTONE_STORE_SEEDS is a number or FIRST..END"),
        },
    }
}

/// Seeds with which a mutant has to be found.
const MUTANT_SEEDS: u64 = 40;

type Story = fn();

#[test]
fn each_mutant_is_found() {
    // A story where one tells of it; else random use finds it soon.
    let all: [(Mutant, Option<Story>); 19] = [
        (Mutant::RecordBeforeData, None),
        (Mutant::ReuseBeforeEpoch, Some(stories::a_place_is_used_again_when_nobody_reads_it)),
        (Mutant::ReuseBeforeMark, Some(stories::a_place_is_used_again_when_that_is_durable)),
        (Mutant::PageOverOnlyCopy, None),
        (Mutant::NoFlushBeforeSuperblock, None),
        (Mutant::MarkWithoutFlush, None),
        (Mutant::SameLayerAfterSnapshot, None),
        (Mutant::StaleIncarnation, None),
        (Mutant::NoTombstone, None),
        (Mutant::MergeCovered, None),
        (Mutant::ReapBeforeMark, Some(stories::a_snapshot_that_comes_back_has_what_it_had)),
        (Mutant::DropReplayed, Some(stories::what_an_opener_replayed_is_not_forgotten_later)),
        (Mutant::DataBeforeIntent, None),
        (Mutant::IntentInCache, None),
        (Mutant::ForgetInPlace, Some(stories::a_checkpoint_does_not_forget_what_is_being_written_in_place)),
        (Mutant::OpenAsFound, Some(stories::a_layer_is_reaped_while_a_volume_is_opened)),
        (Mutant::OpenReused, Some(stories::a_place_is_another_volume_s_before_it_is_in_the_map)),
        (Mutant::KeepBegun, None),
        (Mutant::ScrubUnlocked, Some(stories::a_scrub_waits_for_whoever_writes)),
    ];
    for (mutant, story) in all {
        set(Some(mutant));
        let fails = |seed: u64| {
            let setup = run::setup(seed);
            let long = || run::run(setup.clone(), 4, 400, false);
            let short = || run::run(setup.clone(), 2, 120, true);
            catch_unwind(long).is_err() || catch_unwind(short).is_err()
        };
        let found = match story {
            Some(story) => catch_unwind(story).is_err(),
            None => (0..MUTANT_SEEDS).any(fails),
        };
        set(None);
        assert!(found, "nothing finds {mutant:?}");
    }
}

#[test]
fn every_cut_of_short_runs_leaves_what_was_promised() {
    let states: u64 = seeds(20).map(|number| seed(number, true)).sum();
    println!("{states} states");
}

#[test]
fn long_runs_lose_nothing() {
    let states: u64 = seeds(60).map(|number| seed(number, false)).sum();
    println!("{states} states");
}

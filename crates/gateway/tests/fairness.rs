//! Two guests on one reactor that ask for as much as they can. What each gets is counted in requests, as both wait for turns of
//! the same thread however busy the machine is. How long a neighbour waits is for `ringstone bench resilience` to measure.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;

const MIB: u64 = 1 << 20;
/// Data segments of a request; each names the same mebibyte of guest memory.
const SEGMENTS: u16 = 60;
/// Requests that the greedy guest keeps available in a queue.
const DEPTH: u16 = 8;

/// A guest whose every request reads `SEGMENTS` mebibytes.
struct Greedy {
    queues: Vec<Driver>,
}

impl Greedy {
    fn start(socket: &Path, queues: u16) -> Self {
        let first = Driver::prepare(socket, 256, F_VERSION_1 | F_INDIRECT);
        first.set_memory();
        let mut drivers: Vec<_> = (1..queues).map(|index| first.beside(index)).collect();
        drivers.insert(0, first);
        for driver in &drivers {
            driver.start_vring(0);
            for head in 0..DEPTH {
                let table =
                    DATA + 2 * MIB + (u64::from(driver.index) * u64::from(DEPTH) + u64::from(head)) * 4096;
                let slot = driver.put_header(head, IN, 0);
                driver.descriptor(table, 0, (slot, 16, 1, 1));
                for at in 1..=SEGMENTS {
                    driver.descriptor(table, at, (DATA, MIB as u32, 3, at + 1));
                }
                driver.descriptor(table, SEGMENTS + 1, (slot + 32, 1, 2, 0));
                driver.descriptor(driver.rings(), head, (table, 16 * (u32::from(SEGMENTS) + 2), 4, 0));
            }
        }
        Self { queues: drivers }
    }

    /// Keep all of its queues full until so many requests are done: how many that were.
    fn run_until(&mut self, enough: impl Fn(u32) -> bool) -> u32 {
        for driver in &mut self.queues {
            (0..DEPTH).for_each(|head| driver.offer(head));
        }
        let mut done = 0;
        while !enough(done) {
            // Leave the core to others; requests wait in the ring meanwhile.
            std::thread::sleep(Duration::from_millis(1));
            for driver in &mut self.queues {
                while let Some((head, _)) = driver.next_used() {
                    assert_eq!(driver.status(head as u16), 0);
                    done += 1;
                    driver.offer(head as u16);
                }
            }
        }
        done
    }
}

/// Keep both busy until `first` has had `enough` requests served: how many each had.
fn together(mut first: Greedy, mut second: Greedy, enough: u32) -> (u32, u32) {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| second.run_until(|_| ended.load(Ordering::Relaxed)));
        let of_first = first.run_until(|done| done >= enough);
        ended.store(true, Ordering::Relaxed);
        (of_first, other.join().unwrap())
    })
}

fn on_memory(host: &Host, name: &str, queues: u16) -> Greedy {
    let size = u64::from(SEGMENTS) * MIB;
    let socket = host.volume(name, r#"{"type":"memory","hugepages":"off"}"#, size, queues.into());
    Greedy::start(&socket, queues)
}

/// A guest with 8 queues once had 8 turns where another had one.
#[test]
fn many_queues_have_no_more_turns_than_one() {
    let host = Host::new();
    let (of_many, of_one) = together(on_memory(&host, "many", 8), on_memory(&host, "one", 1), 96);
    // What the many had begun and not finished counts for nothing, so the one may seem to have had more.
    assert!(of_many < 3 * of_one, "8 queues had {of_many} requests served where one had {of_one}");
}

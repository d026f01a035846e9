//! When a queue should move to another reactor, from measured load alone. No clock and no thread: it is told the time.
//!
//! A move stops the queue for as long as its requests in flight take, so it must be worth it: the hottest reactor is close
//! to its limit, a move makes the hotter of the two clearly cooler, and that has been so for some looks in a row. Moves are
//! rare: one at a time, and a queue that has moved stays for a while.

use std::collections::HashMap;

use ringstone_reactor::QueueKey;

/// Busy share from which a reactor is worth relieving.
const HOT: f64 = 0.75;
/// Busy share from which a reactor has more work than time: what its queues are seen to take is less than what they want,
/// and what is left after a move no less than before.
const SATURATED: f64 = 0.95;
/// By how much the hotter of the two reactors must be cooler after a move.
const GAIN: f64 = 0.15;
/// What more it must gain to leave the node that the guest's memory is on.
const REMOTE: f64 = 0.3;
/// Looks in a row that must agree.
const AGREE: u32 = 3;
/// Nanoseconds between two moves of any queue.
const BETWEEN_MOVES: u64 = 1_000_000_000;
/// Nanoseconds that a queue stays where it was moved.
const STAY: u64 = 10_000_000_000;
/// A queue that does less than this of its reactor's work is not worth moving.
const WORTH: f64 = 0.05;

/// A reactor since the last look.
#[derive(Clone, Copy, Debug)]
pub struct ReactorLoad {
    pub reactor: usize,
    /// Busy time of all time, 0 to 1.
    pub busy: f64,
    pub node: Option<u32>,
}

/// A running queue since the last look.
#[derive(Clone, Copy, Debug)]
pub struct QueueLoad {
    pub key: QueueKey,
    pub reactor: usize,
    /// Its part of its reactor's time, 0 to 1.
    pub busy: f64,
    /// Where its guest's memory is.
    pub node: Option<u32>,
}

/// A queue to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    pub key: QueueKey,
    pub to: usize,
}

/// See the module.
#[derive(Default)]
pub struct Balancer {
    wanted: Option<(Move, u32)>,
    last_move: Option<u64>,
    moved: HashMap<QueueKey, u64>,
}

impl Balancer {
    /// Look at the load at `now` (nanoseconds of any clock that never goes back); at most one move comes out.
    pub fn look(&mut self, now: u64, reactors: &[ReactorLoad], queues: &[QueueLoad]) -> Option<Move> {
        self.moved.retain(|_, at| now.saturating_sub(*at) < STAY);
        if self.last_move.is_some_and(|at| now.saturating_sub(at) < BETWEEN_MOVES) {
            self.wanted = None;
            return None;
        }
        let best = self.best(reactors, queues);
        // Which queue is the best to move may change from look to look; that some are must not.
        let seen = match (self.wanted.take(), best) {
            (_, None) => return None,
            (Some((_, seen)), Some(_)) => seen + 1,
            (None, Some(_)) => 1,
        };
        let best = best?;
        if seen < AGREE {
            self.wanted = Some((best, seen));
            return None;
        }
        self.last_move = Some(now);
        self.moved.insert(best.key, now);
        Some(best)
    }

    fn best(&self, reactors: &[ReactorLoad], queues: &[QueueLoad]) -> Option<Move> {
        let hot = reactors.iter().max_by(|a, b| a.busy.total_cmp(&b.busy)).filter(|hot| hot.busy >= HOT)?;
        let mut best: Option<(f64, Move)> = None;
        let movable = queues
            .iter()
            .filter(|queue| queue.reactor == hot.reactor && queue.busy >= WORTH)
            .filter(|queue| !self.moved.contains_key(&queue.key));
        for queue in movable {
            for cold in reactors.iter().filter(|cold| cold.reactor != hot.reactor) {
                let there = cold.busy + queue.busy;
                let after = if hot.busy < SATURATED { there.max(hot.busy - queue.busy) } else { there };
                let remote = |reactor: &ReactorLoad| matches!((queue.node, reactor.node), (Some(memory), Some(core)) if memory != core);
                let toll = match (remote(hot), remote(cold)) {
                    (false, true) => REMOTE,
                    (true, false) => -REMOTE / 2.0,
                    _ => 0.0,
                };
                let gain = hot.busy - after - toll;
                if gain >= GAIN && hot.busy > there && best.is_none_or(|(before, _)| gain > before) {
                    best = Some((gain, Move { key: queue.key, to: cold.reactor }));
                }
            }
        }
        best.map(|(_, to)| to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: u64 = 250_000_000;

    fn key(vring: u16) -> QueueKey {
        QueueKey { session: 1, vring }
    }

    /// A machine whose reactors do as much as fits of what their queues ask for.
    struct Machine {
        balancer: Balancer,
        now: u64,
        /// What each queue would take of a core, and where it is.
        queues: Vec<(f64, usize)>,
        nodes: Vec<Option<u32>>,
        memory: Option<u32>,
    }

    impl Machine {
        fn new(reactors: usize, demands: &[f64]) -> Self {
            Self {
                balancer: Balancer::default(),
                now: 0,
                queues: demands.iter().map(|demand| (*demand, 0)).collect(),
                nodes: vec![None; reactors],
                memory: None,
            }
        }

        fn look(&mut self) -> Option<Move> {
            self.now += LOOK;
            let demand = |reactor| -> f64 {
                self.queues.iter().filter(|(_, at)| *at == reactor).map(|(demand, _)| demand).sum()
            };
            let reactors: Vec<_> = (0..self.nodes.len())
                .map(|reactor| ReactorLoad {
                    reactor,
                    busy: demand(reactor).min(1.0),
                    node: self.nodes[reactor],
                })
                .collect();
            let queues: Vec<_> = (0u16..)
                .zip(&self.queues)
                .map(|(vring, (want, at))| QueueLoad {
                    key: key(vring),
                    reactor: *at,
                    busy: want / demand(*at).max(1.0),
                    node: self.memory,
                })
                .collect();
            let chosen = self.balancer.look(self.now, &reactors, &queues);
            if let Some(Move { key, to }) = chosen {
                self.queues[usize::from(key.vring)].1 = to;
            }
            chosen
        }

        fn run(&mut self, looks: usize) -> usize {
            (0..looks).filter(|_| self.look().is_some()).count()
        }

        fn busiest(&self) -> f64 {
            let on =
                |reactor| self.queues.iter().filter(|(_, at)| *at == reactor).map(|(d, _)| d).sum::<f64>();
            (0..self.nodes.len()).map(on).fold(0.0, f64::max)
        }
    }

    #[test]
    fn four_hot_queues_spread_over_two_reactors_and_stay_there() {
        let mut machine = Machine::new(2, &[0.45; 4]);
        assert_eq!(machine.run(200), 2);
        assert_eq!(machine.busiest(), 0.9);
    }

    #[test]
    fn one_queue_has_nowhere_better_to_go() {
        assert_eq!(Machine::new(4, &[1.0]).run(200), 0);
    }

    #[test]
    fn cool_reactors_are_left_alone() {
        assert_eq!(Machine::new(2, &[0.3, 0.3]).run(200), 0);
    }

    #[test]
    fn a_single_look_moves_nothing() {
        let mut machine = Machine::new(2, &[0.5, 0.5]);
        assert_eq!((machine.look(), machine.look()), (None, None));
        machine.queues[0].0 = 0.0;
        assert_eq!(machine.look(), None);
        machine.queues[0].0 = 0.5;
        assert_eq!((machine.look(), machine.look()), (None, None));
        assert!(machine.look().is_some());
    }

    #[test]
    fn moves_are_limited_in_time() {
        let mut machine = Machine::new(8, &[0.5; 8]);
        let begin = machine.now;
        let moves = machine.run(40);
        assert!(moves >= 2 && moves as u64 <= (machine.now - begin) / BETWEEN_MOVES + 1, "{moves}");
    }

    #[test]
    fn a_guest_is_kept_near_its_memory_unless_it_gains_a_lot() {
        let mut near = Machine::new(2, &[0.4, 0.4]);
        (near.nodes, near.memory) = (vec![Some(0), Some(1)], Some(0));
        assert_eq!(near.run(100), 0, "0.8 to 0.4 is not worth the other node");
        let mut hot = Machine::new(2, &[0.9, 0.9]);
        (hot.nodes, hot.memory) = (vec![Some(0), Some(1)], Some(0));
        assert_eq!(hot.run(100), 1);
        let mut home = Machine::new(2, &[0.4, 0.4]);
        (home.nodes, home.memory) = (vec![Some(1), Some(0)], Some(0));
        assert_eq!(home.run(100), 1, "towards its memory a smaller gain does");
    }

    /// Load that swings must not carry queues to and fro.
    #[test]
    fn swinging_load_does_not_make_queues_wander() {
        let mut machine = Machine::new(2, &[0.5, 0.5, 0.1, 0.1]);
        let mut moves = 0;
        for look in 0..2400usize {
            machine.queues[0].0 = if look / 7 % 2 == 0 { 0.6 } else { 0.2 };
            machine.queues[1].0 = if look / 5 % 2 == 0 { 0.6 } else { 0.2 };
            moves += usize::from(machine.look().is_some());
        }
        assert!(moves <= 4, "{moves} moves in ten minutes");
    }
}

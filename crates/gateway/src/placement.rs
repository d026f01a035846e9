//! The reactors as the control thread sees them: which gets the next queue, which come and go, and mail that did not fit.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;

use ringstone_reactor::{Command, ReactorHandle, Reply};
use ringstone_telemetry::{ReactorCounter, ReactorStats};

use crate::balancer::ReactorLoad;

/// A reactor's place. It keeps its index for life; a removed one's is used again.
struct Place {
    core: usize,
    node: Option<u32>,
    /// `None`: removed, or its thread is being started.
    handle: Option<ReactorHandle>,
    stats: ReactorStats,
    queues: usize,
    backlog: VecDeque<Command>,
    /// It takes no more queues; its handle goes to whoever removes it once it has none.
    leaving: Option<Sender<ReactorHandle>>,
    /// Busy and all nanoseconds at the last look.
    seen: (u64, u64),
}

/// All reactors of the engine.
pub struct Reactors(Vec<Place>);

impl Reactors {
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// Index for a reactor that is to be added: the first free one.
    pub fn free_index(&self) -> usize {
        let free = |place: &Place| place.handle.is_none() && place.leaving.is_none();
        self.0.iter().position(free).unwrap_or(self.0.len())
    }

    /// Put a started reactor at `index`.
    pub fn put(
        &mut self,
        index: usize,
        core: usize,
        node: Option<u32>,
        handle: ReactorHandle,
        stats: ReactorStats,
    ) {
        let place = Place {
            core,
            node,
            handle: Some(handle),
            stats,
            queues: 0,
            backlog: VecDeque::new(),
            leaving: None,
            seen: (0, 0),
        };
        if index < self.0.len() {
            self.0[index] = place;
        } else {
            self.0.push(place);
        }
    }

    /// Reactors that take queues: index and core.
    pub fn usable(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let usable = |place: &&Place| place.handle.is_some() && place.leaving.is_none();
        self.0
            .iter()
            .enumerate()
            .filter(move |(_, place)| usable(place))
            .map(|(index, place)| (index, place.core))
    }

    pub fn is_usable(&self, index: usize) -> bool {
        self.usable().any(|(usable, _)| usable == index)
    }

    /// The reactor on `core`, if it takes queues.
    pub fn on_core(&self, core: usize) -> Option<usize> {
        self.usable().find(|(_, on)| *on == core).map(|(index, _)| index)
    }

    pub fn core(&self, index: usize) -> usize {
        self.0[index].core
    }

    /// The reactor for a volume's next queue: near the guest's memory, with the fewest queues of all, then the fewest of that
    /// volume's. `own(reactor)` counts the volume's.
    pub fn choose(&self, node: Option<u32>, own: impl Fn(usize) -> usize) -> usize {
        let remote =
            |place: &Place| matches!((node, place.node), (Some(memory), Some(core)) if memory != core);
        self.usable()
            .map(|(index, _)| index)
            .min_by_key(|index| (remote(&self.0[*index]), self.0[*index].queues, own(*index)))
            .unwrap_or(0)
    }

    /// Take no more queues onto `index`; the handle goes to `done` once it has none.
    pub fn leave(&mut self, index: usize, done: Sender<ReactorHandle>) {
        self.0[index].leaving = Some(done);
        self.release(index);
    }

    fn release(&mut self, index: usize) {
        let place = &mut self.0[index];
        if place.queues > 0 || place.leaving.is_none() {
            return;
        }
        if let (Some(done), Some(handle)) = (place.leaving.take(), place.handle.take()) {
            place.backlog.clear();
            // Ending the thread may take a moment: the caller's, or ours if it has gone.
            let _ = done.send(handle);
        }
    }

    pub fn started(&mut self, reactor: usize) {
        self.0[reactor].queues += 1;
    }

    pub fn stopped(&mut self, reactor: usize) {
        self.0[reactor].queues -= 1;
        self.release(reactor);
    }

    /// What each has done since this was asked the last time.
    pub fn load(&mut self) -> Vec<ReactorLoad> {
        let mut loads = Vec::new();
        for (reactor, place) in self.0.iter_mut().enumerate() {
            if place.handle.is_none() || place.leaving.is_some() {
                continue;
            }
            let busy = place.stats.get(ReactorCounter::BusyNs);
            let all =
                busy + place.stats.get(ReactorCounter::IdleNs) + place.stats.get(ReactorCounter::AsleepNs);
            let (busy_before, all_before) = std::mem::replace(&mut place.seen, (busy, all));
            let of = all.saturating_sub(all_before);
            let share = busy.saturating_sub(busy_before) as f64 / of.max(1) as f64;
            loads.push(ReactorLoad {
                reactor,
                busy: if of == 0 { 0.0 } else { share.min(1.0) },
                node: place.node,
            });
        }
        loads
    }

    pub fn send(&mut self, reactor: usize, command: Command) {
        let place = &mut self.0[reactor];
        place.backlog.push_back(command);
        Self::flush(place);
    }

    /// To every reactor there is, those on their way out too.
    pub fn send_all(&mut self, command: impl Fn() -> Command) {
        for place in &mut self.0 {
            place.backlog.push_back(command());
            Self::flush(place);
        }
    }

    fn flush(place: &mut Place) {
        let Some(handle) = &mut place.handle else { return place.backlog.clear() };
        while let Some(command) = place.backlog.pop_front() {
            if let Err(back) = handle.send(command) {
                place.backlog.push_front(back);
                return;
            }
        }
    }

    /// The next reply of any reactor, with its index.
    pub fn receive(&mut self) -> Option<(usize, Reply)> {
        for (index, place) in self.0.iter_mut().enumerate() {
            if !place.backlog.is_empty() {
                Self::flush(place);
            }
            if let Some(reply) = place.handle.as_mut().and_then(ReactorHandle::receive) {
                return Some((index, reply));
            }
        }
        None
    }
}

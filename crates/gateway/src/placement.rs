//! The reactors as the control thread sees them: which gets the next queue, and mail that did not fit.

use std::collections::VecDeque;

use ringstone_reactor::{Command, ReactorHandle, Reply};

struct Place {
    handle: ReactorHandle,
    queues: usize,
    backlog: VecDeque<Command>,
}

/// All reactors of the engine.
pub struct Reactors(Vec<Place>);

impl Reactors {
    pub fn new(handles: Vec<ReactorHandle>) -> Self {
        Self(
            handles.into_iter().map(|handle| Place { handle, queues: 0, backlog: VecDeque::new() }).collect(),
        )
    }

    /// The reactor for a volume's next queue: the one with the fewest of that volume's queues among those with the fewest
    /// of all. `own(reactor)` counts the volume's.
    pub fn choose(&self, own: impl Fn(usize) -> usize) -> usize {
        (0..self.0.len()).min_by_key(|index| (self.0[*index].queues, own(*index))).unwrap_or(0)
    }

    pub fn started(&mut self, reactor: usize) {
        self.0[reactor].queues += 1;
    }

    pub fn stopped(&mut self, reactor: usize) {
        self.0[reactor].queues -= 1;
    }

    pub fn send(&mut self, reactor: usize, command: Command) {
        let place = &mut self.0[reactor];
        place.backlog.push_back(command);
        Self::flush(place);
    }

    fn flush(place: &mut Place) {
        while let Some(command) = place.backlog.pop_front() {
            if let Err(back) = place.handle.send(command) {
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
            if let Some(reply) = place.handle.receive() {
                return Some((index, reply));
            }
        }
        None
    }
}

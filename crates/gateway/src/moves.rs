//! Queues that move between reactors, and reactors that come and go. Part of the control thread.

use std::collections::HashMap;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use ringstone_reactor::{QueueKey, ReactorHandle};

use crate::balancer::{Move, QueueLoad};
use crate::control::Control;
use crate::error::EngineError;
use crate::events::Level;
use crate::frontend::RingState;

/// Between two looks at the load.
pub const BALANCE_EVERY: Duration = Duration::from_millis(250);

impl Control {
    /// Something runs and there is more than one place for it.
    pub fn has_to_balance(&self) -> bool {
        self.balancing
            && !self.frozen
            && self.reactors.usable().nth(1).is_some()
            && self
                .attachments
                .values()
                .flat_map(|attachment| &attachment.frontends)
                .any(|live| !live.at_rest())
    }

    /// Look at the load if it is time to, and begin a move if that is worth it.
    pub fn balance(&mut self) {
        if !self.has_to_balance() || self.balanced_at.elapsed() < BALANCE_EVERY {
            return;
        }
        let since = self.balanced_at.elapsed().as_nanos() as u64;
        self.balanced_at = Instant::now();
        let reactors = self.reactors.load();
        let mut queues = Vec::new();
        let mut seen = HashMap::new();
        for attachment in self.attachments.values_mut() {
            for at in 0..usize::from(attachment.queues) {
                let busy = attachment.busy_ns(at);
                for live in &mut attachment.frontends {
                    let RingState::Running { reactor } = live.rings[at] else { continue };
                    let key = live.key(at);
                    let before = self.seen.get(&(key.session, key.vring)).copied().unwrap_or(busy);
                    seen.insert((key.session, key.vring), busy);
                    let node = live.node(&self.topology);
                    let share = busy.saturating_sub(before) as f64 / since as f64;
                    queues.push(QueueLoad { key, reactor, busy: share, node });
                }
            }
        }
        self.seen = seen;
        // A queue counts the time in which its requests are taken. What the reactor does beyond, completions above all, is
        // shared out in the same proportion.
        for load in &reactors {
            let counted: f64 = queues.iter().filter(|q| q.reactor == load.reactor).map(|q| q.busy).sum();
            if counted > 0.0 {
                let scale = load.busy / counted;
                queues.iter_mut().filter(|q| q.reactor == load.reactor).for_each(|q| q.busy *= scale);
            }
        }
        let now = self.clock_zero.elapsed().as_nanos() as u64;
        if let Some(Move { key, to }) = self.balancer.look(now, &reactors, &queues) {
            let busy =
                |reactor| reactors.iter().find(|l| l.reactor == reactor).map_or(0.0, |l| l.busy * 100.0);
            let from = queues.iter().find(|queue| queue.key == key).map_or(to, |queue| queue.reactor);
            let why = format!("{:.0} % busy, the other {:.0} %", busy(from), busy(to));
            self.begin_move(key, to, &why);
        }
    }

    fn begin_move(&mut self, key: QueueKey, to: usize, why: &str) -> bool {
        let Some(id) = self.owner(key.session) else { return false };
        let Some(attachment) = self.attachments.get_mut(&id) else { return false };
        let volume = attachment.volume.clone();
        let Some(live) = attachment.frontend(key.session) else { return false };
        let moves = live.begin_move(usize::from(key.vring), to, &mut self.reactors);
        if moves {
            let core = self.reactors.core(to);
            let message = format!("queue {} moves to the reactor on CPU {core} ({why})", key.vring);
            self.events.log(Level::Info, volume.name(), message);
        }
        moves
    }

    /// Move a queue to the reactor on `core`, by hand.
    pub fn move_queue(&mut self, volume: &str, queue: usize, core: usize) -> Result<(), EngineError> {
        let to = self.reactors.on_core(core).ok_or(EngineError::NoReactor { core })?;
        let id = self.attachment_of(volume).ok_or_else(|| EngineError::NotAttached(volume.into()))?;
        let running = |state: Option<&RingState>| {
            matches!(state, Some(RingState::Running { .. } | RingState::Moving { .. }))
        };
        let frontends = self.attachments.get(&id).map(|attachment| &attachment.frontends);
        let key = frontends
            .and_then(|frontends| frontends.iter().find(|live| running(live.rings.get(queue))))
            .map(|live| live.key(queue))
            .ok_or_else(|| EngineError::QueueStopped { volume: volume.into(), queue })?;
        self.begin_move(key, to, "as asked");
        Ok(())
    }

    /// Move everything off the reactor on `core`; its handle goes to `done` when it has nothing left.
    pub fn remove_reactor(&mut self, core: usize, done: Sender<ReactorHandle>) -> Result<(), EngineError> {
        let reactor = self.reactors.on_core(core).ok_or(EngineError::NoReactor { core })?;
        if self.reactors.usable().nth(1).is_none() {
            return Err(EngineError::LastReactor { core });
        }
        self.reactors.leave(reactor, done);
        self.move_stores(reactor);
        let mut leaving = Vec::new();
        for live in self.attachments.values_mut().flat_map(|attachment| &mut attachment.frontends) {
            for at in 0..live.rings.len() {
                // One that is on its way here finds another place when it arrives.
                if live.rings[at] == (RingState::Running { reactor }) {
                    leaving.push((live.key(at), live.node(&self.topology)));
                }
            }
        }
        for (key, node) in leaving {
            let to = self.reactors.choose(node, |_| 0);
            self.begin_move(key, to, "its reactor is removed");
        }
        Ok(())
    }
}

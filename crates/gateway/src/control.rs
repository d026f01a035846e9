//! The control thread: one epoll over callers, listeners, frontends, reactors and the balancer's clock.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use ringstone_blockdev::Outgrown;
use ringstone_mapping::guard::poison_event;
use ringstone_reactor::Command;
use ringstone_telemetry::StatsPage;
use ringstone_vhost_user::Reaper;
use ringstone_volume::Volume;

use crate::attachment::Attachment;
use crate::balancer::Balancer;
use crate::engine::VolumeSpec;
use crate::error::EngineError;
use crate::events::{Events, Level};
use crate::moves::BALANCE_EVERY;
use crate::placement::Reactors;
use crate::stores::Stores;
use crate::topology::Topology;

/// A call of the engine, run on the control thread.
pub type Call = Box<dyn FnOnce(&mut Control) + Send>;

/// The way of other threads to the control thread.
#[derive(Clone)]
pub struct Caller {
    pub calls: Sender<Call>,
    pub bell: Arc<EventFd>,
}

impl Caller {
    /// Have `call` run on the control thread; one that has ended needs it no more.
    pub fn call(&self, call: Call) {
        if self.calls.send(call).is_ok() {
            // A counter that is full has been rung enough.
            let _ = self.bell.write(1);
        }
    }
}

const TOKEN_CALLS: u64 = 0;
const TOKEN_REACTORS: u64 = 1;
const TOKEN_POISON: u64 = 2;
/// Listener of attachment `n` is `2n + FIRST`, frontend of session `n` is `2n + 1 + FIRST`.
const TOKEN_FIRST: u64 = 16;

/// An open volume and what it was opened with.
pub struct OpenVolume {
    pub volume: Arc<Volume>,
    pub spec: VolumeSpec,
    /// The lock of its image is, or may be, another process's: nothing of it runs.
    pub held: bool,
}

/// What the watchdog sees of the control thread. Odd while it works.
#[derive(Default)]
pub struct Pulse(AtomicU64);

impl Pulse {
    pub fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn sleep(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// `None` while it has nothing to do.
    pub fn progress(&self) -> Option<(u64, u64)> {
        let beats = self.0.load(Ordering::Relaxed);
        (beats % 2 == 1).then_some((beats, 0))
    }
}

/// Everything the control thread owns.
pub struct Control {
    pub volumes: HashMap<String, OpenVolume>,
    pub attachments: HashMap<u64, Attachment>,
    pub stores: Stores,
    pub next_store: u64,
    pub page: StatsPage,
    pub events: Events,
    pub stopping: bool,
    pub reactors: Reactors,
    pub topology: Topology,
    pub balancer: Balancer,
    /// Busy nanoseconds of queues at the last look, by session and vring.
    pub seen: HashMap<(u64, u16), u64>,
    pub balanced_at: Instant,
    pub clock_zero: Instant,
    pub balancing: bool,
    /// Another process is about to go on in our place: nothing starts, nobody is listened to.
    pub frozen: bool,
    /// Whoever waits for every vring to be at rest.
    pub quiet: Option<Sender<()>>,
    pub epoll: Epoll,
    /// Unmaps what volumes have outgrown. What frontends give goes to reapers of their own volume's.
    pub reaper: Reaper,
    pub next_session: u64,
    /// For threads that do for it what takes long.
    pub caller: Caller,
    calls: Receiver<Call>,
    reactors_bell: EventFd,
    next_attachment: u64,
    pulse: Arc<Pulse>,
}

/// What a control thread is made of.
pub struct ControlParts {
    pub page: StatsPage,
    pub events: Events,
    pub reactors: Reactors,
    pub topology: Topology,
    pub reactors_bell: EventFd,
    pub calls: Receiver<Call>,
    pub caller: Caller,
    pub balancing: bool,
    pub pulse: Arc<Pulse>,
}

impl Control {
    pub fn new(parts: ControlParts) -> io::Result<Self> {
        let ControlParts { page, events, reactors, topology, reactors_bell, calls, caller, balancing, pulse } =
            parts;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*caller.bell, EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_CALLS))?;
        epoll.add(&reactors_bell, EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_REACTORS))?;
        epoll.add(poison_event(), EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_POISON))?;
        Ok(Self {
            volumes: HashMap::new(),
            attachments: HashMap::new(),
            stores: Stores::new(),
            next_store: 1,
            page,
            events,
            stopping: false,
            reactors,
            topology,
            balancer: Balancer::default(),
            seen: HashMap::new(),
            balanced_at: Instant::now(),
            clock_zero: Instant::now(),
            balancing,
            frozen: false,
            quiet: None,
            epoll,
            reaper: Reaper::default(),
            next_session: 1,
            calls,
            caller,
            reactors_bell,
            next_attachment: 0,
            pulse,
        })
    }

    /// Run until stopped and nothing is attached any more.
    pub fn run(mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        while !(self.stopping && self.attachments.is_empty()) {
            let timeout = self.balance_timeout();
            let count = match self.epoll.wait(&mut ready, timeout) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => {
                    self.events.log(Level::Error, "", format!("the control thread cannot wait: {error}"));
                    return;
                }
            };
            self.pulse.wake();
            for event in &ready[..count] {
                self.handle(event.data());
            }
            self.balance();
            self.pulse.sleep();
        }
    }

    /// An engine with one reactor, or without a running vring, has nothing to balance and sleeps.
    fn balance_timeout(&self) -> EpollTimeout {
        if !self.has_to_balance() {
            return EpollTimeout::NONE;
        }
        let left = BALANCE_EVERY.saturating_sub(self.balanced_at.elapsed());
        EpollTimeout::from(left.as_millis() as u16 + 1)
    }

    fn handle(&mut self, token: u64) {
        match token {
            TOKEN_CALLS => {
                // The bell may have been rung for calls that an earlier round took.
                let _ = self.caller.bell.read();
                while let Ok(call) = self.calls.try_recv() {
                    call(self);
                }
            }
            TOKEN_REACTORS => {
                let _ = self.reactors_bell.read();
                while let Some((reactor, reply)) = self.reactors.receive() {
                    self.reactor_says(reactor, reply);
                }
            }
            TOKEN_POISON => self.poisoned(),
            token => {
                let id = (token - TOKEN_FIRST) / 2;
                if token % 2 == 0 {
                    self.accept(id);
                } else {
                    self.serve(id);
                }
            }
        }
    }

    // ---- calls of the engine -------------------------------------------------------------------------------------------

    pub fn attachment_of(&self, volume: &str) -> Option<u64> {
        self.attachments.iter().find(|(_, a)| a.volume.name() == volume).map(|(id, _)| *id)
    }

    pub fn attach(&mut self, attachment: Attachment) -> Result<u64, EngineError> {
        let id = self.next_attachment;
        self.epoll
            .add(&*attachment.listener, listener_event(id))
            .map_err(|errno| EngineError::System { what: "epoll_ctl", source: errno.into() })?;
        self.next_attachment += 1;
        self.attachments.insert(id, attachment);
        Ok(id)
    }

    /// A handover is under way that this attachment is a part of: nothing starts there, and nobody is listened to.
    pub fn rests(&self, id: u64) -> bool {
        let held =
            |attachment: &Attachment| self.volumes.get(attachment.volume.name()).is_some_and(|o| o.held);
        self.frozen || self.attachments.get(&id).is_some_and(held)
    }

    /// A volume was incoming and is ours: the queues that wait for that start.
    pub fn take_up(&mut self, volume: &Volume) {
        volume.set_incoming(false);
        if let Some(id) = self.attachment_of(volume.name()) {
            self.start_rings(id);
        }
    }

    /// Let a second frontend connect, or no more.
    pub fn share(&mut self, volume: &str, shared: bool) -> Result<(), EngineError> {
        let attachment = self
            .attachments
            .values_mut()
            .find(|attachment| attachment.volume.name() == volume)
            .ok_or_else(|| EngineError::NotAttached(volume.into()))?;
        if !shared && attachment.frontends.len() > 1 {
            return Err(EngineError::TwoFrontends(volume.into()));
        }
        attachment.shared = shared;
        Ok(())
    }

    /// Begin to detach; `done` hears when it is finished.
    pub fn detach(&mut self, volume: &str, force: bool, done: Sender<Result<(), EngineError>>) {
        let Some(id) = self.attachment_of(volume) else {
            let _ = done.send(Err(EngineError::NotAttached(volume.into())));
            return;
        };
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        if attachment.frontends.iter().any(|live| !live.closing) && !force {
            let _ = done.send(Err(EngineError::Connected(volume.into())));
            return;
        }
        attachment.detach.push(done);
        attachment.detaching = true;
        let sessions: Vec<u64> = attachment.frontends.iter().map(|live| live.id).collect();
        for session in &sessions {
            self.close(*session, Level::Info, "detached");
        }
        if sessions.is_empty() {
            self.finish_detach(id);
        }
    }

    pub fn finish_detach(&mut self, id: u64) {
        let Some(attachment) = self.attachments.remove(&id) else { return };
        // Whoever waits in the backlog sees the end when the reaper closes it, and nobody else comes.
        let _ = nix::sys::socket::shutdown(attachment.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        let _ = self.epoll.delete(&*attachment.listener);
        if let Err(error) = std::fs::remove_file(&attachment.path) {
            self.events.log(
                Level::Warning,
                attachment.volume.name(),
                format!("cannot remove socket {}: {error}", attachment.path.display()),
            );
        }
        for done in &attachment.detach {
            // A caller that went away needs no answer.
            let _ = done.send(Ok(()));
        }
    }

    /// A volume grew: tell its guest, and let go of what it has outgrown once no reactor can be using it.
    pub fn resized(&mut self, volume: &str, outgrown: Option<Outgrown>) {
        if let Some(outgrown) = outgrown.map(Arc::new) {
            self.reactors.send_all(|| Command::Pass(outgrown.clone()));
        }
        let Some(attachment) = self.attachment_of(volume).and_then(|id| self.attachments.get(&id)) else {
            return;
        };
        for live in &attachment.frontends {
            if let Err(error) = live.config_changed() {
                let message = format!(
                    "the frontend could not be told of the new size ({error}); it will see it after a restart"
                );
                self.events.log(Level::Warning, volume, message);
            }
        }
    }
}

pub fn listener_event(attachment: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, TOKEN_FIRST + 2 * attachment)
}

pub fn frontend_event(session: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, TOKEN_FIRST + 2 * session + 1)
}

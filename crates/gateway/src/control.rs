//! The control thread: one epoll over callers, listeners, frontends and reactors.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use ringstone_mapping::guard::poison_event;
use ringstone_reactor::{Command, Reply};
use ringstone_telemetry::StatsPage;
use ringstone_vhost_user::{Effect, Incoming, Quiet, Reply as Answer, SessionError};
use ringstone_volume::Volume;

use crate::attachment::Attachment;
use crate::error::EngineError;
use crate::events::{Events, Level};
use crate::placement::Reactors;

/// A call of the engine, run on the control thread.
pub type Call = Box<dyn FnOnce(&mut Control) + Send>;

/// Messages of one frontend handled before the others have their turn.
const MESSAGES_A_TURN: usize = 32;

const TOKEN_CALLS: u64 = 0;
const TOKEN_REACTORS: u64 = 1;
const TOKEN_POISON: u64 = 2;
/// Listener of attachment `n` is `2n + FIRST`, its frontend `2n + 1 + FIRST`.
const TOKEN_FIRST: u64 = 16;

/// Everything the control thread owns.
pub struct Control {
    pub volumes: HashMap<String, Arc<Volume>>,
    attachments: HashMap<u64, Attachment>,
    pub page: StatsPage,
    pub events: Events,
    pub stopping: bool,
    reactors: Reactors,
    epoll: Epoll,
    calls: Receiver<Call>,
    calls_bell: Arc<EventFd>,
    reactors_bell: EventFd,
    next_attachment: u64,
    next_session: u64,
}

impl Control {
    pub fn new(
        page: StatsPage,
        events: Events,
        reactors: Reactors,
        reactors_bell: EventFd,
        calls: Receiver<Call>,
        calls_bell: Arc<EventFd>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*calls_bell, EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_CALLS))?;
        epoll.add(&reactors_bell, EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_REACTORS))?;
        epoll.add(poison_event(), EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_POISON))?;
        Ok(Self {
            volumes: HashMap::new(),
            attachments: HashMap::new(),
            page,
            events,
            stopping: false,
            reactors,
            epoll,
            calls,
            calls_bell,
            reactors_bell,
            next_attachment: 0,
            next_session: 1,
        })
    }

    /// Run until stopped and nothing is attached any more.
    pub fn run(mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        while !(self.stopping && self.attachments.is_empty()) {
            let count = match self.epoll.wait(&mut ready, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => {
                    self.events.log(Level::Error, "", format!("the control thread cannot wait: {error}"));
                    return;
                }
            };
            for event in &ready[..count] {
                self.handle(event.data());
            }
        }
    }

    fn handle(&mut self, token: u64) {
        match token {
            TOKEN_CALLS => {
                // The bell may have been rung for calls that an earlier round took.
                let _ = self.calls_bell.read();
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

    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attachments.values()
    }

    pub fn attachment_of(&self, volume: &str) -> Option<u64> {
        self.attachments.iter().find(|(_, a)| a.volume.name() == volume).map(|(id, _)| *id)
    }

    pub fn attach(&mut self, attachment: Attachment) -> Result<(), EngineError> {
        let id = self.next_attachment;
        self.epoll
            .add(&attachment.listener, listener_event(id))
            .map_err(|errno| EngineError::System { what: "epoll_ctl", source: errno.into() })?;
        self.next_attachment += 1;
        self.attachments.insert(id, attachment);
        Ok(())
    }

    /// Begin to detach; `done` hears when it is finished.
    pub fn detach(&mut self, volume: &str, force: bool, done: Sender<Result<(), EngineError>>) {
        let Some(id) = self.attachment_of(volume) else {
            let _ = done.send(Err(EngineError::NotAttached(volume.into())));
            return;
        };
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        if attachment.live.as_ref().is_some_and(|live| !live.closing) && !force {
            let _ = done.send(Err(EngineError::Connected(volume.into())));
            return;
        }
        attachment.detach.push(done);
        attachment.detaching = true;
        if attachment.live.is_some() {
            self.close(id, Level::Info, "detached");
        } else {
            self.finish_detach(id);
        }
    }

    fn finish_detach(&mut self, id: u64) {
        let Some(attachment) = self.attachments.remove(&id) else { return };
        // The listener's descriptor goes with it, so epoll forgets it anyway.
        let _ = self.epoll.delete(&attachment.listener);
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

    /// A volume grew: tell its guest.
    pub fn resized(&mut self, volume: &str) {
        let Some(id) = self.attachment_of(volume) else { return };
        let Some(live) = self.attachments.get(&id).and_then(|a| a.live.as_ref()) else { return };
        if let Err(error) = live.config_changed() {
            self.events.log(
                Level::Warning,
                volume,
                format!("the frontend could not be told of the new size ({error}); it will see it after a restart"),
            );
        }
    }

    // ---- frontends ----------------------------------------------------------------------------------------------------

    /// Somebody wants to connect. While the frontend before is being seen off, whoever comes next waits in the backlog.
    fn accept(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get(&id) else { return };
        match &attachment.live {
            Some(live) if live.closing => return,
            Some(live) if live.connection.peer_gone() => {
                self.close(id, Level::Info, "the frontend disconnected");
                return;
            }
            _ => {}
        }
        self.accept_now(id);
        self.rearm_listener(id);
    }

    fn rearm_listener(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get(&id) else { return };
        if let Err(error) = self.epoll.modify(&attachment.listener, &mut listener_event(id)) {
            let message = format!("no new frontend can connect, detach and attach the volume again: {error}");
            self.events.log(Level::Error, attachment.volume.name(), message);
        }
    }

    fn accept_now(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let name = attachment.volume.name().to_owned();
        let stream = match attachment.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                self.events.log(Level::Error, &name, format!("cannot accept a frontend: {error}"));
                return;
            }
        };
        if attachment.live.is_some() || attachment.detaching {
            self.events.log(
                Level::Warning,
                &name,
                "a second frontend was turned away; the volume serves one at a time",
            );
            return;
        }
        let session = self.next_session;
        self.next_session += 1;
        let registered = attachment.connect(session, stream).and_then(|()| {
            let live =
                attachment.live.as_ref().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?;
            let event =
                EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, TOKEN_FIRST + 2 * id + 1);
            self.epoll.add(live.connection.as_fd(), event).map_err(io::Error::from)
        });
        match registered {
            Ok(()) => {
                let pid = attachment.live.as_ref().and_then(|live| live.connection.peer_pid());
                let who = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
                self.events.log(Level::Info, &name, format!("frontend connected{who}"));
            }
            Err(error) => {
                attachment.live = None;
                self.events.log(Level::Error, &name, format!("cannot serve a frontend: {error}"));
            }
        }
    }

    /// A frontend's turn: handle its messages until there are no more, or one has to wait for vrings to rest.
    fn serve(&mut self, id: u64) {
        for _ in 0..MESSAGES_A_TURN {
            let Some(live) = self.attachments.get_mut(&id).and_then(|a| a.live.as_mut()) else { return };
            if live.closing {
                if live.quieten(Quiet::All, &mut self.reactors) {
                    self.finish_close(id);
                }
                return;
            }
            if let Some(incoming) = live.pending.take() {
                let quiet = live.session.needs_quiet(&incoming.request);
                if !live.quieten(quiet, &mut self.reactors) {
                    live.pending = Some(incoming);
                    return;
                }
                self.apply(id, incoming);
                continue;
            }
            match live.connection.receive() {
                Ok(Some(incoming)) => live.pending = Some(incoming),
                Ok(None) => break,
                Err(SessionError::Socket(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    self.close(id, Level::Info, "the frontend disconnected");
                    return;
                }
                Err(error) => {
                    self.close(id, Level::Error, &format!("the frontend was disconnected: {error}"));
                    return;
                }
            }
        }
        self.rearm(id);
    }

    /// Hear of the frontend's next message.
    fn rearm(&mut self, id: u64) {
        let Some(live) = self.attachments.get(&id).and_then(|a| a.live.as_ref()) else { return };
        let mut event =
            EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, TOKEN_FIRST + 2 * id + 1);
        if let Err(error) = self.epoll.modify(live.connection.as_fd(), &mut event) {
            self.close(id, Level::Error, &format!("the frontend cannot be waited for: {error}"));
        }
    }

    fn apply(&mut self, id: u64, incoming: Incoming) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let Some(live) = attachment.live.as_mut() else { return };
        let Incoming { header, request, fds } = incoming;
        let applied = match live.session.apply(header.request, request, fds) {
            Ok(applied) => applied,
            Err(error) => return self.refuse(id, header.request, header.need_reply(), &error),
        };
        let told = match applied.effect {
            Effect::None => Ok(()),
            Effect::Call(index) => live.session.call_descriptor(index).map(|call| {
                live.tell(index, &mut self.reactors, |key| Command::SetCall(key, call));
            }),
            Effect::Kick(index) => live.session.kick_descriptor(index).map(|kick| {
                live.tell(index, &mut self.reactors, |key| Command::SetKick(key, kick));
            }),
            Effect::Memory => {
                live.unregister_memory(false, &mut self.reactors);
                Ok(())
            }
        };
        if let Err(error) = told {
            return self.close(id, Level::Error, &format!("the frontend was disconnected: {error}"));
        }
        let started = attachment.start_rings(&mut self.reactors);
        if let Err(message) = started {
            self.fail_device(id, &message);
        }
        let Some(live) = self.attachments.get_mut(&id).and_then(|a| a.live.as_mut()) else { return };
        let answer = match applied.reply {
            Some(reply) => Some(reply),
            None if header.need_reply() && live.session.acknowledges() => Some(Answer::u64(0)),
            None => None,
        };
        if let Some(answer) = answer {
            if let Err(error) = live.connection.reply(header.request, &answer, applied.descriptor.as_ref()) {
                self.close(id, Level::Error, &format!("the frontend was disconnected: {error}"));
            }
        }
    }

    /// A message that could not be applied: say so if the frontend asked to hear, else end the connection.
    fn refuse(&mut self, id: u64, request: u32, need_reply: bool, error: &SessionError) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let Some(live) = attachment.live.as_mut() else { return };
        if !(need_reply && live.session.acknowledges()) {
            return self.close(id, Level::Error, &format!("the frontend was disconnected: {error}"));
        }
        self.events.log(
            Level::Warning,
            attachment.volume.name(),
            format!("message {request} of the frontend was refused: {error}"),
        );
        if let Err(error) = live.connection.reply(request, &Answer::u64(1), None) {
            return self.close(id, Level::Error, &format!("the frontend was disconnected: {error}"));
        }
        // Vrings that rested for the message go on as they were.
        if let Err(message) = attachment.start_rings(&mut self.reactors) {
            self.fail_device(id, &message);
        }
    }

    /// End a connection: vrings come to rest first, then the memory goes.
    fn close(&mut self, id: u64, level: Level, why: &str) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let Some(live) = attachment.live.as_mut() else { return };
        if live.closing {
            return;
        }
        self.events.log(level, attachment.volume.name(), why);
        live.closing = true;
        live.pending = None;
        if live.quieten(Quiet::All, &mut self.reactors) {
            self.finish_close(id);
        }
    }

    fn finish_close(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        if let Some(mut live) = attachment.live.take() {
            live.unregister_memory(true, &mut self.reactors);
            // Closing the descriptor takes it off the epoll; this only makes it explicit.
            let _ = self.epoll.delete(live.connection.as_fd());
        }
        if attachment.detaching {
            self.finish_detach(id);
        } else {
            self.rearm_listener(id);
        }
    }

    /// A ring cannot be trusted: the device stops with NEEDS_RESET, everything else goes on.
    fn fail_device(&mut self, id: u64, why: &str) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let Some(live) = attachment.live.as_mut() else { return };
        if live.session.broken() {
            return;
        }
        // Rings in memory that was cut read as zeroes and look malformed; say what the cause is.
        let cut = live.session.memory().poisoned();
        let why = if cut { "the frontend cut the file behind its memory" } else { why };
        self.events.log(
            Level::Error,
            attachment.volume.name(),
            format!("the device was stopped and needs a reset by the guest's driver: {why}"),
        );
        live.session.set_broken();
        live.quieten(Quiet::All, &mut self.reactors);
        for fd in live.session.error_descriptors() {
            // Best effort, and never waiting: the frontend may have filled the counter and made it blocking.
            let mut poll = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
            if nix::poll::poll(&mut poll, PollTimeout::ZERO) == Ok(1) {
                let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
            }
        }
        if let Err(error) = live.config_changed() {
            let message = format!("the frontend could not be told that the device needs a reset: {error}");
            self.events.log(Level::Warning, attachment.volume.name(), message);
        }
    }

    // ---- reactors -----------------------------------------------------------------------------------------------------

    fn session_owner(&self, session: u64) -> Option<u64> {
        self.attachments
            .iter()
            .find(|(_, a)| a.live.as_ref().is_some_and(|live| live.id == session))
            .map(|(id, _)| *id)
    }

    fn reactor_says(&mut self, reactor: usize, reply: Reply) {
        match reply {
            Reply::Stopped(queue) => {
                let Some(id) = self.session_owner(queue.key().session) else { return };
                if let Some(attachment) = self.attachments.get_mut(&id) {
                    attachment.ring_stopped(*queue, reactor, &mut self.reactors);
                }
                // The message or the close that waited for it may go on now.
                self.serve(id);
            }
            Reply::Failed { key, message } => {
                if let Some(id) = self.session_owner(key.session) {
                    self.ring_failed(id, key.vring, &message);
                }
            }
            Reply::Trouble { key, message } => {
                if let Some(attachment) =
                    self.session_owner(key.session).and_then(|id| self.attachments.get(&id))
                {
                    self.events.log(Level::Error, attachment.volume.name(), message);
                }
            }
            Reply::Registered(done) => {
                let mut all = self.attachments.values_mut();
                let owner = all.find_map(|attachment| {
                    let live = attachment.live.as_mut()?;
                    live.registered(&done.mapping, reactor, done.bytes).then_some(&attachment.volume)
                });
                let Some(volume) = owner else { return };
                if let Some(error) = done.error {
                    let message = format!(
                        "{} of {} bytes of guest memory are registered with io_uring ({error}); the rest costs a little \
                         more CPU, raise LimitMEMLOCK to change that",
                        done.bytes,
                        done.mapping.len()
                    );
                    self.events.log(Level::Warning, volume.name(), message);
                }
            }
        }
    }

    fn ring_failed(&mut self, id: u64, vring: u16, message: &str) {
        self.fail_device(id, &format!("vring {vring}: {message}"));
    }

    /// A memory file was cut behind a mapping: stop the devices whose guest memory it was.
    fn poisoned(&mut self) {
        let mut counter = [0u8; 8];
        // Nothing to read only means that an earlier round took it.
        let _ = nix::unistd::read(poison_event(), &mut counter);
        let hit: Vec<u64> = self
            .attachments
            .iter()
            .filter(|(_, a)| a.live.as_ref().is_some_and(|live| live.session.memory().poisoned()))
            .map(|(id, _)| *id)
            .collect();
        for id in hit {
            self.fail_device(id, "guest memory cannot be used");
        }
    }
}

fn listener_event(attachment: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, TOKEN_FIRST + 2 * attachment)
}

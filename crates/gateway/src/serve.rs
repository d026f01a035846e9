//! Serving frontends: who connects, what they say, how they go. Part of the control thread.

use std::io;
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use ringstone_mapping::guard::poison_event;
use ringstone_reactor::{Command, Reply};
use ringstone_vhost_user::{Effect, Incoming, Quiet, Reply as Answer, SessionError};

use crate::attachment::Attachment;
use crate::control::{frontend_event, listener_event, Control};
use crate::events::Level;
use crate::frontend::{CacheFlush, Live};

/// Messages of one frontend handled before the others have their turn.
const MESSAGES_A_TURN: usize = 32;

impl Control {
    /// The attachment that a session belongs to.
    pub fn owner(&self, session: u64) -> Option<u64> {
        let has = |attachment: &Attachment| attachment.frontends.iter().any(|live| live.id == session);
        self.attachments.iter().find(|(_, attachment)| has(attachment)).map(|(id, _)| *id)
    }

    fn attachment(&mut self, session: u64) -> Option<&mut Attachment> {
        let id = self.owner(session)?;
        self.attachments.get_mut(&id)
    }

    pub fn live(&mut self, session: u64) -> Option<&mut Live> {
        self.attachment(session)?.frontend(session)
    }

    /// Somebody wants to connect. While a frontend is being seen off, whoever comes next waits in the backlog.
    pub fn accept(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get(&id).filter(|_| !self.rests(id)) else { return };
        let gone: Vec<u64> = attachment
            .frontends
            .iter()
            .filter(|live| !live.closing && live.connection.peer_gone())
            .map(|live| live.id)
            .collect();
        for session in &gone {
            self.close(*session, Level::Info, "the frontend disconnected");
        }
        let Some(attachment) = self.attachments.get(&id) else { return };
        if !gone.is_empty() || attachment.frontends.iter().any(|live| live.closing) {
            // The end of the last of them arms the listener again.
            if !attachment.frontends.iter().any(|live| live.closing) {
                self.rearm_listener(id);
            }
            return;
        }
        self.accept_now(id);
        self.rearm_listener(id);
    }

    pub fn rearm_listener(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get(&id) else { return };
        if let Err(error) = self.epoll.modify(&*attachment.listener, &mut listener_event(id)) {
            let message = format!("no new frontend can connect, detach and attach the volume again: {error}");
            self.events.log(Level::Error, attachment.volume.name(), message);
        }
    }

    fn accept_now(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let name = attachment.volume.name().to_owned();
        let stream = match attachment.listener.accept() {
            // What it has sent already goes with it, if it is turned away.
            Ok((stream, _)) => attachment.strangers.hold(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                self.events.log(Level::Error, &name, format!("cannot accept a frontend: {error}"));
                return;
            }
        };
        if !attachment.has_room() {
            let message = if attachment.shared {
                "a third frontend was turned away; a shared volume serves two, of which one writes"
            } else {
                "a second frontend was turned away; the volume serves one at a time"
            };
            // Seen at once, whenever the socket is closed.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            self.events.log(Level::Warning, &name, message);
            return;
        }
        let session = self.next_session;
        self.next_session += 1;
        let registered = attachment.connect(session, stream.into_inner()).and_then(|live| {
            self.epoll.add(live.connection.as_fd(), frontend_event(session)).map_err(io::Error::from)?;
            Ok(live.connection.peer_pid())
        });
        match registered {
            Ok(pid) => {
                let who = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
                self.events.log(Level::Info, &name, format!("frontend connected{who}"));
            }
            Err(error) => {
                attachment.frontends.retain(|live| live.id != session);
                self.events.log(Level::Error, &name, format!("cannot serve a frontend: {error}"));
            }
        }
    }

    /// A frontend's turn: handle its messages until there are no more, or one has to wait.
    pub fn serve(&mut self, session: u64) {
        for _ in 0..MESSAGES_A_TURN {
            let Some(id) = self.owner(session).filter(|id| !self.rests(*id)) else { return };
            let Some(live) = self.attachments.get_mut(&id).and_then(|a| a.frontend(session)) else { return };
            if live.closing {
                if live.quieten(Quiet::All, false, &mut self.reactors) {
                    self.finish_close(session);
                }
                return;
            }
            if live.pending.is_none() {
                match live.connection.receive() {
                    Ok(Some(incoming)) => live.pending = Some(incoming),
                    Ok(None) => break,
                    Err(SessionError::Socket(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        self.close(session, Level::Info, "the frontend disconnected");
                        return;
                    }
                    Err(error) => {
                        let why = format!("the frontend was disconnected: {error}");
                        self.close(session, Level::Error, &why);
                        return;
                    }
                }
            }
            // A turn never ends with a message that waits for nothing: the next turn comes with the frontend's next message, and
            // the frontend may be waiting for the answer to this one.
            if !self.handle_pending(session) {
                return;
            }
        }
        self.rearm(session);
    }

    /// Take the pending message as far as it goes now; false while it waits for vrings to rest or for the drive. What it waits
    /// for comes back here.
    pub fn handle_pending(&mut self, session: u64) -> bool {
        let Some(id) = self.owner(session) else { return false };
        let Some(live) = self.attachments.get_mut(&id).and_then(|a| a.frontend(session)) else {
            return false;
        };
        if live.cache == CacheFlush::UnderWay {
            return false;
        }
        let Some(incoming) = live.pending.take() else { return true };
        let quiet = live.session.needs_quiet(&incoming.request);
        let leave = live.session.may_leave(&incoming.request);
        let rests = live.quieten(quiet, leave, &mut self.reactors);
        if !rests && !live.session.only_begins_rest(&incoming.request) {
            live.pending = Some(incoming);
            return false;
        }
        if live.session.ends_cache(&incoming.request) && live.cache != CacheFlush::Done {
            live.pending = Some(incoming);
            self.flush_cache(session);
            return false;
        }
        live.cache = CacheFlush::Needless;
        self.apply(session, incoming);
        true
    }

    /// Make durable what a frontend's driver has written, as it will not flush any more. The vrings rest meanwhile. The drive
    /// may take long, so it is asked on a thread of its own.
    fn flush_cache(&mut self, session: u64) {
        let Some(id) = self.owner(session) else { return };
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let volume = attachment.volume.clone();
        let Some(live) = attachment.frontend(session) else { return };
        live.cache = CacheFlush::UnderWay;
        let caller = self.caller.clone();
        let flush = move || {
            let result = volume.drive().backing().sync();
            caller.call(Box::new(move |control| control.cache_flushed(session, result)));
        };
        if let Err(source) = std::thread::Builder::new().name("flush".into()).spawn(flush) {
            self.cache_flushed(session, Err(source));
        }
    }

    fn cache_flushed(&mut self, session: u64, result: io::Result<()>) {
        let Some(live) = self.live(session) else { return };
        live.cache = CacheFlush::Done;
        if let Err(source) = result {
            live.cache = CacheFlush::Needless;
            let Some(Incoming { header, .. }) = live.pending.take() else { return };
            self.refuse(session, header.request, header.need_reply(), &SessionError::Cache { source });
        }
        if self.owner(session).is_some_and(|id| self.rests(id)) {
            return self.tell_quiet();
        }
        self.serve(session);
    }

    /// Hear of the frontend's next message.
    pub fn rearm(&mut self, session: u64) {
        let Some(id) = self.owner(session) else { return };
        let Some(live) = self.attachments.get_mut(&id).and_then(|a| a.frontend(session)) else { return };
        if let Err(error) = self.epoll.modify(live.connection.as_fd(), &mut frontend_event(session)) {
            self.close(session, Level::Error, &format!("the frontend cannot be waited for: {error}"));
        }
    }

    /// Apply a message whose vrings are at rest, start what may run then, and answer.
    fn apply(&mut self, session: u64, incoming: Incoming) {
        let Some(id) = self.owner(session) else { return };
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let reaper = attachment.reaper.clone();
        let Some(live) = attachment.frontend(session) else { return };
        let Incoming { header, request, fds } = incoming;
        let memory = live.session.memory().clone();
        let applied = match live.session.apply(header.request, request, fds) {
            Ok(applied) => applied,
            Err(error) => return self.refuse(session, header.request, header.need_reply(), &error),
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
                reaper.take(memory);
                Ok(())
            }
        };
        if let Err(error) = told {
            return self.close(session, Level::Error, &format!("the frontend was disconnected: {error}"));
        }
        self.start_rings(id);
        let Some(live) = self.live(session) else { return };
        let answer = match applied.reply {
            Some(reply) => Some(reply),
            None if header.need_reply() && live.session.acknowledges() => Some(Answer::u64(0)),
            None => None,
        };
        if let Some(answer) = answer {
            if let Err(error) = live.connection.reply(header.request, &answer, applied.descriptor.as_ref()) {
                self.close(session, Level::Error, &format!("the frontend was disconnected: {error}"));
            }
        }
    }

    /// Run every vring of an attachment that may run and does not.
    pub fn start_rings(&mut self, id: u64) {
        if self.rests(id) {
            return;
        }
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let started = match attachment.start_rings(&self.topology, &mut self.reactors) {
            Ok(started) => started,
            Err((session, message)) => return self.fail_device(session, &message),
        };
        let name = attachment.volume.name();
        if started.again > 0 {
            let message =
                format!("{} requests that the gateway before had not finished are done again", started.again);
            self.events.log(Level::Info, name, message);
        }
        for (index, entries) in started.unnoted {
            let message = format!(
                "vring {index} has {entries} entries, for which the frontend's in-flight region has no room: requests in \
                 flight are lost if this gateway is killed; a smaller queue-size, or a region for all queues, mends that"
            );
            self.events.log(Level::Warning, name, message);
        }
    }

    /// A message that could not be applied: say so if the frontend asked to hear, else end the connection.
    fn refuse(&mut self, session: u64, request: u32, need_reply: bool, error: &SessionError) {
        let Some(id) = self.owner(session) else { return };
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let name = attachment.volume.name().to_owned();
        let Some(live) = attachment.frontend(session) else { return };
        if !(need_reply && live.session.acknowledges()) {
            return self.close(session, Level::Error, &format!("the frontend was disconnected: {error}"));
        }
        let told = live.connection.reply(request, &Answer::u64(1), None);
        self.events.log(
            Level::Warning,
            &name,
            format!("message {request} of the frontend was refused: {error}"),
        );
        if let Err(error) = told {
            return self.close(session, Level::Error, &format!("the frontend was disconnected: {error}"));
        }
        // Vrings that rested for the message go on as they were.
        self.start_rings(id);
    }

    /// End a connection: vrings come to rest first, then the memory goes.
    pub fn close(&mut self, session: u64, level: Level, why: &str) {
        let Some(id) = self.owner(session) else { return };
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let volume = attachment.volume.clone();
        let Some(live) = attachment.frontend(session).filter(|live| !live.closing) else { return };
        live.closing = true;
        live.pending = None;
        let at_rest = live.quieten(Quiet::All, false, &mut self.reactors);
        self.events.log(level, volume.name(), why);
        if at_rest {
            self.finish_close(session);
        }
    }

    pub fn finish_close(&mut self, session: u64) {
        let Some(id) = self.owner(session) else { return };
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let Some(at) = attachment.frontends.iter().position(|live| live.id == session) else { return };
        let live = attachment.frontends.remove(at);
        // Closing the descriptor takes it off the epoll; this only makes it explicit.
        let _ = self.epoll.delete(live.connection.as_fd());
        // The peer hears of it now, whatever its memory takes.
        live.connection.hang_up();
        // The volume goes at once, with the locks on it; the memory and the descriptors go to the reaper piece by piece.
        drop(live);
        if attachment.detaching {
            if attachment.frontends.is_empty() {
                self.finish_detach(id);
            }
            return;
        }
        self.rearm_listener(id);
        // The other frontend may have waited for this one.
        self.start_rings(id);
    }

    /// A ring cannot be trusted: the device stops with NEEDS_RESET, everything else goes on.
    fn fail_device(&mut self, session: u64, why: &str) {
        let Some(id) = self.owner(session) else { return };
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let volume = attachment.volume.clone();
        let signals = attachment.signals.clone();
        let Some(live) = attachment.frontend(session).filter(|live| !live.session.broken()) else { return };
        // Rings in memory that was cut read as zeroes and look malformed; say what the cause is.
        let cut = live.session.poisoned();
        let why = if cut {
            "the frontend cut the file behind its memory, in-flight region or dirty log"
        } else {
            why
        };
        self.events.log(
            Level::Error,
            volume.name(),
            format!("the device was stopped and needs a reset by the guest's driver: {why}"),
        );
        live.session.set_broken();
        live.quieten(Quiet::All, false, &mut self.reactors);
        if signals.is_empty() {
            let copies: Vec<_> = live.session.error_descriptors().flat_map(|fd| fd.try_clone()).collect();
            // Best effort, and not here: the frontend may fill the counter and make it blocking between look and write.
            signals.run(move || {
                for fd in copies {
                    let mut poll = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
                    if nix::poll::poll(&mut poll, PollTimeout::ZERO) == Ok(1) {
                        let _ = nix::unistd::write(&fd, &1u64.to_ne_bytes());
                    }
                }
            });
        }
        if let Err(error) = live.config_changed() {
            let message = format!("the frontend could not be told that the device needs a reset: {error}");
            self.events.log(Level::Warning, volume.name(), message);
        }
    }

    // ---- reactors -----------------------------------------------------------------------------------------------------

    pub fn reactor_says(&mut self, reactor: usize, reply: Reply) {
        match reply {
            Reply::Stopped(queue) => {
                let session = queue.key().session;
                let Some(id) = self.owner(session) else {
                    self.reactors.stopped(reactor);
                    return;
                };
                let rests = self
                    .attachments
                    .get_mut(&id)
                    .is_some_and(|attachment| attachment.ring_stopped(queue, reactor, &mut self.reactors));
                if self.rests(id) {
                    return self.tell_quiet();
                }
                if rests {
                    // The message or the close that waited for it may go on now. Where there is none, what it rested for
                    // has come to nothing (a handover that failed) and it goes on.
                    self.serve(session);
                    if self.live(session).is_some_and(|live| live.pending.is_none() && !live.closing) {
                        self.start_rings(id);
                    }
                }
            }
            Reply::Kept(keeping) => self.kept(reactor, keeping),
            Reply::StoreSays { id, message } => self.store_says(id, message),
            // The last reactor's was the last.
            Reply::Passed(outgrown) => self.reaper.take(outgrown),
            Reply::Failed { key, message } => {
                self.fail_device(key.session, &format!("vring {}: {message}", key.vring));
            }
            Reply::Trouble { key, message } => {
                if let Some(attachment) = self.owner(key.session).and_then(|id| self.attachments.get(&id)) {
                    self.events.log(Level::Error, attachment.volume.name(), message);
                }
            }
        }
    }

    /// A memory file was cut behind a mapping: stop the devices whose guest memory it was.
    pub fn poisoned(&mut self) {
        let mut counter = [0u8; 8];
        // Nothing to read only means that an earlier round took it.
        let _ = nix::unistd::read(poison_event(), &mut counter);
        let frontends = self.attachments.values().flat_map(|attachment| &attachment.frontends);
        let hit: Vec<u64> = frontends.filter(|live| live.session.poisoned()).map(|live| live.id).collect();
        for session in hit {
            self.fail_device(session, "guest memory cannot be used");
        }
    }
}

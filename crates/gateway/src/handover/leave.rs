//! The old process's side: everything comes to rest, goes over, and either goes on here or is let go.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{channel, Sender};
use std::sync::Arc;
use std::time::Duration;

use ringstone_blockdev::{Drive, FileDrive};
use ringstone_vhost_user::{Descriptors, Link, Quiet, SessionError};

use super::format::{
    kind, AttachmentState, FrontendState, Greeting, HandoverState, ImagesState, Opened, Refused, Serving,
    StoreState, VolumeState, FORMAT,
};
use super::images::{apart, image_of, Lent, LET_GO, OPEN, OWN};
use super::{monotonic_ns, ANSWER};
use crate::attachment::Attachment;
use crate::control::{Control, OpenVolume};
use crate::descriptors;
use crate::engine::Engine;
use crate::error::EngineError;
use crate::frontend::Live;
use crate::stores::Rested;

/// How long the new process may take to start: Python, reactors, and the first look at its state.
const START: Duration = Duration::from_secs(120);

/// What a handover came to.
#[derive(Clone, Debug)]
pub struct HandedOver {
    /// Release of the process that goes on.
    pub version: String,
    pub volumes: usize,
    /// From the first vring told to stop until the last was with its new reactor.
    pub stall_ns: u64,
    /// Of it, until everything was at rest, and images were the other's.
    pub drain_ns: u64,
}

fn failed(error: impl std::fmt::Display) -> EngineError {
    EngineError::Handover(error.to_string())
}

/// The answer that must come next.
fn expect(link: &mut Link, wanted: u32) -> Result<Vec<u8>, EngineError> {
    let message = link.receive().map_err(|error| match error {
        SessionError::Socket(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            failed("the new process does not answer")
        }
        SessionError::Socket(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            failed("the new process has gone")
        }
        other => failed(other),
    })?;
    if message.kind == kind::REFUSED {
        let refused: Refused = serde_json::from_slice(&message.body).map_err(failed)?;
        return Err(failed(refused.reason));
    }
    if message.kind != wanted {
        return Err(failed(format!("the new process said {} where {wanted} must come", message.kind)));
    }
    Ok(message.body)
}

impl Engine {
    /// Hand everything over to the gateway at the other end of `stream`. Blocks the caller; guests go on meanwhile, but for the
    /// stall that is reported. `extras` are descriptors of the control side, which arrive under their names. `drain`: how
    /// long requests in flight may take. After `Ok` the engine must be [abandoned](Self::abandon).
    ///
    /// # Errors
    /// The new process refuses, dies or is late: everything goes on here as before. [`EngineError::HandedOver`]: it died after
    /// it was told to go; nothing runs here any more.
    pub fn hand_over(
        &self,
        stream: UnixStream,
        version: &str,
        extras: Vec<(String, OwnedFd)>,
        drain: Duration,
    ) -> Result<HandedOver, EngineError> {
        let mut link = Link::new(stream, START).map_err(failed)?;
        let hello: Greeting = serde_json::from_slice(&expect(&mut link, kind::HELLO)?).map_err(failed)?;
        if !hello.formats.contains(&FORMAT) {
            let reason = format!(
                "release {version} hands over in format {FORMAT}, which release {} does not read; stop and start the \
                 gateway instead",
                hello.version
            );
            refuse(&mut link, &reason);
            return Err(failed(reason));
        }
        let welcome = Greeting {
            version: version.into(),
            formats: vec![FORMAT],
            descriptors: descriptors::open(),
            images: true,
        };
        let body = serde_json::to_vec(&welcome).map_err(failed)?;
        link.send(kind::WELCOME, &body, std::iter::empty()).map_err(failed)?;
        expect(&mut link, kind::READY)?;
        // All that goes over is duplicated once, and the bitmaps of drives come on top.
        descriptors::make_room((3 * descriptors::open()).max(descriptors::AT_START));

        let mut lent = Lent::none();
        let mut rested = Vec::new();
        let outcome = self.lend_images(&mut link, &mut lent, hello.images, drain).and_then(|stopped_ns| {
            self.hand_over_stopped(&mut link, version, extras, drain, stopped_ns, &mut rested)
        });
        match outcome {
            Ok(mut done) => {
                lent.handed_over();
                done.version = hello.version;
                Ok(done)
            }
            Err(error @ EngineError::HandedOver(_)) => {
                lent.handed_over();
                Err(error)
            }
            Err(error) => {
                // It hears of it, or is gone.
                refuse(&mut link, &error.to_string());
                self.call(move |control| {
                    control.resume_stores(rested);
                    control.thaw();
                })?;
                Err(error)
            }
        }
    }

    /// Have the new process own the images of clusters, while all other volumes are served. When the first vring was told to
    /// stop, in ns of CLOCK_MONOTONIC. `before`: it can do that before it has the rest.
    fn lend_images(
        &self,
        link: &mut Link,
        lent: &mut Lent,
        before: bool,
        drain: Duration,
    ) -> Result<u64, EngineError> {
        let images = self.call(|control| control.images())??;
        if images.is_empty() {
            return Ok(monotonic_ns());
        }
        let mut opened = Opened::default();
        if before {
            let volumes = self.call(|control| control.save_images())??;
            let body = serde_json::to_vec(&ImagesState { volumes }).map_err(failed)?;
            link.send(kind::IMAGES, &body, std::iter::empty()).map_err(failed)?;
            link.set_limit(OPEN + ANSWER).map_err(failed)?;
            let body = expect(link, kind::OPENED)?;
            opened = serde_json::from_slice(&body).map_err(failed)?;
        }
        let stopped_ns = monotonic_ns();
        let (quiet, at_rest) = channel();
        self.call(move |control| control.hold_images(quiet))?;
        if at_rest.recv_timeout(drain).is_err() {
            self.call(Control::release_images)?;
            return Err(not_drained(drain));
        }
        lent.let_go(images, &opened.clients, &self.caller()?)?;
        if before {
            link.send(kind::FREE, b"", std::iter::empty()).map_err(failed)?;
            link.set_limit(OWN + ANSWER).map_err(failed)?;
            expect(link, kind::OWNED)?;
        }
        Ok(stopped_ns)
    }

    fn hand_over_stopped(
        &self,
        link: &mut Link,
        version: &str,
        extras: Vec<(String, OwnedFd)>,
        drain: Duration,
        stopped_ns: u64,
        rested: &mut Vec<Rested>,
    ) -> Result<HandedOver, EngineError> {
        let (quiet, at_rest) = channel();
        self.call(move |control| control.freeze(quiet))?;
        at_rest.recv_timeout(drain).map_err(|_| not_drained(drain))?;
        self.rest_stores(drain, rested)?;
        let drain_ns = monotonic_ns() - stopped_ns;
        let version = version.to_owned();
        let drives = rested.iter().map(Rested::drive).collect::<Vec<_>>();
        let (state, fds) =
            self.call(move |control| control.save(version, stopped_ns, &extras, &drives))??;
        let body = serde_json::to_vec(&state).map_err(failed)?;
        link.set_limit(ANSWER).map_err(failed)?;
        link.send(kind::STATE, &body, fds.as_fds()).map_err(failed)?;
        expect(link, kind::INSTALLED)?;
        // So short a message is sent whole or not at all: where that fails the other cannot have begun, and we go on.
        link.send(kind::GO, b"", std::iter::empty()).map_err(failed)?;
        // From here on it is the other's: two processes must never run one ring.
        let gone = |error: &dyn std::fmt::Display| EngineError::HandedOver(error.to_string());
        let body = expect(link, kind::SERVING).map_err(|error| gone(&error))?;
        let serving: Serving = serde_json::from_slice(&body).map_err(|error| gone(&error))?;
        Ok(HandedOver {
            version: String::new(),
            volumes: state.attachments.len(),
            stall_ns: serving.since_ns.saturating_sub(stopped_ns),
            drain_ns,
        })
    }

    /// Let go of everything that was handed over: no socket is removed, no frontend is told. Ends the engine.
    pub fn abandon(&self) {
        let gone = self.call(|control| {
            control.attachments.clear();
            std::mem::take(&mut control.volumes)
        });
        // The control thread may have ended; then there is nothing left to let go of.
        if let Ok(volumes) = gone {
            let (done, closed) = channel();
            let close = move || {
                drop(volumes);
                let _ = done.send(());
            };
            // A cluster may take long to close an image; what is left then goes with the process.
            if apart(close).is_ok() {
                let _ = closed.recv_timeout(LET_GO);
            }
        }
        self.stop();
    }
}

fn not_drained(drain: Duration) -> EngineError {
    failed(format!("requests in flight were not done within {} s", drain.as_secs_f64()))
}

fn refuse(link: &mut Link, reason: &str) {
    let body = serde_json::to_vec(&Refused { reason: reason.into() }).unwrap_or_default();
    // Whoever is refused may have gone.
    let _ = link.send(kind::REFUSED, &body, std::iter::empty());
}

impl Control {
    /// Bring every vring to rest and listen to nobody; `quiet` hears when all is at rest.
    pub fn freeze(&mut self, quiet: Sender<()>) {
        self.frozen = true;
        self.rest(quiet);
    }

    /// Bring the vrings of every attachment that is to rest to that; `quiet` hears when they are.
    pub fn rest(&mut self, quiet: Sender<()>) {
        for id in self.resting() {
            let Some(attachment) = self.attachments.get_mut(&id) else { continue };
            for live in &mut attachment.frontends {
                live.quieten(Quiet::All, false, &mut self.reactors);
            }
        }
        self.quiet = Some(quiet);
        self.tell_quiet();
    }

    fn resting(&self) -> Vec<u64> {
        self.attachments.keys().copied().filter(|id| self.rests(*id)).collect()
    }

    /// Tell whoever waits for it that all that is to rest does, if it does, and no message waits for the drive any more.
    pub fn tell_quiet(&mut self) {
        if self.quiet.is_none() {
            return;
        }
        let resting = self.resting();
        let mut all = resting.iter().filter_map(|id| self.attachments.get(id)).flat_map(|one| &one.frontends);
        if all.all(Live::at_rest) && self.finish_pending(&resting) {
            if let Some(quiet) = self.quiet.take() {
                // Whoever waited gave up: it thaws us.
                let _ = quiet.send(());
            }
        }
    }

    /// Messages that waited for vrings to rest, and frontends that were being seen off: both can be done with now. False while
    /// the drive is still asked to make durable what one of the messages needs durable.
    fn finish_pending(&mut self, resting: &[u64]) -> bool {
        let all = resting.iter().filter_map(|id| self.attachments.get(id)).flat_map(|one| &one.frontends);
        let sessions: Vec<(u64, bool)> = all.map(|live| (live.id, live.closing)).collect();
        let mut done = true;
        for (session, closing) in sessions {
            if closing {
                self.finish_close(session);
            } else {
                done &= self.handle_pending(session);
            }
        }
        done
    }

    /// Go on as before the freeze; a volume that is held for its image goes on when that is back.
    pub fn thaw(&mut self) {
        self.frozen = false;
        self.quiet = None;
        let ids: Vec<u64> = self.attachments.keys().copied().collect();
        for id in ids {
            self.wake(id);
        }
    }

    /// An attachment goes on behind a rest, if it is over.
    pub fn wake(&mut self, id: u64) {
        if self.rests(id) {
            return;
        }
        self.start_rings(id);
        self.rearm_listener(id);
        let Some(attachment) = self.attachments.get(&id) else { return };
        let sessions: Vec<u64> = attachment.frontends.iter().map(|live| live.id).collect();
        for session in sessions {
            self.serve(session);
        }
    }

    fn save_images(&self) -> Result<Vec<VolumeState>, EngineError> {
        let images = self.volumes.values().filter(|open| image_of(&open.volume).is_some());
        images.map(|open| save_volume(open, &mut Descriptors::default())).collect()
    }

    fn save(
        &mut self,
        version: String,
        stopped_ns: u64,
        extras: &[(String, OwnedFd)],
        drives: &[(PathBuf, Arc<FileDrive>)],
    ) -> Result<(HandoverState, Descriptors), EngineError> {
        let mut fds = Descriptors::default();
        let stores = drives
            .iter()
            .map(|(path, drive)| Ok(StoreState { path: path.clone(), fd: fds.add(drive.file())? }))
            .collect::<Result<Vec<_>, SessionError>>()
            .map_err(failed)?;
        let mut volumes =
            self.volumes.values().map(|v| save_volume(v, &mut fds)).collect::<Result<Vec<_>, _>>()?;
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        let mut attachments = Vec::new();
        for attachment in self.attachments.values().filter(|attachment| !attachment.detaching) {
            attachments.push(save_attachment(attachment, &mut fds).map_err(failed)?);
        }
        attachments.sort_by(|a, b| a.volume.cmp(&b.volume));
        let extras = extras
            .iter()
            .map(|(name, fd)| Ok((name.clone(), fds.add(fd.as_fd())?)))
            .collect::<Result<BTreeMap<_, _>, SessionError>>()
            .map_err(failed)?;
        let sessions = || attachments.iter().flat_map(|attachment| &attachment.frontends);
        let requires = [
            ("packed-rings", sessions().any(|f| f.session.features & 1 << 34 != 0)),
            ("dirty-log", sessions().any(|f| f.session.log.is_some())),
            ("stores", !stores.is_empty()),
            ("keys", volumes.iter().any(|volume| volume.key.is_some())),
            ("shared", attachments.iter().any(|attachment| attachment.frontends.len() > 1)),
        ];
        let requires =
            requires.into_iter().filter(|(_, needed)| *needed).map(|(word, _)| word.into()).collect();
        let state = HandoverState {
            format: FORMAT,
            version,
            requires,
            stopped_ns,
            stores,
            volumes,
            attachments,
            extras,
        };
        Ok((state, fds))
    }
}

fn save_volume(open: &OpenVolume, fds: &mut Descriptors) -> Result<VolumeState, EngineError> {
    let OpenVolume { volume, spec, .. } = open;
    let drive = volume.drive();
    let presence = match drive {
        Drive::Mapped(mapped) => {
            let file = memory_file(&mapped.presence()).map_err(failed)?;
            Some(fds.add(file.as_fd()).map_err(failed)?)
        }
        _ => None,
    };
    let key = match drive {
        Drive::Store(of_store) => of_store.cipher().map(|cipher| memory_file(cipher.key().bytes())),
        _ => None,
    };
    let key =
        key.transpose().map_err(failed)?.map(|file| fds.add(file.as_fd())).transpose().map_err(failed)?;
    Ok(VolumeState {
        name: volume.name().into(),
        serial: spec.serial.clone(),
        size: volume.size(),
        block_size: volume.block_size(),
        read_only: volume.read_only(),
        backend: spec.backend.clone(),
        drive: match drive {
            Drive::Mapped(_) => "mapped",
            Drive::File(_) => "file",
            Drive::Rbd(_) => "rbd",
            Drive::Store(_) => "store",
            Drive::Null => "null",
        }
        .into(),
        fd: drive.backing().file().map(|fd| fds.add(fd)).transpose().map_err(failed)?,
        presence,
        key,
    })
}

/// A file in memory that holds `bytes`.
fn memory_file(bytes: &[u8]) -> std::io::Result<OwnedFd> {
    use nix::sys::memfd::{memfd_create, MFdFlags};
    use std::io::Write;
    let mut file = std::fs::File::from(memfd_create(c"ringstone-handover", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file.into())
}

fn save_attachment(attachment: &Attachment, fds: &mut Descriptors) -> Result<AttachmentState, SessionError> {
    let mut frontends = Vec::new();
    for live in &attachment.frontends {
        let (begun, begun_fds) = live.connection.begun();
        frontends.push(FrontendState {
            connection: fds.add(live.connection.as_fd())?,
            begun: begun.to_vec(),
            begun_fds: begun_fds.iter().map(|fd| fds.add(fd.as_fd())).collect::<Result<_, _>>()?,
            cache: live.session.device().cache(),
            session: live.session.save(fds)?,
        });
    }
    Ok(AttachmentState {
        volume: attachment.volume.name().into(),
        path: attachment.path.to_string_lossy().into_owned(),
        queues: usize::from(attachment.queues),
        shared: attachment.shared,
        listener: fds.add(attachment.listener.as_fd())?,
        writer: attachment.frontends.iter().position(|live| Some(live.id) == attachment.writer),
        frontends,
    })
}

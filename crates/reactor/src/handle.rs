//! The control thread's side of a reactor.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use ringstone_blockdev::Outgrown;
use ringstone_rbd::Completions;
use ringstone_store::{Epochs, Reader};
use ringstone_telemetry::{Clock, ReactorStats};
use ringstone_virtqueue::Chain;

use crate::affinity;
use crate::core::{Delayed, Reactor, Shared};
use crate::error::ReactorError;
use crate::guests::{Budget, Quota};
use crate::keeping::{Answered, Keeping};
use crate::mailbox::{mailbox, Receiver, Sender};
use crate::pools::Pools;
use crate::queue::{Queue, QueueKey};
use crate::uring::Uring;

/// Messages that may wait in a mailbox. The control thread keeps what does not fit.
const CAPACITY: usize = 1024;

/// What the control thread tells a reactor.
pub enum Command {
    /// Run this queue from now on.
    Start(Box<Queue>),
    /// Take no more from this queue, and give it back as [`Reply::Stopped`] once what is in flight is done, or, with
    /// `leave`, once the drive has it no more: what is undone stays in the in-flight region.
    Stop {
        key: QueueKey,
        leave: bool,
    },
    SetCall(QueueKey, Option<OwnedFd>),
    SetKick(QueueKey, Option<OwnedFd>),
    /// Give this back: whoever sent it knows then that a turn has begun since.
    Pass(Arc<Outgrown>),
    /// Run a store's keeper from now on.
    Keep(Box<Keeping>),
    /// Bring the keeper of this store to rest, and give it back as [`Reply::Kept`].
    StopKeeping(u64),
    /// For the keeper of this store.
    Store {
        id: u64,
        command: ringstone_store::Command,
        answered: Answered,
    },
    /// End once every queue has been stopped.
    Shutdown,
}

/// What a reactor tells the control thread.
pub enum Reply {
    Stopped(Box<Queue>),
    /// The ring is unusable; the queue takes nothing more. `Stopped` follows when what was in flight is done.
    Failed {
        key: QueueKey,
        message: String,
    },
    /// [`Command::Pass`] came by.
    Passed(Arc<Outgrown>),
    /// What [`Command::StopKeeping`] asked for.
    Kept(Box<Keeping>),
    /// A store has something to say.
    StoreSays {
        id: u64,
        message: String,
    },
    /// An I/O error worth a log line.
    Trouble {
        key: QueueKey,
        message: String,
    },
}

/// How a reactor is to run.
#[derive(Clone, Copy, Debug)]
pub struct ReactorSettings {
    pub core: usize,
    /// Nanoseconds of polling without work before it sleeps.
    pub idle_ns: u64,
}

/// A reactor's way to the control thread.
pub struct Outbox {
    sender: Sender<Reply>,
    wake: Arc<OwnedFd>,
    /// What did not fit. Only a control thread that hangs lets this grow.
    backlog: Vec<Reply>,
}

impl Outbox {
    pub fn send(&mut self, reply: Reply) {
        self.backlog.push(reply);
        while !self.backlog.is_empty() {
            let reply = self.backlog.remove(0);
            if let Err(reply) = self.sender.send(reply) {
                self.backlog.insert(0, reply);
                break;
            }
        }
        ring_bell(&self.wake);
    }
}

/// The control thread's handle; dropping it shuts the reactor down and waits for its thread.
pub struct ReactorHandle {
    sender: Sender<Command>,
    receiver: Receiver<Reply>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl ReactorHandle {
    /// Start a reactor thread bound to its core. `control` is an eventfd that is written when there is a [`Reply`]; `reader` is
    /// its part in the engine's epochs.
    ///
    /// # Errors
    /// No usable io_uring, or a core that this process may not use.
    pub fn start(
        settings: ReactorSettings,
        clock: Clock,
        stats: ReactorStats,
        control: Arc<OwnedFd>,
        epochs: Arc<Epochs>,
        reader: Reader,
    ) -> Result<Self, ReactorError> {
        let (sender, inbox) = mailbox(CAPACITY);
        let (replies, receiver) = mailbox(CAPACITY);
        let wake = Arc::new(eventfd().map_err(ReactorError::Spawn)?);
        let theirs = wake.try_clone().map_err(ReactorError::Spawn)?;
        let returned = Arc::new(Completions::new(wake.try_clone().map_err(ReactorError::Spawn)?));
        let outbox = Outbox { sender: replies, wake: control, backlog: Vec::new() };
        let (ready, started) = std::sync::mpsc::channel();
        let (core, idle_ns) = (settings.core, settings.idle_ns);
        let thread = std::thread::Builder::new()
            .name(format!("reactor-{core}"))
            .spawn(move || match prepare(&settings, clock, stats, outbox, returned, (epochs, reader)) {
                Ok(shared) => {
                    let idle = shared.clock.ticks(idle_ns);
                    let _ = ready.send(Ok(()));
                    Reactor::new(shared, inbox, theirs, idle).run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            })
            .map_err(ReactorError::Spawn)?;
        match started.recv() {
            Ok(Ok(())) => Ok(Self { sender, receiver, wake, thread: Some(thread) }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ReactorError::Spawn(std::io::Error::other("the thread ended at once"))),
        }
    }

    /// Send a command; it comes back if the mailbox is full, to be tried again after some replies.
    pub fn send(&mut self, command: Command) -> Result<(), Command> {
        let result = self.sender.send(command);
        ring_bell(&self.wake);
        result
    }

    /// The next reply, if there is one.
    pub fn receive(&mut self) -> Option<Reply> {
        self.receiver.receive()
    }
}

impl Drop for ReactorHandle {
    fn drop(&mut self) {
        let mut command = Command::Shutdown;
        while let Err(back) = self.send(command) {
            command = back;
            std::thread::yield_now();
        }
        if let Some(thread) = self.thread.take() {
            // A reactor that panicked has said so on stderr; there is nothing to add.
            let _ = thread.join();
        }
    }
}

/// On the reactor's own thread: its core, its ring (single issuer), its memory.
fn prepare(
    settings: &ReactorSettings,
    clock: Clock,
    stats: ReactorStats,
    outbox: Outbox,
    returned: Arc<Completions>,
    (epochs, reader): (Arc<Epochs>, Reader),
) -> Result<Shared, ReactorError> {
    affinity::bind(settings.core).map_err(|source| ReactorError::Bind { core: settings.core, source })?;
    let mut uring = Uring::new().map_err(ReactorError::Uring)?;
    uring.enable().map_err(ReactorError::Uring)?;
    Ok(Shared {
        uring,
        pools: Pools::new(),
        chain: Chain::default(),
        clock,
        now: clock.now(),
        began: 0,
        stats,
        dirty: Vec::with_capacity(256),
        quota: Quota::share(1),
        budget: Budget::default(),
        held: Vec::new(),
        delayed: Delayed::default(),
        outbox,
        returned,
        at_librbd: 0,
        epochs,
        reader,
    })
}

fn eventfd() -> std::io::Result<OwnedFd> {
    // SAFETY: a plain system call; the descriptor is checked and owned from here on.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn ring_bell(bell: &OwnedFd) {
    let one = 1u64;
    // SAFETY: eight bytes of a live local to our own non-blocking eventfd; if its counter is full the bell rings already.
    unsafe { libc::write(bell.as_raw_fd(), (&raw const one).cast(), 8) };
}

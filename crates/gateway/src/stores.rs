//! Stores that this process has open: opened on a caller's thread, kept by one of the reactors, spoken to from any thread.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use ringstone_blockdev::{Direct, Drive, DriveError, FileDrive, Key, StoreDoor, StoreParts, StoreVolume};
use ringstone_rbd::Completions;
use ringstone_reactor::{Answered, Command as Order, Keeping};
use ringstone_store::{Answer, Command, Keeper, Layout, Medium, StoreError, BLOCK};

use crate::control::{Caller, Control};
use crate::engine::{Engine, VolumeSpec};
use crate::error::EngineError;
use crate::events::Level;

/// A store as the control thread sees it.
pub struct OpenStore {
    pub id: u64,
    pub path: PathBuf,
    pub parts: StoreParts,
    home: Home,
}

/// Who has the keeper.
enum Home {
    Reactor(usize),
    /// On its way from one reactor to another, with what is for it; or at rest, where somebody waits for that.
    Moving {
        waiting: Vec<(Command, Answered)>,
        rest: Option<Sender<Rested>>,
    },
}

/// A store whose keeper rests. It goes when this does.
pub struct Rested {
    store: OpenStore,
    keeping: Box<Keeping>,
}

impl Rested {
    pub fn drive(&self) -> (PathBuf, Arc<FileDrive>) {
        (self.store.path.clone(), self.store.parts.drive.clone())
    }
}

/// The way of any thread to a keeper.
struct Door {
    id: u64,
    caller: Caller,
}

impl Door {
    fn send(&self, command: Command) -> Receiver<Result<Answer, StoreError>> {
        let (answered, answer) = channel();
        let id = self.id;
        self.caller.call(Box::new(move |control| control.tell_store(id, command, answered)));
        answer
    }
}

impl StoreDoor for Door {
    fn call(&self, command: Command) -> Result<Answer, StoreError> {
        // Nobody to answer: the engine or the store is gone.
        self.send(command).recv().unwrap_or(Err(StoreError::Closed))
    }

    fn post(&self, command: Command) {
        drop(self.send(command));
    }
}

/// Make a store on the drive at `path`, with extents of `extent` bytes. A file that is not there is made, of `size` bytes that
/// are allocated. Returns the store's UUID. Whatever was on the drive is gone.
///
/// # Errors
/// It is in use, too small, or fails.
pub fn format_store(path: &Path, size: Option<u64>, extent: u64) -> Result<[u8; 16], EngineError> {
    let made = !path.exists();
    if made {
        let size = size.ok_or_else(|| missing(path))?;
        make_file(path, size).map_err(|source| DriveError::Open { path: path.to_owned(), source })?;
    }
    let format = || -> Result<[u8; 16], EngineError> {
        let drive = FileDrive::open(path, 0, BLOCK as u32, false, Direct::Auto)?;
        let have = drive.length()?;
        let layout = Layout::new(size.unwrap_or(have).min(have), extent).map_err(DriveError::from)?;
        let uuid = random()?;
        ringstone_store::format(&drive, &layout, uuid).map_err(DriveError::from)?;
        Ok(uuid)
    };
    let done = format();
    if done.is_err() && made {
        // Ours, and of no use.
        let _ = std::fs::remove_file(path);
    }
    done
}

fn missing(path: &Path) -> DriveError {
    DriveError::Open { path: path.to_owned(), source: std::io::ErrorKind::NotFound.into() }
}

fn make_file(path: &Path, size: u64) -> std::io::Result<()> {
    // Guests' data is nobody else's.
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let done = nix::fcntl::posix_fallocate(&file, 0, size as i64).map_err(std::io::Error::from);
    if done.is_err() {
        let _ = std::fs::remove_file(path);
    }
    done
}

fn random() -> Result<[u8; 16], EngineError> {
    let mut bytes = [0; 16];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|source| EngineError::System { what: "reading /dev/urandom", source })?;
    Ok(bytes)
}

/// The UUID of the store at `path`; None where there is none.
///
/// # Errors
/// The drive cannot be read.
pub fn look_for_store(path: &Path) -> Result<Option<[u8; 16]>, EngineError> {
    match superblock_of(path) {
        Ok(superblock) => Ok(Some(superblock.uuid)),
        Err(EngineError::Volume(ringstone_volume::VolumeError::Drive(DriveError::Store(
            StoreError::NoStore,
        )))) => Ok(None),
        Err(error) => Err(error),
    }
}

fn superblock_of(path: &Path) -> Result<ringstone_store::Superblock, EngineError> {
    let drive = FileDrive::look(path)?;
    Ok(ringstone_store::superblock(&drive).map_err(DriveError::from)?)
}

/// The host's present boot.
pub(crate) fn boot_id() -> Result<[u8; 16], EngineError> {
    let system = |source| EngineError::System { what: "reading the boot id", source };
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(system)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).map_err(|error| system(std::io::Error::other(error)))?;
    Ok(number.to_be_bytes())
}

impl Engine {
    /// Open the store at `path`, unless it is open.
    ///
    /// # Errors
    /// There is none, somebody else has it, or it is damaged.
    pub fn open_store(&self, path: &Path) -> Result<Arc<dyn StoreDoor>, EngineError> {
        Ok(self.store_parts(path)?.door)
    }

    fn store_parts(&self, path: &Path) -> Result<StoreParts, EngineError> {
        let path = std::fs::canonicalize(path)
            .map_err(|source| DriveError::Open { path: path.to_owned(), source })?;
        let _one_at_a_time = self.opening.lock().unwrap_or_else(|e| e.into_inner());
        let wanted = path.clone();
        let open = self.call(move |control| control.stores.get(&wanted).map(|store| store.parts.clone()))?;
        if let Some(parts) = open {
            return Ok(parts);
        }
        // On the caller's thread: there may be much to read.
        let drive = Arc::new(FileDrive::open(&path, 0, BLOCK as u32, false, Direct::Auto)?);
        let keeper =
            ringstone_store::begin(&*drive, boot_id()?, self.epochs.clone()).map_err(DriveError::from)?;
        let caller = self.caller()?;
        self.call(move |control| control.keep(path, drive, keeper, caller))?
    }

    /// Read the store on a drive that another process hands over, whose it is until it is possessed.
    pub(crate) fn borrow_store(
        &self,
        path: PathBuf,
        drive: Arc<FileDrive>,
    ) -> Result<StoreParts, EngineError> {
        let boot = boot_id()?;
        let recovered = ringstone_store::recover(&*drive, boot).map_err(DriveError::from)?;
        let keeper = Keeper::new(recovered, boot, self.epochs.clone()).map_err(DriveError::from)?;
        let caller = self.caller()?;
        self.call(move |control| control.keep(path, drive, keeper, caller))?
    }

    /// Bring all keepers to rest, for another process to go on.
    pub(crate) fn rest_stores(&self, limit: Duration, rested: &mut Vec<Rested>) -> Result<(), EngineError> {
        let (rest, rests) = channel();
        let count = self.call(move |control| {
            let paths: Vec<PathBuf> = control.stores.keys().cloned().collect();
            paths.iter().for_each(|path| control.rest_store(path, rest.clone()));
            paths.len()
        })?;
        for _ in 0..count {
            let one = rests.recv_timeout(limit).map_err(|_| {
                EngineError::Handover(format!(
                    "a store did not come to rest within {} s",
                    limit.as_secs_f64()
                ))
            })?;
            rested.push(one);
        }
        Ok(())
    }

    /// Close all stores, as nothing is attached any more.
    pub(crate) fn close_stores(&self) {
        let Ok(paths) = self.call(|control| control.stores.keys().cloned().collect::<Vec<_>>()) else {
            return;
        };
        if paths.is_empty() {
            return;
        }
        let volumes = self.call(|control| std::mem::take(&mut control.volumes));
        drop(volumes);
        for path in paths {
            if let Err(error) = self.close_store(&path) {
                self.log_warning(format!("the store {} was not closed: {error}", path.display()));
            }
        }
    }

    /// Have the store at `path` write a checkpoint, and let go of it.
    ///
    /// # Errors
    /// It is not open, or volumes of it are.
    pub fn close_store(&self, path: &Path) -> Result<(), EngineError> {
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let _one_at_a_time = self.opening.lock().unwrap_or_else(|e| e.into_inner());
        let wanted = path.clone();
        let parts = self.call(move |control| control.idle_store(&wanted))??;
        // A checkpoint that fails costs nothing but a longer replay.
        if let Err(error) = parts.door.call(Command::Shutdown) {
            self.log_warning(format!(
                "the store {} was closed without a checkpoint: {error}",
                path.display()
            ));
        }
        let (rest, rests) = channel();
        self.call(move |control| control.rest_store(&path, rest))?;
        // With the keeper the drive goes, and the lock on it.
        rests.recv().map(drop).map_err(|_| EngineError::Stopped)
    }

    /// The drive of a volume of a store.
    pub(crate) fn open_store_volume(
        &self,
        spec: &VolumeSpec,
        path: &Path,
        volume: &str,
        key: &Key,
    ) -> Result<Drive, EngineError> {
        let parts = self.store_parts(path)?;
        Ok(Drive::Store(StoreVolume::open(&parts, volume, spec.size, spec.block_size, key)?))
    }

    /// Give the drive's present length to the store at `path`.
    ///
    /// # Errors
    /// It is no longer than the store, or the store refuses.
    pub fn grow_store(&self, path: &Path) -> Result<(), EngineError> {
        let parts = self.store_parts(path)?;
        let size = Medium::size(&*parts.drive)
            .map_err(|source| EngineError::System { what: "measuring the drive", source })?;
        parts.door.call(Command::Grow { size }).map_err(DriveError::from)?;
        Ok(())
    }
}

impl Control {
    fn keep(
        &mut self,
        path: PathBuf,
        drive: Arc<FileDrive>,
        keeper: Keeper,
        caller: Caller,
    ) -> Result<StoreParts, EngineError> {
        let system = |errno: nix::errno::Errno| EngineError::System { what: "eventfd", source: errno.into() };
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map_err(system)?;
        let theirs = bell.as_fd().try_clone_to_owned();
        let theirs = theirs.map_err(|source| EngineError::System { what: "dup", source })?;
        let id = self.next_store;
        self.next_store += 1;
        let inbox = Arc::new(Completions::new(OwnedFd::from(bell)));
        let door: Arc<dyn StoreDoor> = Arc::new(Door { id, caller });
        let parts = StoreParts { drive: drive.clone(), inbox: inbox.clone(), door, shared: keeper.shared() };
        let keeping = Keeping::new(id, keeper, drive, inbox, theirs);
        let reactor = self.reactors.choose(None, |_| 0);
        self.reactors.started(reactor);
        self.reactors.send(reactor, Order::Keep(Box::new(keeping)));
        let store = OpenStore { id, path: path.clone(), parts: parts.clone(), home: Home::Reactor(reactor) };
        self.stores.insert(path, store);
        Ok(parts)
    }

    fn store(&mut self, id: u64) -> Option<&mut OpenStore> {
        self.stores.values_mut().find(|store| store.id == id)
    }

    /// For the keeper of store `id`, wherever it is.
    fn tell_store(&mut self, id: u64, command: Command, answered: Answered) {
        let Some(store) = self.stores.values_mut().find(|store| store.id == id) else { return };
        match &mut store.home {
            Home::Reactor(reactor) => {
                let reactor = *reactor;
                self.reactors.send(reactor, Order::Store { id, command, answered });
            }
            Home::Moving { waiting, .. } => waiting.push((command, answered)),
        }
    }

    /// A store of which no volume is open.
    fn idle_store(&mut self, path: &Path) -> Result<StoreParts, EngineError> {
        let Some(store) = self.stores.get(path) else { return Err(EngineError::NoStore(path.to_owned())) };
        let inbox = &store.parts.inbox;
        let uses =
            |drive: &Drive| matches!(drive, Drive::Store(volume) if Arc::ptr_eq(volume.inbox(), inbox));
        let used = self.volumes.values().find(|open| uses(open.volume.drive()));
        match used {
            Some(open) => Err(EngineError::StoreInUse(path.to_owned(), open.volume.name().into())),
            None => Ok(store.parts.clone()),
        }
    }

    /// Have the keeper of the store come to rest and go to `rest`.
    pub fn rest_store(&mut self, path: &Path, rest: Sender<Rested>) {
        let Some(store) = self.stores.get_mut(path) else { return };
        let id = store.id;
        match &mut store.home {
            Home::Reactor(reactor) => {
                let reactor = *reactor;
                store.home = Home::Moving { waiting: Vec::new(), rest: Some(rest) };
                self.reactors.send(reactor, Order::StopKeeping(id));
            }
            Home::Moving { rest: waits, .. } => *waits = Some(rest),
        }
    }

    /// Keepers that rested go on.
    pub fn resume_stores(&mut self, rested: Vec<Rested>) {
        for Rested { mut store, keeping } in rested {
            let reactor = self.reactors.choose(None, |_| 0);
            self.reactors.started(reactor);
            self.reactors.send(reactor, Order::Keep(keeping));
            store.home = Home::Reactor(reactor);
            self.stores.insert(store.path.clone(), store);
        }
    }

    /// Move all keepers off a reactor that leaves.
    pub fn move_stores(&mut self, reactor: usize) {
        for store in self.stores.values_mut() {
            if matches!(store.home, Home::Reactor(at) if at == reactor) {
                store.home = Home::Moving { waiting: Vec::new(), rest: None };
                self.reactors.send(reactor, Order::StopKeeping(store.id));
            }
        }
    }

    /// A keeper came to rest on `reactor`.
    pub fn kept(&mut self, reactor: usize, keeping: Box<Keeping>) {
        self.reactors.stopped(reactor);
        let id = keeping.id();
        let to = self.reactors.choose(None, |_| 0);
        let Some(store) = self.store(id) else { return };
        let Home::Moving { waiting, rest } = &mut store.home else { return };
        if let Some(rest) = rest.take() {
            let path = store.path.clone();
            if let Some(store) = self.stores.remove(&path) {
                // Whoever asked may have gone; the keeper then goes on.
                if let Err(back) = rest.send(Rested { store, keeping }) {
                    self.resume_stores(vec![back.0]);
                }
            }
            return;
        }
        let waiting = std::mem::take(waiting);
        store.home = Home::Reactor(to);
        self.reactors.started(to);
        self.reactors.send(to, Order::Keep(keeping));
        for (command, answered) in waiting {
            self.reactors.send(to, Order::Store { id, command, answered });
        }
    }

    pub fn store_says(&mut self, id: u64, message: String) {
        let Some(store) = self.store(id) else { return };
        let message = format!("store {}: {message}", store.path.display());
        self.events.log(Level::Error, "", message);
    }
}

/// All open stores, by path.
pub type Stores = HashMap<PathBuf, OpenStore>;

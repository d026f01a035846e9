use std::io;
use std::path::PathBuf;

use ringstone_blockdev::DriveError;
use ringstone_cipher::CipherError;
use ringstone_rbd::RbdError;
use ringstone_reactor::ReactorError;
use ringstone_store::StoreError;
use ringstone_telemetry::TelemetryError;
use ringstone_volume::VolumeError;

use crate::listener::SocketRights;

/// The kind of an error, for callers that act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Exists,
    NotFound,
    Busy,
    Invalid,
    NoDevice,
    NoSpace,
    Unsupported,
    Io,
    Gone,
    Stopped,
    Fenced,
    Denied,
    Unreachable,
}

impl Code {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exists => "exists",
            Self::NotFound => "not_found",
            Self::Busy => "busy",
            Self::Invalid => "invalid",
            Self::NoDevice => "no_device",
            Self::NoSpace => "no_space",
            Self::Unsupported => "unsupported",
            Self::Io => "io",
            Self::Gone => "gone",
            Self::Stopped => "stopped",
            Self::Fenced => "fenced",
            Self::Denied => "denied",
            Self::Unreachable => "unreachable",
        }
    }
}

/// Why a call of the engine failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("volume {0:?} is open already; close it first or choose another name")]
    VolumeExists(String),
    #[error("volume {0:?} is not open; open it first")]
    NoVolume(String),
    #[error("volume {0:?} is attached; detach it first")]
    Attached(String),
    #[error("volume {0:?} is not attached; attach it first")]
    NotAttached(String),
    #[error("a frontend is connected to volume {0:?}; stop the virtual machine first, or force the detach")]
    Connected(String),
    #[error("{queues} queues are not possible; use 1 to 64")]
    Queues { queues: usize },
    #[error("two frontends are connected to volume {0:?}; stop one of the virtual machines first")]
    TwoFrontends(String),
    #[error("volume {0:?} waits for no guest of another host; attach it as incoming first")]
    NotIncoming(String),
    #[error("volume {0:?} waits for its cluster since an upgrade that failed; try again when it is served")]
    Held(String),
    #[error("queues of volume {0:?} run; stop its guest first")]
    QueuesRun(String),
    #[error("volume {0:?} is on storage of this host alone, which no other can own")]
    OneHost(String),
    #[error("there is no reactor on CPU {core}; `ringstone reactor list` shows those there are")]
    NoReactor { core: usize },
    #[error("there is a reactor on CPU {core} already; name another CPU")]
    ReactorExists { core: usize },
    #[error("the reactor on CPU {core} is the only one; add another before you remove it")]
    LastReactor { core: usize },
    #[error("queue {queue} of volume {volume:?} does not run; only a queue that a guest uses can be moved")]
    QueueStopped { volume: String, queue: usize },
    #[error("the handover failed: {0}; the gateway that was there goes on")]
    Handover(String),
    #[error("the new gateway was told to go and then lost: {0}; this one has nothing left and ends")]
    HandedOver(String),
    #[error("no cores were given; name at least one")]
    NoCores,
    #[error("the backend description is not valid: {0}")]
    Backend(serde_json::Error),
    #[error("a faulty drive cannot be put over {0:?}; use memory or file")]
    FaultyInner(String),
    #[error("the store {0} is not open")]
    NoStore(PathBuf),
    #[error("volume {1:?} of the store {0} is open; close it first")]
    StoreInUse(PathBuf, String),
    #[error("the store {path} has {faults} faults that cannot be mended, so nothing was written. Look at them with `ringstone store check`; restore from a backup what they name")]
    Unmendable { path: PathBuf, faults: usize },
    #[error("somebody else listens on {path}; stop that process or choose another socket path")]
    SocketTaken { path: PathBuf },
    #[error("{path} exists and is no socket; remove it or choose another socket path")]
    NotASocket { path: PathBuf },
    #[error("cannot listen on {path}: {source}; check that its directory exists and is writable")]
    Listen { path: PathBuf, source: io::Error },
    #[error(
        "cannot give the socket {path} {rights}: {source}; run the gateway as root, whose unit must leave it CAP_CHOWN \
         and fchownat (docs/operations/confinement.md), or name no owner and no group"
    )]
    Give { path: PathBuf, rights: SocketRights, source: io::Error },
    #[error("the engine was stopped; start a new one")]
    Stopped,
    #[error("{what} failed: {source}")]
    System { what: &'static str, source: io::Error },
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Reactor(#[from] ReactorError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
}

impl From<DriveError> for EngineError {
    fn from(error: DriveError) -> Self {
        Self::Volume(error.into())
    }
}

impl EngineError {
    pub fn code(&self) -> Code {
        match self {
            Self::VolumeExists(_)
            | Self::SocketTaken { .. }
            | Self::NotASocket { .. }
            | Self::ReactorExists { .. } => Code::Exists,
            Self::NoVolume(_) | Self::NotAttached(_) | Self::NoReactor { .. } | Self::NoStore(_) => {
                Code::NotFound
            }
            Self::Attached(_)
            | Self::NotIncoming(_)
            | Self::QueuesRun(_)
            | Self::StoreInUse(..)
            | Self::Held(_)
            | Self::Connected(_)
            | Self::TwoFrontends(_)
            | Self::LastReactor { .. }
            | Self::QueueStopped { .. } => Code::Busy,
            Self::Queues { .. }
            | Self::OneHost(_)
            | Self::NoCores
            | Self::Backend(_)
            | Self::FaultyInner(_) => Code::Invalid,
            Self::Stopped => Code::Stopped,
            Self::Handover(_) | Self::Unmendable { .. } => Code::Io,
            Self::HandedOver(_) => Code::Gone,
            Self::Listen { .. } | Self::Give { .. } | Self::System { .. } => Code::Io,
            Self::Volume(error) => volume_code(error),
            Self::Reactor(ReactorError::Bind { .. }) => Code::Invalid,
            Self::Reactor(ReactorError::Uring(_)) => Code::Unsupported,
            Self::Reactor(ReactorError::Spawn(_)) => Code::Io,
            Self::Telemetry(TelemetryError::Create { .. }) => Code::Io,
            Self::Telemetry(TelemetryError::Full { .. } | TelemetryError::Reactors { .. }) => Code::NoSpace,
        }
    }
}

fn volume_code(error: &VolumeError) -> Code {
    match error {
        VolumeError::Drive(drive) => match drive {
            DriveError::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => Code::NoDevice,
            DriveError::InUse { .. } => Code::Busy,
            DriveError::Open { .. }
            | DriveError::Lock { .. }
            | DriveError::Poisoned
            | DriveError::Mapping(_) => Code::Io,
            DriveError::WrongType { .. } | DriveError::BlockSize { .. } => Code::Invalid,
            DriveError::TooShort { .. } | DriveError::NoHugePages { .. } | DriveError::NoMemory { .. } => {
                Code::NoSpace
            }
            DriveError::NoDirect { .. } => Code::Unsupported,
            DriveError::Rbd(error) => rbd_code(error),
            DriveError::Store(error) => store_code(error),
            DriveError::Key { source, .. } | DriveError::Cipher(source) => cipher_code(source),
        },
        _ => Code::Invalid,
    }
}

/// The kind of an error of a store.
pub fn store_code(error: &StoreError) -> Code {
    match error {
        StoreError::Drive { .. } | StoreError::Damaged { .. } | StoreError::Failed(_) => Code::Io,
        StoreError::NoStore => Code::NoDevice,
        StoreError::Version { .. } => Code::Unsupported,
        StoreError::Truncated { .. } | StoreError::Full { .. } | StoreError::CatalogFull => Code::NoSpace,
        StoreError::NoVolume(_) | StoreError::NoSnapshot { .. } => Code::NotFound,
        StoreError::VolumeExists(_) | StoreError::SnapshotExists { .. } => Code::Exists,
        StoreError::HasClones { .. }
        | StoreError::HasSnapshots { .. }
        | StoreError::Deleted { .. }
        | StoreError::InUse(_)
        | StoreError::Busy { .. }
        | StoreError::NotPossessed
        | StoreError::Slow(_) => Code::Busy,
        StoreError::NoKey(_) => Code::Denied,
        StoreError::Impossible(_)
        | StoreError::NoParent(_)
        | StoreError::Name { .. }
        | StoreError::Shrink { .. }
        | StoreError::Size { .. } => Code::Invalid,
        StoreError::Closed => Code::Stopped,
    }
}

fn cipher_code(error: &CipherError) -> Code {
    match error {
        CipherError::WrongKey => Code::Denied,
        CipherError::Length { .. } | CipherError::Weak => Code::Invalid,
        CipherError::Version(_) => Code::Unsupported,
        CipherError::Damaged | CipherError::OpenSsl(_) => Code::Io,
    }
}

/// The kind of an error of a Ceph cluster.
pub fn rbd_code(error: &RbdError) -> Code {
    match error {
        RbdError::NoLibrary(_) | RbdError::Features { .. } | RbdError::NoExclusiveLock { .. } => {
            Code::Unsupported
        }
        RbdError::Nul(_) | RbdError::Setting { .. } => Code::Invalid,
        RbdError::NoConf { .. }
        | RbdError::NoKeyring { .. }
        | RbdError::NoPool { .. }
        | RbdError::NoImage { .. }
        | RbdError::TooShort { .. } => Code::NoDevice,
        RbdError::Refused { .. } | RbdError::NoCaps { .. } => Code::Denied,
        RbdError::NoMonitor { .. } => Code::Unreachable,
        RbdError::ImageExists { .. } | RbdError::SnapshotExists { .. } => Code::Exists,
        RbdError::NoSnapshot { .. } => Code::NotFound,
        RbdError::NoParent { .. } => Code::Invalid,
        RbdError::Locked { .. }
        | RbdError::InUse { .. }
        | RbdError::HasSnapshots { .. }
        | RbdError::HasClones { .. } => Code::Busy,
        RbdError::Fenced { .. } => Code::Fenced,
        RbdError::Full => Code::NoSpace,
        RbdError::Ceph { .. } => Code::Io,
    }
}

use std::ffi::c_int;
use std::io;
use std::path::PathBuf;

/// Why something with a Ceph cluster did not work.
#[derive(Debug, thiserror::Error)]
pub enum RbdError {
    #[error(
        "Ceph's library cannot be loaded ({0}); install librbd1 (`apt-get install librbd1`) to use rbd pools"
    )]
    NoLibrary(String),
    #[error("{0:?} contains a NUL byte; correct the name")]
    Nul(String),
    #[error("the Ceph configuration {path} cannot be read: {source}; name the cluster's ceph.conf with the pool's `conf`")]
    NoConf { path: PathBuf, source: io::Error },
    #[error("Ceph does not know the setting {name} = {value:?}: {source}; check the pool's options")]
    Setting { name: String, value: String, source: io::Error },
    #[error("no keyring for Ceph user {user:?} was found; put its key into the `keyring` that {conf} names, or name the file with the pool's `keyring`")]
    NoKeyring { user: String, conf: PathBuf },
    #[error("Ceph refuses user {user:?} ({source}); check that the keyring has its current key (`ceph auth get {user}`), and this host's clock")]
    Refused { user: String, source: io::Error },
    #[error("no monitor of the Ceph cluster in {conf} answered ({source}); check `mon_host` there, the network, and `ceph -s`")]
    NoMonitor { conf: PathBuf, source: io::Error },
    #[error("there is no Ceph pool {pool:?}; `ceph osd pool ls` lists those there are, `ceph osd pool create {pool}` makes it")]
    NoPool { pool: String },
    #[error("Ceph user {user:?} may not use pool {pool:?}; give it `osd 'profile rbd pool={pool}'` with `ceph auth caps`")]
    NoCaps { user: String, pool: String },
    #[error("there is no image {image:?}; `rbd ls` lists those there are")]
    NoImage { image: String },
    #[error("there is an image {image:?} already; choose another name, or remove it with `rbd rm`")]
    ImageExists { image: String },
    #[error("image {image:?} has features that this librbd cannot open ({source}); turn them off with `rbd feature disable`, or use a newer librbd")]
    Features { image: String, source: io::Error },
    #[error("image {image:?} lacks the feature exclusive-lock, without which nothing keeps two hosts from writing it; run `rbd feature enable {image} exclusive-lock`")]
    NoExclusiveLock { image: String },
    #[error("image {image:?} is locked by another client ({owner}); stop what uses it (`rbd lock ls {image}`, `rbd status {image}`)")]
    Locked { image: String, owner: String },
    #[error("image {image:?} was opened with epoch {stored} by another host, which is later than {epoch}; this host does not own the volume any more")]
    Fenced { image: String, stored: u64, epoch: u64 },
    #[error("image {image:?} has {have} bytes but the volume has {want}; resize it first")]
    TooShort { image: String, have: u64, want: u64 },
    #[error("image {image:?} is in use by a client; close it there first (`rbd status {image}`)")]
    InUse { image: String },
    #[error("image {image:?} has snapshots; delete them first")]
    HasSnapshots { image: String },
    #[error("image {image:?} has no snapshot {snapshot:?}; list them with `rbd snap ls {image}`")]
    NoSnapshot { image: String, snapshot: String },
    #[error("image {image:?} has a snapshot {snapshot:?} already; choose another name")]
    SnapshotExists { image: String, snapshot: String },
    #[error("snapshot {snapshot:?} of image {image:?} has clones; flatten or delete them first")]
    HasClones { image: String, snapshot: String },
    #[error("image {image:?} has no parent, so there is nothing to flatten")]
    NoParent { image: String },
    #[error("the Ceph cluster or pool is full; add OSDs, delete something or raise the quota")]
    Full,
    #[error("{what} failed: {source}; `ceph -s` and the cluster's logs may say why")]
    Ceph { what: String, source: io::Error },
}

/// A library's negative return value.
pub fn os(code: c_int) -> io::Error {
    io::Error::from_raw_os_error(-code)
}

/// `code` as a result: what is not negative is the value.
pub fn check(code: c_int, what: impl FnOnce() -> String) -> Result<c_int, RbdError> {
    match code {
        0.. => Ok(code),
        _ if -code == libc::ENOSPC || -code == libc::EDQUOT => Err(RbdError::Full),
        _ => Err(RbdError::Ceph { what: what(), source: os(code) }),
    }
}

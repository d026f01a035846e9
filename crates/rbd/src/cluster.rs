//! A connection to a cluster, shared by the images that use it.

use std::collections::HashMap;
use std::ffi::{c_char, CString};
use std::path::PathBuf;
use std::ptr;
use std::sync::{Arc, Mutex, Weak};

use crate::bindings::{rados_ioctx_t, rados_pool_stat_t, rados_t, Library};
use crate::error::{check, os, RbdError};
use crate::library::{library, text};

/// What every connection is set to, whatever ceph.conf says.
const SETTINGS: &[(&str, &str)] = &[
    // A write is acknowledged when Ceph has it, and nothing is kept here that a dying host could take along.
    ("rbd_cache", "false"),
    // Whoever loses the lock is shut out by the OSDs; for how long is what `Cluster::blocklist` then says.
    ("rbd_blocklist_on_break_lock", "true"),
    // Seconds; the default of five minutes is longer than a person waits for an error.
    ("client_mount_timeout", "30"),
    ("rados_mon_op_timeout", "30"),
    // Operations wait for OSDs that are away, without end: a guest gets its answer late, never an error.
    ("rados_osd_op_timeout", "0"),
];

/// How to reach a cluster, and as whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClusterSpec {
    pub conf: PathBuf,
    /// `client.` and a name.
    pub user: String,
    /// `None`: where ceph.conf says.
    pub keyring: Option<PathBuf>,
}

/// Bytes of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterUsage {
    pub total: u64,
    pub free: u64,
}

/// A connection.
pub struct Cluster {
    pub(crate) library: &'static Library,
    handle: rados_t,
    spec: ClusterSpec,
    /// As blocklists name this client.
    address: String,
}

// SAFETY: librados handles may be used by any thread at once (librados.h, "thread safe").
unsafe impl Send for Cluster {}
// SAFETY: as above.
unsafe impl Sync for Cluster {}

pub(crate) fn c_string(text: &str) -> Result<CString, RbdError> {
    CString::new(text).map_err(|_| RbdError::Nul(text.into()))
}

/// Connections that are in use, by what they are to.
static SHARED: Mutex<Option<HashMap<ClusterSpec, Weak<Cluster>>>> = Mutex::new(None);

impl Cluster {
    /// The connection that other images use, or a new one. Blocks for as long as the monitors take.
    ///
    /// # Errors
    /// See [`RbdError`]; nothing stays open.
    pub fn shared(spec: &ClusterSpec) -> Result<Arc<Self>, RbdError> {
        let known = |shared: &Option<HashMap<ClusterSpec, Weak<Cluster>>>| {
            shared.as_ref().and_then(|all| all.get(spec)).and_then(Weak::upgrade)
        };
        if let Some(cluster) = known(&SHARED.lock().unwrap_or_else(|e| e.into_inner())) {
            return Ok(cluster);
        }
        // Outside the lock: another cluster's volumes must not wait for this one's monitors.
        let cluster = Arc::new(Self::connect(spec)?);
        let mut shared = SHARED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(earlier) = known(&shared) {
            return Ok(earlier);
        }
        let all = shared.get_or_insert_with(HashMap::new);
        all.retain(|_, cluster| cluster.strong_count() > 0);
        all.insert(spec.clone(), Arc::downgrade(&cluster));
        Ok(cluster)
    }

    /// Let nobody else share this connection: it was shut out by the cluster. Images that have it keep it.
    pub fn retire(&self) {
        let mut shared = SHARED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(all) = shared.as_mut() {
            let own = all.get(&self.spec).is_some_and(|known| ptr::eq(known.as_ptr(), self));
            if own {
                all.remove(&self.spec);
            }
        }
    }

    fn connect(spec: &ClusterSpec) -> Result<Self, RbdError> {
        let library = library()?;
        if let Err(source) = std::fs::File::open(&spec.conf) {
            return Err(RbdError::NoConf { path: spec.conf.clone(), source });
        }
        let (name, user) = (c_string("ceph")?, c_string(&spec.user)?);
        let mut handle: rados_t = ptr::null_mut();
        // SAFETY: live strings; the handle is written on success.
        let made = unsafe { library.rados_create2(&raw mut handle, name.as_ptr(), user.as_ptr(), 0) };
        check(made, || "making a Ceph client".into())?;
        // From here on dropping it shuts it down.
        let mut cluster = Self { library, handle, spec: spec.clone(), address: String::new() };
        cluster.configure()?;
        // SAFETY: a configured handle that was not connected.
        match unsafe { library.rados_connect(handle) } {
            0 => {}
            code => return Err(cluster.refusal(code)),
        }
        cluster.address = cluster.own_address()?;
        Ok(cluster)
    }

    fn configure(&self) -> Result<(), RbdError> {
        let path = c_string(&self.spec.conf.to_string_lossy())?;
        // SAFETY: a live handle and string.
        match unsafe { self.library.rados_conf_read_file(self.handle, path.as_ptr()) } {
            0 => {}
            code => return Err(RbdError::NoConf { path: self.spec.conf.clone(), source: os(code) }),
        }
        for (name, value) in SETTINGS {
            self.set(name, value)?;
        }
        if let Some(keyring) = &self.spec.keyring {
            if !keyring.is_file() {
                return Err(RbdError::NoKeyring {
                    user: self.spec.user.clone(),
                    conf: self.spec.conf.clone(),
                });
            }
            self.set("keyring", &keyring.to_string_lossy())?;
        }
        Ok(())
    }

    fn set(&self, name: &str, value: &str) -> Result<(), RbdError> {
        let (c_name, c_value) = (c_string(name)?, c_string(value)?);
        // SAFETY: a live handle and strings.
        match unsafe { self.library.rados_conf_set(self.handle, c_name.as_ptr(), c_value.as_ptr()) } {
            0 => Ok(()),
            code => Err(RbdError::Setting { name: name.into(), value: value.into(), source: os(code) }),
        }
    }

    fn refusal(&self, code: i32) -> RbdError {
        let (user, conf) = (self.spec.user.clone(), self.spec.conf.clone());
        match -code {
            libc::ENOENT => RbdError::NoKeyring { user, conf },
            libc::EACCES | libc::EPERM | libc::EINVAL => RbdError::Refused { user, source: os(code) },
            _ => RbdError::NoMonitor { conf, source: os(code) },
        }
    }

    fn own_address(&self) -> Result<String, RbdError> {
        let mut found: *mut c_char = ptr::null_mut();
        // SAFETY: a connected handle; the string is ours to give back.
        let code = unsafe { self.library.rados_getaddrs(self.handle, &raw mut found) };
        check(code, || "asking for the client's address".into())?;
        // SAFETY: what rados_getaddrs wrote, freed once and not used after.
        unsafe {
            let address = text(found);
            self.library.rados_buffer_free(found);
            Ok(address)
        }
    }

    /// As blocklists name this connection.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn spec(&self) -> &ClusterSpec {
        &self.spec
    }

    /// The cluster's own id.
    ///
    /// # Errors
    /// See [`RbdError::Ceph`].
    pub fn fsid(&self) -> Result<String, RbdError> {
        let mut buffer = [0 as c_char; 64];
        // SAFETY: a connected handle and a live buffer of the length given.
        let code = unsafe { self.library.rados_cluster_fsid(self.handle, buffer.as_mut_ptr(), buffer.len()) };
        check(code, || "asking for the cluster's id".into())?;
        // SAFETY: it was NUL-terminated, being shorter than the buffer.
        Ok(unsafe { text(buffer.as_ptr()) })
    }

    /// Shut a client out for longer than any process stays stopped: when this returns, no OSD that we talk to takes another operation of its.
    ///
    /// # Errors
    /// The monitors refuse it or do not answer.
    pub fn blocklist(&self, address: &str) -> Result<(), RbdError> {
        let c_address = c_string(address)?;
        const YEAR: u32 = 31_536_000;
        // SAFETY: a connected handle; librados copies the string and does not write to it.
        let code =
            unsafe { self.library.rados_blocklist_add(self.handle, c_address.as_ptr().cast_mut(), YEAR) };
        check(code, || format!("putting {address} on the blocklist"))?;
        // SAFETY: a connected handle.
        let code = unsafe { self.library.rados_wait_for_latest_osdmap(self.handle) };
        check(code, || "waiting for the new OSD map".into()).map(drop)
    }

    /// Open a pool of it.
    ///
    /// # Errors
    /// There is none of that name, or the user may not use it.
    pub fn space(self: &Arc<Self>, pool: &str, namespace: &str) -> Result<Space, RbdError> {
        let (c_pool, c_namespace) = (c_string(pool)?, c_string(namespace)?);
        let mut handle: rados_ioctx_t = ptr::null_mut();
        // SAFETY: a connected handle and live string; the context is written on success.
        match unsafe { self.library.rados_ioctx_create(self.handle, c_pool.as_ptr(), &raw mut handle) } {
            0 => {}
            code if -code == libc::ENOENT => return Err(RbdError::NoPool { pool: pool.into() }),
            code if matches!(-code, libc::EPERM | libc::EACCES) => {
                return Err(RbdError::NoCaps { user: self.spec.user.clone(), pool: pool.into() })
            }
            code => return check(code, || format!("opening the pool {pool}")).map(|_| unreachable!()),
        }
        // SAFETY: a live context and string, which is copied.
        unsafe { self.library.rados_ioctx_set_namespace(handle, c_namespace.as_ptr()) };
        Ok(Space { cluster: self.clone(), handle, pool: pool.into() })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SAFETY: images and contexts hold the cluster, so nothing of it is in use any more.
        unsafe { self.library.rados_shutdown(self.handle) };
    }
}

/// A pool of a cluster, and a namespace in it.
pub struct Space {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) handle: rados_ioctx_t,
    pub(crate) pool: String,
}

// SAFETY: as for the cluster; its namespace is not changed after it was made.
unsafe impl Send for Space {}
// SAFETY: as above.
unsafe impl Sync for Space {}

impl Space {
    /// Bytes of the cluster under it, as `ceph df` counts them: raw, before replication.
    ///
    /// # Errors
    /// See [`RbdError::Ceph`].
    pub fn usage(&self) -> Result<ClusterUsage, RbdError> {
        // SAFETY: a plain structure of numbers.
        let mut stat: crate::bindings::rados_cluster_stat_t = unsafe { std::mem::zeroed() };
        // SAFETY: a connected handle and a live structure.
        let code = unsafe { self.cluster.library.rados_cluster_stat(self.cluster.handle, &raw mut stat) };
        check(code, || "asking for the cluster's space".into())?;
        Ok(ClusterUsage { total: stat.kb * 1024, free: stat.kb_avail * 1024 })
    }

    /// Bytes that the pool's objects hold, once.
    ///
    /// # Errors
    /// See [`RbdError::Ceph`].
    pub fn stored(&self) -> Result<u64, RbdError> {
        // SAFETY: a plain structure of numbers.
        let mut stat: rados_pool_stat_t = unsafe { std::mem::zeroed() };
        // SAFETY: a live context and structure.
        let code = unsafe { self.cluster.library.rados_ioctx_pool_stat(self.handle, &raw mut stat) };
        check(code, || format!("asking for the space in pool {}", self.pool))?;
        Ok(stat.num_bytes)
    }

    /// The pool's number, which no other pool of the cluster ever has.
    pub fn id(&self) -> i64 {
        // SAFETY: a live context.
        unsafe { self.cluster.library.rados_ioctx_get_id(self.handle) }
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // SAFETY: images hold their space, so nothing of it is in use any more.
        unsafe { self.cluster.library.rados_ioctx_destroy(self.handle) };
    }
}

//! Who may write an image: librbd's exclusive lock, a blocklist for owners before, and the epoch that the image remembers.
//!
//! The lock alone does not stop a process that was stopped with its lock taken away and goes on: its requests on the way are
//! as good as any. So the owner before is put on the OSDs' blocklist first, and the lock is taken when that is confirmed
//! (Ceph's own rule for a broken lock). The epoch in the image's metadata stops those who come late and do not know it.

use std::ffi::{c_char, c_int};
use std::ptr;

use crate::bindings::{
    rbd_lock_mode_t, rbd_lock_mode_t_RBD_LOCK_MODE_EXCLUSIVE as EXCLUSIVE, RBD_FEATURE_EXCLUSIVE_LOCK,
};
use crate::cluster::c_string;
use crate::error::{check, os, RbdError};
use crate::image::Image;
use crate::library::text;

/// Key of the image's metadata that holds the epoch of its latest owner.
const EPOCH: &str = "ringstone_epoch";
/// Times that the lock is tried when another client takes or releases it at the same moment.
const ATTEMPTS: usize = 5;
const MOST_OWNERS: usize = 8;

impl Image {
    /// Shut predecessors out, take the lock and note the epoch. Blocks for as long as the cluster takes.
    ///
    /// # Errors
    /// Another client has it, or a later owner had; see [`RbdError`]. Predecessors may be shut out all the same.
    pub fn own(&self, epoch: u64, predecessors: &[String]) -> Result<(), RbdError> {
        let mut features = 0u64;
        // SAFETY: an open image and a live number.
        let code = unsafe { self.library().rbd_get_features(self.handle(), &raw mut features) };
        check(code, || format!("asking for the features of image {}", self.name))?;
        if features & u64::from(RBD_FEATURE_EXCLUSIVE_LOCK) == 0 {
            return Err(RbdError::NoExclusiveLock { image: self.name.clone() });
        }
        self.check_epoch(epoch)?;
        // Before the lock is broken: that puts its owner on the blocklist too, but for an hour, and the first entry stays.
        for address in predecessors.iter().filter(|address| **address != self.client()) {
            self.space.cluster.blocklist(address)?;
        }
        for owner in self.owners()?.iter().filter(|owner| predecessors.contains(owner)) {
            self.break_lock(owner)?;
        }
        self.take_lock()?;
        // Somebody may have been in between.
        self.check_epoch(epoch)?;
        self.set_metadata(EPOCH, &epoch.to_string())
    }

    /// Let another process of this host take the lock, as nothing is in flight; this one reads and writes nothing until
    /// [`retake`](Self::retake).
    ///
    /// # Errors
    /// See [`RbdError::Ceph`].
    pub fn let_go(&self) -> Result<(), RbdError> {
        if self.read_only {
            return Ok(());
        }
        // SAFETY: an open image.
        let code = unsafe { self.library().rbd_lock_release(self.handle()) };
        check(code, || format!("releasing the lock of image {}", self.name)).map(drop)
    }

    /// Take the lock again after [`let_go`](Self::let_go): whoever was to have it could not go on.
    ///
    /// # Errors
    /// Another client has it.
    pub fn retake(&self) -> Result<(), RbdError> {
        if self.read_only {
            return Ok(());
        }
        self.take_lock()
    }

    fn check_epoch(&self, epoch: u64) -> Result<(), RbdError> {
        let stored = self.metadata(EPOCH)?.and_then(|text| text.parse().ok()).unwrap_or(0);
        if stored > epoch {
            return Err(RbdError::Fenced { image: self.name.clone(), stored, epoch });
        }
        Ok(())
    }

    fn take_lock(&self) -> Result<(), RbdError> {
        let mut last = 0;
        for _ in 0..ATTEMPTS {
            match self.owners()?.first() {
                Some(owner) if owner == self.client() => {}
                Some(owner) => {
                    return Err(RbdError::Locked { image: self.name.clone(), owner: owner.clone() })
                }
                None => {}
            }
            // SAFETY: an open image.
            last = unsafe { self.library().rbd_lock_acquire(self.handle(), EXCLUSIVE) };
            if last == 0 {
                return Ok(());
            }
            if !matches!(-last, libc::EBUSY | libc::EAGAIN | libc::EROFS | libc::ENOENT) {
                break;
            }
        }
        match self.owners()?.first() {
            Some(owner) => Err(RbdError::Locked { image: self.name.clone(), owner: owner.clone() }),
            None => Err(RbdError::Ceph { what: format!("locking image {}", self.name), source: os(last) }),
        }
    }

    /// Addresses of the clients that have the lock.
    pub(crate) fn owners(&self) -> Result<Vec<String>, RbdError> {
        let mut mode: rbd_lock_mode_t = EXCLUSIVE;
        let mut found: [*mut c_char; MOST_OWNERS] = [ptr::null_mut(); MOST_OWNERS];
        let mut count = found.len();
        // SAFETY: an open image and live places for as many owners as are told.
        let code = unsafe {
            self.library().rbd_lock_get_owners(
                self.handle(),
                &raw mut mode,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        // EINVAL: an image without the feature.
        if matches!(-code, libc::ENOENT | libc::EINVAL) {
            return Ok(Vec::new());
        }
        if -code == libc::EBUSY {
            // Locked by hand, which is not librbd's to tell more about.
            return Err(RbdError::Locked { image: self.name.clone(), owner: "see `rbd lock ls`".into() });
        }
        check(code, || format!("asking who has the lock of image {}", self.name))?;
        let count = count.min(found.len());
        // SAFETY: the library wrote `count` strings, which are given back once.
        unsafe {
            let owners = found[..count].iter().map(|owner| text(*owner)).collect();
            self.library().rbd_lock_get_owners_cleanup(found.as_mut_ptr(), count);
            Ok(owners)
        }
    }

    fn break_lock(&self, owner: &str) -> Result<(), RbdError> {
        let c_owner = c_string(owner)?;
        // SAFETY: an open image and a live string.
        let code = unsafe { self.library().rbd_lock_break(self.handle(), EXCLUSIVE, c_owner.as_ptr()) };
        match -code {
            // It has let go meanwhile.
            libc::ENOENT => Ok(()),
            _ => check(code, || format!("breaking the lock of {owner} on image {}", self.name)).map(drop),
        }
    }

    pub(crate) fn metadata(&self, key: &str) -> Result<Option<String>, RbdError> {
        let c_key = c_string(key)?;
        let mut value = [0 as c_char; 128];
        let mut len = value.len();
        // SAFETY: an open image, a live string and a live buffer of the length given.
        let code: c_int = unsafe {
            self.library().rbd_metadata_get(self.handle(), c_key.as_ptr(), value.as_mut_ptr(), &raw mut len)
        };
        if -code == libc::ENOENT {
            return Ok(None);
        }
        check(code, || format!("reading {key} of image {}", self.name))?;
        // SAFETY: the library NUL-terminates what it wrote.
        Ok(Some(unsafe { text(value.as_ptr()) }))
    }

    pub(crate) fn set_metadata(&self, key: &str, value: &str) -> Result<(), RbdError> {
        let (c_key, c_value) = (c_string(key)?, c_string(value)?);
        // SAFETY: an open image and live strings.
        let code =
            unsafe { self.library().rbd_metadata_set(self.handle(), c_key.as_ptr(), c_value.as_ptr()) };
        check(code, || format!("writing {key} of image {}", self.name)).map(drop)
    }
}

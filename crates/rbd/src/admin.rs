//! What is done to images from outside a request: made, grown, snapshotted, cloned, removed. All of it blocks.
//!
//! An image that a gateway has open for writing is changed through that gateway's client: librbd sends what is asked for to
//! the owner of the lock, so a snapshot holds what was acknowledged before it.

use std::ffi::{c_char, c_int, CStr};
use std::ptr;
use std::sync::Arc;

use crate::bindings::{
    rbd_image_options_t, rbd_linked_image_spec_t, rbd_snap_info_t,
    rbd_snap_namespace_type_t_RBD_SNAP_NAMESPACE_TYPE_TRASH as TRASH, rbd_snap_spec_t, timespec, Library,
    RBD_FEATURE_DEEP_FLATTEN, RBD_FEATURE_EXCLUSIVE_LOCK, RBD_FEATURE_FAST_DIFF, RBD_FEATURE_LAYERING,
    RBD_FEATURE_OBJECT_MAP, RBD_IMAGE_OPTION_CLONE_FORMAT, RBD_IMAGE_OPTION_DATA_POOL,
    RBD_IMAGE_OPTION_FEATURES, RBD_IMAGE_OPTION_ORDER,
};
use crate::cluster::{c_string, Cluster, ClusterUsage, Space};
use crate::error::{check, RbdError};
use crate::image::Image;
use crate::library::text;

/// What `rbd create` gives an image too, and all that fast snapshots, diffs and clones need.
const FEATURES: u64 = (RBD_FEATURE_LAYERING
    | RBD_FEATURE_EXCLUSIVE_LOCK
    | RBD_FEATURE_OBJECT_MAP
    | RBD_FEATURE_FAST_DIFF
    | RBD_FEATURE_DEEP_FLATTEN) as u64;
/// Clones of snapshots that need no protection, and outlive them in the trash.
const CLONE_FORMAT: u64 = 2;

/// How an image is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Created {
    /// log2 of the objects' size; `None`: the cluster's default, 22.
    pub order: Option<u8>,
    /// Pool for the data, for example an erasure-coded one; "": the image's own.
    pub data_pool: String,
}

/// Where a clone's unwritten blocks are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    pub pool: String,
    pub image: String,
    pub snapshot: String,
}

/// An image as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    pub size: u64,
    pub parent: Option<Parent>,
    /// Addresses of the clients that have its exclusive lock.
    pub owners: Vec<String>,
}

/// A snapshot of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    pub name: String,
    pub size: u64,
    /// Seconds since 1970, as the cluster's clock has it.
    pub created_s: i64,
}

/// The images of a pool.
pub struct Admin {
    cluster: Arc<Cluster>,
    pool: String,
    namespace: String,
}

struct Options {
    library: &'static Library,
    handle: rbd_image_options_t,
}

impl Options {
    fn new(library: &'static Library, features: u64) -> Result<Self, RbdError> {
        let mut handle: rbd_image_options_t = ptr::null_mut();
        // SAFETY: the handle is written, and destroyed once by Drop.
        unsafe { library.rbd_image_options_create(&raw mut handle) };
        let options = Self { library, handle };
        options.set(RBD_IMAGE_OPTION_FEATURES, features)?;
        Ok(options)
    }

    fn set(&self, name: u32, value: u64) -> Result<(), RbdError> {
        // SAFETY: a live handle.
        let code = unsafe { self.library.rbd_image_options_set_uint64(self.handle, name as c_int, value) };
        check(code, || format!("setting image option {name}")).map(drop)
    }

    fn set_text(&self, name: u32, value: &str) -> Result<(), RbdError> {
        let value = c_string(value)?;
        // SAFETY: a live handle and string, which is copied.
        let code =
            unsafe { self.library.rbd_image_options_set_string(self.handle, name as c_int, value.as_ptr()) };
        check(code, || format!("setting image option {name}")).map(drop)
    }

    fn of(library: &'static Library, created: &Created) -> Result<Self, RbdError> {
        let options = Self::new(library, FEATURES)?;
        if let Some(order) = created.order {
            options.set(RBD_IMAGE_OPTION_ORDER, u64::from(order))?;
        }
        if !created.data_pool.is_empty() {
            options.set_text(RBD_IMAGE_OPTION_DATA_POOL, &created.data_pool)?;
        }
        Ok(options)
    }
}

impl Drop for Options {
    fn drop(&mut self) {
        // SAFETY: made by rbd_image_options_create and not used after.
        unsafe { self.library.rbd_image_options_destroy(self.handle) };
    }
}

impl Admin {
    /// # Errors
    /// There is no such pool.
    pub fn new(cluster: Arc<Cluster>, pool: &str, namespace: &str) -> Result<Self, RbdError> {
        cluster.space(pool, namespace)?;
        Ok(Self { cluster, pool: pool.into(), namespace: namespace.into() })
    }

    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    fn space(&self) -> Result<Space, RbdError> {
        self.cluster.space(&self.pool, &self.namespace)
    }

    fn open(&self, name: &str, read_only: bool) -> Result<Image, RbdError> {
        Image::plain(self.space()?, name, read_only)
    }

    /// Names the pool beyond doubt: the cluster's id and the pool's number in it.
    ///
    /// # Errors
    /// See [`RbdError`].
    pub fn identity(&self) -> Result<String, RbdError> {
        Ok(format!("{}:{}", self.cluster.fsid()?, self.space()?.id()))
    }

    /// # Errors
    /// See [`RbdError`].
    pub fn usage(&self) -> Result<ClusterUsage, RbdError> {
        self.space()?.usage()
    }

    /// # Errors
    /// It is there already, or the cluster is full.
    pub fn create(&self, name: &str, size: u64, created: &Created) -> Result<(), RbdError> {
        let (space, c_name) = (self.space()?, c_string(name)?);
        let options = Options::of(self.cluster.library, created)?;
        // SAFETY: a live context, string and options.
        let code =
            unsafe { self.cluster.library.rbd_create4(space.handle, c_name.as_ptr(), size, options.handle) };
        if -code == libc::EEXIST {
            return Err(RbdError::ImageExists { image: name.into() });
        }
        check(code, || format!("making image {name}")).map(drop)
    }

    /// # Errors
    /// A client has it open, or it has snapshots. [`RbdError::NoImage`] if it is not there.
    pub fn remove(&self, name: &str) -> Result<(), RbdError> {
        let (space, c_name) = (self.space()?, c_string(name)?);
        // SAFETY: a live context and string.
        let code = unsafe { self.cluster.library.rbd_remove(space.handle, c_name.as_ptr()) };
        match -code {
            libc::ENOENT => Err(RbdError::NoImage { image: name.into() }),
            libc::EBUSY => Err(RbdError::InUse { image: name.into() }),
            libc::ENOTEMPTY => Err(RbdError::HasSnapshots { image: name.into() }),
            _ => check(code, || format!("removing image {name}")).map(drop),
        }
    }

    /// # Errors
    /// See [`RbdError`].
    pub fn info(&self, name: &str) -> Result<ImageInfo, RbdError> {
        // One opened read-only knows nothing of locks.
        let image = self.open(name, false)?;
        Ok(ImageInfo { size: image.size()?, parent: parent(&image)?, owners: image.owners()? })
    }

    /// Make it `size` bytes long; shorter only to undo a growth.
    ///
    /// # Errors
    /// See [`RbdError`].
    pub fn resize(&self, name: &str, size: u64) -> Result<(), RbdError> {
        let image = self.open(name, false)?;
        // SAFETY: an open image; no progress is asked for.
        let code = unsafe { image.library().rbd_resize2(image.handle(), size, true, None, ptr::null_mut()) };
        check(code, || format!("resizing image {name}")).map(drop)
    }

    /// Oldest first.
    ///
    /// # Errors
    /// See [`RbdError`].
    pub fn snapshots(&self, name: &str) -> Result<Vec<SnapshotInfo>, RbdError> {
        snapshots(&self.open(name, true)?)
    }

    /// Run `operation` on the image with the snapshot's name.
    fn on_snapshot(
        &self,
        image: &str,
        snapshot: &str,
        what: &str,
        operation: impl FnOnce(&Image, &CStr) -> c_int,
    ) -> Result<(), RbdError> {
        let opened = self.open(image, false)?;
        let code = operation(&opened, &c_string(snapshot)?);
        let (image, snapshot) = (image.to_owned(), snapshot.to_owned());
        match -code {
            libc::EEXIST => Err(RbdError::SnapshotExists { image, snapshot }),
            libc::ENOENT => Err(RbdError::NoSnapshot { image, snapshot }),
            libc::EBUSY => Err(RbdError::HasClones { image, snapshot }),
            libc::EROFS => Err(RbdError::InUse { image }),
            _ => check(code, || format!("{what} snapshot {snapshot} of image {image}")).map(drop),
        }
    }

    /// A snapshot holds every write that was acknowledged before.
    ///
    /// # Errors
    /// The name is taken, or see [`RbdError`].
    pub fn create_snapshot(&self, image: &str, snapshot: &str) -> Result<(), RbdError> {
        // SAFETY: an open image and a live string.
        self.on_snapshot(image, snapshot, "making", |image, name| unsafe {
            image.library().rbd_snap_create(image.handle(), name.as_ptr())
        })
    }

    /// # Errors
    /// There is none of that name, or it has clones.
    pub fn remove_snapshot(&self, image: &str, snapshot: &str) -> Result<(), RbdError> {
        // SAFETY: as above.
        self.on_snapshot(image, snapshot, "removing", |image, name| unsafe {
            image.library().rbd_snap_remove(image.handle(), name.as_ptr())
        })
    }

    /// Give the image the snapshot's content; what was written since is gone.
    ///
    /// # Errors
    /// There is none of that name, or a client has the image open for writing.
    pub fn revert(&self, image: &str, snapshot: &str) -> Result<(), RbdError> {
        // SAFETY: as above.
        self.on_snapshot(image, snapshot, "reverting to", |image, name| unsafe {
            image.library().rbd_snap_rollback(image.handle(), name.as_ptr())
        })
    }

    /// Make `image` of a snapshot of `parent`; its blocks are there at once, and read from the parent until written.
    ///
    /// # Errors
    /// The name is taken, or there is no such snapshot.
    pub fn clone_image(
        &self,
        parent: &str,
        snapshot: &str,
        image: &str,
        created: &Created,
    ) -> Result<(), RbdError> {
        let space = self.space()?;
        let (c_parent, c_snapshot, c_image) = (c_string(parent)?, c_string(snapshot)?, c_string(image)?);
        let options = Options::of(self.cluster.library, created)?;
        options.set(RBD_IMAGE_OPTION_CLONE_FORMAT, CLONE_FORMAT)?;
        // SAFETY: a live context, strings and options.
        let code = unsafe {
            self.cluster.library.rbd_clone3(
                space.handle,
                c_parent.as_ptr(),
                c_snapshot.as_ptr(),
                space.handle,
                c_image.as_ptr(),
                options.handle,
            )
        };
        match -code {
            libc::EEXIST => Err(RbdError::ImageExists { image: image.into() }),
            libc::ENOENT => Err(RbdError::NoSnapshot { image: parent.into(), snapshot: snapshot.into() }),
            _ => check(code, || format!("cloning {parent}@{snapshot} as {image}")).map(drop),
        }
    }

    /// Copy what the image still reads from its parent, so that it has none.
    ///
    /// # Errors
    /// It has no parent.
    pub fn flatten(&self, name: &str) -> Result<(), RbdError> {
        let image = self.open(name, false)?;
        // SAFETY: an open image.
        match unsafe { image.library().rbd_flatten(image.handle()) } {
            code if -code == libc::EINVAL => Err(RbdError::NoParent { image: name.into() }),
            code => check(code, || format!("flattening image {name}")).map(drop),
        }
    }
}

fn parent(image: &Image) -> Result<Option<Parent>, RbdError> {
    // SAFETY: plain structures of numbers and null pointers.
    let (mut linked, mut snapshot): (rbd_linked_image_spec_t, rbd_snap_spec_t) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    // SAFETY: an open image and live structures.
    match unsafe { image.library().rbd_get_parent(image.handle(), &raw mut linked, &raw mut snapshot) } {
        code if -code == libc::ENOENT => return Ok(None),
        code => check(code, || format!("asking for the parent of image {}", image.name))?,
    };
    // SAFETY: the library wrote the strings, which are given back once and not used after.
    unsafe {
        let parent = Parent {
            pool: text(linked.pool_name),
            image: text(linked.image_name),
            snapshot: text(snapshot.name),
        };
        image.library().rbd_linked_image_spec_cleanup(&raw mut linked);
        image.library().rbd_snap_spec_cleanup(&raw mut snapshot);
        Ok(Some(parent))
    }
}

fn snapshots(image: &Image) -> Result<Vec<SnapshotInfo>, RbdError> {
    let library = image.library();
    let mut room: c_int = 16;
    loop {
        let none = rbd_snap_info_t { id: 0, size: 0, name: ptr::null::<c_char>() };
        // One more than there are: the library ends the list with a null name.
        let mut found = vec![none; room as usize + 1];
        // SAFETY: an open image and room for as many as are told.
        let count = unsafe { library.rbd_snap_list(image.handle(), found.as_mut_ptr(), &raw mut room) };
        if -count == libc::ERANGE {
            continue;
        }
        let count = check(count, || format!("listing the snapshots of image {}", image.name))?;
        let mut all = Vec::new();
        for info in &found[..count as usize] {
            let mut kind = 0;
            // SAFETY: an open image and a live number.
            let code = unsafe { library.rbd_snap_get_namespace_type(image.handle(), info.id, &raw mut kind) };
            if code == 0 && kind == TRASH {
                // A deleted one that clones still need. Its name is the library's, and nobody can use it.
                continue;
            }
            // SAFETY: a string that the library wrote, and a live structure.
            let (name, created) = unsafe {
                let mut at = timespec { tv_sec: 0, tv_nsec: 0 };
                let code = library.rbd_snap_get_timestamp(image.handle(), info.id, &raw mut at);
                (text(info.name), if code == 0 { at.tv_sec } else { 0 })
            };
            all.push(SnapshotInfo { name, size: info.size, created_s: created });
        }
        if count > 0 {
            // SAFETY: the list that the library filled, given back once.
            unsafe { library.rbd_snap_list_end(found.as_mut_ptr()) };
        }
        return Ok(all);
    }
}

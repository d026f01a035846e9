//! An open image: what a volume's requests go to.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;

use crate::bindings::{rbd_completion_t, rbd_image_t, Library, RBD_WRITE_ZEROES_FLAG_THICK_PROVISION};
use crate::cluster::{c_string, Cluster, Space};
use crate::completions::{Completions, Ticket};
use crate::error::{check, os, RbdError};
use crate::library::library;

/// Which image, and for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    pub pool: String,
    /// "": the pool's own.
    pub namespace: String,
    pub image: String,
    /// Which of the volume's owners this one is; a later one shuts it out. 0: nobody counts.
    pub epoch: u64,
    /// Addresses of clients that owned the volume before and must not write another byte.
    pub predecessors: Vec<String>,
    /// Leave the lock to whoever has it, until [`Image::own`].
    pub incoming: bool,
}

/// An image that is open; for writing, with its exclusive lock unless it is incoming.
pub struct Image {
    library: &'static Library,
    handle: rbd_image_t,
    pub(crate) space: Space,
    pub(crate) name: String,
    pub(crate) read_only: bool,
}

// SAFETY: librbd images may be used by any thread at once; what we keep beside the handle does not change.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

/// The data of a request.
#[derive(Clone, Copy)]
pub enum Transfer {
    Read,
    Write,
}

impl Image {
    /// Open an image of at least `size` bytes, for writing with its lock: every predecessor is shut out when this returns.
    /// Blocks for as long as the cluster takes.
    ///
    /// # Errors
    /// See [`RbdError`]; nothing stays open, but predecessors may be shut out.
    pub fn open(
        cluster: &Arc<Cluster>,
        spec: &ImageSpec,
        size: u64,
        read_only: bool,
    ) -> Result<Self, RbdError> {
        let space = cluster.space(&spec.pool, &spec.namespace)?;
        let image = Self::plain(space, &spec.image, read_only)?;
        let have = image.size()?;
        if have < size {
            return Err(RbdError::TooShort { image: image.name.clone(), have, want: size });
        }
        if !read_only && !spec.incoming {
            image.own(spec.epoch, &spec.predecessors)?;
        }
        Ok(image)
    }

    /// Open an image without its lock.
    pub(crate) fn plain(space: Space, name: &str, read_only: bool) -> Result<Self, RbdError> {
        let library = space.cluster.library;
        let c_name = c_string(name)?;
        let mut handle: rbd_image_t = ptr::null_mut();
        // SAFETY: a live context and string; the image is written on success. No snapshot is chosen.
        let code = unsafe {
            match read_only {
                false => library.rbd_open(space.handle, c_name.as_ptr(), &raw mut handle, ptr::null()),
                true => {
                    library.rbd_open_read_only(space.handle, c_name.as_ptr(), &raw mut handle, ptr::null())
                }
            }
        };
        match -code {
            0 => Ok(Self { library, handle, space, name: name.into(), read_only }),
            libc::ENOENT => Err(RbdError::NoImage { image: name.into() }),
            libc::ENOSYS | libc::EOPNOTSUPP | libc::EXDEV => {
                Err(RbdError::Features { image: name.into(), source: os(code) })
            }
            libc::EPERM | libc::EACCES => {
                Err(RbdError::NoCaps { user: space.cluster.spec().user.clone(), pool: space.pool.clone() })
            }
            _ => check(code, || format!("opening image {name}")).map(|_| unreachable!()),
        }
    }

    pub(crate) fn library(&self) -> &'static Library {
        self.library
    }

    pub(crate) fn handle(&self) -> rbd_image_t {
        self.handle
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pool(&self) -> &str {
        &self.space.pool
    }

    /// As blocklists name the client that has it open.
    pub fn client(&self) -> &str {
        self.space.cluster.address()
    }

    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.space.cluster
    }

    /// Bytes.
    ///
    /// # Errors
    /// See [`RbdError::Ceph`].
    pub fn size(&self) -> Result<u64, RbdError> {
        let mut size = 0u64;
        // SAFETY: an open image and a live number.
        let code = unsafe { self.library.rbd_get_size(self.handle, &raw mut size) };
        check(code, || format!("asking for the size of image {}", self.name))?;
        Ok(size)
    }

    /// A completion of librbd's for `ticket`.
    #[inline(always)]
    fn completion(
        &self,
        ticket: &Ticket,
        completions: &Arc<Completions>,
        tag: u64,
    ) -> Result<rbd_completion_t, c_int> {
        ticket.address_to(completions, tag);
        let mut completion: rbd_completion_t = ptr::null_mut();
        let argument = ptr::from_ref(ticket).cast_mut().cast::<c_void>();
        // SAFETY: the callback gets the ticket, which the submitter keeps where it is until it is back.
        let code =
            unsafe { self.library.rbd_aio_create_completion(argument, Some(returned), &raw mut completion) };
        if code < 0 {
            ticket.take_back();
            return Err(code);
        }
        Ok(completion)
    }

    /// What a call to submit returned.
    #[inline(always)]
    fn submitted(&self, code: c_int, completion: rbd_completion_t, ticket: &Ticket) -> Result<(), c_int> {
        if code < 0 {
            // SAFETY: nothing was submitted, so the callback does not come.
            unsafe { self.library.rbd_aio_release(completion) };
            ticket.take_back();
            return Err(code);
        }
        Ok(())
    }

    /// Read or write at `offset`. The result is the bytes read, 0 for a write, or a negated errno.
    ///
    /// # Errors
    /// A negated errno: nothing was submitted, and the ticket does not come back.
    ///
    /// # Safety
    /// The iovecs, what they point to and the ticket stay where they are until the ticket is back; nobody but librbd uses
    /// them meanwhile (the guest may write to its memory).
    pub unsafe fn transfer(
        &self,
        transfer: Transfer,
        offset: u64,
        iovecs: &[libc::iovec],
        ticket: &Ticket,
        completions: &Arc<Completions>,
        tag: u64,
    ) -> Result<(), c_int> {
        let completion = self.completion(ticket, completions, tag)?;
        let (library, handle) = (self.library, self.handle);
        let many = (iovecs.as_ptr(), iovecs.len() as c_int);
        // SAFETY: the caller's promise; lone buffers go without an array, which librbd would keep a pointer to.
        let code = unsafe {
            match (transfer, iovecs) {
                (Transfer::Read, [one]) => {
                    library.rbd_aio_read(handle, offset, one.iov_len, one.iov_base.cast(), completion)
                }
                (Transfer::Write, [one]) => {
                    library.rbd_aio_write(handle, offset, one.iov_len, one.iov_base.cast(), completion)
                }
                (Transfer::Read, _) => library.rbd_aio_readv(handle, many.0, many.1, offset, completion),
                (Transfer::Write, _) => library.rbd_aio_writev(handle, many.0, many.1, offset, completion),
            }
        };
        self.submitted(code, completion, ticket)
    }

    /// Make durable what was written before.
    ///
    /// # Errors
    /// As for [`transfer`](Self::transfer).
    ///
    /// # Safety
    /// The ticket stays where it is until it is back.
    pub unsafe fn flush(
        &self,
        ticket: &Ticket,
        completions: &Arc<Completions>,
        tag: u64,
    ) -> Result<(), c_int> {
        let completion = self.completion(ticket, completions, tag)?;
        // SAFETY: an open image and a completion of ours.
        let code = unsafe { self.library.rbd_aio_flush(self.handle, completion) };
        self.submitted(code, completion, ticket)
    }

    /// Zero a range; it stays allocated unless `unmap`.
    ///
    /// # Errors
    /// As for [`transfer`](Self::transfer).
    ///
    /// # Safety
    /// The ticket stays where it is until it is back.
    pub unsafe fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        unmap: bool,
        ticket: &Ticket,
        completions: &Arc<Completions>,
        tag: u64,
    ) -> Result<(), c_int> {
        let completion = self.completion(ticket, completions, tag)?;
        let thick = if unmap { 0 } else { RBD_WRITE_ZEROES_FLAG_THICK_PROVISION as c_int };
        // SAFETY: an open image and a completion of ours.
        let code = unsafe {
            self.library.rbd_aio_write_zeroes(self.handle, offset, len as usize, completion, thick, 0)
        };
        self.submitted(code, completion, ticket)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: every request is back, as its submitter keeps the image until then. Closing releases the lock. A cluster
        // that fails us here has nothing left to tell anybody.
        unsafe { self.library.rbd_close(self.handle) };
    }
}

/// Called on a thread of librbd's when a request is done.
unsafe extern "C" fn returned(completion: rbd_completion_t, argument: *mut c_void) {
    let Ok(library) = library() else { return };
    // SAFETY: the completion is ours until it is released, and the argument is the ticket that waits for it.
    unsafe {
        let result = library.rbd_aio_get_return_value(completion);
        library.rbd_aio_release(completion);
        (*argument.cast_const().cast::<Ticket>()).give_back(result as i64);
    }
}

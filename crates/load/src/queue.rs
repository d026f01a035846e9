//! One virtio-blk request queue: request headers and status bytes around the independent crate's virtqueue.
//!
//! The crate's own `VirtioBlkQueue` makes only well-formed reads, writes, flushes, discards and write-zeroes, and packs
//! its request areas so that neighbours share cache lines. This queue makes any request and gives each a line of its
//! own, as a guest kernel's request structures have.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use virtio_driver::virtqueue::Virtqueue;
use virtio_driver::{iovec, EventFd, QueueNotifier};

use crate::LoadError;

/// Request types of virtio-blk (VIRTIO 1.2, 5.2.6).
pub(crate) mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Header and status of one request, in the memory shared with the backend.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct RequestArea {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
    padding: [u8; 47],
}

/// Written before a request is made, so that a backend that completes without a status is noticed.
pub(crate) const STATUS_NOT_WRITTEN: u8 = 0xff;
const HEADER_BYTES: usize = 16;

impl RequestArea {
    pub(crate) fn status(&self) -> u8 {
        self.status
    }

    /// Makes this area a request of `kind` and adds its descriptors: header, `readable`, `writable`, status.
    pub(crate) fn describe(
        &mut self,
        kind: u32,
        sector: u64,
        readable: &[iovec],
        writable: &[iovec],
        add: &mut dyn FnMut(iovec, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        *self = Self { kind, reserved: 0, sector, status: STATUS_NOT_WRITTEN, padding: [0; 47] };
        let area: *mut Self = self;
        add(iovec { iov_base: area.cast(), iov_len: HEADER_BYTES }, false)?;
        for &segment in readable {
            add(segment, false)?;
        }
        for &segment in writable {
            add(segment, true)?;
        }
        // SAFETY: `area` comes from a reference to the whole structure; only the field's address is taken.
        let status = unsafe { &raw mut (*area).status };
        add(iovec { iov_base: status.cast(), iov_len: 1 }, true)
    }
}

/// A request that the backend has answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Completed {
    /// What was given to [`RequestQueue::submit`].
    pub tag: u32,
    pub status: u8,
}

/// What the load generator asks of a queue, whichever of the two clients it belongs to.
pub(crate) trait LoadQueue: Send {
    fn index(&self) -> usize;
    fn in_flight(&self) -> usize;
    fn kicks(&self) -> u64;
    fn call(&self) -> RawFd;
    fn submit(
        &mut self,
        kind: u32,
        sector: u64,
        readable: &[iovec],
        writable: &[iovec],
        tag: u32,
    ) -> Result<(), LoadError>;
    fn kick_if_needed(&mut self) -> Result<(), LoadError>;
    fn has_completed(&mut self) -> bool;
    fn reap(&mut self) -> Result<Option<Completed>, LoadError>;
    fn enable_calls(&mut self, enabled: bool);
}

impl LoadQueue for RequestQueue {
    fn index(&self) -> usize {
        self.index()
    }

    fn in_flight(&self) -> usize {
        self.in_flight()
    }

    fn kicks(&self) -> u64 {
        self.kicks()
    }

    fn call(&self) -> RawFd {
        self.call()
    }

    #[inline(always)]
    fn submit(
        &mut self,
        kind: u32,
        sector: u64,
        readable: &[iovec],
        writable: &[iovec],
        tag: u32,
    ) -> Result<(), LoadError> {
        self.submit(kind, sector, readable, writable, tag)
    }

    #[inline(always)]
    fn kick_if_needed(&mut self) -> Result<(), LoadError> {
        self.kick_if_needed()
    }

    #[inline(always)]
    fn has_completed(&mut self) -> bool {
        self.has_completed()
    }

    #[inline(always)]
    fn reap(&mut self) -> Result<Option<Completed>, LoadError> {
        self.reap()
    }

    fn enable_calls(&mut self, enabled: bool) {
        self.enable_calls(enabled);
    }
}

/// One virtqueue with its eventfds.
pub(crate) struct RequestQueue {
    index: usize,
    ring: Virtqueue<'static, RequestArea>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    /// Tag by head descriptor; None when that descriptor heads no request in flight.
    tags: Box<[Option<u32>]>,
    event_idx: bool,
    in_flight: usize,
    kicks: u64,
}

impl RequestQueue {
    pub(crate) fn new(
        index: usize,
        ring: Virtqueue<'static, RequestArea>,
        kick: Box<dyn QueueNotifier>,
        call: Arc<EventFd>,
        event_idx: bool,
    ) -> Self {
        let tags = vec![None; usize::from(ring.queue_size())].into_boxed_slice();
        Self { index, ring, kick, call, tags, event_idx, in_flight: 0, kicks: 0 }
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(crate) fn kicks(&self) -> u64 {
        self.kicks
    }

    /// The eventfd that the backend signals completions on.
    pub(crate) fn call(&self) -> RawFd {
        self.call.as_raw_fd()
    }

    /// Puts a request on the ring; [`Self::kick_if_needed`] tells the backend. `readable` is data the device reads,
    /// `writable` data it writes; both must stay mapped and unused until the request completes.
    #[inline]
    pub(crate) fn submit(
        &mut self,
        kind: u32,
        sector: u64,
        readable: &[iovec],
        writable: &[iovec],
        tag: u32,
    ) -> Result<(), LoadError> {
        let added = self.ring.add_request(|area, add| area.describe(kind, sector, readable, writable, add));
        let head = added.map_err(|source| LoadError::Submit { queue: self.index, source })?;
        self.tags[usize::from(head)] = Some(tag);
        self.in_flight += 1;
        Ok(())
    }

    /// Tells the backend of the requests submitted so far, unless it has said that it polls.
    #[inline]
    pub(crate) fn kick_if_needed(&mut self) -> Result<(), LoadError> {
        if !self.event_idx {
            // The crate has this fence only with EVENT_IDX. Without it the flags could be read before the new
            // available index is seen by a backend that is about to sleep, and both sides would wait.
            fence(Ordering::SeqCst);
        }
        if self.ring.avail_notif_needed() {
            self.kick.notify().map_err(|source| LoadError::System { what: "kicking the backend", source })?;
            self.kicks += 1;
        }
        Ok(())
    }

    #[inline(always)]
    pub(crate) fn has_completed(&mut self) -> bool {
        self.ring.completions().has_next()
    }

    /// Takes the next completion off the used ring.
    #[inline]
    pub(crate) fn reap(&mut self) -> Result<Option<Completed>, LoadError> {
        let Some(done) = self.ring.completions().next() else { return Ok(None) };
        let Some(tag) = self.tags[usize::from(done.id)].take() else {
            return Err(LoadError::Protocol { queue: self.index, id: done.id });
        };
        self.in_flight -= 1;
        Ok(Some(Completed { tag, status: done.req.status }))
    }

    /// Asks the backend to signal completions on the call eventfd, or not to.
    pub(crate) fn enable_calls(&mut self, enabled: bool) {
        self.ring.set_used_notif_enabled(enabled);
        // A completion made before the backend saw the new flag is found by the caller's next look at the ring.
        fence(Ordering::SeqCst);
    }
}

/// What a status byte means (VIRTIO 1.2, 5.2.6).
pub(crate) fn status_name(status: u8) -> &'static str {
    match status {
        0 => "ok",
        1 => "ioerr",
        2 => "unsupp",
        STATUS_NOT_WRITTEN => "not written",
        _ => "unknown",
    }
}

/// Waits until one of the eventfds `calls` was signalled or `timeout` passes; drains those that were. False after the
/// timeout.
pub(crate) fn wait_for_calls(calls: &[RawFd], timeout: std::time::Duration) -> Result<bool, LoadError> {
    let mut polled: Vec<libc::pollfd> =
        calls.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let milliseconds = timeout.as_millis().clamp(1, i32::MAX as u128) as i32;
    // SAFETY: `polled` is a live array of as many entries as told.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, milliseconds) };
    if ready < 0 {
        let source = io::Error::last_os_error();
        return match source.kind() {
            io::ErrorKind::Interrupted => Ok(true),
            _ => Err(LoadError::System { what: "waiting for a call", source }),
        };
    }
    for entry in polled.iter().filter(|entry| entry.revents & libc::POLLIN != 0) {
        let mut count = 0u64;
        // SAFETY: `count` has room for the 8 bytes that an eventfd gives.
        if unsafe { libc::read(entry.fd, (&raw mut count).cast(), 8) } < 0 {
            return Err(LoadError::System { what: "reading a call", source: io::Error::last_os_error() });
        }
    }
    Ok(ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_area_fills_one_cache_line() {
        assert_eq!(std::mem::size_of::<RequestArea>(), 64);
        assert_eq!(std::mem::offset_of!(RequestArea, sector), 8);
        assert_eq!(std::mem::offset_of!(RequestArea, status), HEADER_BYTES);
    }

    #[test]
    fn statuses_have_names() {
        let names: Vec<_> = [0, 1, 2, 3, 255].into_iter().map(status_name).collect();
        assert_eq!(names, ["ok", "ioerr", "unsupp", "unknown", "not written"]);
    }
}

//! One virtqueue that outlives its backend. The ring handling is the independent crate's; this file looks at what the
//! backend has put into the ring before that crate does, because it takes every completion on trust: one that comes twice
//! would put a descriptor on its free list twice.

use std::io;
use std::sync::atomic::{fence, AtomicU16, Ordering};

use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{iovec, IovaTranslator, VirtioFeatureFlags};
use vmm_sys_util::eventfd::{EventFd, EFD_CLOEXEC, EFD_NONBLOCK};

use crate::config::Hugepages;
use crate::memory::SharedMemory;
use crate::queue::RequestArea;
use crate::LoadError;

const PAGE: usize = 4096;
/// VIRTIO 1.2, 2.8.1: bits of a packed descriptor's flags.
const PACKED_AVAIL: u16 = 1 << 7;
const PACKED_USED: u16 = 1 << 15;
/// VIRTIO 1.2, 2.8.14: "no notifications" in an event suppression structure.
const EVENTS_DISABLED: u16 = 1;

/// Where a ring lies in this process; its addresses are those that the backend is told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    pub descriptors: usize,
    pub driver: usize,
    pub device: usize,
    pub size: u16,
    pub packed: bool,
}

impl Addresses {
    /// A 16-bit field at `offset` of the device's area, or of the descriptors.
    fn field(&self, base: usize, offset: usize) -> &AtomicU16 {
        // SAFETY: callers name fields within the ring, which is 2-byte aligned shared memory that outlives every user
        // of these addresses (see `Ring::new`); both sides access it as atomics or through the independent crate.
        unsafe { &*((base + offset) as *const AtomicU16) }
    }

    /// The split ring's used index: where a backend that lost its memory goes on.
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.field(self.device, 2).load(Ordering::Acquire))
    }
}

/// Where the next completion will be.
#[derive(Debug)]
struct View {
    ring: Addresses,
    next: u16,
    /// Packed: the device's wrap counter at `next`.
    wrap: bool,
}

impl View {
    /// The head that the next completion names, if there is one.
    #[inline(always)]
    fn peek(&self) -> Option<u32> {
        let ring = &self.ring;
        if ring.packed {
            let at = usize::from(self.next) * 16;
            let flags = u16::from_le(ring.field(ring.descriptors, at + 14).load(Ordering::Acquire));
            let (avail, used) = (flags & PACKED_AVAIL != 0, flags & PACKED_USED != 0);
            (avail == used && used == self.wrap)
                .then(|| u16::from_le(ring.field(ring.descriptors, at + 12).load(Ordering::Relaxed)).into())
        } else {
            if ring.used_index() == self.next {
                return None;
            }
            let at = 4 + usize::from(self.next % ring.size) * 8;
            let half =
                |offset| u32::from(u16::from_le(ring.field(ring.device, offset).load(Ordering::Relaxed)));
            Some(half(at) | half(at + 2) << 16)
        }
    }

    /// Steps over a completion of `descriptors` descriptors.
    fn advance(&mut self, descriptors: u16) {
        if !self.ring.packed {
            self.next = self.next.wrapping_add(1);
            return;
        }
        self.next += descriptors;
        if self.next >= self.ring.size {
            self.next -= self.ring.size;
            self.wrap = !self.wrap;
        }
    }

    /// Packed: the independent crate stops the process unless the length is that of all that could be written, which
    /// a backend need not report for a request that failed.
    fn set_length(&self, len: u32) {
        let at = usize::from(self.next) * 16 + 8;
        self.ring.field(self.ring.descriptors, at).store((len as u16).to_le(), Ordering::Relaxed);
        self.ring.field(self.ring.descriptors, at + 2).store(((len >> 16) as u16).to_le(), Ordering::Relaxed);
    }
}

/// What heads a descriptor chain in flight.
#[derive(Debug, Clone, Copy)]
struct Head {
    tag: u32,
    descriptors: u16,
    writable_bytes: u32,
}

/// What came off the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reaped {
    Done {
        tag: u32,
        status: u8,
    },
    /// A head that is not in flight. The ring cannot be used any more.
    Stray {
        head: u32,
    },
}

pub(crate) struct Ring {
    index: usize,
    ring: Virtqueue<'static, RequestArea>,
    view: View,
    heads: Box<[Option<Head>]>,
    in_flight: usize,
    event_idx: bool,
    kick: EventFd,
    call: EventFd,
    kicks: u64,
}

/// How the rings of a connection are made.
pub(crate) struct Layout<'a> {
    pub socket: &'a str,
    pub entries: u16,
    /// Negotiated feature bits.
    pub features: u64,
    pub packed: bool,
}

impl Layout<'_> {
    /// One ring for each translator, in shared memory that must outlive them.
    pub fn make(
        &self,
        translators: Vec<Box<dyn IovaTranslator>>,
    ) -> Result<(SharedMemory, Vec<Ring>), LoadError> {
        let features = VirtioFeatureFlags::from_bits_truncate(self.features);
        let layout = VirtqueueLayout::new::<RequestArea>(1, usize::from(self.entries), features)
            .map_err(|_| LoadError::config("queue_size", "must be a power of two of at most 32768"))?;
        let ring_bytes = layout.end_offset.next_multiple_of(PAGE);
        let memory = SharedMemory::new(translators.len() * ring_bytes, Hugepages::Off)?;
        let mut rings = Vec::with_capacity(translators.len());
        for (index, translator) in translators.into_iter().enumerate() {
            let base = memory.at(index * ring_bytes, ring_bytes);
            // SAFETY: the parts are disjoint and page-aligned, nothing else refers to them in this process, and the
            // caller keeps `memory` for longer than the rings.
            let part: &'static mut [u8] = unsafe { std::slice::from_raw_parts_mut(base, ring_bytes) };
            let ring = Virtqueue::new(translator, part, self.entries, features).map_err(|source| {
                LoadError::Setup { socket: self.socket.to_owned(), what: "a ring's layout", source }
            })?;
            let event_idx = features.contains(VirtioFeatureFlags::RING_EVENT_IDX);
            rings.push(Ring::new(index, ring, self.packed, event_idx)?);
        }
        Ok((memory, rings))
    }
}

impl Ring {
    /// `ring` lies in memory that must outlive the result.
    pub fn new(
        index: usize,
        ring: Virtqueue<'static, RequestArea>,
        packed: bool,
        event_idx: bool,
    ) -> Result<Self, LoadError> {
        let eventfd = || {
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .map_err(|source| LoadError::System { what: "making an eventfd", source })
        };
        let addresses = Addresses {
            descriptors: ring.desc_table_ptr() as usize,
            driver: ring.driver_area_ptr() as usize,
            device: ring.device_area_ptr() as usize,
            size: ring.queue_size(),
            packed,
        };
        let heads = vec![None; usize::from(ring.queue_size())].into_boxed_slice();
        let view = View { ring: addresses, next: 0, wrap: true };
        let (kick, call) = (eventfd()?, eventfd()?);
        Ok(Self { index, ring, view, heads, in_flight: 0, event_idx, kick, call, kicks: 0 })
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn addresses(&self) -> Addresses {
        self.view.ring
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// Puts a request on the ring; [`Self::kick_if_needed`] tells the backend.
    #[inline]
    pub fn submit(
        &mut self,
        kind: u32,
        sector: u64,
        readable: &[iovec],
        writable: &[iovec],
        tag: u32,
    ) -> Result<(), LoadError> {
        let added = self.ring.add_request(|area, add| area.describe(kind, sector, readable, writable, add));
        let head = added.map_err(|source| LoadError::Submit { queue: self.index, source })?;
        let descriptors = 2 + (readable.len() + writable.len()) as u16;
        let writable_bytes = 1 + writable.iter().map(|segment| segment.iov_len as u32).sum::<u32>();
        self.heads[usize::from(head)] = Some(Head { tag, descriptors, writable_bytes });
        self.in_flight += 1;
        Ok(())
    }

    /// Tells the backend of the requests submitted so far, unless it has said that it polls.
    #[inline]
    pub fn kick_if_needed(&mut self) -> Result<(), LoadError> {
        if self.view.ring.packed || !self.event_idx {
            // The crate has this fence only with a split ring and EVENT_IDX. Without it the suppression could be read
            // before the new requests are seen by a backend that is about to sleep, and both sides would wait.
            fence(Ordering::SeqCst);
        }
        // The crate counts what it added since the last kick in 16 bits that overflow while a packed ring's backend
        // polls, so there its answer is not asked for: a kick too many does no harm.
        let needed = if self.view.ring.packed {
            let ring = self.view.ring;
            u16::from_le(ring.field(ring.device, 2).load(Ordering::Acquire)) & 3 != EVENTS_DISABLED
        } else {
            self.ring.avail_notif_needed()
        };
        if needed {
            kick(&self.kick)?;
            self.kicks += 1;
        }
        Ok(())
    }

    #[inline(always)]
    pub fn has_completed(&self) -> bool {
        self.view.peek().is_some()
    }

    /// Takes the next completion off the ring.
    #[inline]
    pub fn reap(&mut self) -> Option<Reaped> {
        let head = self.view.peek()?;
        let Some(known) = self.heads.get_mut(head as usize).and_then(Option::take) else {
            return Some(Reaped::Stray { head });
        };
        if self.view.ring.packed {
            self.view.set_length(known.writable_bytes);
        }
        self.view.advance(known.descriptors);
        self.in_flight -= 1;
        match self.ring.completions().next() {
            Some(done) if u32::from(done.id) == head => {
                Some(Reaped::Done { tag: known.tag, status: done.req.status() })
            }
            // The ring was changed between the two looks.
            _ => Some(Reaped::Stray { head }),
        }
    }

    /// Asks the backend to signal completions on the call eventfd, or not to.
    pub fn enable_calls(&mut self, enabled: bool) {
        self.ring.set_used_notif_enabled(enabled);
        fence(Ordering::SeqCst);
    }
}

/// Signals a kick or call eventfd.
pub(crate) fn kick(eventfd: &EventFd) -> Result<(), LoadError> {
    match eventfd.write(1) {
        // The counter is full: whoever waits for it is awake.
        Err(source) if source.kind() == io::ErrorKind::WouldBlock => Ok(()),
        done => done.map_err(|source| LoadError::System { what: "signalling an eventfd", source }),
    }
}

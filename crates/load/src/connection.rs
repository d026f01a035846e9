//! A connection to a backend: negotiation, queues, and payload memory given as one or several regions.
//!
//! The vhost-user messages and the virtqueues are the independent crate's; this file decides what is negotiated,
//! where the rings lie, and in which order things end.

use std::os::fd::AsRawFd;
use std::time::Instant;

use serde::Serialize;
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    ByteValued, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioFeatureFlags, VirtioTransport,
};

use crate::memory::SharedMemory;
use crate::queue::{RequestArea, RequestQueue};
use crate::LoadError;

const PAGE: usize = 4096;

/// What the backend said of its device.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Device {
    pub capacity_bytes: u64,
    pub block_size: u32,
    pub queues: usize,
    pub seg_max: u32,
    pub size_max: u32,
    pub read_only: bool,
    pub writeback: bool,
    pub flush: bool,
    pub discard: bool,
    pub max_discard_sectors: u32,
    pub write_zeroes: bool,
    pub max_write_zeroes_sectors: u32,
    /// Negotiated feature bits.
    pub features: u64,
    pub max_memory_regions: u64,
}

/// What to ask a backend for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    pub socket: &'a str,
    pub queues: usize,
    pub queue_size: u16,
    pub event_idx: bool,
}

/// A connected device with its queues set up. Fields are dropped in this order, and it matters: the queues point into
/// the transport's ring memory, and the backend may write to the payload memory until the transport's socket closes.
pub(crate) struct Connection {
    queues: Vec<RequestQueue>,
    _transport: VhostUser<VirtioBlkConfig, RequestArea>,
    memory: Option<SharedMemory>,
    pub device: Device,
    /// From the first byte on the socket until every queue was enabled.
    pub connect_ns: u64,
    pub regions: usize,
}

impl Connection {
    /// Connects and sets the queues up. `memory` is given to the backend before, in regions of at most
    /// `region_bytes` (0: one region).
    pub(crate) fn open(
        request: Request<'_>,
        memory: Option<SharedMemory>,
        region_bytes: usize,
    ) -> Result<Self, LoadError> {
        let started = Instant::now();
        let mut transport = connect::<RequestArea>(request.socket, request.event_idx)?;
        let device = describe(&transport, request.socket)?;
        if device.queues < request.queues {
            let socket = request.socket.to_owned();
            return Err(LoadError::Queues { socket, offered: device.queues, asked: request.queues });
        }
        let regions = match &memory {
            Some(memory) => share(&mut transport, memory, region_bytes, request.socket)?,
            None => 0,
        };
        let queues = set_up_queues(&mut transport, request)?;
        Ok(Self {
            device,
            connect_ns: started.elapsed().as_nanos() as u64,
            _transport: transport,
            queues,
            memory,
            regions,
        })
    }

    pub(crate) fn queues(&mut self) -> &mut [RequestQueue] {
        &mut self.queues
    }

    /// Queues to drive and the memory they work on.
    pub(crate) fn parts(&mut self) -> (&mut [RequestQueue], &SharedMemory) {
        (&mut self.queues, self.memory.as_ref().expect("a connection that was opened with memory"))
    }
}

/// Every feature this client understands.
pub(crate) fn understood(event_idx: bool) -> u64 {
    let block = VirtioBlkFeatureFlags::SIZE_MAX
        | VirtioBlkFeatureFlags::SEG_MAX
        | VirtioBlkFeatureFlags::RO
        | VirtioBlkFeatureFlags::BLK_SIZE
        | VirtioBlkFeatureFlags::FLUSH
        | VirtioBlkFeatureFlags::TOPOLOGY
        | VirtioBlkFeatureFlags::CONFIG_WCE
        | VirtioBlkFeatureFlags::MQ
        | VirtioBlkFeatureFlags::DISCARD
        | VirtioBlkFeatureFlags::WRITE_ZEROES;
    let mut ring = VirtioFeatureFlags::VERSION_1;
    ring.set(VirtioFeatureFlags::RING_EVENT_IDX, event_idx);
    block.bits() | ring.bits()
}

/// Connects and negotiates every feature this client understands. `R` is the request area of the queues.
pub(crate) fn connect<R: Copy>(
    socket: &str,
    event_idx: bool,
) -> Result<VhostUser<VirtioBlkConfig, R>, LoadError> {
    connect_for(socket, understood(event_idx))
}

/// Connects and negotiates those of `features` that the backend offers.
pub(crate) fn connect_for<R: Copy>(
    socket: &str,
    features: u64,
) -> Result<VhostUser<VirtioBlkConfig, R>, LoadError> {
    VhostUser::new(socket, features)
        .map_err(|source| LoadError::Connect { socket: socket.to_owned(), source })
}

/// Reads the device's configuration space.
pub(crate) fn describe<R: Copy>(
    transport: &VhostUser<VirtioBlkConfig, R>,
    socket: &str,
) -> Result<Device, LoadError> {
    let config = transport.get_config().map_err(|source| LoadError::Setup {
        socket: socket.to_owned(),
        what: "GET_CONFIG",
        source,
    })?;
    let features = VirtioBlkFeatureFlags::from_bits_truncate(transport.get_features());
    let has = |flag| features.contains(flag);
    Ok(Device {
        capacity_bytes: u64::from(config.capacity).saturating_mul(512),
        block_size: if has(VirtioBlkFeatureFlags::BLK_SIZE) { config.blk_size.into() } else { 512 },
        queues: if has(VirtioBlkFeatureFlags::MQ) { u16::from(config.num_queues).into() } else { 1 },
        seg_max: config.seg_max.into(),
        size_max: config.size_max.into(),
        read_only: has(VirtioBlkFeatureFlags::RO),
        writeback: config.writeback != 0,
        flush: has(VirtioBlkFeatureFlags::FLUSH),
        discard: has(VirtioBlkFeatureFlags::DISCARD),
        max_discard_sectors: config.max_discard_sectors.into(),
        write_zeroes: has(VirtioBlkFeatureFlags::WRITE_ZEROES),
        max_write_zeroes_sectors: config.max_write_zeroes_sectors.into(),
        features: transport.get_features(),
        max_memory_regions: transport.max_mem_regions(),
    })
}

/// Gives `memory` to the backend in regions of at most `region_bytes` (0: one); returns how many.
pub(crate) fn share<C: ByteValued, R: Copy>(
    transport: &mut VhostUser<C, R>,
    memory: &SharedMemory,
    region_bytes: usize,
    socket: &str,
) -> Result<usize, LoadError> {
    let step = if region_bytes == 0 { memory.len() } else { region_bytes };
    if !step.is_multiple_of(PAGE) {
        return Err(LoadError::config("region_bytes", "must be a multiple of 4096"));
    }
    // One region more holds the rings.
    let (wanted, most) = (memory.len().div_ceil(step) + 1, transport.max_mem_regions());
    if wanted as u64 > most {
        let problem = format!("makes {wanted} regions but the backend takes {most}; raise it");
        return Err(LoadError::config("region_bytes", problem));
    }
    let mut regions = 0;
    for offset in (0..memory.len()).step_by(step) {
        let len = step.min(memory.len() - offset);
        transport
            .map_mem_region(memory.at(offset, len) as usize, len, memory.file().as_raw_fd(), offset as i64)
            .map_err(|source| LoadError::Setup {
                socket: socket.to_owned(),
                what: "a memory region",
                source,
            })?;
        regions += 1;
    }
    Ok(regions)
}

fn set_up_queues(
    transport: &mut VhostUser<VirtioBlkConfig, RequestArea>,
    request: Request<'_>,
) -> Result<Vec<RequestQueue>, LoadError> {
    let refused = |what| move |source| LoadError::Setup { socket: request.socket.to_owned(), what, source };
    let features = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
    let event_idx = features.contains(VirtioFeatureFlags::RING_EVENT_IDX);
    let entries = usize::from(request.queue_size);
    let mut layout = VirtqueueLayout::new::<RequestArea>(request.queues, entries, features)
        .map_err(|_| LoadError::config("queue_size", "must be a power of two of at most 32768"))?;
    // The crate only keeps queues 16 bytes apart; request areas want a cache line and queues no shared page.
    layout.end_offset = layout.end_offset.next_multiple_of(PAGE);
    let translators: Vec<_> = (0..request.queues).map(|_| transport.iova_translator()).collect();
    let rings = transport.alloc_queue_mem(&layout).map_err(refused("the rings' memory region"))?;
    let mut virtqueues = Vec::with_capacity(request.queues);
    for (translator, ring) in translators.into_iter().zip(rings.chunks_exact_mut(layout.end_offset)) {
        // SAFETY: the chunks are disjoint and page-aligned parts of the transport's mapping, which does not move and
        // which `Connection` drops after the queues; nothing else refers to them.
        let ring = unsafe { std::slice::from_raw_parts_mut(ring.as_mut_ptr(), ring.len()) };
        virtqueues.push(
            Virtqueue::new(translator, ring, request.queue_size, features)
                .map_err(refused("a ring's layout"))?,
        );
    }
    transport.setup_queues(&virtqueues).map_err(refused("a queue's set-up"))?;
    let queues = virtqueues.into_iter().enumerate().map(|(index, ring)| {
        let kick = transport.get_submission_notifier(index);
        let call = transport.get_completion_fd(index);
        RequestQueue::new(index, ring, kick, call, event_idx)
    });
    Ok(queues.collect())
}

//! The memory of the model: one small ring and its in-flight region, as bytes to be kept and put back.

use std::os::fd::AsFd;
use std::sync::Arc;

use ringstone_mapping::Mapping;

use crate::shared::journal::{self, Store};
use crate::{InflightRegion, MemoryRegion, MemoryTable, RingAddresses, RingSetup, Segment};

pub const SIZE: u16 = 4;

pub const DESCRIPTORS: usize = 0;
/// The available ring, or the driver's event area.
pub const DRIVER: usize = 0x40;
/// The used ring, or the device's event area.
pub const DEVICE: usize = 0x50;
const REGION: usize = 0x80;
const IMAGE: usize = REGION + 192;

/// Where the buffers are: a stretch for each request, a slot in it for each buffer.
const BUFFERS: usize = 0x1000;
const STRETCH: usize = 0x100;
const SLOT: usize = 0x10;
const MEMORY: usize = 0x4000;

/// All the bytes that ring and region consist of.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Image([u8; IMAGE]);

impl Image {
    pub fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().unwrap()
    }

    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// Address and length of buffer `slot` of a request.
pub fn buffer(request: u8, slot: u16) -> (u64, u32) {
    let at = BUFFERS + STRETCH * usize::from(request) + SLOT * usize::from(slot);
    (at as u64, 1 + u32::from(slot))
}

pub struct Stage {
    mapping: Arc<Mapping>,
    memory: Arc<MemoryTable>,
    packed: bool,
    base: u32,
}

impl Stage {
    pub fn new(packed: bool, base: u32) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY as u64).unwrap();
        let mapping = Arc::new(Mapping::new(file.as_fd(), 0, MEMORY as u64).unwrap());
        let region = MemoryRegion { guest: 0, len: MEMORY as u64, user: 0, mapping: mapping.clone() };
        Self { mapping, memory: Arc::new(MemoryTable::new(vec![region]).unwrap()), packed, base }
    }

    pub fn blank() -> Image {
        Image([0; IMAGE])
    }

    pub fn setup(&self) -> RingSetup {
        RingSetup {
            memory: self.memory.clone(),
            size: SIZE.into(),
            addresses: RingAddresses {
                descriptors: DESCRIPTORS as u64,
                available: DRIVER as u64,
                used: DEVICE as u64,
            },
            base: self.base,
            event_idx: true,
            indirect: false,
            inflight: InflightRegion::new(self.mapping.clone(), REGION, SIZE, self.packed),
            log: None,
        }
    }

    /// Let the device do something to `image`. Also answers the image behind each store but the last.
    pub fn run<T>(&self, image: &mut Image, step: impl FnOnce() -> T) -> (T, Vec<Image>) {
        let base = self.mapping.as_ptr();
        // SAFETY: the image fits the mapping, which nobody else touches.
        unsafe { base.copy_from_nonoverlapping(image.0.as_ptr(), IMAGE) };
        let (result, stores) = journal::of(step);
        let mut between = Vec::new();
        for Store { at, len, bytes } in stores {
            let before = image.clone();
            image.put(at - base as usize, &bytes[..len]);
            if *image != before {
                between.push(image.clone());
            }
        }
        between.pop();
        let mut now = [0; IMAGE];
        // SAFETY: as above.
        unsafe { base.copy_to_nonoverlapping(now.as_mut_ptr(), IMAGE) };
        assert!(now == image.0, "a store that the journal does not know of");
        (result, between)
    }

    /// The request that a chain belongs to.
    pub fn request_of(&self, segments: &[Segment]) -> u8 {
        let offset = |segment: &Segment| segment.ptr as usize - self.mapping.as_ptr() as usize - BUFFERS;
        let request = (offset(&segments[0]) / STRETCH) as u8;
        for (slot, segment) in segments.iter().enumerate() {
            let (address, len) = buffer(request, slot as u16);
            assert_eq!(
                (offset(segment) + BUFFERS, segment.len),
                (address as usize, len),
                "a buffer of another request"
            );
        }
        request
    }
}

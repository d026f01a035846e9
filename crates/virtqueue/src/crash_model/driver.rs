//! Drivers as the specification describes them: they look at the ring in order, and only at what shows them that there is
//! something to see.

use std::hash::Hash;

use super::stage::{buffer, Image, Stage, DESCRIPTORS, DEVICE, DRIVER, SIZE};
use crate::{PackedRing, RingError, SplitRing, VirtRing};

pub trait Driver: Clone + Hash {
    type Ring: VirtRing + Clone;
    const PACKED: bool;

    /// A driver whose ring begins at `begin`, and what `SET_VRING_BASE` says of it.
    fn new(image: &mut Image, begin: u16) -> (Self, u32);

    /// Make a request with `len` buffers available; false if there is no room.
    fn offer(&mut self, image: &mut Image, request: u8, len: u16) -> bool;

    /// The next request that was completed, and its length.
    fn reap(&mut self, image: &Image) -> Option<(u8, u32)>;

    fn device(stage: &Stage) -> Result<Self::Ring, RingError>;

    /// What of the device's own state decides what it does next.
    fn state(ring: &Self::Ring) -> impl Hash;
}

#[derive(Clone, Hash)]
pub struct SplitDriver {
    available: u16,
    used: u16,
    free: Vec<u16>,
    /// By head: the request and its descriptors, the head first.
    owners: [Option<(u8, Vec<u16>)>; SIZE as usize],
}

impl Driver for SplitDriver {
    type Ring = SplitRing;
    const PACKED: bool = false;

    fn new(image: &mut Image, begin: u16) -> (Self, u32) {
        image.put(DRIVER + 2, &begin.to_le_bytes());
        image.put(DEVICE + 2, &begin.to_le_bytes());
        let free = (0..SIZE).rev().collect();
        (Self { available: begin, used: begin, free, owners: Default::default() }, begin.into())
    }

    fn offer(&mut self, image: &mut Image, request: u8, len: u16) -> bool {
        let Some(rest) = self.free.len().checked_sub(len.into()) else { return false };
        let mut taken = self.free.split_off(rest);
        taken.reverse();
        for (slot, index) in taken.iter().enumerate() {
            let (address, bytes) = buffer(request, slot as u16);
            let next = taken.get(slot + 1);
            let at = DESCRIPTORS + 16 * usize::from(*index);
            image.put(at, &address.to_le_bytes());
            image.put(at + 8, &bytes.to_le_bytes());
            image.put(at + 12, &u16::from(next.is_some()).to_le_bytes());
            image.put(at + 14, &next.unwrap_or(&0).to_le_bytes());
        }
        image.put(DRIVER + 4 + 2 * usize::from(self.available % SIZE), &taken[0].to_le_bytes());
        self.available = self.available.wrapping_add(1);
        image.put(DRIVER + 2, &self.available.to_le_bytes());
        let head = usize::from(taken[0]);
        self.owners[head] = Some((request, taken));
        true
    }

    fn reap(&mut self, image: &Image) -> Option<(u8, u32)> {
        if image.u16(DEVICE + 2) == self.used {
            return None;
        }
        let at = DEVICE + 4 + 8 * usize::from(self.used % SIZE);
        self.used = self.used.wrapping_add(1);
        let owner = self.owners[image.u32(at) as usize].take();
        let (request, descriptors) = owner.expect("a used entry for a head that is not in flight");
        self.free.extend(descriptors.iter().rev());
        Some((request, image.u32(at + 4)))
    }

    fn device(stage: &Stage) -> Result<SplitRing, RingError> {
        SplitRing::new(stage.setup())
    }

    fn state(ring: &SplitRing) -> impl Hash {
        ring.state()
    }
}

#[derive(Clone, Hash)]
pub struct PackedDriver {
    available: (u16, bool),
    used: (u16, bool),
    room: u16,
    free: Vec<u16>,
    /// By id: the request and how many descriptors it has.
    owners: [Option<(u8, u16)>; SIZE as usize],
}

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

fn advance((index, wrap): (u16, bool), by: u16) -> (u16, bool) {
    match index + by {
        index if index >= SIZE => (index - SIZE, !wrap),
        index => (index, wrap),
    }
}

impl Driver for PackedDriver {
    type Ring = PackedRing;
    const PACKED: bool = true;

    fn new(image: &mut Image, begin: u16) -> (Self, u32) {
        // What lies before was used in this lap.
        for index in 0..usize::from(begin) {
            image.put(DESCRIPTORS + 16 * index + 14, &(AVAIL | USED).to_le_bytes());
        }
        let position = (begin, true);
        let free = (0..SIZE).rev().collect();
        let driver =
            Self { available: position, used: position, room: SIZE, free, owners: Default::default() };
        (driver, 0x8000_8000 | u32::from(begin) << 16 | u32::from(begin))
    }

    fn offer(&mut self, image: &mut Image, request: u8, len: u16) -> bool {
        if len > self.room {
            return false;
        }
        let id = self.free.pop().unwrap();
        for slot in 0..len {
            let (index, wrap) = self.available;
            let (address, bytes) = buffer(request, slot);
            let flags = u16::from(slot + 1 < len) | if wrap { AVAIL } else { USED };
            let at = DESCRIPTORS + 16 * usize::from(index);
            image.put(at, &address.to_le_bytes());
            image.put(at + 8, &bytes.to_le_bytes());
            image.put(at + 12, &id.to_le_bytes());
            image.put(at + 14, &flags.to_le_bytes());
            self.available = advance(self.available, 1);
        }
        self.room -= len;
        self.owners[usize::from(id)] = Some((request, len));
        true
    }

    fn reap(&mut self, image: &Image) -> Option<(u8, u32)> {
        let (index, wrap) = self.used;
        let at = DESCRIPTORS + 16 * usize::from(index);
        if image.u16(at + 14) & (AVAIL | USED) != if wrap { AVAIL | USED } else { 0 } {
            return None;
        }
        let id = image.u16(at + 12);
        let owner = self.owners[usize::from(id)].take();
        let (request, len) = owner.expect("a used descriptor for an id that is not in flight");
        self.free.push(id);
        self.room += len;
        self.used = advance(self.used, len);
        Some((request, image.u32(at + 8)))
    }

    fn device(stage: &Stage) -> Result<PackedRing, RingError> {
        PackedRing::new(stage.setup())
    }

    fn state(ring: &PackedRing) -> impl Hash {
        ring.state()
    }
}

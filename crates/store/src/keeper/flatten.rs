//! Copying what a clone reads from others, while it is in use.

use super::flushing::Waiter;
use super::operations::{Merge, Operation, Stage};
use super::requests::Piece;
use super::sealing::Sealing;
use super::{Answer, Commit, Keeper, Then};
use crate::catalog::{Change, Layer, Volume};
use crate::error::StoreError;
use crate::format::zeroed;
use crate::geometry::BLOCK;
use crate::io::{Action, Data, Io, Purpose};
use crate::map::Sought;

pub(super) struct Flatten {
    number: u64,
    volume: u32,
    /// The next extent to look at.
    at: u32,
    copying: bool,
    /// Everything is copied; the journal is to say so.
    ending: bool,
}

impl Keeper {
    /// Begin to flatten `volume`. Command `number` is answered when that has ended.
    pub(super) fn flatten(&mut self, number: u64, name: &str) -> Result<Option<Answer>, StoreError> {
        let volume = self.catalog.volume(name).cloned().ok_or_else(|| StoreError::NoVolume(name.into()))?;
        if self.flatten.is_some() {
            return Err(StoreError::Busy {
                volume: name.into(),
                what: "kept waiting, as another is being flattened",
            });
        }
        if volume.origin == 0 {
            return Err(StoreError::NoParent(name.into()));
        }
        Ok(self.open_volume(number, volume.id, super::opening::Purpose::Flatten))
    }

    /// Volume `volume` is open.
    pub(super) fn begin_flatten(&mut self, number: u64, volume: u32) {
        self.flatten = Some(Flatten { number, volume, at: 0, copying: false, ending: false });
    }

    pub(super) fn refuse_flattening(&self, volume: &Volume) -> Result<(), StoreError> {
        match &self.flatten {
            Some(flatten) if flatten.volume == volume.id => {
                Err(StoreError::Busy { volume: volume.name.clone(), what: "flattened" })
            }
            _ => Ok(()),
        }
    }

    /// The journal is about to say that it is flat: layers must not change otherwise.
    pub(super) fn is_ending_flatten(&self) -> bool {
        self.flatten.as_ref().is_some_and(|flatten| flatten.ending)
    }

    /// True if it has to look further in the next turn.
    pub(super) fn run_flatten(&mut self) -> bool {
        let Some(flatten) = self.flatten.as_ref().filter(|flatten| !flatten.copying && !flatten.ending)
        else {
            return false;
        };
        let volume = flatten.volume;
        if let Some(errno) = self.failed {
            self.flatten_failed(errno);
            return false;
        }
        if !self.may_work() || !self.journal.has_room() || self.journal.pending() > 0 {
            return false;
        }
        match self.next_to_copy() {
            Sought::At(vextent) if self.locks.contains_key(&(volume, vextent)) => {}
            Sought::At(vextent) => self.copy_part(volume, vextent),
            Sought::NotYet(_) => return true,
            Sought::Nothing => self.record_flat(volume),
        }
        false
    }

    /// The next extent of which another layer has something.
    fn next_to_copy(&mut self) -> Sought {
        let Some(flatten) = &mut self.flatten else { return Sought::Nothing };
        let Some(open) = self.open.get(&flatten.volume) else { return Sought::Nothing };
        let size = self.catalog.volumes.get(&flatten.volume).map_or(0, |volume| volume.size);
        let end = size.div_ceil(self.superblock.layout.extents.bytes()) as u32;
        loop {
            let sought = open.map.seek_mapped(flatten.at, end, &mut self.looks);
            match sought {
                Sought::At(vextent) if open.map.parts(vextent).iter().all(|part| part.tag() == open.tag) => {
                    flatten.at = vextent + 1;
                }
                Sought::At(at) | Sought::NotYet(at) => {
                    flatten.at = at;
                    return sought;
                }
                Sought::Nothing => return sought,
            }
        }
    }

    /// Everything is the live layer's: have the journal say so.
    fn record_flat(&mut self, volume: u32) {
        // What is under way may be about to change the same volume's description, or its layers.
        if self.reap.is_some() || self.running.is_some() {
            return;
        }
        let Some(volume) = self.catalog.volumes.get(&volume).cloned() else { return };
        if let Some(flatten) = &mut self.flatten {
            flatten.ending = true;
        }
        let catalog = vec![
            Change::Layer(Layer { id: volume.live, parent: 0 }),
            Change::Volume(Volume { origin: 0, ..volume }),
        ];
        self.record(Commit { catalog, then: Then::Flatten, ..Commit::default() });
    }

    /// Copy granules that another layer has of an extent, as far as they lie together.
    fn copy_part(&mut self, volume: u32, vextent: u32) {
        let extents = self.extents();
        let Some(open) = self.open.get(&volume) else { return };
        let parts = open.map.parts(vextent);
        let Some(part) = parts.iter().find(|part| part.tag() != open.tag) else { return };
        let (from, mask) = (part.slot(), part.mask());
        let first = mask.trailing_zeros();
        let count = (mask >> first).trailing_ones();
        let Some((slot, taken)) = self.slot_for(volume, vextent) else {
            let free = self.allocator.free() * extents.bytes();
            return self.end_flatten(Err(StoreError::Full { free }));
        };
        let within = u64::from(first) << extents.granule_shift;
        let len = u64::from(count) << extents.granule_shift;
        let piece = Piece { vextent, mask: extents.mask(within, len) };
        let operation = Operation {
            request: None,
            volume,
            bytes: len,
            locked: vec![vextent],
            taken,
            commit: self.put(volume, &[piece], slot),
            stage: Stage::Merge {
                merge: Merge::Copy,
                from: self.place(from) + within,
                to: self.place(slot) + within,
            },
            held: 0,
            // Encrypted blocks stay as they are: the clone has its parent's key.
            sealing: self
                .sealing(volume, (u64::from(vextent) << extents.shift) + within)
                .map(|sealing| Sealing { cipher: None, ..sealing }),
            overwrite: None,
        };
        if let Some(flatten) = &mut self.flatten {
            flatten.copying = true;
        }
        let offset = self.place(from) + within;
        self.begin(operation, |id| Io {
            action: Action::Read,
            offset,
            len,
            data: Data::Own(zeroed((len / BLOCK) as usize)),
            purpose: Purpose::Operation(id),
        });
    }

    /// A copy has ended.
    pub(super) fn copied(&mut self, result: Result<(), i32>) {
        if let Some(flatten) = &mut self.flatten {
            flatten.copying = false;
        }
        match result {
            Ok(()) if self.closing => self.end_flatten(Err(StoreError::Closed)),
            Ok(()) => {}
            Err(errno) => self.flatten_failed(errno),
        }
    }

    /// The store is being closed.
    pub(super) fn stop_flattening(&mut self) {
        if self.flatten.as_ref().is_some_and(|flatten| !flatten.copying) {
            self.end_flatten(Err(StoreError::Closed));
        }
    }

    pub(super) fn flatten_committed(&mut self) {
        self.flushing.wait(Waiter::Flatten);
    }

    pub(super) fn flatten_flushed(&mut self, result: Result<(), i32>) {
        match result {
            Ok(()) => self.end_flatten(Ok(Answer::Done)),
            Err(errno) => self.flatten_failed(errno),
        }
    }

    pub(super) fn flatten_failed(&mut self, errno: i32) {
        let source = std::io::Error::from_raw_os_error(errno);
        self.end_flatten(Err(StoreError::Drive { what: "read or written", offset: 0, source }));
    }

    fn end_flatten(&mut self, result: Result<Answer, StoreError>) {
        let Some(flatten) = self.flatten.take() else { return };
        self.close_volume(flatten.volume);
        self.answers.push_back((flatten.number, result));
    }
}

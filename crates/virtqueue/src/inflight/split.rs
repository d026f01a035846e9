//! The in-flight region of a split ring: `QueueRegionSplit` in the vhost-user specification.

use super::{InflightRegion, DESC_NUM, FEATURES, REGION_VERSION, VERSION};
use crate::error::RingError;
use crate::shared::{get_u16, get_u64, get_u8, put_u16, put_u64, put_u8};

const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
pub(super) const HEADER: usize = 16;

// `DescStateSplit`.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
pub(super) const ENTRY: usize = 16;

/// The region as the ring that uses it sees it.
#[cfg_attr(test, derive(Clone))]
pub(crate) struct SplitInflight {
    at: *mut u8,
    /// Keeps the mapping alive.
    _region: InflightRegion,
    mask: u16,
    /// Value for the request taken next.
    counter: u64,
    last_batch_head: u16,
    /// What the `next` fields of the last batch say.
    next: Box<[u16]>,
    /// Heads to be done again; the one taken first is the last.
    resubmit: Vec<u16>,
}

impl SplitInflight {
    /// Make the region ready for a ring of `size` whose used index the driver sees as `used_idx`. Also answers, of a region
    /// that was in use, the next available index.
    pub(crate) fn open(
        region: InflightRegion,
        size: u16,
        used_idx: u16,
    ) -> Result<(Self, Option<u16>), RingError> {
        region.check(size, false)?;
        let mut inflight = Self {
            at: region.ptr(),
            _region: region,
            mask: size - 1,
            counter: 0,
            last_batch_head: 0,
            next: vec![0; usize::from(size)].into(),
            resubmit: Vec::new(),
        };
        // SAFETY: the header lies inside the region, which is aligned to 8.
        match unsafe { get_u16(inflight.at.add(REGION_VERSION)) } {
            0 => {
                inflight.initialise(used_idx);
                Ok((inflight, None))
            }
            VERSION => {
                let next_available = inflight.recover(size, used_idx)?;
                Ok((inflight, Some(next_available)))
            }
            version => Err(RingError::InflightVersion { version }),
        }
    }

    /// Address of a field of entry `head`; the mask keeps any number inside.
    #[inline(always)]
    fn entry(&self, head: u16, field: usize) -> *mut u8 {
        // SAFETY: the region has at least as many entries as the ring.
        unsafe { self.at.add(HEADER + ENTRY * usize::from(head & self.mask) + field) }
    }

    fn initialise(&mut self, used_idx: u16) {
        for head in 0..=self.mask {
            // SAFETY: a field of an entry; see `entry`.
            unsafe { put_u8(self.entry(head, INFLIGHT), 0) };
        }
        // SAFETY: fields of the header, which is aligned to 8. The version comes last: a region without it is begun anew.
        unsafe {
            put_u64(self.at.add(FEATURES), 0);
            put_u16(self.at.add(DESC_NUM), self._region.entries);
            put_u16(self.at.add(LAST_BATCH_HEAD), 0);
            put_u16(self.at.add(USED_IDX), used_idx);
            put_u16(self.at.add(REGION_VERSION), VERSION);
        }
    }

    /// Finish the batch that was being published and collect what is in flight. Answers the next available index.
    fn recover(&mut self, size: u16, used_idx: u16) -> Result<u16, RingError> {
        let fail = |why| Err(RingError::InflightContent { why });
        // SAFETY: fields of entries; see `entry`.
        let is_inflight = |head| unsafe { get_u8(self.entry(head, INFLIGHT)) } == 1;
        // SAFETY: fields of the header, which is aligned to 8.
        let (recorded, mut head) =
            unsafe { (get_u16(self.at.add(USED_IDX)), get_u16(self.at.add(LAST_BATCH_HEAD))) };
        if recorded != used_idx {
            // The driver was shown these; the process was killed before it could say so here.
            let batch = used_idx.wrapping_sub(recorded);
            if batch <= size {
                for _ in 0..batch {
                    if head >= size {
                        return fail("its list of used descriptors leads outside the ring");
                    }
                    // SAFETY: fields of an entry; see `entry`.
                    unsafe {
                        put_u8(self.entry(head, INFLIGHT), 0);
                        head = get_u16(self.entry(head, NEXT));
                    }
                }
            } else if (0..size).any(is_inflight) {
                return fail("its used index and the ring's are further apart than the ring is long");
            }
            // SAFETY: a field of the header.
            unsafe { put_u16(self.at.add(USED_IDX), used_idx) };
        }
        // SAFETY: fields of entries; see `entry`.
        let mut found: Vec<(u64, u16)> = (0..size)
            .filter(|head| is_inflight(*head))
            .map(|head| (unsafe { get_u64(self.entry(head, COUNTER)) }, head))
            .collect();
        found.sort_unstable();
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        self.resubmit = found.into_iter().rev().map(|(_, head)| head).collect();
        Ok(used_idx.wrapping_add(self.resubmit.len() as u16))
    }

    #[inline(always)]
    pub(crate) fn resubmitting(&self) -> u16 {
        self.resubmit.len() as u16
    }

    /// The head to be done again next.
    #[inline(always)]
    pub(crate) fn resubmission(&self) -> Option<u16> {
        self.resubmit.last().copied()
    }

    /// The request that `resubmission` named was taken again. True if there was one.
    #[inline(always)]
    pub(crate) fn resubmitted(&mut self) -> bool {
        self.resubmit.pop().is_some()
    }

    /// A request was taken off the available ring.
    #[inline(always)]
    pub(crate) fn taken(&mut self, head: u16) {
        // SAFETY: fields of an entry; see `entry`. The flag comes last: it makes the counter count.
        unsafe {
            put_u64(self.entry(head, COUNTER), self.counter);
            put_u8(self.entry(head, INFLIGHT), 1);
        }
        self.counter = self.counter.wrapping_add(1);
    }

    /// A used entry was written that the driver does not see yet.
    #[inline(always)]
    pub(crate) fn used(&mut self, head: u16) {
        let head = head & self.mask;
        self.next[usize::from(head)] = self.last_batch_head;
        // SAFETY: fields of an entry and of the header.
        unsafe {
            put_u16(self.entry(head, NEXT), self.last_batch_head);
            put_u16(self.at.add(LAST_BATCH_HEAD), head);
        }
        self.last_batch_head = head;
    }

    /// The driver was shown the last `batch` used entries, up to `used_idx`.
    #[inline(always)]
    pub(crate) fn published(&mut self, batch: u16, used_idx: u16) {
        let mut head = self.last_batch_head;
        for _ in 0..batch {
            // SAFETY: a field of an entry; see `entry`.
            unsafe { put_u8(self.entry(head, INFLIGHT), 0) };
            head = self.next[usize::from(head & self.mask)];
        }
        // SAFETY: a field of the header.
        unsafe { put_u16(self.at.add(USED_IDX), used_idx) };
    }

    /// What of the process's own state decides what it does next.
    #[cfg(test)]
    pub(crate) fn state(&self) -> impl std::hash::Hash {
        (self.counter, self.last_batch_head, self.next.clone(), self.resubmit.clone())
    }
}

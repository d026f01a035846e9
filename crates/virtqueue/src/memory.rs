use std::sync::Arc;

use ringstone_mapping::Mapping;

/// One region of guest memory as the frontend described it (vhost-user, "Memory region description").
#[derive(Clone)]
pub struct MemoryRegion {
    /// Guest physical address of the first byte.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// The frontend's virtual address of the first byte; ring addresses come in this address space.
    pub user: u64,
    /// Where it is mapped here.
    pub mapping: Arc<Mapping>,
}

/// Guest memory: an immutable set of regions, replaced whole when the frontend changes it.
///
/// Regions are sorted by guest address and do not overlap.
#[derive(Clone, Default)]
pub struct MemoryTable {
    regions: Vec<MemoryRegion>,
}

impl MemoryTable {
    /// A table of `regions`; `None` if two overlap in guest addresses, or one wraps around or is shorter than its mapping.
    pub fn new(mut regions: Vec<MemoryRegion>) -> Option<Self> {
        regions.sort_by_key(|r| r.guest);
        for region in &regions {
            region.guest.checked_add(region.len)?;
            region.user.checked_add(region.len)?;
            if region.len == 0 || region.len > region.mapping.len() as u64 {
                return None;
            }
        }
        if regions.windows(2).any(|pair| pair[0].guest + pair[0].len > pair[1].guest) {
            return None;
        }
        Some(Self { regions })
    }

    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// The region that holds guest address `address`, tried at `hint` first.
    #[inline(always)]
    pub(crate) fn find(&self, address: u64, hint: usize) -> Option<(usize, &MemoryRegion)> {
        if let Some(region) = self.regions.get(hint) {
            if address.wrapping_sub(region.guest) < region.len {
                return Some((hint, region));
            }
        }
        let index = self.regions.partition_point(|r| r.guest <= address).checked_sub(1)?;
        let region = &self.regions[index];
        (address - region.guest < region.len).then_some((index, region))
    }

    /// Host address of `len` bytes at guest address `address`, all inside one region; else `None`.
    #[inline]
    pub fn translate(&self, address: u64, len: u64) -> Option<*mut u8> {
        let (_, region) = self.find(address, 0)?;
        let at = address - region.guest;
        // SAFETY: `at` is inside the region, which is no longer than its mapping.
        (region.len - at >= len).then(|| unsafe { region.mapping.as_ptr().add(at as usize) })
    }

    /// Host address of `len` bytes at the frontend's virtual address `address`, all inside one region; else `None`.
    pub fn translate_user(&self, address: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|region| {
            let at = address.checked_sub(region.user)?;
            // SAFETY: `at` is inside the region, which is no longer than its mapping.
            (at < region.len && region.len - at >= len)
                .then(|| unsafe { region.mapping.as_ptr().add(at as usize) })
        })
    }

    /// Guest address of the byte at host address `ptr`.
    pub(crate) fn guest_address(&self, ptr: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let at = (ptr as u64).wrapping_sub(region.mapping.as_ptr() as u64);
            (at < region.len).then(|| region.guest + at)
        })
    }

    /// True if the frontend cut a memory file behind our mapping.
    pub fn poisoned(&self) -> bool {
        self.regions.iter().any(|r| r.mapping.poisoned())
    }
}

//! Guest memory as the frontend gives it: regions with their files.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ringstone_mapping::Mapping;
use ringstone_virtqueue::{MemoryRegion, MemoryTable};

use crate::descriptor::memory;
use crate::error::SessionError;
use crate::message::{WireRegion, MAX_MEMORY_SLOTS};
use crate::reaper::{Reaped, Reaper};

/// A mapped region. Its file stays open, so that a process that takes the connection over can map it too.
#[derive(Clone)]
pub(crate) struct Region {
    pub wire: WireRegion,
    pub file: Arc<Reaped<OwnedFd>>,
    mapping: Arc<Mapping>,
}

impl Region {
    pub fn map(wire: WireRegion, file: Reaped<OwnedFd>, reaper: &Reaper) -> Result<Self, SessionError> {
        let file = memory(file, "guest memory", reaper)?;
        let mapping = Mapping::new(file.as_fd(), wire.offset, wire.len)
            .map_err(|source| SessionError::Mapping { guest: wire.guest, source })?;
        Ok(Self { wire, file: Arc::new(file), mapping: Arc::new(mapping) })
    }

    /// Whether REM_MEM_REG with `wire` means this one.
    pub fn is(&self, wire: &WireRegion) -> bool {
        (self.wire.guest, self.wire.len, self.wire.user) == (wire.guest, wire.len, wire.user)
    }
}

/// The memory table of `regions`.
pub(crate) fn table(regions: &[Region]) -> Result<MemoryTable, SessionError> {
    let layout = SessionError::MemoryLayout { limit: MAX_MEMORY_SLOTS };
    if regions.len() > MAX_MEMORY_SLOTS {
        return Err(layout);
    }
    let of = |region: &Region| MemoryRegion {
        guest: region.wire.guest,
        len: region.wire.len,
        user: region.wire.user,
        mapping: region.mapping.clone(),
    };
    MemoryTable::new(regions.iter().map(of).collect()).ok_or(layout)
}

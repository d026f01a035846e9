//! The dirty log of a live migration: a bitmap in the frontend's memory.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ringstone_mapping::Mapping;
use ringstone_virtqueue::DirtyLog;

use crate::descriptor::memory;
use crate::error::SessionError;
use crate::reaper::{Reaped, Reaper};

/// The bitmap that SET_LOG_BASE hands over. Rings write to it while F_LOG_ALL is among the features. What VHOST_VRING_F_LOG
/// adds, the used ring, is logged along with it: frontends set both together, and a page too many does no harm.
pub(crate) struct Log {
    pub len: u64,
    pub offset: u64,
    pub file: Reaped<OwnedFd>,
    pub dirty: Arc<DirtyLog>,
    mapping: Arc<Mapping>,
}

impl Log {
    pub fn open(
        len: u64,
        offset: u64,
        file: Reaped<OwnedFd>,
        reaper: &Reaper,
    ) -> Result<Reaped<Self>, SessionError> {
        let file = memory(file, "dirty log", reaper)?;
        let mapping = Mapping::new(file.as_fd(), offset, len)
            .map_err(|error| SessionError::Log { len, why: error.to_string() })?;
        let mapping = Arc::new(mapping);
        Ok(reaper.hold(Self { len, offset, file, dirty: Arc::new(DirtyLog::new(mapping.clone())), mapping }))
    }

    pub fn poisoned(&self) -> bool {
        self.mapping.poisoned()
    }
}

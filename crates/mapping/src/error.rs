use std::io;

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The range asked for is empty or wraps around.
    #[error("cannot map {len} bytes at file offset {offset:#x}: the range is empty or too large")]
    BadRange { offset: u64, len: u64 },
    /// The file ends before the range does.
    #[error("cannot map {len} bytes at file offset {offset:#x}: the file holds only {file_len} bytes; make it longer first")]
    FileTooShort { offset: u64, len: u64, file_len: u64 },
    /// The process-wide table of guarded mappings has no free slot.
    #[error("more than {limit} guarded mappings; detach volumes or give guests fewer memory regions")]
    TooMany { limit: usize },
    /// A system call failed.
    #[error("{what} failed: {source}")]
    System { what: &'static str, source: io::Error },
}

impl MappingError {
    pub(crate) fn last(what: &'static str) -> Self {
        Self::System { what, source: io::Error::last_os_error() }
    }
}

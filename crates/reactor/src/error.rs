use std::io;

/// Why a reactor could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ReactorError {
    #[error("cannot make an io_uring: {0}; Linux 6.1 or newer is needed, with io_uring enabled (kernel.io_uring_disabled=0)")]
    Uring(io::Error),
    #[error("cannot bind a reactor to core {core}: {source}; choose cores that this process may use")]
    Bind { core: usize, source: io::Error },
    #[error("cannot start a reactor thread: {0}")]
    Spawn(io::Error),
}

use std::io;
use std::path::PathBuf;

/// Why the stats page could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error(
        "cannot make the stats page at {path}: {source}; check that the run directory exists and is writable"
    )]
    Create { path: PathBuf, source: io::Error },
    #[error("all {limit} queue slots of the stats page are taken; detach volumes or use fewer queues")]
    Full { limit: usize },
    #[error("there are no more than {limit} reactors on a stats page; remove one first")]
    Reactors { limit: usize },
}

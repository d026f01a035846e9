//! What can go wrong with a job, in sentences that say what to do next.

use std::io;

/// Why a job could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The JSON does not describe a job.
    #[error("the job's JSON is not understood ({0}); compare it with the fields in docs/benchmarks.md")]
    Json(#[from] serde_json::Error),
    /// A field has a value that cannot work.
    #[error("{field} {problem}")]
    Config { field: &'static str, problem: String },
    /// The backend's socket refused the connection or the vhost-user negotiation.
    #[error("cannot connect to {socket} ({source}); check that the backend listens there and has no other frontend")]
    Connect { socket: String, source: io::Error },
    /// The backend refused a vhost-user message after the connection was made.
    #[error("the backend at {socket} refused {what} ({source}); its log tells why")]
    Setup { socket: String, what: &'static str, source: io::Error },
    /// The backend refused a vhost-user message, or the socket broke over it.
    #[error("the backend at {socket} did not do {what} ({source}); its log tells why")]
    Control { socket: String, what: &'static str, source: vhost::Error },
    /// A feature the job needs, or had before the backend was started anew, is not there.
    #[error("the backend at {socket} does not offer {feature}; {fix}")]
    Feature { socket: String, feature: String, fix: &'static str },
    /// The backend went away and did not come back.
    #[error(
        "the backend at {socket} was gone for {seconds} s, and {attempts} attempts to connect again failed (the last one: {last}); see whether it still runs"
    )]
    Gone { socket: String, seconds: f64, attempts: u64, last: String },
    /// The backend offers fewer queues than the job uses.
    #[error(
        "the backend at {socket} offers {offered} queue(s) but the job asks for {asked}; lower `queues`"
    )]
    Queues { socket: String, offered: usize, asked: usize },
    /// A request could not be put on the ring.
    #[error("queue {queue} took no request ({source}); raise `queue_size`")]
    Submit { queue: usize, source: io::Error },
    /// The backend completed a request that was never made.
    #[error(
        "queue {queue} returned descriptor {id}, which is not in flight: the backend's used ring is wrong"
    )]
    Protocol { queue: usize, id: u16 },
    /// No completion came for too long.
    #[error("queue {queue} completed nothing for {seconds} s with {in_flight} request(s) in flight; see whether the backend still runs")]
    Stalled { queue: usize, seconds: f64, in_flight: usize },
    /// Memory to share with the backend could not be had.
    #[error("cannot get {bytes} bytes of shared memory ({source}); free memory or reserve hugepages")]
    Memory { bytes: usize, source: io::Error },
    /// A thread could not be bound to its core.
    #[error("cannot bind a thread to core {core} ({source}); choose a core this machine has")]
    Affinity { core: usize, source: io::Error },
    /// A system call of the client itself failed.
    #[error("{what} failed ({source})")]
    System { what: &'static str, source: io::Error },
}

impl LoadError {
    pub(crate) fn config(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Config { field, problem: problem.into() }
    }
}

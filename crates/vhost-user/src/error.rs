use std::io;

use ringstone_mapping::MappingError;

/// What is wrong with a frontend's message or connection.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the header has version {version}, not 1")]
    Version { version: u32 },
    #[error("message {request} has {len} bytes, more than any message we know")]
    TooLong { request: u32, len: u32 },
    #[error("message {request} has {len} bytes, which does not fit its kind")]
    WrongLength { request: u32, len: usize },
    #[error("message {request} is a reply, which a frontend never sends")]
    NotARequest { request: u32 },
    #[error("message {request} is not known or was not negotiated")]
    Unknown { request: u32 },
    #[error("message {request} came with {got} file descriptors instead of {want}")]
    Descriptors { request: u32, got: usize, want: usize },
    #[error("more file descriptors in one message than {limit}")]
    TooManyDescriptors { limit: usize },
    #[error("vring {index} does not exist, the device has {queues}")]
    NoVring { index: u32, queues: u16 },
    #[error("vring {index}: {value} is no valid {what}")]
    BadVringValue { index: u32, what: &'static str, value: u64 },
    #[error("features {asked:#x} were acknowledged but only {offered:#x} are offered")]
    Features { asked: u64, offered: u64 },
    #[error("memory regions overlap, wrap around or are more than {limit}")]
    MemoryLayout { limit: usize },
    #[error("memory region at guest address {guest:#x} is not known")]
    NoRegion { guest: u64 },
    #[error("memory region at guest address {guest:#x}: {source}")]
    Mapping { guest: u64, source: MappingError },
    #[error("configuration bytes {offset}+{len} cannot be written")]
    Config { offset: u32, len: usize },
    #[error("what is in the write cache cannot be made durable, so it stays on: {source}")]
    Cache { source: io::Error },
    #[error("the in-flight region does not fit: {why}")]
    Inflight { why: &'static str },
    #[error("the dirty log of {len} bytes cannot be used: {why}")]
    Log { len: u64, why: String },
    #[error("what another process handed over of this connection is incomplete: {what}")]
    Handover { what: &'static str },
    #[error("the file descriptor given as {what} is no eventfd")]
    NotAnEventFd { what: &'static str },
    #[error("the file descriptor given as {what} is neither a memfd nor a file on tmpfs or hugetlbfs; give the guest such memory")]
    NotMemory { what: &'static str },
    #[error("the file descriptor given as the back-end channel is no Unix stream socket")]
    NotAChannel,
    #[error("the frontend gave more than {limit} things that are not let go of yet")]
    Backlog { limit: usize },
    #[error("the frontend closed the connection in the middle of a message")]
    Truncated,
    #[error("the frontend does not read its replies")]
    Stuck,
    #[error("the connection failed: {0}")]
    Socket(#[from] io::Error),
}

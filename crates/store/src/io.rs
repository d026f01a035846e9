//! What the keeper wants of the drive, and what it is asked. Nothing here does anything: see the crate's documentation for who
//! carries it out.

use crate::format::Block;

/// Something to be done on the drive. Whoever does it gives it back with [`Keeper::completed`](crate::Keeper::completed).
#[derive(Debug)]
pub struct Io {
    pub action: Action,
    /// Byte on the drive, a multiple of 512.
    pub offset: u64,
    pub len: u64,
    pub data: Data,
    pub(crate) purpose: Purpose,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Read,
    /// `durable`: it is to be on stable media when it is done.
    Write {
        durable: bool,
    },
    /// Make durable all that was completed before.
    Flush,
    /// Copy `len` bytes of the request's data from byte `skip` on into the buffer, from its byte `at` on. No I/O.
    Fill {
        token: u64,
        skip: u64,
        at: usize,
    },
    /// Copy `len` bytes of the buffer, from its byte `at` on, to the begin of the request's memory. No I/O.
    Give {
        token: u64,
        at: usize,
    },
}

/// Where the bytes are.
#[derive(Debug)]
pub enum Data {
    None,
    /// The keeper's own memory.
    Own(Box<[Block]>),
    /// The memory of the request with this token, from byte `skip` of it on.
    Guest {
        token: u64,
        skip: u64,
    },
    /// Zeroes; no more than [`ZEROES`] of them.
    Zeroes,
}

/// Bytes that a write of zeroes has at most.
pub const ZEROES: u64 = 256 << 10;

/// Whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Operation(u32),
    Journal(u64),
    Flush,
    Page {
        page: u32,
        copy: u8,
    },
    /// Of checksums.
    SumsPage,
    Catalog,
    CheckpointFlush,
    Superblock,
    PossessionFlush,
    Possession,
    Scrub,
}

/// What a guest asks of the keeper: all that cannot be done in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The carrier's name for it.
    pub token: u64,
    /// As [`Answer::Opened`](crate::Answer::Opened) named it.
    pub volume: u32,
    pub kind: RequestKind,
    pub offset: u64,
    pub len: u64,
    /// The answer means that it is on stable media.
    pub durable: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Of a volume whose blocks are sealed: parts of blocks, or blocks that are not what their checksums say.
    Read,
    Write,
    /// Zeroes; `unmap`: the place may be given up.
    Zero {
        unmap: bool,
    },
    Flush,
}

/// The answer to a [`Request`]: the bytes that were done, from its begin, or an errno. Whoever asked goes on with the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub token: u64,
    pub result: Result<u64, i32>,
}

/// Errno values of answers, as Linux numbers them.
pub mod errno {
    pub const EIO: i32 = 5;
    pub const ENOSPC: i32 = 28;
    pub const ENODEV: i32 = 19;
}

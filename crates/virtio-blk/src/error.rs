/// Why a request is not carried out. The first group is answered with a status byte, the last stops the device, as there is
/// no place to put an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("request type {0} is not known here")]
    UnknownType(u32),
    #[error("sectors {sector}+{len} bytes end behind the disk of {size} bytes")]
    OutOfRange { sector: u64, len: u64, size: u64 },
    #[error("a length of {len} bytes at sector {sector} is no multiple of the block size {block_size}")]
    Unaligned { sector: u64, len: u64, block_size: u32 },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("a buffer lies outside guest memory")]
    OutsideMemory,
    #[error("the buffers do not fit the request type")]
    WrongBuffers,
    #[error("the request has more segments than are served")]
    TooManySegments,
    #[error("flags {0:#x} are reserved")]
    ReservedFlags(u32),
    #[error("the request has no whole header, or no status byte inside guest memory")]
    NoStatus,
}

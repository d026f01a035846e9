use ringstone_blockdev::DriveError;

/// Why a volume could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("volume name {name:?} is not 1 to 63 bytes long; choose another")]
    Name { name: String },
    #[error("serial {serial:?} is longer than 20 bytes; shorten it")]
    Serial { serial: String },
    #[error("block size {block_size} is not possible; use 512 or 4096")]
    BlockSize { block_size: u32 },
    #[error("a size of {size} bytes is no multiple of the block size {block_size}; round it up")]
    Size { size: u64, block_size: u32 },
    #[error("a volume of {now} bytes cannot shrink to {size}; give a larger size")]
    Shrink { now: u64, size: u64 },
    #[error(transparent)]
    Drive(#[from] DriveError),
}

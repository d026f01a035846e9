//! A volume: what a guest sees as one disk. Its blocks lie on one drive; queues of one volume may run on many reactors, so
//! all that changes while they run is atomic here.

mod error;

pub use error::VolumeError;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ringstone_blockdev::{Drive, Faults, Outgrown};

/// Bytes of a serial (virtio-blk GET_ID).
pub const SERIAL_LEN: usize = 20;

/// An open volume, shared by its queues.
pub struct Volume {
    name: String,
    serial: [u8; SERIAL_LEN],
    /// Bytes; only grows.
    size: AtomicU64,
    block_size: u32,
    read_only: bool,
    drive: Drive,
    faults: Option<Faults>,
    /// Another host owns it now.
    fenced: AtomicBool,
    /// Another host owns it still.
    incoming: AtomicBool,
}

impl Volume {
    /// Put a volume of `size` bytes over `drive`.
    ///
    /// # Errors
    /// A block size other than 512 or 4096, a size that is no multiple of it or none at all, a serial or name too long.
    pub fn new(
        name: &str,
        serial: &str,
        size: u64,
        block_size: u32,
        read_only: bool,
        drive: Drive,
        faults: Option<Faults>,
    ) -> Result<Self, VolumeError> {
        if name.is_empty() || name.len() > 63 {
            return Err(VolumeError::Name { name: name.into() });
        }
        if !matches!(block_size, 512 | 4096) {
            return Err(VolumeError::BlockSize { block_size });
        }
        check_size(size, block_size)?;
        let serial = if serial.is_empty() { cut(name) } else { serial };
        if serial.len() > SERIAL_LEN {
            return Err(VolumeError::Serial { serial: serial.into() });
        }
        let mut bytes = [0u8; SERIAL_LEN];
        bytes[..serial.len()].copy_from_slice(serial.as_bytes());
        let size = AtomicU64::new(size);
        Ok(Self {
            name: name.into(),
            serial: bytes,
            size,
            block_size,
            read_only,
            drive,
            faults,
            fenced: AtomicBool::new(false),
            incoming: AtomicBool::new(false),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// NUL padded.
    pub fn serial(&self) -> &[u8; SERIAL_LEN] {
        &self.serial
    }

    /// Bytes, at this moment.
    #[inline(always)]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    pub fn read_only(&self) -> bool {
        self.read_only
    }

    #[inline(always)]
    pub fn drive(&self) -> &Drive {
        &self.drive
    }

    /// Faults to inject, for tests.
    pub fn faults(&self) -> Option<Faults> {
        self.faults
    }

    /// This host does not own the volume any more: from here on its queues take nothing, and answer nothing of what is on the
    /// way. There is no way back but to open it anew.
    pub fn fence(&self) {
        self.fenced.store(true, Ordering::Release);
    }

    #[inline(always)]
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Relaxed)
    }

    /// Say whether another host owns it still, and its guest is to move here: until that has ended no queue runs.
    pub fn set_incoming(&self, incoming: bool) {
        self.incoming.store(incoming, Ordering::Release);
    }

    pub fn is_incoming(&self) -> bool {
        self.incoming.load(Ordering::Acquire)
    }

    /// Grow to `size` bytes; queues see the new end with their next request. What comes back is to be kept until every reactor
    /// has begun another turn.
    ///
    /// # Errors
    /// Smaller than now, no multiple of the block size, or a drive that is too short.
    pub fn resize(&self, size: u64) -> Result<Option<Outgrown>, VolumeError> {
        check_size(size, self.block_size)?;
        let now = self.size();
        if size < now {
            return Err(VolumeError::Shrink { now, size });
        }
        let outgrown = self.drive.backing().resize(size)?;
        self.size.store(size, Ordering::Release);
        Ok(outgrown)
    }
}

/// The begin of `name`, at most a serial long.
fn cut(name: &str) -> &str {
    let end = (0..=SERIAL_LEN.min(name.len())).rev().find(|at| name.is_char_boundary(*at));
    &name[..end.unwrap_or(0)]
}

fn check_size(size: u64, block_size: u32) -> Result<(), VolumeError> {
    if size == 0 || !size.is_multiple_of(u64::from(block_size)) || size > i64::MAX as u64 {
        return Err(VolumeError::Size { size, block_size });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(size: u64, block_size: u32) -> Result<Volume, VolumeError> {
        Volume::new("a-volume-with-a-long-name", "", size, block_size, false, Drive::Null, None)
    }

    #[test]
    fn sizes_are_multiples_of_the_block_size_and_only_grow() {
        assert!(matches!(volume(4096 + 512, 4096), Err(VolumeError::Size { .. })));
        assert!(matches!(volume(0, 512), Err(VolumeError::Size { .. })));
        assert!(matches!(volume(4096, 1024), Err(VolumeError::BlockSize { .. })));
        let volume = volume(4096 + 512, 512).unwrap();
        assert!(matches!(volume.resize(4096), Err(VolumeError::Shrink { .. })));
        volume.resize(8192).unwrap();
        assert_eq!(volume.size(), 8192);
    }

    #[test]
    fn the_serial_defaults_to_the_begin_of_the_name() {
        assert_eq!(volume(4096, 512).unwrap().serial(), b"a-volume-with-a-long");
    }
}

//! The device configuration space: `struct virtio_blk_config`, virtio 1.2, section 5.2.4.

/// Bytes of the structure up to and with the write-zeroes fields.
pub const CONFIG_SIZE: usize = 60;

/// Offset of `writeback`, the one field a driver may write.
pub const WRITEBACK_OFFSET: usize = 32;

/// What the device announces beside its capacity.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of one segment at most; never 0, as some frontends divide by it.
    pub size_max: u32,
    /// Data segments of one request at most.
    pub seg_max: u32,
    /// Sectors of one discard at most.
    pub max_discard_sectors: u32,
    /// Sectors of one write-zeroes at most.
    pub max_write_zeroes_sectors: u32,
}

impl Limits {
    /// seg_max 126 leaves room for header and status in QEMU's usual ring of 128.
    pub const SEG_MAX: u32 = 126;
    pub const SIZE_MAX: u32 = 1 << 20;
}

/// The configuration space of one disk.
#[derive(Clone, Copy, Debug)]
pub struct ConfigSpace {
    /// Bytes.
    pub size: u64,
    pub block_size: u32,
    pub queues: u16,
    /// Volatile write cache on: a guest must flush. The driver may change it (CONFIG_WCE).
    pub writeback: bool,
    pub limits: Limits,
}

impl ConfigSpace {
    /// The bytes as the driver reads them.
    pub fn encode(&self) -> [u8; CONFIG_SIZE] {
        let mut bytes = [0u8; CONFIG_SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let physical_exp = 4096u32.max(self.block_size).trailing_zeros() - self.block_size.trailing_zeros();
        let blocks_of_4k = (4096 / self.block_size).max(1);
        put(0, &(self.size / 512).to_le_bytes());
        put(8, &self.limits.size_max.to_le_bytes());
        put(12, &self.limits.seg_max.to_le_bytes());
        // 16..20 geometry: not offered.
        put(20, &self.block_size.to_le_bytes());
        // topology: physical_block_exp, alignment_offset, min_io_size and opt_io_size in blocks.
        put(24, &[physical_exp as u8, 0]);
        put(26, &(blocks_of_4k as u16).to_le_bytes());
        put(28, &0u32.to_le_bytes());
        put(WRITEBACK_OFFSET, &[u8::from(self.writeback)]);
        put(34, &self.queues.to_le_bytes());
        put(36, &self.limits.max_discard_sectors.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &(4096u32 / 512).to_le_bytes());
        put(48, &self.limits.max_write_zeroes_sectors.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let config = ConfigSpace {
            size: 1 << 30,
            block_size: 512,
            queues: 4,
            writeback: true,
            limits: Limits {
                size_max: Limits::SIZE_MAX,
                seg_max: 126,
                max_discard_sectors: 8,
                max_write_zeroes_sectors: 16,
            },
        };
        let bytes = config.encode();
        assert_eq!(u64::from_le_bytes(bytes[0..8].try_into().unwrap()), 2_097_152);
        assert_eq!(bytes[24], 3, "a physical block is 4096 bytes");
        assert_eq!(bytes[WRITEBACK_OFFSET], 1);
        assert_eq!(u16::from_le_bytes([bytes[34], bytes[35]]), 4);
        assert_eq!(u32::from_le_bytes(bytes[48..52].try_into().unwrap()), 16);
        let four_k = ConfigSpace { block_size: 4096, ..config }.encode();
        assert_eq!((four_k[24], four_k[26]), (0, 1));
    }
}

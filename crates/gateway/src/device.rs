//! The virtio-blk device that a session shows.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use ringstone_blockdev::Drive;
use ringstone_vhost_user::DeviceModel;
use ringstone_virtio_blk::{
    device_features, feature, ConfigSpace, Geometry, Limits, FORMER_FEATURES, WRITEBACK_OFFSET,
};
use ringstone_volume::Volume;

/// Bytes of one discard or write-zeroes at most. The kernel does the work elsewhere; the limit keeps one request's share of
/// a drive's time bounded.
const MAX_RANGE: u64 = 1 << 30;

/// A volume as one frontend sees it.
pub struct BlockDevice {
    volume: Arc<Volume>,
    queues: u16,
    /// What the driver set in the configuration space.
    cache: bool,
    features: u64,
    /// What the queues go by.
    writeback: Arc<AtomicBool>,
}

impl BlockDevice {
    pub fn new(volume: Arc<Volume>, queues: u16) -> Self {
        Self { volume, queues, cache: true, features: 0, writeback: Arc::new(AtomicBool::new(true)) }
    }

    pub fn writeback(&self) -> Arc<AtomicBool> {
        self.writeback.clone()
    }

    /// The write cache as the driver set it: part of the device's state that the features do not tell.
    pub fn cache(&self) -> bool {
        self.cache
    }

    /// Go on with the cache of another process's device.
    pub fn set_cache(&mut self, on: bool) {
        self.cache = on;
        self.update_cache();
    }

    /// What requests are checked against.
    pub fn geometry(&self) -> Geometry {
        let ranges = !self.volume.read_only();
        Geometry {
            size: self.volume.size(),
            block_size: self.volume.block_size(),
            read_only: self.volume.read_only(),
            discard: ranges && self.volume.drive().backing().can_discard(),
            write_zeroes: ranges,
            max_discard: MAX_RANGE,
            max_write_zeroes: self.max_write_zeroes(),
        }
    }

    fn max_write_zeroes(&self) -> u64 {
        match self.volume.drive() {
            // Without help of the file system zeroes are written one buffer at a time.
            Drive::File(file) if !file.can_punch() && !file.can_zero_range() => 16 << 20,
            _ => MAX_RANGE,
        }
    }

    /// virtio 1.2, 5.2.6.2: without FLUSH the driver cannot flush, so nothing may linger in a cache.
    fn update_cache(&self) {
        let flush = self.features & (1 << feature::FLUSH) != 0;
        self.writeback.store(self.cache && flush, Ordering::Relaxed);
    }
}

impl DeviceModel for BlockDevice {
    fn features(&self) -> u64 {
        let geometry = self.geometry();
        device_features(geometry.read_only, geometry.discard, geometry.write_zeroes)
    }

    fn max_queues(&self) -> u16 {
        self.queues
    }

    fn config(&self) -> Vec<u8> {
        let geometry = self.geometry();
        let space = ConfigSpace {
            size: geometry.size,
            block_size: geometry.block_size,
            queues: self.queues,
            writeback: self.cache,
            limits: Limits {
                size_max: Limits::SIZE_MAX,
                seg_max: Limits::SEG_MAX,
                max_discard_sectors: (geometry.max_discard / 512) as u32,
                max_write_zeroes_sectors: (geometry.max_write_zeroes / 512) as u32,
            },
        };
        space.encode().to_vec()
    }

    fn set_config(&mut self, offset: usize, bytes: &[u8]) -> bool {
        let ([value @ (0 | 1)], WRITEBACK_OFFSET) = (bytes, offset) else {
            return false;
        };
        self.set_cache(*value == 1);
        true
    }

    fn former_features(&self) -> u64 {
        FORMER_FEATURES
    }

    fn set_features(&mut self, features: u64) {
        self.features = features;
        self.update_cache();
    }

    fn features_end_cache(&self, features: u64) -> bool {
        self.writeback.load(Ordering::Relaxed) && features & (1 << feature::FLUSH) == 0
    }

    fn config_ends_cache(&self, offset: usize, bytes: &[u8]) -> bool {
        self.writeback.load(Ordering::Relaxed) && (offset, bytes) == (WRITEBACK_OFFSET, &[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_cannot_flush_gets_write_through() {
        let volume = Volume::new("v", "", 1 << 20, 512, false, Drive::Null, None).unwrap();
        let mut device = BlockDevice::new(Arc::new(volume), 1);
        let writeback = device.writeback();
        device.set_features(1 << feature::FLUSH | 1 << feature::CONFIG_WCE);
        assert!(writeback.load(Ordering::Relaxed));
        assert!(device.set_config(WRITEBACK_OFFSET, &[0]));
        assert!(!writeback.load(Ordering::Relaxed));
        assert!(device.set_config(WRITEBACK_OFFSET, &[1]));
        device.set_features(0);
        assert!(!writeback.load(Ordering::Relaxed));
        assert!(!device.set_config(0, &[1]));
        assert!(!device.set_config(WRITEBACK_OFFSET, &[2]));
    }
}

//! A driver of a packed ring (virtio 1.2, 2.8), one request at a time.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{wait_for, Driver, F_RING_PACKED};

const NEXT: u16 = 1;
const WRITE: u16 = 1 << 1;
const INDIRECT: u16 = 1 << 2;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Both positions 0, both wrap counters 1.
const BEGIN: u32 = 0x8000_8000;

/// See the module. The descriptors are where a split ring would have its own, the event areas where it would have the
/// available and the used ring.
pub struct PackedDriver {
    pub driver: Driver,
    next: u16,
    wrap: bool,
}

impl PackedDriver {
    /// Connect, negotiate and start vring 0 with `size` entries.
    pub fn start(path: &Path, size: u16, features: u64) -> Self {
        let driver = Driver::prepare(path, size, features | F_RING_PACKED);
        driver.set_memory();
        driver.start_vring(BEGIN);
        Self { driver, next: 0, wrap: true }
    }

    /// Guest address of the descriptor that the next request begins with.
    pub fn next_at(&self) -> u64 {
        16 * u64::from(self.next)
    }

    /// One request from begin to end: its status byte.
    pub fn request(&mut self, kind: u32, sector: u64, data: Option<(u64, u32)>) -> u8 {
        let slot = self.driver.put_header(0, kind, sector);
        let mut parts = vec![(slot, 16, 0)];
        parts
            .extend(data.map(|(address, len)| (address, len, if matches!(kind, 0 | 8) { WRITE } else { 0 })));
        parts.push((slot + 32, 1, WRITE));
        self.send(parts)
    }

    /// The request whose descriptors are in the indirect table at `table`, its status in slot 0.
    pub fn indirect(&mut self, table: u64, len: u32) -> u8 {
        self.send(vec![(table, len, INDIRECT)])
    }

    fn send(&mut self, parts: Vec<(u64, u32, u16)>) -> u8 {
        let first = (self.next, self.wrap);
        let last = parts.len() - 1;
        let mut head = 0;
        for (number, (address, len, flags)) in parts.into_iter().enumerate() {
            let available = if self.wrap { AVAIL } else { USED };
            let flags = flags | available | if number < last { NEXT } else { 0 };
            // The first one's flags last: the device may begin with them.
            if number == 0 {
                head = flags;
            }
            self.put(address, len, if number == 0 { 0 } else { flags });
        }
        self.driver.memory.write_all_at(&head.to_le_bytes(), 16 * u64::from(first.0) + 14).unwrap();
        self.driver.kick.write(1).unwrap();
        wait_for("a used descriptor", || {
            let bytes = self.driver.read(16 * u64::from(first.0) + 14, 2);
            let flags = u16::from_le_bytes(bytes.try_into().unwrap());
            (flags & AVAIL != 0) == first.1 && (flags & USED != 0) == first.1
        });
        self.driver.status(0)
    }

    fn put(&mut self, address: u64, len: u32, flags: u16) {
        let at = 16 * u64::from(self.next);
        self.driver.write(at, &address.to_le_bytes());
        self.driver.write(at + 8, &len.to_le_bytes());
        self.driver.write(at + 12, &7u16.to_le_bytes());
        // An unavailable one looks as if it were a wrap behind.
        let flags = if flags == 0 {
            if self.wrap {
                USED
            } else {
                AVAIL
            }
        } else {
            flags
        };
        self.driver.write(at + 14, &flags.to_le_bytes());
        self.next += 1;
        if self.next == self.driver.size {
            (self.next, self.wrap) = (0, !self.wrap);
        }
    }
}

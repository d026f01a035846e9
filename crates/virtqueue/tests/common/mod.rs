//! Guest memory for tests.
#![allow(dead_code, reason = "each test file uses a part")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ringstone_mapping::Mapping;
use ringstone_virtqueue::{InflightRegion, MemoryRegion, MemoryTable, RingAddresses, RingSetup};

/// Guest address of the first byte, and the frontend's.
pub const GUEST: u64 = 0x10_0000;
pub const USER: u64 = 0x7000_0000;

/// A mapped file.
pub struct Memory {
    pub file: File,
    pub mapping: Arc<Mapping>,
}

impl Memory {
    pub fn new(len: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        let mapping = Arc::new(Mapping::new(file.as_fd(), 0, len).unwrap());
        Self { file, mapping }
    }

    pub fn ptr(&self, at: u64) -> *mut u8 {
        assert!(at < self.mapping.len() as u64);
        self.mapping.as_ptr().wrapping_add(at as usize)
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at))
    }

    pub fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.read(at))
    }

    /// All of it as a guest's memory.
    pub fn table(&self) -> Arc<MemoryTable> {
        let len = self.mapping.len() as u64;
        let region = MemoryRegion { guest: GUEST, len, user: USER, mapping: self.mapping.clone() };
        Arc::new(MemoryTable::new(vec![region]).unwrap())
    }

    /// The begin of it as the in-flight region of one queue.
    pub fn inflight(&self, entries: u16, packed: bool) -> Option<InflightRegion> {
        InflightRegion::new(self.mapping.clone(), 0, entries, packed)
    }
}

/// A set-up with everything negotiated, nothing kept and nothing logged. The addresses count from the begin of memory.
pub fn setup(memory: Arc<MemoryTable>, size: u32, parts: [u64; 3]) -> RingSetup {
    let [descriptors, available, used] = parts.map(|part| USER + part);
    RingSetup {
        memory,
        size,
        addresses: RingAddresses { descriptors, available, used },
        base: 0,
        event_idx: true,
        indirect: true,
        inflight: None,
        log: None,
    }
}

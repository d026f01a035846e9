//! Requests as a driver lays them out, good and bad, through a real ring.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use ringstone_mapping::Mapping;
use ringstone_virtio_blk::{parse, Geometry, Operation, Refusal};
use ringstone_virtqueue::{
    total_len, Chain, MemoryRegion, MemoryTable, RingAddresses, RingSetup, SplitRing, VirtRing,
};

const MEMORY: u64 = 1 << 20;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STATUS: u64 = 0x5000;
const DISK: u64 = 1 << 30;

const GEOMETRY: Geometry = Geometry {
    size: DISK,
    block_size: 512,
    read_only: false,
    discard: true,
    write_zeroes: true,
    max_discard: 1 << 20,
    max_write_zeroes: 1 << 20,
};

/// Guest memory with one chain in it.
struct Guest {
    file: File,
    memory: Arc<MemoryTable>,
}

/// One buffer of a chain: address, bytes, device-writable.
type Buffer = (u64, u32, bool);

impl Guest {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY).unwrap();
        let mapping = Arc::new(Mapping::new(file.as_fd(), 0, MEMORY).unwrap());
        let region = MemoryRegion { guest: 0, len: MEMORY, user: 0, mapping };
        Self { file, memory: Arc::new(MemoryTable::new(vec![region]).unwrap()) }
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.file.write_all_at(&bytes, HEADER).unwrap();
    }

    fn range(&self, sector: u64, sectors: u32, flags: u32) {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        self.file.write_all_at(&bytes, DATA).unwrap();
    }

    fn chain(&self, buffers: &[Buffer]) -> Chain {
        for (i, (address, len, writable)) in buffers.iter().enumerate() {
            let next = u16::from(i + 1 < buffers.len());
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend((next | u16::from(*writable) << 1).to_le_bytes());
            bytes.extend((i as u16 + 1).to_le_bytes());
            self.file.write_all_at(&bytes, 16 * i as u64).unwrap();
        }
        let addresses = RingAddresses { descriptors: 0, available: 0x2000, used: 0x3000 };
        let setup = RingSetup {
            memory: self.memory.clone(),
            size: 16,
            addresses,
            base: 0,
            event_idx: false,
            indirect: false,
            inflight: None,
            log: None,
        };
        let mut chain = Chain::default();
        SplitRing::new(setup).unwrap().walk_next(&mut chain).unwrap();
        chain
    }

    fn parse(&self, buffers: &[Buffer], geometry: &Geometry) -> Result<(Operation, u64, u64), Refusal> {
        match parse(&mut self.chain(buffers), geometry) {
            Ok((request, _)) => Ok((request.operation, request.offset, request.len)),
            Err((_, refusal)) => Err(refusal),
        }
    }
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const HEAD: Buffer = (HEADER, 16, false);
const TAIL: Buffer = (STATUS, 1, true);

#[test]
fn reads_and_writes_are_checked_against_the_disk() {
    let guest = Guest::new();
    let read = |sector, len| {
        guest.header(IN, sector);
        guest.parse(&[HEAD, (DATA, len, true), TAIL], &GEOMETRY)
    };
    let last = DISK / 512 - 8;
    assert_eq!(read(last, 4096), Ok((Operation::Read, last * 512, 4096)));
    assert!(matches!(read(last + 1, 4096), Err(Refusal::OutOfRange { .. })));
    assert!(matches!(read(u64::MAX, 4096), Err(Refusal::OutOfRange { .. })));
    assert!(matches!(read(u64::MAX / 512, 4096), Err(Refusal::OutOfRange { .. })));
    assert!(matches!(read(0, 100), Err(Refusal::Unaligned { .. })));
    let four_k = Geometry { block_size: 4096, ..GEOMETRY };
    guest.header(OUT, 1);
    let write = [HEAD, (DATA, 4096, false), TAIL];
    assert!(matches!(guest.parse(&write, &four_k), Err(Refusal::Unaligned { block_size: 4096, .. })));
    let read_only = Geometry { read_only: true, ..GEOMETRY };
    assert_eq!(guest.parse(&write, &read_only), Err(Refusal::ReadOnly));
    assert_eq!(guest.parse(&write, &GEOMETRY), Ok((Operation::Write, 512, 4096)));
}

#[test]
fn buffers_in_the_wrong_direction_or_outside_memory_are_refused() {
    let guest = Guest::new();
    guest.header(OUT, 0);
    assert_eq!(guest.parse(&[HEAD, (DATA, 512, true), TAIL], &GEOMETRY), Err(Refusal::WrongBuffers));
    guest.header(IN, 0);
    assert_eq!(guest.parse(&[HEAD, (DATA, 512, false), TAIL], &GEOMETRY), Err(Refusal::WrongBuffers));
    assert_eq!(guest.parse(&[HEAD, (MEMORY, 512, true), TAIL], &GEOMETRY), Err(Refusal::OutsideMemory));
    assert_eq!(guest.parse(&[HEAD, (MEMORY - 256, 512, true), TAIL], &GEOMETRY), Err(Refusal::OutsideMemory));
}

#[test]
fn a_request_without_a_place_for_its_status_stops_the_device() {
    let guest = Guest::new();
    guest.header(IN, 0);
    for buffers in [&[HEAD][..], &[HEAD, (MEMORY, 1, true)], &[(HEADER, 8, false), TAIL], &[TAIL]] {
        assert_eq!(guest.parse(buffers, &GEOMETRY), Err(Refusal::NoStatus), "{buffers:?}");
    }
}

#[test]
fn ranges_to_discard_or_zero_are_checked_too() {
    let guest = Guest::new();
    let range = |kind, sector, sectors, flags| {
        guest.header(kind, 0);
        guest.range(sector, sectors, flags);
        guest.parse(&[HEAD, (DATA, 16, false), TAIL], &GEOMETRY)
    };
    assert_eq!(range(DISCARD, 8, 16, 0), Ok((Operation::Discard, 4096, 8192)));
    assert_eq!(range(WRITE_ZEROES, 8, 16, 1), Ok((Operation::WriteZeroesUnmap, 4096, 8192)));
    assert_eq!(range(DISCARD, 8, 16, 1), Err(Refusal::ReservedFlags(1)));
    assert_eq!(range(WRITE_ZEROES, 8, 16, 2), Err(Refusal::ReservedFlags(2)));
    assert!(matches!(range(DISCARD, DISK / 512 - 1, 2, 0), Err(Refusal::OutOfRange { .. })));
    assert!(matches!(range(DISCARD, 0, u32::MAX, 0), Err(Refusal::OutOfRange { .. })));
    let two = [HEAD, (DATA, 32, false), TAIL];
    assert_eq!(guest.parse(&two, &GEOMETRY), Err(Refusal::WrongBuffers), "one range a request is announced");
    let never = Geometry { discard: false, ..GEOMETRY };
    guest.header(DISCARD, 0);
    assert_eq!(guest.parse(&[HEAD, (DATA, 16, false), TAIL], &never), Err(Refusal::UnknownType(DISCARD)));
}

#[test]
fn flush_serial_and_what_nobody_knows() {
    let guest = Guest::new();
    guest.header(FLUSH, 0);
    assert_eq!(guest.parse(&[HEAD, TAIL], &GEOMETRY), Ok((Operation::Flush, 0, 0)));
    guest.header(GET_ID, 0);
    assert_eq!(guest.parse(&[HEAD, (DATA, 20, true), TAIL], &GEOMETRY), Ok((Operation::GetId, 0, 20)));
    assert_eq!(guest.parse(&[HEAD, (DATA, 7, true), TAIL], &GEOMETRY), Ok((Operation::GetId, 0, 7)));
    guest.header(99, 0);
    assert_eq!(guest.parse(&[HEAD, TAIL], &GEOMETRY), Err(Refusal::UnknownType(99)));
}

proptest! {
    /// However header, data and status are cut into descriptors, the request is the same.
    #[test]
    fn framing_does_not_matter(cuts in prop::collection::btree_set(1u32..4112, 0..6), write in any::<bool>()) {
        let guest = Guest::new();
        guest.header(if write { OUT } else { IN }, 64);
        // Header and data lie one after the other for a write, data and status for a read.
        let (start, len) = if write { (HEADER, 16 + 4096) } else { (DATA, 4096 + 1) };
        let mut buffers = Vec::new();
        if !write {
            buffers.push(HEAD);
        }
        let mut from = 0;
        for cut in cuts.into_iter().filter(|cut| *cut < len).chain([len]) {
            buffers.push((start + u64::from(from), cut - from, !write));
            from = cut;
        }
        if write {
            buffers.push(TAIL);
        }
        let operation = if write { Operation::Write } else { Operation::Read };
        let mut chain = guest.chain(&buffers);
        let (request, _) = parse(&mut chain, &GEOMETRY).map_err(|(_, r)| TestCaseError::fail(r.to_string()))?;
        prop_assert_eq!((request.operation, request.offset, request.len), (operation, 64 * 512, 4096));
        let data = if write { chain.readable() } else { chain.writable() };
        prop_assert_eq!(total_len(data), 4096);
    }
}

//! What the fuzz targets share: guest memory to misuse, and a device side that serves a ring and checks what it gets.

pub mod frontend;
pub mod store;

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use ringstone_virtio_blk::{parse, status, Geometry, Operation, Request};
use ringstone_virtqueue::{total_len, Chain, MemoryTable, Notify, Segment, VirtRing, MAX_SEGMENTS};

/// Chains served of one ring at most: the input is what is to be varied, not the time it takes.
const MOST_CHAINS: usize = 256;

/// A file in memory of `len` bytes.
///
/// # Panics
/// There is none to be had.
pub fn memory_file(len: usize) -> File {
    // SAFETY: plain system calls; the descriptor is checked before it is owned.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        File::from(OwnedFd::from_raw_fd(fd))
    };
    file.set_len(len as u64).expect("room for guest memory");
    file
}

/// Every how many requests one is completed after those behind it.
const LATE: usize = 3;

/// Serve a ring as a reactor does: all that is available, then what is used, then the question for a call. False if the
/// device has to stop.
///
/// # Panics
/// Something passed a check that it should not have passed.
pub fn serve(ring: &mut impl VirtRing, chain: &mut Chain, geometry: &Geometry) -> bool {
    let mut served = 0;
    let mut late = None;
    while served < MOST_CHAINS {
        let Ok(waiting) = ring.available() else { return false };
        assert!(waiting <= ring.size() && ring.resubmitting() <= waiting);
        ring.set_kicks(if waiting == 0 { Notify::Armed } else { Notify::Suppressed });
        if waiting == 0 {
            break;
        }
        let batch = (MOST_CHAINS - served).min(waiting.into()) as u16;
        for done in 0..batch {
            served += 1;
            ring.prefetch_batch(done, batch);
            let Ok(head) = ring.walk_next(chain) else { return false };
            assert!(head < ring.size());
            if !complete(ring.memory(), chain, geometry) {
                return false;
            }
            ring.take();
            if served % LATE == 0 && late.is_none() {
                late = Some(head);
            } else {
                ring.push_used(head, 1);
            }
        }
        ring.publish();
        if let Some(head) = late.take() {
            ring.push_used(head, 0);
        }
        ring.publish();
        ring.wants_call();
        ring.prefetch_lone(0, std::ptr::null());
    }
    true
}

/// Take up to `count` requests and never answer them, as a process does that is killed.
pub fn abandon(ring: &mut impl VirtRing, chain: &mut Chain, count: u16) {
    for _ in 0..count {
        if !matches!(ring.available(), Ok(1..)) || ring.walk_next(chain).is_err() {
            return;
        }
        ring.take();
    }
}

/// Check and answer one chain; false if there is nowhere to put a status.
fn complete(memory: &MemoryTable, chain: &mut Chain, geometry: &Geometry) -> bool {
    assert!(chain.readable().len() + chain.writable().len() <= MAX_SEGMENTS);
    check_inside(memory, chain);
    let parsed = parse(chain, geometry);
    check_inside(memory, chain);
    let (answer, byte) = match parsed {
        Ok((request, byte)) => {
            check_request(&request, chain, geometry);
            touch(chain, &request.operation);
            (status::OK, byte)
        }
        Err((Some(byte), refusal)) => (refusal.status(), byte),
        Err((None, _)) => return false,
    };
    // SAFETY: the memory table outlives this call.
    unsafe { byte.set(answer) };
    true
}

fn check_inside(memory: &MemoryTable, chain: &Chain) {
    for segment in chain.readable().iter().chain(chain.writable()).filter(|segment| !segment.ptr.is_null()) {
        let inside = memory.regions().iter().any(|region| {
            let start = region.mapping.as_ptr() as usize;
            let at = segment.ptr as usize;
            at >= start && at + segment.len as usize <= start + region.len as usize
        });
        assert!(inside, "{segment:?} is outside guest memory");
        assert!(segment.len > 0, "an empty segment");
    }
}

fn check_request(request: &Request, chain: &Chain, geometry: &Geometry) {
    let writes = matches!(
        request.operation,
        Operation::Write | Operation::Discard | Operation::WriteZeroes | Operation::WriteZeroesUnmap
    );
    assert!(!writes || !geometry.read_only, "a write to a read-only disk");
    assert!(request.offset + request.len <= geometry.size);
    if request.operation != Operation::GetId {
        let block = u64::from(geometry.block_size);
        assert!(request.offset.is_multiple_of(block) && request.len.is_multiple_of(block));
    }
    match request.operation {
        Operation::Read => assert_eq!(total_len(chain.writable()), request.len),
        Operation::Write => assert_eq!(total_len(chain.readable()), request.len),
        Operation::Discard => assert!(request.len <= geometry.max_discard),
        Operation::WriteZeroes | Operation::WriteZeroesUnmap => {
            assert!(request.len <= geometry.max_write_zeroes)
        }
        Operation::Flush | Operation::GetId => {}
    }
}

/// Read or write the ends of a request's data, as a drive would.
fn touch(chain: &Chain, operation: &Operation) {
    let ends = |segment: &Segment| [segment.ptr, segment.ptr.wrapping_add(segment.len as usize - 1)];
    match operation {
        Operation::Read => {
            for end in chain.writable().iter().flat_map(ends) {
                // SAFETY: the ends of a segment lie inside guest memory; see `check_inside`.
                unsafe { end.write_volatile(0xa5) };
            }
        }
        Operation::Write => {
            for end in chain.readable().iter().flat_map(ends) {
                // SAFETY: as above.
                unsafe { end.read_volatile() };
            }
        }
        _ => {}
    }
}

//! Requests: virtio 1.2, section 5.2.6.

use ringstone_virtqueue::{total_len, Chain, GuestByte};

use crate::error::Refusal;

/// Bytes of the serial that GET_ID answers.
pub const SERIAL_LEN: usize = 20;

const SECTOR: u64 = 512;
/// Bytes of data of one request at most. Drivers exceed `seg_max` times `size_max`: EDK2's sends what it is asked for in one
/// segment, up to this.
const MAX_DATA: u64 = 1 << 30;
const HEADER_LEN: usize = 16;
const RANGE_LEN: usize = 16;
const RANGE_UNMAP: u32 = 1;

mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Values of the status byte (5.2.6).
pub mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}

/// What the disk looks like to a request.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Bytes.
    pub size: u64,
    pub block_size: u32,
    pub read_only: bool,
    pub discard: bool,
    pub write_zeroes: bool,
    /// Bytes of one discard at most.
    pub max_discard: u64,
    /// Bytes of one write-zeroes at most.
    pub max_write_zeroes: u64,
}

/// What a request asks for. Its data: the chain's writable segments for `Read` and `GetId`, the readable ones for `Write`.
///
/// As wide as its neighbours in [`Request`], as padding is copied in pieces that overlap, and the processor then waits for
/// every store before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Operation {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// Zeroes, and the range may be deallocated.
    WriteZeroesUnmap,
}

/// A request whose fields were all checked against the disk.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub operation: Operation,
    /// Byte offset on the disk; 0 where the operation has none.
    pub offset: u64,
    /// Bytes of data, or of the range to discard or zero.
    pub len: u64,
}

/// Take header and status off `chain` and check the rest against `geometry`.
///
/// # Errors
/// `Err((None, NoStatus))` if there is no place for a status: the device must stop. Otherwise the status byte and why the
/// request is refused.
#[inline(always)]
pub fn parse(
    chain: &mut Chain,
    geometry: &Geometry,
) -> Result<(Request, GuestByte), (Option<GuestByte>, Refusal)> {
    let Some(status) = chain.take_last_byte() else {
        return Err((None, Refusal::NoStatus));
    };
    if chain.overlong() {
        return Err((Some(status), Refusal::TooManySegments));
    }
    match checked(chain, geometry) {
        Ok(request) => Ok((request, status)),
        Err(refusal) => Err((Some(status), refusal)),
    }
}

impl Refusal {
    /// The status byte that tells the driver.
    pub fn status(self) -> u8 {
        match self {
            Self::UnknownType(_) | Self::ReservedFlags(_) => status::UNSUPP,
            _ => status::IOERR,
        }
    }
}

/// As [`glance_read`], of reads and writes.
#[inline(always)]
pub fn glance(header: &[u8; HEADER_LEN]) -> Option<u64> {
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
    matches!(kind, kind::IN | kind::OUT).then(|| sector.wrapping_mul(SECTOR))
}

/// The byte offset that a request header names if it is a read, unchecked: for prefetching only.
#[inline(always)]
pub fn glance_read(header: &[u8; HEADER_LEN]) -> Option<u64> {
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
    (kind == kind::IN).then(|| sector.wrapping_mul(SECTOR))
}

#[inline(always)]
fn checked(chain: &mut Chain, geometry: &Geometry) -> Result<Request, Refusal> {
    let header = chain.take_front::<HEADER_LEN>().ok_or(Refusal::NoStatus)?;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
    match kind {
        kind::IN => {
            let request = range(Operation::Read, sector, total_len(chain.writable()), geometry)?;
            only(chain.readable().is_empty())?;
            inside(chain.writable())?;
            Ok(request)
        }
        kind::OUT => {
            writable_disk(geometry)?;
            let request = range(Operation::Write, sector, total_len(chain.readable()), geometry)?;
            only(chain.writable().is_empty())?;
            inside(chain.readable())?;
            Ok(request)
        }
        kind::FLUSH => Ok(Request { operation: Operation::Flush, offset: 0, len: 0 }),
        kind::GET_ID => {
            inside(chain.writable())?;
            Ok(Request {
                operation: Operation::GetId,
                offset: 0,
                len: total_len(chain.writable()).min(SERIAL_LEN as u64),
            })
        }
        kind::DISCARD if geometry.discard => one_range(chain, geometry, geometry.max_discard, false),
        kind::WRITE_ZEROES if geometry.write_zeroes => {
            one_range(chain, geometry, geometry.max_write_zeroes, true)
        }
        other => Err(Refusal::UnknownType(other)),
    }
}

/// DISCARD and WRITE_ZEROES carry `struct virtio_blk_discard_write_zeroes`; we announce one range a request.
#[cold]
fn one_range(chain: &mut Chain, geometry: &Geometry, max: u64, zeroes: bool) -> Result<Request, Refusal> {
    writable_disk(geometry)?;
    only(total_len(chain.readable()) == RANGE_LEN as u64)?;
    let bytes = chain.take_front::<RANGE_LEN>().ok_or(Refusal::OutsideMemory)?;
    let sector = u64::from_le_bytes(bytes[0..8].try_into().unwrap_or_default());
    let len = u64::from(u32::from_le_bytes(bytes[8..12].try_into().unwrap_or_default())) * SECTOR;
    let flags = u32::from_le_bytes(bytes[12..16].try_into().unwrap_or_default());
    // 5.2.6.1: unmap is reserved for DISCARD; every other bit for both.
    let allowed = if zeroes { RANGE_UNMAP } else { 0 };
    if flags & !allowed != 0 {
        return Err(Refusal::ReservedFlags(flags));
    }
    let operation = match (zeroes, flags & RANGE_UNMAP != 0) {
        (false, _) => Operation::Discard,
        (true, false) => Operation::WriteZeroes,
        (true, true) => Operation::WriteZeroesUnmap,
    };
    let request = range(operation, sector, len, geometry)?;
    if len > max {
        return Err(Refusal::OutOfRange { sector, len, size: geometry.size });
    }
    Ok(request)
}

#[inline(always)]
fn range(operation: Operation, sector: u64, len: u64, geometry: &Geometry) -> Result<Request, Refusal> {
    let out = Refusal::OutOfRange { sector, len, size: geometry.size };
    let offset = sector.checked_mul(SECTOR).ok_or(out)?;
    if offset.checked_add(len).is_none_or(|end| end > geometry.size) {
        return Err(out);
    }
    if matches!(operation, Operation::Read | Operation::Write) && len > MAX_DATA {
        return Err(Refusal::WrongBuffers);
    }
    let mask = u64::from(geometry.block_size) - 1;
    if (offset | len) & mask != 0 {
        return Err(Refusal::Unaligned { sector, len, block_size: geometry.block_size });
    }
    Ok(Request { operation, offset, len })
}

#[inline(always)]
fn writable_disk(geometry: &Geometry) -> Result<(), Refusal> {
    if geometry.read_only {
        return Err(Refusal::ReadOnly);
    }
    Ok(())
}

#[inline(always)]
fn only(fits: bool) -> Result<(), Refusal> {
    if fits {
        Ok(())
    } else {
        Err(Refusal::WrongBuffers)
    }
}

#[inline(always)]
fn inside(segments: &[ringstone_virtqueue::Segment]) -> Result<(), Refusal> {
    if segments.iter().any(|s| s.ptr.is_null()) {
        return Err(Refusal::OutsideMemory);
    }
    Ok(())
}

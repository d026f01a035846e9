//! What guests write: each sector says which write it is of, and which sector of its volume it is.

use std::sync::Arc;

use ringstone_store::{checksum, zeroed, Action, Block, Cipher, Data, Io, Seal, Sums};

use crate::drive::{Drive, Flight, Owner, What, SECTOR};
use crate::rng::Rng;

const LEN: usize = SECTOR as usize;

/// `len` bytes of the write `value` from byte `offset` of its volume on.
pub fn bytes(value: u64, offset: u64, len: u64) -> Vec<u8> {
    let mut all = vec![0; len as usize];
    for (n, sector) in (offset / SECTOR..).zip(all.chunks_mut(LEN)).filter(|_| value != 0) {
        sector[..8].copy_from_slice(&value.to_le_bytes());
        sector[8..16].copy_from_slice(&n.to_le_bytes());
        sector[LEN - 8..].copy_from_slice(&value.to_le_bytes());
    }
    all
}

/// The values of sectors that were read from byte `offset` on.
///
/// # Errors
/// One is no sector that a guest wrote there.
pub fn values(bytes: &[u8], offset: u64) -> Result<Vec<u64>, String> {
    let number =
        |sector: &[u8], at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().unwrap_or_default());
    let value = |(n, sector): (u64, &[u8])| {
        let value = number(sector, 0);
        let whole = value == number(sector, LEN - 8) && (value == 0 || number(sector, 8) == n);
        let is_zero = value != 0 || sector.iter().all(|byte| *byte == 0);
        match whole && is_zero {
            true => Ok(value),
            false => Err(format!("sector {n} holds sector {} of {value}", number(sector, 8))),
        }
    };
    (offset / SECTOR..).zip(bytes.chunks(LEN)).map(value).collect()
}

/// Begin what a keeper wants. `guest`: the memory of the request with a token, from a byte of it on. None if it is under way;
/// else the I/O that is done.
pub fn start(drive: &mut Drive, mut io: Io, guest: impl Fn(u64, u64, u64) -> Vec<u8>) -> Option<Io> {
    let what = match io.action {
        Action::Read => What::Read,
        Action::Flush => What::Flush { before: drive.flushable() },
        Action::Fill { token, skip, at } => {
            let from = guest(token, skip, io.len);
            let Data::Own(buffer) = &mut io.data else { panic!("filled without a buffer") };
            for (n, byte) in from.into_iter().enumerate() {
                let at = at + n;
                buffer[at / 4096].0[at % 4096] = byte;
            }
            return Some(io);
        }
        Action::Give { .. } => return Some(io),
        Action::Write { durable } => {
            let bytes = match &io.data {
                Data::Own(buffer) => buffer.iter().flat_map(|block| block.0).collect(),
                Data::Guest { token, skip } => guest(*token, *skip, io.len),
                Data::Zeroes => vec![0; io.len as usize],
                Data::None => panic!("written without data"),
            };
            assert_eq!(bytes.len() as u64, io.len);
            What::Write { bytes: bytes.into(), durable }
        }
    };
    assert!(io.offset.is_multiple_of(SECTOR) && io.offset + io.len <= drive.size(), "{io:?}");
    drive.flights.push(Flight {
        offset: io.offset,
        len: io.len,
        what,
        owner: Owner::Keeper(io),
        slow: false,
    });
    None
}

/// Give a keeper's read what is on the drive, and sectors of what is being written there.
pub fn read(drive: &Drive, io: &mut Io, rng: &mut Rng) {
    if let (Action::Read, Data::Own(buffer)) = (io.action, &mut io.data) {
        for (n, block) in buffer.iter_mut().enumerate() {
            let at = io.offset + n as u64 * 4096;
            drive.read(at, &mut block.0);
            drive.glimpse(at, &mut block.0, rng);
        }
    }
}

/// Each byte depends on its block's number, and none of a block of zeroes stays one.
#[derive(Debug)]
struct Toy;

impl Toy {
    fn turn(first: u64, blocks: &mut [Block]) {
        for (n, block) in (first..).zip(blocks) {
            block.0.iter_mut().for_each(|byte| *byte ^= 0x80 | (n as u8).wrapping_mul(7));
        }
    }
}

impl Cipher for Toy {
    fn encrypt(&self, first: u64, blocks: &mut [Block]) {
        Self::turn(first, blocks);
    }

    fn decrypt(&self, first: u64, blocks: &mut [Block]) {
        Self::turn(first, blocks);
    }
}

pub fn cipher() -> Option<Arc<dyn Cipher>> {
    Some(Arc::new(Toy))
}

/// Encrypt or decrypt whole blocks of a volume that has a key, from byte `offset` on.
pub fn turn(seal: &Seal, offset: u64, bytes: &mut [u8]) {
    if seal.key.is_empty() {
        return;
    }
    assert!(offset.is_multiple_of(4096) && bytes.len().is_multiple_of(4096));
    let mut block = zeroed(1);
    for (n, piece) in (offset / 4096..).zip(bytes.chunks_mut(4096)) {
        block[0].0.copy_from_slice(piece);
        Toy::turn(n, &mut block);
        piece.copy_from_slice(&block[0].0);
    }
}

/// Blocks that were read from byte `place` of the drive are those that were written.
pub fn is_sound(sums: Option<&Sums>, place: u64, bytes: &[u8]) -> bool {
    let fits = |(at, block): (u64, &[u8])| sums.is_none_or(|sums| sums.at(at) == Some(checksum(block)));
    (place..).step_by(4096).zip(bytes.chunks(4096)).all(fits)
}

//! A page of checksums: of the blocks of some extents.

use super::bytes::{Block, Reader, Writer};
use super::page::checksum;
use crate::geometry::SUMS_PER_PAGE;

const MAGIC: u32 = 0x4d53_5352;
const HEADER: usize = 64;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumsPage {
    /// Counted over all zones.
    pub number: u32,
    pub sums: Vec<u32>,
}

impl SumsPage {
    pub fn encode(&self, uuid: &[u8; 16], block: &mut Block) {
        debug_assert_eq!(self.sums.len() as u64, SUMS_PER_PAGE);
        let mut out = Writer(Vec::with_capacity(4096));
        out.u32(MAGIC);
        out.u32(0);
        out.0.extend_from_slice(uuid);
        out.u32(self.number);
        out.0.resize(HEADER, 0);
        self.sums.iter().for_each(|sum| out.u32(*sum));
        block.0.copy_from_slice(&out.0);
        let crc = crc32c::crc32c(&block.0);
        block.0[4..8].copy_from_slice(&crc.to_le_bytes());
    }

    /// None if it is no sound page of this store with this number.
    pub fn decode(uuid: &[u8; 16], number: u32, block: &[u8; 4096]) -> Option<Self> {
        let mut from = Reader(block);
        let (magic, crc) = (from.u32()?, from.u32()?);
        if magic != MAGIC || from.bytes16()? != *uuid || from.u32()? != number || checksum(block) != crc {
            return None;
        }
        let mut from = Reader(&block[HEADER..]);
        let sums = (0..SUMS_PER_PAGE).map(|_| from.u32()).collect::<Option<_>>()?;
        Some(Self { number, sums })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_as_it_went_and_nowhere_else() {
        let uuid = *b"0123456789abcdef";
        let page = SumsPage { number: 7, sums: (0..SUMS_PER_PAGE as u32).map(|n| n * 3).collect() };
        let mut block = Block::default();
        page.encode(&uuid, &mut block);
        assert_eq!(SumsPage::decode(&uuid, 7, &block.0), Some(page));
        assert_eq!(SumsPage::decode(&uuid, 8, &block.0), None);
        assert_eq!(SumsPage::decode(&[0; 16], 7, &block.0), None);
        block.0[100] ^= 1;
        assert_eq!(SumsPage::decode(&uuid, 7, &block.0), None);
    }
}

//! What every block of the volume must hold, as far as the requests made so far tell.

use std::ops::Range;

use crate::random::Random;

/// Bytes 0..8 of a written block.
const MAGIC: u64 = u64::from_le_bytes(*b"RSVERIFY");
const HEADER: usize = 32;

/// What is known of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Unknown,
    Zero,
    Written(u64),
    /// Discarded since it was written: the old content or zeros, both are right (VIRTIO 1.2, 5.2.6.2).
    WrittenOrZero(u64),
}

pub(crate) struct Shadow {
    contents: Vec<Content>,
}

/// The content of `block` after the write `sequence`: magic, seed, block and sequence number, then a fill drawn from them.
pub(crate) fn fill_block(seed: u64, block: u64, sequence: u64, bytes: &mut [u8]) {
    for (field, value) in bytes.chunks_exact_mut(8).zip([MAGIC, seed, block, sequence]) {
        field.copy_from_slice(&value.to_le_bytes());
    }
    let start = seed ^ block.rotate_left(32) ^ sequence.wrapping_mul(0xd6e8_feb8_6659_fd93);
    Random::new(start).fill(&mut bytes[HEADER..]);
}

impl Shadow {
    pub(crate) fn new(blocks: u64, zeroed: bool) -> Self {
        let content = if zeroed { Content::Zero } else { Content::Unknown };
        Self { contents: vec![content; blocks as usize] }
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.contents.len() as u64
    }

    pub(crate) fn written(&mut self, range: Range<u64>, sequence: u64) {
        self.set(range, |_| Content::Written(sequence));
    }

    pub(crate) fn zeroed(&mut self, range: Range<u64>) {
        self.set(range, |_| Content::Zero);
    }

    pub(crate) fn discarded(&mut self, range: Range<u64>) {
        self.set(range, |content| match content {
            Content::Written(sequence) => Content::WrittenOrZero(sequence),
            other => other,
        });
    }

    pub(crate) fn forget(&mut self, range: Range<u64>) {
        self.set(range, |_| Content::Unknown);
    }

    fn set(&mut self, range: Range<u64>, change: impl Fn(Content) -> Content) {
        for content in &mut self.contents[range.start as usize..range.end as usize] {
            *content = change(*content);
        }
    }

    /// Whether `block` may hold `bytes`: Ok(false) when nothing was known of it, Err with a sentence when it may not.
    pub(crate) fn check(&self, seed: u64, block: u64, bytes: &[u8]) -> Result<bool, String> {
        let zero = || bytes.iter().all(|&byte| byte == 0);
        let written = |sequence| {
            let mut expected = vec![0; bytes.len()];
            fill_block(seed, block, sequence, &mut expected);
            expected == bytes
        };
        let (right, expected) = match self.contents[block as usize] {
            Content::Unknown => return Ok(false),
            Content::Zero => (zero(), "zeros".to_owned()),
            Content::Written(sequence) => (written(sequence), format!("write {sequence}")),
            Content::WrittenOrZero(sequence) => {
                (zero() || written(sequence), format!("write {sequence} or zeros"))
            }
        };
        if right {
            Ok(true)
        } else {
            Err(format!("block {block} must hold {expected} but holds {}", describe(seed, bytes)))
        }
    }
}

fn describe(seed: u64, bytes: &[u8]) -> String {
    let field = |index: usize| {
        let mut value = [0; 8];
        value.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
        u64::from_le_bytes(value)
    };
    if bytes.iter().all(|&byte| byte == 0) {
        return "zeros".to_owned();
    }
    if field(0) != MAGIC {
        return format!("bytes of unknown origin ({:02x?} ...)", &bytes[..16]);
    }
    let (block, sequence) = (field(2), field(3));
    let mut whole = vec![0; bytes.len()];
    fill_block(field(1), block, sequence, &mut whole);
    let torn = if whole == bytes { "" } else { ", torn" };
    let run = if field(1) == seed { "" } else { " of another run" };
    format!("block {block} of write {sequence}{run}{torn}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: u64, sequence: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        fill_block(5, number, sequence, &mut bytes);
        bytes
    }

    #[test]
    fn what_a_block_may_hold_follows_its_requests() {
        let mut shadow = Shadow::new(4, false);
        let zeros = vec![0; 512];
        assert_eq!(shadow.check(5, 1, &block(1, 9)), Ok(false));
        shadow.written(1..3, 9);
        assert_eq!(shadow.check(5, 1, &block(1, 9)), Ok(true));
        assert!(shadow.check(5, 1, &zeros).is_err());
        shadow.discarded(0..4);
        assert_eq!(shadow.check(5, 2, &zeros), Ok(true));
        assert_eq!(shadow.check(5, 2, &block(2, 9)), Ok(true));
        assert_eq!(shadow.check(5, 0, &block(3, 1)), Ok(false));
        shadow.zeroed(2..3);
        assert!(shadow.check(5, 2, &block(2, 9)).is_err());
        shadow.forget(2..3);
        assert_eq!(shadow.check(5, 2, &block(2, 9)), Ok(false));
    }

    #[test]
    fn a_wrong_block_is_told_apart() {
        let mut shadow = Shadow::new(4, true);
        shadow.written(2..3, 8);
        let mut torn = block(2, 8);
        torn[511] ^= 1;
        for (bytes, words) in [
            (block(3, 8), "holds block 3 of write 8"),
            (block(2, 7), "holds block 2 of write 7"),
            (torn, "block 2 of write 8, torn"),
            (vec![0; 512], "holds zeros"),
            (vec![1; 512], "unknown origin"),
        ] {
            let finding = shadow.check(5, 2, &bytes).unwrap_err();
            assert!(finding.contains(words) && finding.starts_with("block 2 must hold write 8"), "{finding}");
        }
    }
}

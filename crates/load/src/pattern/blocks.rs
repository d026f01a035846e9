//! What the blocks of one queue must hold, and what a block that was read turns out to be.
//!
//! A queue has blocks of its own and at most one write in flight to each, so a read of a block has a floor, the write
//! acknowledged when the read was made, and a ceiling, the newest write made by the time it completes. What it returns
//! must be one of these writes, whole. Older than the floor means that an acknowledged write is lost.

use crate::random::Random;

/// Bytes 0..8 of a written block.
const MAGIC: u64 = u64::from_le_bytes(*b"RSPATTRN");
/// Magic, seed, run, block, sequence (8 bytes each), CRC-32 of all else (4), zero (4).
const HEADER: usize = 48;
const CRC: std::ops::Range<usize> = 40..44;
/// No write of a smaller part than this is torn by anybody.
const SECTOR: usize = 512;

/// Tells this run's blocks from those of any other, also of one with the same seed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stamp {
    pub seed: u64,
    pub run: u64,
}

/// What a block says of itself.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Whole {
        block: u64,
        sequence: u64,
    },
    /// The header is this run's but the checksum is not.
    Broken {
        block: u64,
        sequence: u64,
    },
    OtherRun,
    Zeros,
    Garbage,
}

impl Stamp {
    /// Makes `bytes` the content of `block` after the write `sequence`. Every word differs from that of any other write.
    pub fn fill(&self, block: u64, sequence: u64, bytes: &mut [u8]) {
        for (field, value) in bytes.chunks_exact_mut(8).zip([MAGIC, self.seed, self.run, block, sequence, 0])
        {
            field.copy_from_slice(&value.to_le_bytes());
        }
        let from = self.run ^ self.seed.rotate_left(17) ^ block.rotate_left(32) ^ sequence.rotate_left(48);
        let mut word = Random::new(from).next();
        for field in bytes[HEADER..].chunks_exact_mut(8) {
            field.copy_from_slice(&word.to_le_bytes());
            word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        }
        let crc = checksum(bytes);
        bytes[CRC].copy_from_slice(&crc.to_le_bytes());
    }

    fn read(&self, bytes: &[u8]) -> Found {
        let field = |index: usize| {
            let mut value = [0; 8];
            value.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
            u64::from_le_bytes(value)
        };
        if field(0) != MAGIC {
            return if bytes.iter().all(|&byte| byte == 0) { Found::Zeros } else { Found::Garbage };
        }
        if (field(1), field(2)) != (self.seed, self.run) {
            return Found::OtherRun;
        }
        let (block, sequence) = (field(3), field(4));
        if checksum(bytes).to_le_bytes() == bytes[CRC] {
            Found::Whole { block, sequence }
        } else {
            Found::Broken { block, sequence }
        }
    }

    /// Whether any sector is that of the write `sequence` to `block`.
    fn partly(&self, block: u64, sequence: u64, bytes: &[u8]) -> bool {
        let mut expected = vec![0; bytes.len()];
        self.fill(block, sequence, &mut expected);
        expected.chunks(SECTOR).zip(bytes.chunks(SECTOR)).any(|(expected, found)| expected == found)
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..CRC.start]);
    hasher.update(&bytes[CRC.end..]);
    hasher.finalize()
}

/// What a read says of the backend.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing is known of what the block must hold.
    Unknown,
    Right,
    /// A mixture of two writes, one of which was in flight meanwhile.
    Mixed,
    /// Older than what was acknowledged.
    Lost(String),
    /// Not this block, or nothing that was ever written.
    Wrong(String),
    /// Part of a write, with none in flight.
    Torn(String),
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// The last write acknowledged; 0: none, or what the block holds is not known since.
    acknowledged: u64,
    /// The last write made.
    newest: u64,
    in_flight: bool,
    /// The write in flight may have been done before a loss, and only be answered behind it.
    doubtful: bool,
    /// The last write that is durable as far as we were told; 0: none.
    flushed: u64,
}

/// What a flush makes durable: for each block the write that was acknowledged when it began.
pub(super) struct Flushed(Vec<u64>);

/// The blocks of one queue: every `stride`th of the span, from `first`.
pub(super) struct Blocks {
    stamp: Stamp,
    first: u64,
    stride: u64,
    states: Vec<State>,
    sequence: u64,
}

impl Blocks {
    /// Queue `queue`'s share of `total` blocks.
    pub fn new(stamp: Stamp, total: u64, queue: usize, queues: usize) -> Self {
        let (first, stride) = (queue as u64, queues as u64);
        let count = total.saturating_sub(first).div_ceil(stride);
        Self { stamp, first, stride, states: vec![State::default(); count as usize], sequence: 0 }
    }

    pub fn count(&self) -> usize {
        self.states.len()
    }

    /// The volume's number of the queue's block `index`.
    pub fn number(&self, index: usize) -> u64 {
        self.first + index as u64 * self.stride
    }

    /// How many blocks hold an acknowledged write.
    pub fn written(&self) -> u64 {
        self.states.iter().filter(|state| state.acknowledged > 0).count() as u64
    }

    /// Begins a write of block `index` and puts what it carries into `bytes`; None while one is in flight there.
    pub fn begin_write(&mut self, index: usize, bytes: &mut [u8]) -> Option<u64> {
        let state = &mut self.states[index];
        if state.in_flight {
            return None;
        }
        self.sequence += 1;
        state.newest = self.sequence;
        state.in_flight = true;
        state.doubtful = false;
        self.stamp.fill(self.number(index), self.sequence, bytes);
        Some(self.sequence)
    }

    /// `durable`: it was promised to be.
    pub fn acknowledge(&mut self, index: usize, durable: bool) {
        let state = &mut self.states[index];
        state.in_flight = false;
        if state.doubtful {
            return;
        }
        state.acknowledged = state.newest;
        if durable {
            state.flushed = state.newest;
        }
    }

    /// What a flush that begins now makes durable.
    pub fn flushing(&self) -> Flushed {
        Flushed(self.states.iter().map(|state| state.acknowledged).collect())
    }

    pub fn flushed(&mut self, flushed: &Flushed) {
        for (state, sequence) in self.states.iter_mut().zip(&flushed.0) {
            state.flushed = state.flushed.max(*sequence);
        }
    }

    /// The drive may have gone back to what it had flushed, or to anything since.
    pub fn lose_unflushed(&mut self) {
        for state in &mut self.states {
            state.acknowledged = state.flushed;
            state.doubtful = state.in_flight;
        }
    }

    /// A write ended with an error: the block may hold it, what was before, or part of both.
    pub fn forget(&mut self, index: usize) {
        self.states[index] = State::default();
    }

    /// The floor of a read made now; 0 when nothing is known of the block.
    pub fn floor(&self, index: usize) -> u64 {
        self.states[index].acknowledged
    }

    /// Judges what a read of block `index` returned that was made when the floor was `floor`.
    pub fn check(&self, index: usize, floor: u64, bytes: &[u8]) -> Verdict {
        let State { acknowledged, newest, .. } = self.states[index];
        if floor == 0 || acknowledged == 0 {
            return Verdict::Unknown;
        }
        let number = self.number(index);
        let must = match newest > floor {
            true => format!("block {number} must hold one of the writes {floor} to {newest}"),
            false => format!("block {number} must hold write {floor}"),
        };
        match self.stamp.read(bytes) {
            Found::Whole { block, sequence } if block == number => {
                if sequence < floor {
                    Verdict::Lost(format!("{must} but holds write {sequence}"))
                } else if sequence > newest {
                    Verdict::Wrong(format!("{must} but holds write {sequence}, which was never made"))
                } else {
                    Verdict::Right
                }
            }
            Found::Whole { block, sequence } => {
                Verdict::Wrong(format!("{must} but holds block {block} of write {sequence}"))
            }
            Found::Broken { block, .. } if block == number && newest > floor => Verdict::Mixed,
            Found::Broken { block, sequence } => {
                Verdict::Torn(format!("{must} but holds part of write {sequence} to block {block}"))
            }
            Found::Zeros => Verdict::Lost(format!("{must} but holds zeros")),
            _ if self.stamp.partly(number, floor, bytes) => {
                Verdict::Torn(format!("{must} but holds part of write {floor}, without its beginning"))
            }
            Found::OtherRun => Verdict::Lost(format!("{must} but holds what an earlier run wrote")),
            Found::Garbage => Verdict::Wrong(format!("{must} but holds {:02x?} ...", &bytes[..16])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { seed: 5, run: 77 };
    const BYTES: usize = 2048;

    fn content(stamp: Stamp, block: u64, sequence: u64) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        stamp.fill(block, sequence, &mut bytes);
        bytes
    }

    /// Queue 1 of 4 with block 9 (its third) written twice: sequences 1 and 2.
    fn written_twice() -> Blocks {
        let mut blocks = Blocks::new(STAMP, 16, 1, 4);
        for _ in 0..2 {
            blocks.begin_write(2, &mut [0; BYTES]).unwrap();
            blocks.acknowledge(2, false);
        }
        blocks
    }

    #[test]
    fn queues_share_the_span_without_overlap() {
        for (total, queues) in [(16, 4), (17, 4), (5, 3), (4, 4)] {
            let mut numbers: Vec<u64> = (0..queues)
                .map(|queue| Blocks::new(STAMP, total, queue, queues))
                .flat_map(|blocks| {
                    (0..blocks.count()).map(move |index| blocks.number(index)).collect::<Vec<_>>()
                })
                .collect();
            numbers.sort_unstable();
            assert_eq!(numbers, (0..total).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_block_has_one_write_in_flight() {
        let mut blocks = written_twice();
        assert_eq!(blocks.begin_write(2, &mut [0; BYTES]), Some(3));
        assert_eq!(blocks.begin_write(2, &mut [0; BYTES]), None);
        assert_eq!(blocks.floor(2), 2);
        blocks.acknowledge(2, false);
        assert_eq!((blocks.floor(2), blocks.written()), (3, 1));
        assert_eq!(blocks.begin_write(2, &mut [0; BYTES]), Some(4));
    }

    #[test]
    fn a_read_returns_the_acknowledged_write_or_one_in_flight() {
        let mut blocks = written_twice();
        let floor = blocks.floor(2);
        assert_eq!(blocks.check(2, floor, &content(STAMP, 9, 2)), Verdict::Right);
        assert!(matches!(blocks.check(2, floor, &content(STAMP, 9, 1)), Verdict::Lost(_)));
        assert!(matches!(blocks.check(2, floor, &content(STAMP, 9, 3)), Verdict::Wrong(_)));
        let mut written = [0; BYTES];
        blocks.begin_write(2, &mut written);
        assert_eq!(blocks.check(2, floor, &content(STAMP, 9, 2)), Verdict::Right);
        assert_eq!(blocks.check(2, floor, &written), Verdict::Right);
        // A read made before the acknowledgement may still return the older one, a later read may not.
        blocks.acknowledge(2, false);
        assert_eq!(blocks.check(2, floor, &content(STAMP, 9, 2)), Verdict::Right);
        assert!(matches!(blocks.check(2, blocks.floor(2), &content(STAMP, 9, 2)), Verdict::Lost(_)));
    }

    #[test]
    fn a_drive_may_go_back_to_what_was_flushed_and_no_further() {
        let mut blocks = written_twice();
        let flush = blocks.flushing();
        for _ in 0..2 {
            blocks.begin_write(2, &mut [0; BYTES]).unwrap();
            blocks.acknowledge(2, false);
        }
        blocks.flushed(&flush);
        assert_eq!(blocks.floor(2), 4);
        blocks.lose_unflushed();
        assert_eq!(blocks.floor(2), 2);
        for sequence in 2..=4 {
            assert_eq!(blocks.check(2, 2, &content(STAMP, 9, sequence)), Verdict::Right);
        }
        assert!(matches!(blocks.check(2, 2, &content(STAMP, 9, 1)), Verdict::Lost(_)));
        blocks.begin_write(2, &mut [0; BYTES]).unwrap();
        blocks.acknowledge(2, true);
        blocks.lose_unflushed();
        assert_eq!(blocks.floor(2), 5);
    }

    /// A backend that finds a request done by the one before answers it, and the drive may have lost it in between.
    #[test]
    fn a_write_that_was_in_flight_at_a_loss_is_not_counted_on() {
        let mut blocks = written_twice();
        blocks.begin_write(2, &mut [0; BYTES]).unwrap();
        blocks.flushed(&blocks.flushing());
        blocks.lose_unflushed();
        blocks.acknowledge(2, true);
        assert_eq!(blocks.floor(2), 2);
        assert_eq!(blocks.begin_write(2, &mut [0; BYTES]), Some(4));
        blocks.acknowledge(2, false);
        assert_eq!(blocks.floor(2), 4);
    }

    /// Nothing is known of what was never flushed.
    #[test]
    fn without_a_flush_all_may_be_lost() {
        let mut blocks = written_twice();
        blocks.lose_unflushed();
        assert_eq!(blocks.check(2, blocks.floor(2), &[0; BYTES]), Verdict::Unknown);
        assert_eq!(blocks.begin_write(2, &mut [0; BYTES]), Some(3));
    }

    #[test]
    fn a_mixture_is_torn_unless_a_write_is_in_flight() {
        let mut blocks = written_twice();
        let mut ends_old = content(STAMP, 9, 2);
        ends_old[BYTES / 2..].copy_from_slice(&content(STAMP, 9, 1)[BYTES / 2..]);
        let mut begins_old = content(STAMP, 9, 2);
        begins_old[..SECTOR].fill(0);
        let mut one_bit = content(STAMP, 9, 2);
        one_bit[BYTES - 1] ^= 1;
        for bytes in [&ends_old, &begins_old, &one_bit] {
            assert!(matches!(blocks.check(2, 2, bytes), Verdict::Torn(_)), "{:?}", blocks.check(2, 2, bytes));
        }
        blocks.begin_write(2, &mut [0; BYTES]);
        let mut mixed = content(STAMP, 9, 3);
        mixed[SECTOR..].copy_from_slice(&content(STAMP, 9, 2)[SECTOR..]);
        assert_eq!(blocks.check(2, 2, &mixed), Verdict::Mixed);
    }

    #[test]
    fn what_does_not_belong_there_is_told_apart() {
        let blocks = written_twice();
        let again = Stamp { run: 78, ..STAMP };
        let wrong: fn(String) -> Verdict = Verdict::Wrong;
        let lost: fn(String) -> Verdict = Verdict::Lost;
        for (bytes, verdict, words) in [
            (content(STAMP, 8, 2), wrong, "holds block 8 of write 2"),
            (vec![1; BYTES], wrong, "holds [01, 01"),
            (vec![0; BYTES], lost, "holds zeros"),
            (content(again, 9, 2), lost, "an earlier run"),
        ] {
            let found = blocks.check(2, 2, &bytes);
            let sentence = match &found {
                Verdict::Wrong(sentence) | Verdict::Lost(sentence) => sentence.clone(),
                other => panic!("{other:?}"),
            };
            assert!(
                sentence.starts_with("block 9 must hold write 2 but") && sentence.contains(words),
                "{sentence}"
            );
            assert_eq!(found, verdict(sentence));
        }
    }

    #[test]
    fn nothing_is_asked_of_a_block_nobody_wrote_or_whose_write_failed() {
        let mut blocks = written_twice();
        assert_eq!(blocks.check(0, blocks.floor(0), &[7; BYTES]), Verdict::Unknown);
        let floor = blocks.floor(2);
        blocks.begin_write(2, &mut [0; BYTES]);
        blocks.forget(2);
        assert_eq!(blocks.check(2, floor, &[7; BYTES]), Verdict::Unknown);
        assert_eq!(blocks.written(), 0);
    }
}

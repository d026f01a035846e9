//! A small seeded generator: no allocation, a nanosecond a number, good enough to spread offsets.

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    #[inline(always)]
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound` (at least 1).
    #[inline(always)]
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_repeat_for_a_seed_and_stay_below_their_bound() {
        let (mut one, mut two) = (Random::new(7), Random::new(7));
        let numbers: Vec<u64> = (0..1000).map(|_| one.below(10)).collect();
        assert!(numbers.iter().all(|&n| n == two.below(10) && n < 10));
        assert!((0..10).all(|n| numbers.contains(&n)));
    }

    #[test]
    fn a_fill_covers_a_length_that_is_no_multiple_of_eight() {
        let mut bytes = [0u8; 13];
        Random::new(3).fill(&mut bytes);
        assert!(bytes[8..].iter().any(|&b| b != 0));
    }
}

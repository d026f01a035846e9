//! Faults for tests, decided by a seed.

/// How often what goes wrong. Rates are per million requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    pub seed: u64,
    pub error_per_million: u32,
    /// A write of which only the first half of the blocks lands, and which is acknowledged all the same.
    pub torn_per_million: u32,
    /// A write that is acknowledged and never lands.
    pub lost_per_million: u32,
    /// Microseconds added to every request.
    pub delay_us: u32,
}

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    Error,
    Torn,
    Lost,
}

/// One queue's source of faults: the same seed and queue give the same faults in the same order.
#[derive(Clone, Debug)]
pub struct FaultDice {
    faults: Faults,
    state: u64,
}

impl FaultDice {
    pub fn new(faults: Faults, queue: usize) -> Self {
        Self { faults, state: faults.seed ^ (queue as u64).wrapping_mul(0xa076_1d64_78bd_642f) }
    }

    pub fn delay_us(&self) -> u32 {
        self.faults.delay_us
    }

    /// Decide the next request's fate.
    pub fn roll(&mut self, is_write: bool) -> Fault {
        let roll = (self.next() % 1_000_000) as u32;
        let Faults { error_per_million: error, torn_per_million: torn, lost_per_million: lost, .. } =
            self.faults;
        if roll < error {
            Fault::Error
        } else if is_write && roll < error.saturating_add(torn) {
            Fault::Torn
        } else if is_write && roll < error.saturating_add(torn).saturating_add(lost) {
            Fault::Lost
        } else {
            Fault::None
        }
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_queue_give_the_same_faults() {
        let faults =
            Faults { seed: 9, error_per_million: 200_000, torn_per_million: 200_000, ..Default::default() };
        let run = |queue| {
            let mut dice = FaultDice::new(faults, queue);
            (0..100).map(|_| dice.roll(true)).collect::<Vec<_>>()
        };
        assert_eq!(run(0), run(0));
        assert_ne!(run(0), run(1));
    }

    #[test]
    fn rates_are_kept_and_reads_are_never_torn_or_lost() {
        let faults =
            Faults { seed: 1, error_per_million: 100_000, lost_per_million: 300_000, ..Default::default() };
        let mut dice = FaultDice::new(faults, 0);
        let writes: Vec<_> = (0..20_000).map(|_| dice.roll(true)).collect();
        let count = |wanted| writes.iter().filter(|f| **f == wanted).count();
        assert!((1_700..2_300).contains(&count(Fault::Error)), "{}", count(Fault::Error));
        assert!((5_500..6_500).contains(&count(Fault::Lost)), "{}", count(Fault::Lost));
        assert!((0..20_000).all(|_| !matches!(dice.roll(false), Fault::Torn | Fault::Lost)));
    }
}

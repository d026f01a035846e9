//! Latencies in buckets of at most 12.5 % width: the bucket rule of docs/formats/stats-page.md.

/// Buckets of a histogram; the last one takes everything from about 69 minutes up.
pub const BUCKETS: usize = 320;

/// Counts of latencies in nanoseconds, with their exact sum and maximum.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    count: u64,
    sum: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: Box::new([0; BUCKETS]), count: 0, sum: 0, max: 0 }
    }
}

/// Bucket of a latency of `value` ns.
#[inline(always)]
pub fn bucket_of(value: u64) -> usize {
    if value < 8 {
        return value as usize;
    }
    let exponent = 63 - value.leading_zeros() as usize;
    let sub = (value >> (exponent - 3)) as usize & 7;
    ((exponent - 2) * 8 + sub).min(BUCKETS - 1)
}

/// Smallest latency (ns) that falls into `bucket`.
pub fn lower_edge(bucket: usize) -> u64 {
    if bucket < 8 {
        return bucket as u64;
    }
    let exponent = bucket / 8 + 2;
    (8 + bucket as u64 % 8) << (exponent - 3)
}

impl Histogram {
    #[inline(always)]
    pub fn record(&mut self, value: u64) {
        self.counts[bucket_of(value)] += 1;
        self.count += 1;
        self.sum += value;
        self.max = self.max.max(value);
    }

    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts.iter()) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    pub fn clear(&mut self) {
        self.counts.fill(0);
        (self.count, self.sum, self.max) = (0, 0, 0);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn max(&self) -> u64 {
        self.max
    }

    /// Mean in ns, 0 when empty.
    pub fn mean(&self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            self.sum as f64 / self.count as f64
        }
    }

    /// The latency (ns) that `share` (0..=1) of all values do not exceed, linear within its bucket; 0 when empty.
    pub fn percentile(&self, share: f64) -> u64 {
        let rank = ((share * self.count as f64).ceil() as u64).clamp(1, self.count.max(1));
        let mut below = 0;
        for (bucket, &count) in self.counts.iter().enumerate() {
            if below + count >= rank {
                let (low, high) = (lower_edge(bucket), lower_edge(bucket + 1));
                let inside = (rank - below) as f64 / count as f64;
                return (low + ((high - low) as f64 * inside) as u64).min(self.max);
            }
            below += count;
        }
        0
    }

    /// Non-empty buckets as (lower edge in ns, count).
    pub fn buckets(&self) -> Vec<(u64, u64)> {
        let filled = self.counts.iter().enumerate().filter(|(_, &count)| count > 0);
        filled.map(|(bucket, &count)| (lower_edge(bucket), count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_begins_at_its_lower_edge() {
        for bucket in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(lower_edge(bucket)), bucket);
            assert_eq!(bucket_of(lower_edge(bucket + 1) - 1), bucket);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn golden_buckets_of_the_stats_page() {
        for (value, bucket) in [(0, 0), (7, 7), (8, 8), (15, 15), (16, 16), (17, 16), (1000, 63), (4096, 80)]
        {
            assert_eq!(bucket_of(value), bucket, "{value} ns");
        }
    }

    #[test]
    fn percentiles_stay_within_a_bucket_of_the_truth() {
        let mut histogram = Histogram::default();
        (1..=10_000u64).for_each(|value| histogram.record(value));
        for (share, truth) in [(0.5, 5000.0), (0.99, 9900.0), (0.999, 9990.0)] {
            let found = histogram.percentile(share) as f64;
            assert!((found / truth - 1.0).abs() < 0.125, "{share}: {found}");
        }
        assert_eq!(histogram.percentile(1.0), 10_000);
        assert_eq!(histogram.mean(), 5000.5);
    }

    #[test]
    fn an_empty_histogram_answers_zero_and_merging_adds() {
        let mut all = Histogram::default();
        assert_eq!((all.percentile(0.99), all.mean(), all.max()), (0, 0.0, 0));
        let mut one = Histogram::default();
        one.record(100);
        all.merge(&one);
        all.merge(&one);
        assert_eq!((all.count(), all.max(), all.buckets()), (2, 100, vec![(96, 2)]));
        all.clear();
        assert_eq!((all.count(), all.buckets()), (0, vec![]));
    }
}

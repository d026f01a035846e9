//! The bucket rule of the latency histograms: log-linear, eight buckets an octave (docs/formats/stats-page.md).

/// Buckets of one histogram: up to 2^42 ns, a little over an hour.
pub const BUCKETS: usize = 320;

/// The bucket that counts a latency of `ns` nanoseconds.
#[inline]
pub fn bucket_of(ns: u64) -> usize {
    if ns < 8 {
        return ns as usize;
    }
    let exponent = 63 - ns.leading_zeros();
    let index = (exponent as usize - 2) * 8 + ((ns >> (exponent - 3)) & 7) as usize;
    index.min(BUCKETS - 1)
}

/// The least latency in ns that `bucket` counts.
pub fn bucket_lower_edge(bucket: usize) -> u64 {
    if bucket < 8 {
        return bucket as u64;
    }
    let exponent = bucket / 8 + 2;
    (8 + (bucket % 8) as u64) << (exponent - 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_edge_falls_into_its_own_bucket_and_the_value_before_into_the_last() {
        for bucket in 1..BUCKETS {
            let edge = bucket_lower_edge(bucket);
            assert_eq!(bucket_of(edge), bucket, "edge {edge}");
            assert_eq!(bucket_of(edge - 1), bucket - 1, "just below edge {edge}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }
}

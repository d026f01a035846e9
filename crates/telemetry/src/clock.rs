//! Time for reactors: the time stamp counter where it is invariant, else the monotonic clock.

use std::time::{Duration, Instant};

/// Converts ticks to nanoseconds. Ticks of different cores compare, as the counter is invariant and synchronised.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Nanoseconds per tick as a 32.32 fixed point number.
    scale: u64,
}

impl Clock {
    /// Measure the counter's rate against CLOCK_MONOTONIC; takes about 10 ms.
    pub fn calibrate() -> Self {
        let (t0, c0) = (Instant::now(), ticks());
        std::thread::sleep(Duration::from_millis(10));
        let (t1, c1) = (Instant::now(), ticks());
        let scale = ((t1 - t0).as_nanos() << 32) / u128::from((c1 - c0).max(1));
        Self { scale: scale as u64 }
    }

    /// The current tick.
    #[inline(always)]
    pub fn now(&self) -> u64 {
        ticks()
    }

    /// Nanoseconds of a span of ticks.
    #[inline(always)]
    pub fn ns(&self, span: u64) -> u64 {
        ((u128::from(span) * u128::from(self.scale)) >> 32) as u64
    }

    /// Ticks in a span of nanoseconds.
    pub fn ticks(&self, ns: u64) -> u64 {
        ((u128::from(ns) << 32) / u128::from(self.scale.max(1))) as u64
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ticks() -> u64 {
    // SAFETY: RDTSC is available on every x86_64 processor and has no side effect.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn ticks() -> u64 {
    use std::sync::OnceLock;
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_nanoseconds_convert_both_ways() {
        let clock = Clock::calibrate();
        for ns in [1_000u64, 1_000_000, 60_000_000_000] {
            let back = clock.ns(clock.ticks(ns));
            assert!(back.abs_diff(ns) <= ns / 100 + 2, "{ns} became {back}");
        }
    }
}

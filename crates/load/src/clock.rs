//! A clock that costs a few nanoseconds a reading: the time stamp counter where it is invariant, else the kernel's.

use std::time::Duration;

/// Ticks and what they are worth. Two clocks made on one machine count the same ticks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    counter: bool,
    /// Nanoseconds per tick, times 2^32.
    scale: u64,
}

impl Clock {
    /// Measures the counter against CLOCK_MONOTONIC for 20 ms.
    pub(crate) fn calibrated() -> Self {
        if !counter_is_invariant() {
            return Self { counter: false, scale: 1 << 32 };
        }
        let (start, first) = paired_reading();
        std::thread::sleep(Duration::from_millis(20));
        let (end, last) = paired_reading();
        let ticks = u128::from(last.wrapping_sub(first).max(1));
        Self { counter: true, scale: ((u128::from(end - start) << 32) / ticks) as u64 }
    }

    #[inline(always)]
    pub(crate) fn ticks(&self) -> u64 {
        if self.counter {
            counter()
        } else {
            kernel_nanoseconds()
        }
    }

    /// Nanoseconds of a difference of ticks.
    #[inline(always)]
    pub(crate) fn nanoseconds(&self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.scale)) >> 32) as u64
    }

    /// Ticks that `seconds` take.
    pub(crate) fn ticks_in(&self, seconds: f64) -> u64 {
        (seconds * 1e9 * (1u64 << 32) as f64 / self.scale as f64) as u64
    }

    pub(crate) fn seconds(&self, ticks: u64) -> f64 {
        ticks as f64 * self.scale as f64 / (1u64 << 32) as f64 / 1e9
    }
}

/// Both clocks at one moment: of a few readings the one that was interrupted least.
fn paired_reading() -> (u64, u64) {
    let reading = |_| {
        let before = counter();
        let nanoseconds = kernel_nanoseconds();
        let width = counter().wrapping_sub(before);
        (width, nanoseconds, before.wrapping_add(width / 2))
    };
    let (_, nanoseconds, ticks) = (0..8).map(reading).min().expect("eight readings");
    (nanoseconds, ticks)
}

/// CLOCK_MONOTONIC in nanoseconds: one time for all processes of a machine.
pub(crate) fn kernel_nanoseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec to write to; CLOCK_MONOTONIC exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn counter() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 and touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    kernel_nanoseconds()
}

/// CPUID 80000007h EDX bit 8: the counter runs at one rate on all cores and in all sleep states.
#[cfg(target_arch = "x86_64")]
fn counter_is_invariant() -> bool {
    use core::arch::x86_64::__cpuid;
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & (1 << 8) != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn counter_is_invariant() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_follow_the_kernel_clock() {
        let clock = Clock::calibrated();
        let (before, first, after) = (kernel_nanoseconds(), clock.ticks(), kernel_nanoseconds());
        std::thread::sleep(Duration::from_millis(30));
        let (shortest, last, longest) =
            (kernel_nanoseconds() - after, clock.ticks(), kernel_nanoseconds() - before);
        let measured = clock.nanoseconds(last - first) as f64;
        assert!(measured > shortest as f64 * 0.99, "{measured} ns in at least {shortest} ns");
        assert!(measured < longest as f64 * 1.01, "{measured} ns in at most {longest} ns");
        assert!((clock.seconds(clock.ticks_in(2.5)) - 2.5).abs() < 1e-6);
    }
}

//! Threads on cores, and the CPU time they use.

use std::{io, mem};

use crate::LoadError;

/// Binds the calling thread to `core`.
pub(crate) fn bind_current_thread(core: usize) -> Result<(), LoadError> {
    if core >= libc::CPU_SETSIZE as usize {
        let source = io::Error::from_raw_os_error(libc::EINVAL);
        return Err(LoadError::Affinity { core, source });
    }
    // SAFETY: an all-zero cpu_set_t is a valid empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: `core` is below CPU_SETSIZE, so the bit lies within the set.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: `set` is a valid set of the size given; 0 means the calling thread.
    if unsafe { libc::sched_setaffinity(0, mem::size_of_val(&set), &set) } != 0 {
        return Err(LoadError::Affinity { core, source: io::Error::last_os_error() });
    }
    Ok(())
}

/// CPU seconds the calling thread has used.
pub(crate) fn thread_cpu_seconds() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec to write to; the clock exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_that_does_not_exist_is_named() {
        for core in [1000, 100_000] {
            let error = bind_current_thread(core).unwrap_err().to_string();
            assert!(error.contains(&format!("core {core}")), "{error}");
        }
    }

    #[test]
    fn work_costs_cpu_time() {
        let before = thread_cpu_seconds();
        let sum: u64 = (0..2_000_000u64).map(std::hint::black_box).sum();
        assert!(std::hint::black_box(sum) > 0 && thread_cpu_seconds() > before);
    }
}

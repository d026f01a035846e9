//! Hints that a cache line is needed soon.

/// Hint that the cache line at `ptr` will be written soon. Any address is allowed: a prefetch never faults.
#[inline(always)]
pub(crate) fn prefetch_for_write(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHW has no architectural effect, whatever the address; processors without it treat it as a NOP. The
    // intrinsic would need the feature enabled for the whole build.
    unsafe {
        core::arch::asm!("prefetchw [{0}]", in(reg) ptr, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

/// Hint that the cache line at `ptr` is needed soon. Any address is allowed: a prefetch never faults.
#[inline(always)]
pub fn prefetch(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no architectural effect, whatever the address.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(ptr.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

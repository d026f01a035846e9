//! Access to memory that others read and write while we do: rings, in-flight regions.
//!
//! Every store is a release store. A process may be killed between any two of them, and what the driver or the next
//! process finds must be a prefix of what was written, in program order; on x86 that costs nothing but keeps the compiler
//! from moving them. Under test each store is also noted, so that the crash model can stop behind any of them.
//!
//! The fields are little-endian, as is every machine this runs on.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};

macro_rules! shared_word {
    ($word:ty, $atomic:ty, $get:ident, $put:ident) => {
        /// # Safety
        /// `at` is aligned and lies in a live mapping that is only touched atomically.
        #[inline(always)]
        pub(crate) unsafe fn $get(at: *const u8) -> $word {
            // SAFETY: the caller's promise.
            unsafe { (*at.cast::<$atomic>()).load(Ordering::Relaxed) }
        }

        /// # Safety
        /// `at` is aligned and lies in a live mapping that is only touched atomically.
        #[inline(always)]
        pub(crate) unsafe fn $put(at: *mut u8, value: $word) {
            #[cfg(test)]
            journal::note(at, &value.to_ne_bytes());
            // SAFETY: the caller's promise.
            unsafe { (*at.cast::<$atomic>()).store(value, Ordering::Release) }
        }
    };
}

shared_word!(u8, AtomicU8, get_u8, put_u8);
shared_word!(u16, AtomicU16, get_u16, put_u16);
shared_word!(u32, AtomicU32, get_u32, put_u32);
shared_word!(u64, AtomicU64, get_u64, put_u64);

/// The stores made by this thread, in order.
#[cfg(test)]
pub(crate) mod journal {
    use std::cell::RefCell;

    #[derive(Clone, Copy)]
    pub(crate) struct Store {
        pub at: usize,
        pub len: usize,
        pub bytes: [u8; 8],
    }

    thread_local! {
        static STORES: RefCell<Option<Vec<Store>>> = const { RefCell::new(None) };
    }

    pub(super) fn note(at: *mut u8, value: &[u8]) {
        STORES.with_borrow_mut(|stores| {
            if let Some(stores) = stores {
                let mut bytes = [0; 8];
                bytes[..value.len()].copy_from_slice(value);
                stores.push(Store { at: at as usize, len: value.len(), bytes });
            }
        });
    }

    /// Run `step` and answer what it stored.
    pub(crate) fn of<T>(step: impl FnOnce() -> T) -> (T, Vec<Store>) {
        STORES.set(Some(Vec::new()));
        let result = step();
        (result, STORES.take().unwrap_or_default())
    }
}

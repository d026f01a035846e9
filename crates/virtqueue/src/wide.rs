//! A ring's position, laid out so that the processor can hand it from a store to the next load.

/// A 16-bit value in 32 bits of its own.
///
/// The compiler may load 32 bits where it needs 16, as that is shorter. Were the other 16 a field that was just written,
/// too, the load would take from two stores that have not left the store buffer: it has to wait until they have, with
/// all of a request's data before them, which is 150 to 250 ns for 4 KiB that are not in the cache (Intel 64 and IA-32
/// Architectures Optimization Reference Manual, "Store Forwarding").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Wide(u32);

impl Wide {
    #[inline(always)]
    pub const fn new(value: u16) -> Self {
        Self(value as u32)
    }

    #[inline(always)]
    pub const fn get(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    pub fn set(&mut self, value: u16) {
        *self = Self::new(value);
    }

    /// Its value, and 0 from now on.
    #[inline(always)]
    pub fn take(&mut self) -> u16 {
        std::mem::replace(self, Self::new(0)).get()
    }
}

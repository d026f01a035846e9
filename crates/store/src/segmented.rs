//! An array that grows while others read it: elements never move, and nothing is locked.

use std::sync::OnceLock;

/// log2 of the first segment's elements; each segment doubles what there is.
const FIRST: u32 = 6;
const SEGMENTS: usize = 32 - FIRST as usize + 1;

/// See the module.
pub struct Segmented<T> {
    segments: [OnceLock<Box<[T]>>; SEGMENTS],
}

impl<T: Default> Default for Segmented<T> {
    fn default() -> Self {
        Self { segments: [const { OnceLock::new() }; SEGMENTS] }
    }
}

#[inline(always)]
fn locate(index: u32) -> (usize, usize) {
    let segment = (u32::BITS - (index >> FIRST).leading_zeros()) as usize;
    let start = if segment == 0 { 0 } else { 1u32 << (FIRST as usize + segment - 1) };
    (segment, (index - start) as usize)
}

impl<T: Default> Segmented<T> {
    /// None where nothing was made yet.
    #[inline(always)]
    pub fn get(&self, index: u32) -> Option<&T> {
        let (segment, at) = locate(index);
        self.segments[segment].get().map(|elements| &elements[at])
    }

    /// The element, made if need be.
    pub fn make(&self, index: u32) -> &T {
        let (segment, at) = locate(index);
        let len = 1usize << (FIRST as usize + segment.saturating_sub(1));
        &self.segments[segment].get_or_init(|| (0..len).map(|_| T::default()).collect())[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_index_has_an_element_of_its_own() {
        let array = Segmented::<u32>::default();
        assert!(array.get(0).is_none());
        let seen: HashSet<*const u32> = (0..5000).map(|n| std::ptr::from_ref(array.make(n))).collect();
        assert_eq!(seen.len(), 5000);
        assert!(std::ptr::eq(array.make(4999), array.get(4999).unwrap()));
        assert_eq!(locate(u32::MAX).0, SEGMENTS - 1);
    }
}

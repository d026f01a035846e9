//! How blocks of a volume are encrypted. Whoever opens the volume brings it; the store sees no key.

use std::fmt::Debug;

use crate::format::Block;

/// Encrypts each block by itself, depending on its number in the volume, and keeps its length.
pub trait Cipher: Debug + Send + Sync {
    /// In place; block number `first` of the volume comes first.
    fn encrypt(&self, first: u64, blocks: &mut [Block]);

    /// As [`encrypt`](Self::encrypt).
    fn decrypt(&self, first: u64, blocks: &mut [Block]);
}

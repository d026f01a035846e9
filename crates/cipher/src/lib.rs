//! How blocks of volumes are encrypted, and how their keys are kept. The algorithms are OpenSSL's, of the machine's own release.
//!
//! A volume has a key of its own, made when the volume is. On the drive it is *wrapped*: encrypted by the pool's key, which is
//! nowhere on the drive (docs/formats/store.md, "Keys"). Blocks are encrypted with AES-256 in XTS mode (IEEE 1619-2018), each by
//! itself and depending on its number in the volume. XTS hides what is in a block; it does not prove that nobody changed it.

mod error;
mod keys;
mod xts;

pub use error::CipherError;
pub use keys::{PoolKey, VolumeKey, POOL_KEY_LEN, VOLUME_KEY_LEN};
pub use xts::Xts;

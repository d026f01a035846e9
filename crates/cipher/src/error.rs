//! Errors of keys.

use openssl::error::ErrorStack;
use thiserror::Error;

/// Why a key cannot be had or used. No message says anything of a key but its length.
#[derive(Debug, Error)]
pub enum CipherError {
    #[error("a {what} has {wanted} bytes, and this one {have}")]
    Length { what: &'static str, wanted: usize, have: usize },
    /// The two halves are the same, as of a key that nobody drew by lot; XTS is weak then.
    #[error("the key cannot be used: its two halves are the same")]
    Weak,
    #[error(
        "its key was wrapped by another key than the pool has; put that one where `ringstone pool show` says"
    )]
    WrongKey,
    #[error("its wrapped key is damaged; restore the volume from a backup")]
    Damaged,
    #[error("its key is wrapped in a way of a later release ({0}); use that release")]
    Version(u8),
    #[error("OpenSSL failed: {0}")]
    OpenSsl(#[from] ErrorStack),
}

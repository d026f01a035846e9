//! Keys of volumes, and the key of a pool that wraps them.

use std::fmt;

use openssl::rand::rand_bytes;
use openssl::sha::Sha256;
use openssl::symm::{decrypt_aead, encrypt_aead, Cipher};
use zeroize::Zeroizing;

use crate::error::CipherError;

/// Bytes of a pool's key: one of AES-256.
pub const POOL_KEY_LEN: usize = 32;
/// Bytes of a volume's key: two of AES-256.
pub const VOLUME_KEY_LEN: usize = 64;

/// Of a wrapped key: how it is wrapped, which key wrapped it, the nonce, the volume's key, the tag.
const VERSION: u8 = 1;
const ID_LEN: usize = 8;
const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;
const HEAD: usize = 1 + ID_LEN;
const WRAPPED_LEN: usize = HEAD + NONCE_LEN + VOLUME_KEY_LEN + TAG_LEN;
const ID_OF: &[u8] = b"ringstone: which key of a pool";

/// What wraps the keys of a pool's volumes.
pub struct PoolKey(Zeroizing<[u8; POOL_KEY_LEN]>);

/// What the blocks of a volume are encrypted with.
#[derive(Clone)]
pub struct VolumeKey(Zeroizing<[u8; VOLUME_KEY_LEN]>);

fn exactly<const N: usize>(bytes: &[u8], what: &'static str) -> Result<Zeroizing<[u8; N]>, CipherError> {
    let mut key = Zeroizing::new([0; N]);
    if bytes.len() != N {
        return Err(CipherError::Length { what, wanted: N, have: bytes.len() });
    }
    key.copy_from_slice(bytes);
    Ok(key)
}

impl PoolKey {
    /// # Errors
    /// Not [`POOL_KEY_LEN`] bytes.
    pub fn new(bytes: &[u8]) -> Result<Self, CipherError> {
        exactly(bytes, "pool's key").map(Self)
    }

    /// Tells keys of pools apart, and says nothing of them.
    fn id(&self) -> [u8; ID_LEN] {
        let mut hash = Sha256::new();
        hash.update(ID_OF);
        hash.update(&*self.0);
        let mut id = [0; ID_LEN];
        id.copy_from_slice(&hash.finish()[..ID_LEN]);
        id
    }

    /// `wrapped` was wrapped by this key.
    pub fn has_wrapped(&self, wrapped: &[u8]) -> bool {
        wrapped.get(..HEAD).is_some_and(|head| head[0] == VERSION && head[1..] == self.id())
    }

    /// The key as it may be on a drive. No two of one key are the same.
    ///
    /// # Errors
    /// OpenSSL fails.
    pub fn wrap(&self, key: &VolumeKey) -> Result<Vec<u8>, CipherError> {
        let mut wrapped = vec![VERSION];
        wrapped.extend(self.id());
        let mut nonce = [0; NONCE_LEN];
        rand_bytes(&mut nonce)?;
        let mut tag = [0; TAG_LEN];
        let cipher = Cipher::aes_256_gcm();
        let hidden = encrypt_aead(cipher, &*self.0, Some(&nonce), &wrapped, &*key.0, &mut tag)?;
        wrapped.extend(nonce);
        wrapped.extend(hidden);
        wrapped.extend(tag);
        Ok(wrapped)
    }

    /// # Errors
    /// Another key wrapped it, or it is not what was wrapped.
    pub fn unwrap(&self, wrapped: &[u8]) -> Result<VolumeKey, CipherError> {
        match wrapped.first() {
            Some(&VERSION) if wrapped.len() == WRAPPED_LEN => {}
            Some(&VERSION) | None => return Err(CipherError::Damaged),
            Some(version) => return Err(CipherError::Version(*version)),
        }
        if !self.has_wrapped(wrapped) {
            return Err(CipherError::WrongKey);
        }
        let (head, rest) = wrapped.split_at(HEAD);
        let (nonce, rest) = rest.split_at(NONCE_LEN);
        let (hidden, tag) = rest.split_at(VOLUME_KEY_LEN);
        let key = decrypt_aead(Cipher::aes_256_gcm(), &*self.0, Some(nonce), head, hidden, tag);
        VolumeKey::new(&Zeroizing::new(key.map_err(|_| CipherError::Damaged)?))
    }
}

impl VolumeKey {
    /// # Errors
    /// Not [`VOLUME_KEY_LEN`] bytes, or of two halves that are the same.
    pub fn new(bytes: &[u8]) -> Result<Self, CipherError> {
        let key: Zeroizing<[u8; VOLUME_KEY_LEN]> = exactly(bytes, "volume's key")?;
        match key[..VOLUME_KEY_LEN / 2] == key[VOLUME_KEY_LEN / 2..] {
            true => Err(CipherError::Weak),
            false => Ok(Self(key)),
        }
    }

    /// A new one, by lot.
    ///
    /// # Errors
    /// OpenSSL fails.
    pub fn draw() -> Result<Self, CipherError> {
        let mut key = Zeroizing::new([0; VOLUME_KEY_LEN]);
        rand_bytes(&mut *key)?;
        Self::new(&*key)
    }

    /// For nobody but a successor of this process.
    pub fn bytes(&self) -> &[u8; VOLUME_KEY_LEN] {
        &self.0
    }
}

impl fmt::Debug for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PoolKey")
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VolumeKey")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(byte: u8) -> PoolKey {
        PoolKey::new(&[byte; POOL_KEY_LEN]).unwrap()
    }

    #[test]
    fn a_wrapped_key_comes_back_with_the_key_that_wrapped_it_alone() {
        let key = VolumeKey::draw().unwrap();
        let wrapped = pool(1).wrap(&key).unwrap();
        assert_eq!(wrapped.len(), WRAPPED_LEN);
        assert_eq!(pool(1).unwrap(&wrapped).unwrap().bytes(), key.bytes());
        assert!(pool(1).has_wrapped(&wrapped) && !pool(2).has_wrapped(&wrapped));
        assert!(matches!(pool(2).unwrap(&wrapped), Err(CipherError::WrongKey)));
        assert_ne!(wrapped, pool(1).wrap(&key).unwrap());
        let has = |bytes: &[u8]| wrapped.windows(bytes.len()).any(|window| window == bytes);
        assert!(!key.bytes().chunks(8).any(has) && !has(&[1; 8]));
    }

    #[test]
    fn what_was_changed_on_the_drive_is_never_a_key() {
        let wrapped = pool(1).wrap(&VolumeKey::draw().unwrap()).unwrap();
        for at in 0..wrapped.len() {
            let mut changed = wrapped.clone();
            changed[at] ^= 1;
            let error = pool(1).unwrap(&changed).unwrap_err();
            let right = match at {
                0 => matches!(error, CipherError::Version(0)),
                1..HEAD => matches!(error, CipherError::WrongKey),
                _ => matches!(error, CipherError::Damaged),
            };
            assert!(right, "byte {at}: {error}");
        }
        for len in 0..wrapped.len() {
            assert!(matches!(pool(1).unwrap(&wrapped[..len]), Err(CipherError::Damaged)));
        }
    }

    #[test]
    fn keys_have_their_length_and_are_not_shown() {
        assert!(matches!(PoolKey::new(&[1; 31]), Err(CipherError::Length { have: 31, .. })));
        assert!(matches!(VolumeKey::new(&[1; 65]), Err(CipherError::Length { have: 65, .. })));
        assert!(matches!(VolumeKey::new(&[1; 64]), Err(CipherError::Weak)));
        assert_ne!(VolumeKey::draw().unwrap().bytes(), VolumeKey::draw().unwrap().bytes());
        assert_eq!(format!("{:?} {:?}", pool(9), VolumeKey::draw().unwrap()), "PoolKey VolumeKey");
    }
}

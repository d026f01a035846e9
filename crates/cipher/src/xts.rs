//! AES-256-XTS of whole blocks, from any thread.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use openssl::cipher::Cipher;
use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;
use ringstone_store::{Block, Cipher as StoreCipher};

use crate::error::CipherError;
use crate::keys::VolumeKey;

/// Threads that have a context of their own. More of them share.
const CONTEXTS: usize = 8;

/// A number of this thread, by which it finds its context.
fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}

/// One direction of both.
struct Contexts {
    encrypt: CipherCtx,
    decrypt: CipherCtx,
}

/// Encrypts the blocks of one volume.
pub struct Xts {
    key: VolumeKey,
    /// OpenSSL's contexts are for one thread at a time. Reactors are few and each has its own, so nobody waits.
    contexts: Box<[Mutex<Contexts>]>,
}

impl Contexts {
    fn new(key: &VolumeKey) -> Result<Self, ErrorStack> {
        let (mut encrypt, mut decrypt) = (CipherCtx::new()?, CipherCtx::new()?);
        encrypt.encrypt_init(Some(Cipher::aes_256_xts()), Some(key.bytes()), None)?;
        decrypt.decrypt_init(Some(Cipher::aes_256_xts()), Some(key.bytes()), None)?;
        Ok(Self { encrypt, decrypt })
    }
}

/// IEEE 1619-2018, 5.1: the number of the data unit, in little endian.
fn tweak(number: u64) -> [u8; 16] {
    u128::from(number).to_le_bytes()
}

impl Xts {
    /// # Errors
    /// OpenSSL fails.
    pub fn new(key: VolumeKey) -> Result<Self, CipherError> {
        let contexts: Result<_, ErrorStack> =
            (0..CONTEXTS).map(|_| Contexts::new(&key).map(Mutex::new)).collect();
        Ok(Self { contexts: contexts?, key })
    }

    /// For nobody but a successor of this process.
    pub fn key(&self) -> &VolumeKey {
        &self.key
    }

    fn context(&self) -> MutexGuard<'_, Contexts> {
        self.contexts[thread_number() % CONTEXTS].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl StoreCipher for Xts {
    fn encrypt(&self, first: u64, blocks: &mut [Block]) {
        let context = &mut self.context().encrypt;
        for (number, block) in (first..).zip(blocks) {
            let len = block.0.len();
            let done = context
                .encrypt_init(None, None, Some(&tweak(number)))
                .and_then(|()| context.cipher_update_inplace(&mut block.0, len));
            // The key is set and the block whole, so there is nothing that can fail; a block as it is must never get to the drive.
            assert!(matches!(done, Ok(n) if n == len), "AES-256-XTS failed: {done:?}");
        }
    }

    fn decrypt(&self, first: u64, blocks: &mut [Block]) {
        let context = &mut self.context().decrypt;
        for (number, block) in (first..).zip(blocks) {
            let len = block.0.len();
            let done = context
                .decrypt_init(None, None, Some(&tweak(number)))
                .and_then(|()| context.cipher_update_inplace(&mut block.0, len));
            assert!(matches!(done, Ok(n) if n == len), "AES-256-XTS failed: {done:?}");
        }
    }
}

impl fmt::Debug for Xts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Xts")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xts() -> Xts {
        let key: Vec<u8> = (0..64).map(|byte| byte * 3 + 1).collect();
        Xts::new(VolumeKey::new(&key).unwrap()).unwrap()
    }

    fn blocks(count: usize) -> Vec<Block> {
        (0..count).map(|_| Block(std::array::from_fn(|at| (at % 251) as u8))).collect()
    }

    /// XTS written out from the standard over AES-ECB: c = E1(p ^ t) ^ t, where t begins as E2(number) and is multiplied by x in
    /// GF(2^128) for each 16 bytes.
    fn by_the_standard(key: &[u8; 64], number: u64, block: &[u8; 4096]) -> Vec<u8> {
        use openssl::symm::{Cipher, Crypter, Mode};
        let ecb = |key: &[u8], from: &[u8]| {
            let mut crypter = Crypter::new(Cipher::aes_256_ecb(), Mode::Encrypt, key, None).unwrap();
            crypter.pad(false);
            let mut out = vec![0; from.len() + 16];
            let n = crypter.update(from, &mut out).unwrap();
            out.truncate(n);
            out
        };
        let first = ecb(&key[32..], &tweak(number));
        let mut t = u128::from_le_bytes(first.try_into().unwrap());
        let mut out = Vec::new();
        for piece in block.chunks(16) {
            let mixed = u128::from_le_bytes(piece.try_into().unwrap()) ^ t;
            let hidden = ecb(&key[..32], &mixed.to_le_bytes());
            out.extend((u128::from_le_bytes(hidden.try_into().unwrap()) ^ t).to_le_bytes());
            t = (t << 1) ^ if t >> 127 == 1 { 0x87 } else { 0 };
        }
        out
    }

    #[test]
    fn a_block_is_encrypted_as_the_standard_says() {
        for first in [0, 1, u64::from(u32::MAX), u64::MAX / 4096] {
            let (xts, mut found, plain) = (xts(), blocks(3), blocks(3));
            xts.encrypt(first, &mut found);
            for (number, (found, plain)) in (first..).zip(found.iter().zip(&plain)) {
                assert!(found.0[..] == by_the_standard(xts.key().bytes(), number, &plain.0));
            }
            xts.decrypt(first, &mut found);
            assert!(found.iter().zip(&plain).all(|(one, other)| one.0 == other.0));
        }
    }

    #[test]
    fn many_threads_encrypt_at_once() {
        let (xts, plain) = (xts(), blocks(1));
        std::thread::scope(|scope| {
            for number in 0..3 * CONTEXTS as u64 {
                let (xts, plain) = (&xts, &plain);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let mut block = plain.clone();
                        xts.encrypt(number, &mut block);
                        assert!(block[0].0 != plain[0].0);
                        xts.decrypt(number, &mut block);
                        assert!(block[0].0 == plain[0].0);
                    }
                });
            }
        });
    }
}

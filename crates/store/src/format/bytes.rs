//! Blocks of memory that direct I/O takes, and numbers in them.

/// 4096 bytes, aligned as direct I/O needs it.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Block(pub [u8; 4096]);

impl Default for Block {
    fn default() -> Self {
        Self([0; 4096])
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Block")
    }
}

/// `blocks` of them.
pub fn zeroed(blocks: usize) -> Box<[Block]> {
    vec![Block::default(); blocks].into_boxed_slice()
}

/// Appends numbers to bytes.
#[derive(Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// A length in one byte, then the bytes. They are checked to be at most 255 before they come here.
    pub fn bytes(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() < 256);
        self.u8(bytes.len() as u8);
        self.0.extend_from_slice(bytes);
    }

    /// As [`bytes`](Self::bytes).
    pub fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }
}

/// Takes numbers off bytes; None where they end.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn bytes16(&mut self) -> Option<[u8; 16]> {
        self.array()
    }

    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }

    pub fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_vec()).ok()
    }
}

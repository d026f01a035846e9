//! Messages as bytes: decoding what a frontend sends and encoding replies. No I/O.

use crate::error::SessionError;

/// Bytes of a header: request, flags, payload size.
pub const HEADER_LEN: usize = 12;
/// The longest payload of any message we know, SET_CONFIG with 256 bytes, rounded up.
pub const MAX_PAYLOAD: usize = 512;
/// Bytes of configuration space a frontend may ask for at once ("VHOST_USER_MAX_CONFIG_SIZE").
pub const MAX_CONFIG: usize = 256;
/// Memory regions of one SET_MEM_TABLE, and so file descriptors of one message.
pub const MAX_FDS: usize = 8;
/// Memory slots that ADD_MEM_REG can fill; what QEMU's own limit of 512 leaves after its reserve of 3.
pub const MAX_MEMORY_SLOTS: usize = 509;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// In SET_VRING_KICK, CALL and ERR: no descriptor is attached, the other side polls.
const VRING_NO_FD: u64 = 1 << 8;

/// Protocol feature bits.
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const GET_VRING_BASE_INFLIGHT: u64 = 1 << 20;
    pub const GET_VRING_BASE_SKIP_DRAIN: u64 = 1 << 23;

    /// All that this backend speaks.
    pub const OFFERED: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS
        | GET_VRING_BASE_INFLIGHT
        | GET_VRING_BASE_SKIP_DRAIN;
}

/// Request codes, front-end message types.
pub(crate) mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
}

/// BACKEND_CONFIG_CHANGE_MSG, a back-end message type.
const CONFIG_CHANGE: u32 = 2;

/// A message header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub request: u32,
    flags: u32,
    /// Bytes of payload.
    pub len: u32,
}

impl Header {
    /// Decode and check a header.
    ///
    /// # Errors
    /// A wrong version, a reply, or a payload longer than any.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, SessionError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let header = Self { request: word(0), flags: word(4), len: word(8) };
        if header.flags & VERSION_MASK != VERSION {
            return Err(SessionError::Version { version: header.flags & VERSION_MASK });
        }
        if header.flags & FLAG_REPLY != 0 {
            return Err(SessionError::NotARequest { request: header.request });
        }
        if header.len as usize > MAX_PAYLOAD {
            return Err(SessionError::TooLong { request: header.request, len: header.len });
        }
        Ok(header)
    }

    /// The frontend wants to hear whether it worked, even where the message has no answer of its own.
    pub fn need_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}

/// A memory region as it comes over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireRegion {
    pub guest: u64,
    pub len: u64,
    pub user: u64,
    pub offset: u64,
}

/// The in-flight region's description.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WireInflight {
    pub len: u64,
    pub offset: u64,
    pub queues: u16,
    pub queue_size: u16,
}

/// A decoded request; `index` names a vring and is not checked yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<WireRegion>),
    /// Bytes and offset of the dirty bitmap in the descriptor that comes along.
    SetLogBase {
        len: u64,
        offset: u64,
    },
    SetLogFd,
    SetVringNum {
        index: u32,
        num: u32,
    },
    SetVringAddr {
        index: u32,
        descriptors: u64,
        used: u64,
        available: u64,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    /// GET_VRING_BASE, or GET_VRING_BASE_SKIP_DRAIN.
    GetVringBase {
        index: u32,
        skip_drain: bool,
    },
    SetVringKick {
        index: u32,
        fd: bool,
    },
    SetVringCall {
        index: u32,
        fd: bool,
    },
    SetVringErr {
        index: u32,
        fd: bool,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    SetBackendReqFd,
    GetConfig {
        offset: u32,
        len: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        flags: u32,
        bytes: Vec<u8>,
    },
    GetInflightFd(WireInflight),
    SetInflightFd(WireInflight),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(WireRegion),
    RemMemReg(WireRegion),
    SetStatus(u64),
    GetStatus,
}

/// Reads little-endian fields off a payload.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*now)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn region(&mut self) -> Option<WireRegion> {
        Some(WireRegion { guest: self.u64()?, len: self.u64()?, user: self.u64()?, offset: self.u64()? })
    }

    fn inflight(&mut self) -> Option<WireInflight> {
        Some(WireInflight {
            len: self.u64()?,
            offset: self.u64()?,
            queues: self.u16()?,
            queue_size: self.u16()?,
        })
    }
}

impl Request {
    /// Decode the payload of a message with `header`.
    ///
    /// # Errors
    /// An unknown request, or a payload that does not fit it.
    pub fn decode(header: &Header, payload: &[u8]) -> Result<Self, SessionError> {
        let wrong = SessionError::WrongLength { request: header.request, len: payload.len() };
        let mut fields = Fields(payload);
        let request = Self::fields(header.request, &mut fields)?.ok_or(wrong)?;
        if !fields.0.is_empty() {
            return Err(SessionError::WrongLength { request: header.request, len: payload.len() });
        }
        Ok(request)
    }

    /// `Ok(None)`: too short.
    fn fields(request: u32, f: &mut Fields<'_>) -> Result<Option<Self>, SessionError> {
        let decoded = (|| {
            Some(match request {
                code::GET_FEATURES => Self::GetFeatures,
                code::SET_FEATURES => Self::SetFeatures(f.u64()?),
                code::SET_OWNER => Self::SetOwner,
                code::RESET_OWNER => Self::ResetOwner,
                code::SET_MEM_TABLE => {
                    let count = f.u32()?;
                    f.u32()?;
                    if count as usize > MAX_FDS {
                        return None;
                    }
                    Self::SetMemTable((0..count).map(|_| f.region()).collect::<Option<_>>()?)
                }
                code::SET_LOG_BASE => Self::SetLogBase { len: f.u64()?, offset: f.u64()? },
                code::SET_LOG_FD => Self::SetLogFd,
                code::SET_VRING_NUM => Self::SetVringNum { index: f.u32()?, num: f.u32()? },
                code::SET_VRING_ADDR => {
                    let index = f.u32()?;
                    f.u32()?;
                    let (descriptors, used, available) = (f.u64()?, f.u64()?, f.u64()?);
                    f.u64()?;
                    Self::SetVringAddr { index, descriptors, used, available }
                }
                code::SET_VRING_BASE => Self::SetVringBase { index: f.u32()?, base: f.u32()? },
                code::GET_VRING_BASE | code::GET_VRING_BASE_SKIP_DRAIN => {
                    let index = f.u32()?;
                    f.u32()?;
                    Self::GetVringBase { index, skip_drain: request == code::GET_VRING_BASE_SKIP_DRAIN }
                }
                code::SET_VRING_KICK => {
                    let (index, fd) = vring_fd(f.u64()?);
                    Self::SetVringKick { index, fd }
                }
                code::SET_VRING_CALL => {
                    let (index, fd) = vring_fd(f.u64()?);
                    Self::SetVringCall { index, fd }
                }
                code::SET_VRING_ERR => {
                    let (index, fd) = vring_fd(f.u64()?);
                    Self::SetVringErr { index, fd }
                }
                code::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
                code::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(f.u64()?),
                code::GET_QUEUE_NUM => Self::GetQueueNum,
                code::SET_VRING_ENABLE => Self::SetVringEnable { index: f.u32()?, enable: f.u32()? != 0 },
                code::SET_BACKEND_REQ_FD => Self::SetBackendReqFd,
                code::GET_CONFIG => {
                    let (offset, len, flags) = (f.u32()?, f.u32()?, f.u32()?);
                    // The bytes that follow are room for the answer.
                    f.0 = f.0.get(len as usize..)?;
                    Self::GetConfig { offset, len, flags }
                }
                code::SET_CONFIG => {
                    let (offset, len, flags) = (f.u32()?, f.u32()?, f.u32()?);
                    let bytes = f.0.get(..len as usize)?.to_vec();
                    f.0 = &f.0[len as usize..];
                    Self::SetConfig { offset, flags, bytes }
                }
                code::GET_INFLIGHT_FD => Self::GetInflightFd(padded(f)?),
                code::SET_INFLIGHT_FD => Self::SetInflightFd(padded(f)?),
                code::RESET_DEVICE => Self::ResetDevice,
                code::GET_MAX_MEM_SLOTS => Self::GetMaxMemSlots,
                code::ADD_MEM_REG => {
                    f.u64()?;
                    Self::AddMemReg(f.region()?)
                }
                code::REM_MEM_REG => {
                    f.u64()?;
                    Self::RemMemReg(f.region()?)
                }
                code::SET_STATUS => Self::SetStatus(f.u64()?),
                code::GET_STATUS => Self::GetStatus,
                _ => return None,
            })
        })();
        if decoded.is_none() && !known(request) {
            return Err(SessionError::Unknown { request });
        }
        Ok(decoded)
    }

    /// File descriptors that must come with the message: least and most.
    pub(crate) fn descriptors(&self) -> (usize, usize) {
        match self {
            Self::SetMemTable(regions) => (regions.len(), regions.len()),
            Self::SetVringKick { fd, .. } | Self::SetVringCall { fd, .. } | Self::SetVringErr { fd, .. } => {
                (usize::from(*fd), usize::from(*fd))
            }
            Self::SetBackendReqFd
            | Self::SetInflightFd(_)
            | Self::AddMemReg(_)
            | Self::SetLogBase { .. }
            | Self::SetLogFd => (1, 1),
            // "The back-end ... must close the file descriptor" that some frontends send along.
            Self::RemMemReg(_) => (0, 1),
            _ => (0, 0),
        }
    }
}

/// C compilers pad the in-flight description to a multiple of 8; frontends send it with the padding or without.
fn padded(f: &mut Fields<'_>) -> Option<WireInflight> {
    let inflight = f.inflight()?;
    if f.0.len() == 4 {
        f.u32()?;
    }
    Some(inflight)
}

fn vring_fd(value: u64) -> (u32, bool) {
    ((value & 0xff) as u32, value & VRING_NO_FD == 0)
}

fn known(request: u32) -> bool {
    matches!(request, 1..=18 | 21 | 24 | 25 | 31 | 32 | 34 | 36..=40 | 45)
}

/// A reply's payload, encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub payload: Vec<u8>,
}

impl Reply {
    pub fn u64(value: u64) -> Self {
        Self { payload: value.to_le_bytes().to_vec() }
    }

    /// `struct vhost_vring_state`: GET_VRING_BASE.
    pub(crate) fn vring_state(index: u32, value: u32) -> Self {
        let mut payload = index.to_le_bytes().to_vec();
        payload.extend(value.to_le_bytes());
        Self { payload }
    }

    /// GET_CONFIG's answer; no bytes mean that the request was not acceptable.
    pub(crate) fn config(offset: u32, flags: u32, bytes: &[u8]) -> Self {
        let mut payload = offset.to_le_bytes().to_vec();
        payload.extend((bytes.len() as u32).to_le_bytes());
        payload.extend(flags.to_le_bytes());
        payload.extend(bytes);
        Self { payload }
    }

    pub(crate) fn inflight(inflight: &WireInflight) -> Self {
        let mut payload = inflight.len.to_le_bytes().to_vec();
        payload.extend(inflight.offset.to_le_bytes());
        payload.extend(inflight.queues.to_le_bytes());
        payload.extend(inflight.queue_size.to_le_bytes());
        payload.extend([0u8; 4]);
        Self { payload }
    }

    /// The whole message.
    pub fn encode(&self, request: u32) -> Vec<u8> {
        message(request, VERSION | FLAG_REPLY, &self.payload)
    }
}

/// The message that tells a frontend to read the configuration space again.
pub(crate) fn config_change() -> Vec<u8> {
    message(CONFIG_CHANGE, VERSION, &[])
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend(request.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(request: u32, flags: u32, len: u32) -> Result<Header, SessionError> {
        let mut bytes = [0u8; HEADER_LEN];
        bytes[..4].copy_from_slice(&request.to_le_bytes());
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..].copy_from_slice(&len.to_le_bytes());
        Header::decode(&bytes)
    }

    #[test]
    fn headers_that_no_frontend_sends_are_refused() {
        assert!(matches!(header(1, 2, 0), Err(SessionError::Version { version: 2 })));
        assert!(matches!(header(1, 1 | FLAG_REPLY, 0), Err(SessionError::NotARequest { .. })));
        assert!(matches!(header(5, 1, 70_000), Err(SessionError::TooLong { .. })));
        assert!(header(1, 1 | FLAG_NEED_REPLY, 0).unwrap().need_reply());
    }

    #[test]
    fn payloads_that_are_short_long_or_unknown_are_told_apart() {
        let decode = |request, payload: &[u8]| {
            Request::decode(&header(request, 1, payload.len() as u32).unwrap(), payload)
        };
        assert_eq!(decode(code::SET_FEATURES, &[1, 0, 0, 0, 0, 0, 0, 0]).unwrap(), Request::SetFeatures(1));
        assert!(matches!(decode(code::SET_FEATURES, &[1]), Err(SessionError::WrongLength { .. })));
        assert!(matches!(decode(code::SET_FEATURES, &[0; 9]), Err(SessionError::WrongLength { .. })));
        assert!(matches!(decode(99, &[]), Err(SessionError::Unknown { request: 99 })));
        // Nine regions where eight are allowed.
        let mut table = vec![9, 0, 0, 0, 0, 0, 0, 0];
        table.extend([0u8; 9 * 32]);
        assert!(matches!(decode(code::SET_MEM_TABLE, &table), Err(SessionError::WrongLength { .. })));
    }

    #[test]
    fn a_vring_descriptor_message_says_whether_one_comes() {
        let payload = (3u64 | VRING_NO_FD).to_le_bytes();
        let request = Request::decode(&header(code::SET_VRING_CALL, 1, 8).unwrap(), &payload).unwrap();
        assert_eq!(request, Request::SetVringCall { index: 3, fd: false });
        assert_eq!(request.descriptors(), (0, 0));
    }
}

//! The state as it travels: docs/formats/handover.md, with golden vectors beside it.
//!
//! A release may add fields (with a default) and messages' fields; a reader passes over what it does not know. What a reader
//! must understand to go on rightly is named in `requires`, so that an older release refuses it and the old process goes on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ringstone_vhost_user::SessionState;
use serde::{Deserialize, Serialize};

use crate::backend::BackendSpec;

/// Version of the format. It changes only when a reader of the one before could not even refuse.
pub const FORMAT: u32 = 1;

/// What this release understands of `HandoverState::requires`.
pub const UNDERSTOOD: &[&str] = &["packed-rings", "dirty-log", "shared", "stores", "keys"];

/// Kinds of messages.
pub mod kind {
    pub const HELLO: u32 = 1;
    pub const WELCOME: u32 = 2;
    pub const READY: u32 = 3;
    pub const STATE: u32 = 4;
    pub const INSTALLED: u32 = 5;
    pub const GO: u32 = 6;
    pub const SERVING: u32 = 7;
    pub const REFUSED: u32 = 8;
    pub const IMAGES: u32 = 9;
    pub const OPENED: u32 = 10;
    pub const FREE: u32 = 11;
    pub const OWNED: u32 = 12;
}

/// HELLO, from the new process; WELCOME, from the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    pub version: String,
    /// Formats that the sender reads and writes.
    pub formats: Vec<u32>,
    /// Of the old process, how many file descriptors it has open: what the new one makes room for.
    #[serde(default)]
    pub descriptors: usize,
    /// Of the new process: it takes images over before the rest.
    #[serde(default)]
    pub images: bool,
}

/// IMAGES: volumes on images of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesState {
    pub volumes: Vec<VolumeState>,
}

/// OPENED.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// What the clusters know the new process by.
    #[serde(default)]
    pub clients: Vec<String>,
}

/// REFUSED, from either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub reason: String,
}

/// SERVING.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// CLOCK_MONOTONIC ns at which the last vring was with its reactor.
    pub since_ns: u64,
}

/// STATE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverState {
    pub format: u32,
    /// Of the process that hands over.
    pub version: String,
    /// What a reader must understand.
    #[serde(default)]
    pub requires: Vec<String>,
    /// CLOCK_MONOTONIC ns at which the old process began to stop its vrings.
    pub stopped_ns: u64,
    /// Stores that volumes are in. Their keepers rest, and the new process reads them from the drive.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stores: Vec<StoreState>,
    pub volumes: Vec<VolumeState>,
    pub attachments: Vec<AttachmentState>,
    /// Descriptors of the control side, by name.
    #[serde(default)]
    pub extras: BTreeMap<String, usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreState {
    pub path: PathBuf,
    /// Its drive, with the lock on it.
    pub fd: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeState {
    pub name: String,
    pub serial: String,
    pub size: u64,
    pub block_size: u32,
    pub read_only: bool,
    /// As `open_volume` takes it.
    pub backend: BackendSpec,
    /// What it is open as: `mapped`, `file`, `rbd`, `store` or `null`.
    pub drive: String,
    #[serde(default)]
    pub fd: Option<usize>,
    /// A file with a bit per chunk of a mapped drive that has memory; without it the file itself is asked.
    #[serde(default)]
    pub presence: Option<usize>,
    /// A file in memory with the key of an encrypted volume. It is nowhere else in the handover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentState {
    pub volume: String,
    pub path: String,
    pub queues: usize,
    #[serde(default)]
    pub shared: bool,
    pub listener: usize,
    pub frontends: Vec<FrontendState>,
    /// Which of the frontends may run vrings.
    #[serde(default)]
    pub writer: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendState {
    pub connection: usize,
    /// Bytes of a message that is not complete yet, and descriptors that came with them.
    #[serde(default)]
    pub begun: Vec<u8>,
    #[serde(default)]
    pub begun_fds: Vec<usize>,
    /// The write cache as the driver set it.
    #[serde(default = "yes")]
    pub cache: bool,
    pub session: SessionState,
}

fn yes() -> bool {
    true
}

impl HandoverState {
    /// # Errors
    /// It is not JSON of this format, or requires what this release does not understand: a sentence.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let state: Self = serde_json::from_slice(json)
            .map_err(|error| format!("the state handed over cannot be read: {error}"))?;
        if state.format != FORMAT {
            return Err(format!(
                "the state handed over has format {}, and this release reads {FORMAT}",
                state.format
            ));
        }
        let unknown: Vec<&str> =
            state.requires.iter().map(String::as_str).filter(|word| !UNDERSTOOD.contains(word)).collect();
        if !unknown.is_empty() {
            let (version, words) = (&state.version, unknown.join(", "));
            return Err(format!("release {version} hands over what this release does not know: {words}"));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(name: &str) -> Vec<u8> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/formats/vectors/");
        std::fs::read(format!("{folder}{name}")).unwrap()
    }

    /// What this release writes is what the vector says, to the byte: a change of the format is seen here.
    #[test]
    fn the_golden_vector_is_read_and_written_unchanged() {
        let bytes = vector("handover-1.json");
        let state = HandoverState::parse(&bytes).unwrap();
        assert_eq!(state.attachments[0].frontends[0].session.vrings[0].base, Some(0x8005_8005));
        let mut written = serde_json::to_vec_pretty(&state).unwrap();
        written.push(b'\n');
        assert_eq!(String::from_utf8(written).unwrap(), String::from_utf8(bytes).unwrap());
    }

    /// The first release that could hand over wrote no more than this.
    #[test]
    fn the_least_that_a_release_wrote_is_still_read() {
        let state = HandoverState::parse(&vector("handover-1-least.json")).unwrap();
        let attachment = &state.attachments[0];
        assert!(!attachment.shared && attachment.frontends[0].cache);
        assert_eq!(attachment.frontends[0].session.inflight, None);
    }

    /// A newer release's fields are passed over; what it requires is not.
    #[test]
    fn a_newer_release_is_understood_or_refused() {
        let state = HandoverState::parse(&vector("handover-1-newer.json")).unwrap();
        assert_eq!(state.version, "9.0.0");
        let refused = HandoverState::parse(&vector("handover-1-unknown-requirement.json")).unwrap_err();
        assert!(refused.contains("9.0.0") && refused.contains("quantum-rings"), "{refused}");
        assert!(HandoverState::parse(br#"{"format":2}"#).is_err());
    }
}

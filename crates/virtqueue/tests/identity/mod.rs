//! The crate `virtio-driver` has address translators, but one can only be had of a connection.
//!
//! So there is one: a backend that says just enough for the connection to come about.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::OnceLock;

use virtio_driver::{ByteValued, IovaTranslator, VhostUser, VirtioTransport};

#[derive(Clone, Copy)]
#[repr(transparent)]
struct NoConfig(u8);

// SAFETY: any byte is a valid value, and there is no padding.
unsafe impl ByteValued for NoConfig {}

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_MAX_MEM_SLOTS: u32 = 36;
/// Version 1, and a reply.
const REPLY: u32 = 5;

/// One that takes addresses of this process for those of the guest.
pub fn translator() -> Box<dyn IovaTranslator> {
    static CONNECTION: OnceLock<VhostUser<NoConfig, u64>> = OnceLock::new();
    let connection = CONNECTION.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let backend = std::thread::spawn(move || converse(&mut listener.accept().unwrap().0));
        let connection = VhostUser::new(path.to_str().unwrap(), 0).unwrap();
        backend.join().unwrap();
        connection
    });
    connection.iova_translator()
}

/// Answer up to the last question that is asked while connecting.
fn converse(socket: &mut UnixStream) {
    loop {
        let mut header = [0; 12];
        socket.read_exact(&mut header).unwrap();
        let [request, _, size] =
            [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
        socket.read_exact(&mut vec![0; size as usize]).unwrap();
        let value: u64 = match request {
            // Protocol features.
            GET_FEATURES => 1 << 30,
            // REPLY_ACK, CONFIG and CONFIGURE_MEM_SLOTS.
            GET_PROTOCOL_FEATURES => 1 << 3 | 1 << 9 | 1 << 15,
            GET_MAX_MEM_SLOTS => 8,
            _ => continue,
        };
        let mut reply = [request, REPLY, 8].map(u32::to_le_bytes).concat();
        reply.extend(value.to_le_bytes());
        socket.write_all(&reply).unwrap();
        if request == GET_MAX_MEM_SLOTS {
            return;
        }
    }
}

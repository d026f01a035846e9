//! A frontend sends whatever it likes over a vhost-user socket, descriptors too, and may have the rings it sets up served.
//!
//! The input is a list of records (see `ringstone_fuzz::frontend`), each a message or bytes for the guest's memory. They go through a real
//! socket into a `Connection` and its `Session`; what may run is run as the control thread and a reactor would run it.
//! Nothing may panic or hang, a refused message must change nothing, and no descriptor may be left open.
#![no_main]

use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use ringstone_fuzz::frontend::{
    open_descriptors, send, Descriptors, Record, GUEST_MEMORY, MEMORY_RECORD, TRUNCATE_RECORD,
};
use ringstone_fuzz::serve;
use ringstone_vhost_user::{
    Connection, DeviceModel, Incoming, Quiet, Reaper, Session, SessionError, F_LOG_ALL, F_PROTOCOL_FEATURES,
    HEADER_LEN,
};
use ringstone_virtio_blk::Geometry;
use ringstone_virtqueue::{Chain, PackedRing, SplitRing, VirtRing};

const QUEUES: u16 = 4;
const FEATURES: u64 = 1 << 34 | 1 << 32 | 1 << 29 | 1 << 28 | 1 << 12;
const CONFIG_LEN: usize = 60;
struct Disk;

impl DeviceModel for Disk {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn max_queues(&self) -> u16 {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        vec![0x5a; CONFIG_LEN]
    }

    fn set_config(&mut self, offset: usize, bytes: &[u8]) -> bool {
        offset == 32 && bytes.len() == 1
    }

    fn set_features(&mut self, features: u64) {
        assert_eq!(features & !(FEATURES | F_PROTOCOL_FEATURES | F_LOG_ALL), 0);
    }
}

enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// The control thread and the reactor of one connection.
struct Backend {
    connection: Connection,
    session: Session<Disk>,
    rings: [Option<Ring>; QUEUES as usize],
    chain: Chain,
}

impl Backend {
    fn new(socket: UnixStream, reaper: &Reaper) -> Self {
        Self {
            connection: Connection::new(socket, reaper.clone()).expect("a socket that does not block"),
            session: Session::new(Disk, reaper.clone()),
            rings: Default::default(),
            chain: Chain::default(),
        }
    }

    /// Take every whole message that has come.
    fn receive(&mut self) -> Result<(), SessionError> {
        while let Some(incoming) = self.connection.receive()? {
            self.apply(incoming)?;
            self.run();
        }
        Ok(())
    }

    fn apply(&mut self, incoming: Incoming) -> Result<(), SessionError> {
        match self.session.needs_quiet(&incoming.request) {
            Quiet::None => {}
            Quiet::Vring(index) => self.stop(index),
            Quiet::All => (0..QUEUES).for_each(|index| self.stop(index)),
        }
        let code = incoming.header.request;
        let before = self.state();
        let applied = self.session.apply(code, incoming.request, incoming.fds).inspect_err(|error| {
            assert_eq!(before, self.state(), "refused and yet applied: {error}");
        })?;
        if let Some(reply) = applied.reply {
            assert!(reply.encode(code).len() <= HEADER_LEN + 12 + 256);
            self.connection.reply(code, &reply, applied.descriptor.as_ref())?;
        }
        Ok(())
    }

    /// What a refused message must leave as it is.
    fn state(&self) -> (u64, u64, usize, Vec<u32>) {
        let session = &self.session;
        let sizes = (0..QUEUES).map(|index| session.vring_size(index)).collect();
        (session.features(), session.protocol_features(), Arc::as_ptr(session.memory()) as usize, sizes)
    }

    fn stop(&mut self, index: u16) {
        if let Some(ring) = self.rings[usize::from(index)].take() {
            self.session.stopped(
                index,
                match ring {
                    Ring::Split(ring) => ring.base(),
                    Ring::Packed(ring) => ring.base(),
                },
            );
        }
    }

    /// Start the rings that may run, and serve all that run.
    fn run(&mut self) {
        for index in 0..QUEUES {
            // An in-flight region made for rings of the other kind stops the device too.
            let setup = match self.session.runnable(index) {
                Ok(Some(setup)) => Some(setup),
                Ok(None) => continue,
                Err(_) => None,
            };
            let ring = &mut self.rings[usize::from(index)];
            if ring.is_none() {
                *ring = setup.and_then(|setup| match setup.packed {
                    false => SplitRing::new(setup.ring).ok().map(Ring::Split),
                    true => PackedRing::new(setup.ring).ok().map(Ring::Packed),
                });
            }
            let sound = match ring {
                Some(Ring::Split(ring)) => serve(ring, &mut self.chain, &GEOMETRY),
                Some(Ring::Packed(ring)) => serve(ring, &mut self.chain, &GEOMETRY),
                None => false,
            };
            if !sound {
                self.session.set_broken();
                (0..QUEUES).for_each(|index| self.stop(index));
                assert!(matches!(self.session.runnable(index), Ok(None)), "a broken device runs");
                return;
            }
        }
    }
}

const GEOMETRY: Geometry = Geometry {
    size: 1 << 20,
    block_size: 512,
    read_only: false,
    discard: true,
    write_zeroes: true,
    max_discard: 1 << 20,
    max_write_zeroes: 1 << 20,
};

fn talk(descriptors: &Descriptors, reaper: &Reaper, mut input: &[u8]) {
    let (frontend, backend) = UnixStream::pair().expect("a pair of sockets");
    let mut backend = Backend::new(backend, reaper);
    while let Some((record, rest)) = Record::split(input) {
        input = rest;
        if record.code == MEMORY_RECORD {
            let at = u64::from(record.descriptors) * 256;
            let room = (GUEST_MEMORY - at as usize).min(record.payload.len());
            descriptors.memory.write_all_at(&record.payload[..room], at).expect("guest memory");
            backend.run();
            continue;
        }
        if record.code == TRUNCATE_RECORD {
            descriptors.memory.set_len(u64::from(record.descriptors) * 256).expect("a shorter file");
            backend.run();
            continue;
        }
        let message = record.message();
        let (first, second) = message.split_at(usize::from(record.pause).clamp(1, message.len()));
        if !send(&frontend, first, &descriptors.choose(record.descriptors)) || backend.receive().is_err() {
            return;
        }
        if !second.is_empty() && (!send(&frontend, second, &[]) || backend.receive().is_err()) {
            return;
        }
    }
}

thread_local! {
    static DESCRIPTORS: RefCell<Descriptors> = RefCell::new(Descriptors::new());
    /// One for all inputs: its thread stays for a while.
    static REAPER: Reaper = Reaper::default();
}

fuzz_target!(|input: &[u8]| {
    let reaper = REAPER.with(Reaper::clone);
    DESCRIPTORS.with_borrow(|descriptors| {
        descriptors.memory.set_len(0).expect("an empty file");
        descriptors.memory.set_len(GUEST_MEMORY as u64).expect("room for guest memory");
        // The guard of guest memory keeps an eventfd for good; the first mapping makes it.
        ringstone_mapping::guard::poison_event();
        let before = open_descriptors();
        talk(descriptors, &reaper, input);
        // None of them can hold it up.
        while !reaper.is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(before, open_descriptors(), "a descriptor was left open");
    });
});

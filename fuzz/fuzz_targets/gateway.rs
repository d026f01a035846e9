//! A whole engine, with its control thread and a reactor, serves a volume to a frontend that sends whatever it likes. The
//! inputs are those of `control_messages`. Nothing may panic, no thread may hang, and when the frontend has gone the volume
//! waits for the next one with every descriptor closed.
#![no_main]

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use ringstone_blockdev::Key;
use ringstone_fuzz::frontend::{
    open_descriptors, send, Descriptors, Record, GUEST_MEMORY, MEMORY_RECORD, TRUNCATE_RECORD,
};
use ringstone_gateway::{BackendSpec, Engine, EngineSettings, VolumeSpec};

const QUEUES: usize = 4;
/// Below libFuzzer's own limit, so that this says what hangs.
const PATIENCE: Duration = Duration::from_secs(8);

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

extern "C" fn remove_folder() {
    // Nobody is left to tell.
    let _ = FOLDER.get().map(std::fs::remove_dir_all);
}

/// One gateway for all inputs.
struct Gateway {
    engine: Engine,
    socket: PathBuf,
}

impl Gateway {
    fn start() -> Self {
        // A thread that panics would only be missed.
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            told(info);
            std::process::abort();
        }));
        let folder = std::env::temp_dir().join(format!("ringstone-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        FOLDER.set(folder.clone()).expect("one gateway");
        // SAFETY: the function may be called at any time after this, by which FOLDER is set.
        unsafe { libc::atexit(remove_folder) };
        let settings = EngineSettings {
            cores: vec![0],
            idle_us: 20,
            stats_path: folder.join("stats"),
            balance: false,
            topology: None,
        };
        let engine = Engine::start(&settings).expect("an engine");
        let volume = VolumeSpec {
            name: "disk".into(),
            backend: BackendSpec::parse(r#"{"type":"memory","hugepages":"off"}"#).expect("a backend"),
            size: 1 << 20,
            block_size: 512,
            read_only: false,
            serial: String::new(),
        };
        engine.open_volume(&volume, &Key::None).expect("a volume");
        let socket = folder.join("disk.sock");
        engine.attach("disk", &socket, QUEUES).expect("an attachment");
        let gateway = Self { engine, socket };
        // What is opened with the first frontend stays.
        drop(gateway.connect());
        gateway.wait_idle(usize::MAX);
        gateway
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).expect("the volume's socket")
    }

    /// Until the frontend has gone, and no more than `before` descriptors are open.
    fn wait_idle(&self, before: usize) {
        let end = Instant::now() + PATIENCE;
        loop {
            let attachments = self.engine.attachments().expect("the control thread");
            let (state, open) = (attachments[0].state, open_descriptors());
            if state == "listening" && open <= before {
                return;
            }
            assert!(Instant::now() < end, "{state}, with {open} descriptors open and not {before}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

fn talk(gateway: &Gateway, descriptors: &Descriptors, mut input: &[u8]) {
    let frontend = gateway.connect();
    while let Some((record, rest)) = Record::split(input) {
        input = rest;
        let at = u64::from(record.descriptors) * 256;
        match record.code {
            MEMORY_RECORD => {
                let room = (GUEST_MEMORY - at as usize).min(record.payload.len());
                descriptors.memory.write_all_at(&record.payload[..room], at).expect("guest memory");
                descriptors.kick();
            }
            TRUNCATE_RECORD => descriptors.memory.set_len(at).expect("a shorter file"),
            _ => {
                let message = record.message();
                let (first, second) = message.split_at(usize::from(record.pause).clamp(1, message.len()));
                if !send(&frontend, first, &descriptors.choose(record.descriptors)) {
                    return;
                }
                if !second.is_empty() && !send(&frontend, second, &[]) {
                    return;
                }
            }
        }
    }
    descriptors.kick();
}

fuzz_target!(|input: &[u8]| {
    static GATEWAY: OnceLock<Gateway> = OnceLock::new();
    let gateway = GATEWAY.get_or_init(Gateway::start);
    // Between two inputs the sanitizer may open some of its own.
    let before = open_descriptors();
    talk(gateway, &Descriptors::new(), input);
    gateway.wait_idle(before);
    gateway.engine.drain_events();
});

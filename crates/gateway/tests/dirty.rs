//! The dirty log of a migration (LOG_SHMFD): every page that a completion writes has its bit afterwards, whichever ring the
//! guest has and whichever drive serves it.

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use common::packed::PackedDriver;
use common::*;

const PAGE: u64 = 4096;
const PAGES: u64 = MEMORY / PAGE;
const SIZE: u16 = 64;
/// Three pages, beginning and ending in the middle of one.
const ACROSS: (u64, u32) = (DATA + 0x800, 8192);

fn page(address: u64) -> u64 {
    address / PAGE
}

/// A guest with either ring, and what the migration keeps of it.
enum Guest {
    Split(Driver),
    Packed(PackedDriver),
}

impl Guest {
    fn start(host: &Host, volume: &str, features: u64, packed: bool) -> Self {
        let socket = host.path(&format!("{volume}.sock"));
        match packed {
            false => Self::Split(Driver::start(&socket, SIZE, features | F_VERSION_1)),
            true => Self::Packed(PackedDriver::start(&socket, SIZE, features | F_VERSION_1)),
        }
    }

    fn driver(&self) -> &Driver {
        match self {
            Self::Split(driver) => driver,
            Self::Packed(driver) => &driver.driver,
        }
    }

    fn request(&mut self, kind: u32, sector: u64, data: Option<(u64, u32)>) {
        let status = match self {
            Self::Split(driver) => driver.request(kind, sector, data),
            Self::Packed(driver) => driver.request(kind, sector, data),
        };
        assert_eq!(status, 0);
    }

    fn features(&self, features: u64) {
        let packed = if matches!(self, Self::Packed(_)) { F_RING_PACKED } else { 0 };
        let features = features | packed | F_VERSION_1 | F_PROTOCOL;
        assert!(self.driver().frontend.ack(SET_FEATURES, &words(&[features]), &[]));
    }

    fn log_to(&self, bitmap: &Bitmap) {
        let place = words(&[bitmap.len, 0]);
        assert!(self.driver().frontend.ack(SET_LOG_BASE, &place, &[bitmap.file.as_raw_fd()]));
    }

    /// Pages that any completion writes: the status byte's, and where the ring says that it is used.
    fn of_completion(&self, first: u64) -> BTreeSet<u64> {
        let used = match self {
            Self::Split(driver) => driver.used_at(),
            Self::Packed(_) => first,
        };
        BTreeSet::from([page(self.driver().slot(0)), page(used)])
    }

    /// Where the next request begins, in a packed ring.
    fn next_at(&self) -> u64 {
        match self {
            Self::Split(_) => 0,
            Self::Packed(driver) => driver.next_at(),
        }
    }

    /// What a request marked, and what its completion alone has to mark.
    fn marks(
        &mut self,
        bitmap: &Bitmap,
        kind: u32,
        sector: u64,
        data: Option<(u64, u32)>,
    ) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let wanted = self.of_completion(self.next_at());
        bitmap.harvest();
        self.request(kind, sector, data);
        // It is marked after it is written and before it is shown to the driver.
        let mut marked = bitmap.harvest();
        if let Self::Packed(driver) = self {
            // The device's event area: written when it goes to sleep or wakes.
            marked.remove(&page(driver.driver.used_at()));
        }
        (marked, wanted)
    }
}

struct Bitmap {
    file: File,
    len: u64,
}

impl Bitmap {
    fn new(pages: u64) -> Self {
        let len = pages / 8;
        let file =
            File::from(nix::sys::memfd::memfd_create(c"log", nix::sys::memfd::MFdFlags::empty()).unwrap());
        file.set_len(len).unwrap();
        Self { file, len }
    }

    /// Pages marked, taken out of the bitmap as a frontend does.
    fn harvest(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; self.len as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        self.file.write_all_at(&vec![0; bytes.len()], 0).unwrap();
        let bits = |(at, byte): (u64, u8)| {
            (0..8).filter(move |bit| byte & 1 << bit != 0).map(move |bit| at * 8 + bit)
        };
        (0..).zip(bytes).flat_map(bits).collect()
    }
}

fn with_pages(mut set: BTreeSet<u64>, pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    set.extend(pages);
    set
}

fn marks_all_it_writes(host: &Host, backend: &str) {
    host.volume("vol", backend, 16 << 20, 1);
    for packed in [false, true] {
        let bitmap = Bitmap::new(PAGES);
        let mut guest = Guest::start(host, "vol", 0, packed);
        guest.log_to(&bitmap);
        guest.request(IN, 0, Some(ACROSS));
        assert_eq!(bitmap.harvest(), BTreeSet::new(), "there is a bitmap, and nobody has asked to use it");

        guest.features(F_LOG_ALL);
        let (marked, wanted) = guest.marks(&bitmap, OUT, 0, Some(ACROSS));
        assert_eq!(marked, wanted, "a write only reads the guest's data");
        let (marked, wanted) = guest.marks(&bitmap, IN, 0, Some(ACROSS));
        assert_eq!(marked, with_pages(wanted, page(DATA)..=page(DATA) + 2), "a read, in place or copied");
        let (marked, wanted) = guest.marks(&bitmap, IN, 8, Some((DATA + 3 * PAGE + 13, 512)));
        assert_eq!(marked, with_pages(wanted, [page(DATA) + 3]), "a read to an odd address");
        let long = (DATA + 64 * PAGE, 1 << 20);
        let (marked, wanted) = guest.marks(&bitmap, IN, 0, Some(long));
        assert_eq!(marked, with_pages(wanted, page(long.0)..page(long.0) + 256), "a read in many steps");
        let (marked, wanted) = guest.marks(&bitmap, GET_ID, 0, Some((DATA + 9 * PAGE, 20)));
        assert_eq!(marked, with_pages(wanted, [page(DATA) + 9]), "the name");
        let (marked, wanted) = guest.marks(&bitmap, FLUSH, 0, None);
        assert_eq!(marked, wanted);

        guest.features(0);
        bitmap.harvest();
        guest.request(IN, 0, Some(ACROSS));
        assert_eq!(bitmap.harvest(), BTreeSet::new(), "the migration is over");
        drop(guest);
        host.wait_state("vol", "listening");
    }
}

#[test]
fn a_mapped_drive_marks_all_it_writes() {
    marks_all_it_writes(&Host::new(), r#"{"type":"memory","hugepages":"off"}"#);
}

#[test]
fn a_file_drive_marks_all_it_writes() {
    let host = Host::new();
    let disk = host.disk_file(16 << 20);
    marks_all_it_writes(&host, &format!(r#"{{"type":"file","path":{disk:?}}}"#));
    std::fs::remove_file(disk).unwrap();
}

#[test]
fn a_delayed_completion_marks_all_it_writes() {
    let slow = r#"{"type":"faulty","inner":{"type":"memory","hugepages":"off"},"delay_us":2000}"#;
    marks_all_it_writes(&Host::new(), slow);
}

/// Pages that it has no bit for are the frontend's own fault, and not a reason to write behind its end.
#[test]
fn a_bitmap_that_is_too_small_takes_what_fits() {
    let host = Host::new();
    host.memory_volume("vol");
    for packed in [false, true] {
        let bitmap = Bitmap::new(8);
        let mut guest = Guest::start(&host, "vol", F_LOG_ALL, packed);
        guest.log_to(&bitmap);
        for sector in 0..200 {
            guest.request(IN, sector, Some(ACROSS));
        }
        assert!(bitmap.harvest().contains(&page(if packed { 0 } else { guest.driver().used_at() })));
        assert_eq!(bitmap.file.metadata().unwrap().len(), bitmap.len);
        // A larger one in its place, while the ring runs, has them all from then on.
        let whole = Bitmap::new(PAGES);
        guest.log_to(&whole);
        bitmap.harvest();
        guest.request(IN, 0, Some(ACROSS));
        assert!(whole.harvest().is_superset(&(page(DATA)..=page(DATA) + 2).collect()));
        assert_eq!(bitmap.harvest(), BTreeSet::new());
        drop(guest);
        host.wait_state("vol", "listening");
    }
}

/// Migrations begin and fail while a guest is busy: it loses no request, and what completes after the answer is logged.
#[test]
fn logging_begins_and_ends_under_load() {
    let host = Host::new();
    let slow = r#"{"type":"faulty","inner":{"type":"memory","hugepages":"off"},"delay_us":500}"#;
    let socket = host.volume("vol", slow, 16 << 20, 1);
    let mut driver = Driver::start(&socket, SIZE, F_VERSION_1);
    let bitmap = Bitmap::new(PAGES);
    let place = words(&[bitmap.len, 0]);
    assert!(driver.frontend.ack(SET_LOG_BASE, &place, &[bitmap.file.as_raw_fd()]));
    for round in 0..100u64 {
        for head in (0..48u16).step_by(3) {
            driver.lay(head, IN, 0, Some((DATA + PAGE * u64::from(head), 512)));
            driver.offer(head);
        }
        let logs = round % 2 == 0;
        let features = F_VERSION_1 | F_PROTOCOL | if logs { F_LOG_ALL } else { 0 };
        assert!(driver.frontend.ack(SET_FEATURES, &words(&[features]), &[]));
        for _ in 0..16 {
            driver.wait_used();
        }
        bitmap.harvest();
        let data = DATA + PAGE * (100 + round);
        assert_eq!(driver.request(IN, 0, Some((data, 512))), 0);
        assert_eq!(bitmap.harvest().contains(&page(data)), logs, "round {round}");
    }
}

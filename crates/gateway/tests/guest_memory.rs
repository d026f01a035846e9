//! Guest memory belongs to whoever runs the guest: a balloon, free page reporting and virtio-mem give pages of it back while
//! the guest runs, and what the guest touches next is another page.

mod common;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use common::*;
use nix::fcntl::{fallocate, FallocateFlags};
use nix::sys::memfd::{memfd_create, MFdFlags};
use ringstone_mapping::Mapping;

/// Guest address of the memory that gives pages back; rings and headers lie in the driver's own, at 0.
const BALLOONED: u64 = 1 << 40;

struct Balloon {
    file: File,
    mapping: Mapping,
}

impl Balloon {
    /// Two pages, all of which have their memory before the backend sees them, as with a guest that is preallocated, or one
    /// whose backend was restarted.
    fn new(flags: MFdFlags) -> Self {
        let file = File::from(memfd_create(c"ballooned", flags).unwrap());
        let page = ringstone_mapping::page_size_of(file.as_fd()) as u64;
        file.set_len(2 * page).unwrap();
        let mapping = Mapping::new(file.as_fd(), 0, 2 * page).unwrap();
        mapping.populate(0, mapping.len()).unwrap();
        Self { file, mapping }
    }

    /// Give the first page back, as QEMU's balloon does, and take another by writing to it.
    fn replace(&self, byte: u8) {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, punch, 0, self.mapping.page_size() as i64).unwrap();
        // SAFETY: inside the mapping.
        unsafe { self.mapping.as_ptr().write_bytes(byte, 4096) };
    }

    fn block(&self) -> [u8; 4096] {
        // SAFETY: inside the mapping.
        unsafe { self.mapping.as_ptr().cast::<[u8; 4096]>().read_volatile() }
    }
}

/// Once buffers were registered with io_uring, which pins the pages of that moment: a read answered OK went to a page that the
/// guest no longer had, and a write answered OK stored bytes that the guest had replaced.
fn a_page_given_back_is_never_served(balloon: &Balloon) {
    let host = Host::new();
    let disk = host.disk_file(1 << 20);
    let socket = host.volume("vol", &format!(r#"{{"type":"file","path":{disk:?}}}"#), 1 << 20, 1);
    let mut driver = Driver::prepare(&socket, 16, F_VERSION_1);
    driver.set_memory();
    let mut region = words(&[0]);
    region.extend(words(&[BALLOONED, balloon.mapping.len() as u64, USER + BALLOONED, 0]));
    assert!(driver.frontend.ack(ADD_MEM_REG, &region, &[balloon.file.as_raw_fd()]));
    driver.start_vring(0);
    let stored = File::open(&disk).unwrap();
    let data = Some((BALLOONED, 4096));
    for round in 1..=100u8 {
        balloon.replace(round);
        assert_eq!(driver.request(OUT, 0, data), 0);
        let mut block = [0; 4096];
        stored.read_exact_at(&mut block, 0).unwrap();
        assert!(block == [round; 4096], "a write stored what the guest had replaced");
        balloon.replace(0xee);
        assert_eq!(driver.request(IN, 0, data), 0);
        assert!(balloon.block() == [round; 4096], "a read went to a page that the guest had given back");
    }
    drop(driver);
    std::fs::remove_file(disk).unwrap();
}

#[test]
fn a_small_page_given_back_is_never_served() {
    a_page_given_back_is_never_served(&Balloon::new(MFdFlags::empty()));
}

#[test]
fn a_huge_page_given_back_is_never_served() {
    // Two pages, one of which is given back and taken anew.
    let _reserved = HugePages::reserve(4);
    a_page_given_back_is_never_served(&Balloon::new(MFdFlags::MFD_HUGETLB));
}

/// 2 MiB pages for a test, given back at its end.
struct HugePages(u64);

impl HugePages {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";

    fn pool() -> u64 {
        std::fs::read_to_string(Self::POOL).unwrap().trim().parse().unwrap()
    }

    fn reserve(pages: u64) -> Self {
        std::fs::write(Self::POOL, (Self::pool() + pages).to_string())
            .expect("huge pages, which only root reserves");
        Self(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        std::fs::write(Self::POOL, Self::pool().saturating_sub(self.0).to_string()).unwrap();
    }
}

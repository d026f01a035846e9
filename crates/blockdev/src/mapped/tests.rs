use super::*;
use std::os::unix::fs::MetadataExt;

fn read(drive: &MappedDrive, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xaau8; len];
    // SAFETY: the buffer is as long as asked and the tests stay inside the drive.
    unsafe { drive.read(offset, bytes.as_mut_ptr(), len).unwrap() };
    bytes
}

fn write(drive: &MappedDrive, offset: u64, bytes: &[u8]) {
    // SAFETY: as above.
    unsafe { drive.write(offset, bytes.as_ptr(), bytes.len()).unwrap() };
}

/// All of a discard at once; the chunks that are to give their memory back.
fn discard(drive: &MappedDrive, offset: u64, len: u64) -> Option<(u64, u64)> {
    let discard = drive.plan_discard(offset, len);
    let mut done = 0;
    while let Some((from, n)) = discard.ragged(done) {
        drive.zero(from, n).unwrap();
        done += n;
    }
    discard.whole.inspect(|whole| drive.forget(*whole).unwrap())
}

fn blocks(drive: &MappedDrive) -> u64 {
    drive.file.metadata().unwrap().blocks() * 512
}

#[test]
fn reading_what_was_never_written_takes_no_memory() {
    let drive = MappedDrive::anonymous(64 << 20, HugePages::Off).unwrap();
    assert_eq!(read(&drive, 1 << 20, 1 << 20), vec![0; 1 << 20]);
    assert_eq!(blocks(&drive), 0);
    write(&drive, (1 << 20) - 100, &[5; 300]);
    assert_eq!(read(&drive, (1 << 20) - 100, 300), vec![5; 300]);
    assert!(blocks(&drive) <= 2 * SMALL_CHUNK as u64);
}

#[test]
fn a_discard_zeroes_the_ragged_ends_and_names_the_chunks_between() {
    let drive = MappedDrive::anonymous(1 << 20, HugePages::Off).unwrap();
    write(&drive, 0, &vec![9; 1 << 20]);
    let chunk = SMALL_CHUNK as u64;
    let punch = discard(&drive, chunk / 2, 3 * chunk);
    assert_eq!(punch, Some((chunk, 2 * chunk)));
    assert_eq!(read(&drive, chunk / 2, 3 * SMALL_CHUNK), vec![0; 3 * SMALL_CHUNK]);
    assert_eq!(read(&drive, 0, SMALL_CHUNK / 2), vec![9; SMALL_CHUNK / 2]);
    assert_eq!(read(&drive, chunk / 2 + 3 * chunk, 10), vec![9; 10]);
    assert_eq!(discard(&drive, 8 * chunk + 512, 512), None);
}

#[test]
fn the_ragged_ends_are_zeroed_from_wherever_they_were_left() {
    let drive = MappedDrive::anonymous(1 << 20, HugePages::Off).unwrap();
    let chunk = SMALL_CHUNK as u64;
    let both = drive.plan_discard(chunk - 100, 2 * chunk);
    assert_eq!(both.whole, Some((chunk, chunk)));
    assert_eq!(both.ragged(0), Some((chunk - 100, 100)));
    assert_eq!(both.ragged(99), Some((chunk - 1, 1)));
    assert_eq!(both.ragged(100), Some((2 * chunk, chunk - 100)));
    assert_eq!(both.ragged(chunk - 1), Some((3 * chunk - 101, 1)));
    assert_eq!(both.ragged(chunk), None);
    let inside = drive.plan_discard(10, 20);
    assert_eq!((inside.whole, inside.ragged(5), inside.ragged(20)), (None, Some((15, 15)), None));
    let even = drive.plan_discard(chunk, chunk);
    assert_eq!((even.whole, even.ragged(0)), (Some((chunk, chunk)), None));
}

#[test]
fn a_file_opened_again_shows_its_data() {
    let path = Path::new("/dev/shm").join(format!("ringstone-test-{}", std::process::id()));
    std::fs::write(&path, vec![0u8; 0]).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(4 << 20).unwrap();
    {
        let drive = MappedDrive::open(&path, 4 << 20, false).unwrap();
        write(&drive, 3 << 20, b"still here");
    }
    let drive = MappedDrive::open(&path, 4 << 20, false);
    std::fs::remove_file(&path).unwrap();
    let drive = drive.unwrap();
    assert_eq!(read(&drive, 3 << 20, 10), b"still here");
    assert_eq!(read(&drive, 1 << 20, 10), [0; 10]);
}

/// Call `with` with a directory on a tmpfs of one MiB, which nobody else sees.
fn on_a_small_tmpfs(with: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    let path = std::ffi::CString::new(dir.path().as_os_str().as_encoded_bytes()).unwrap();
    // A thread of its own, whose mounts go with it.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: plain system calls with NUL-terminated strings, for this thread alone.
            let mounted = unsafe {
                libc::unshare(libc::CLONE_NEWNS) == 0
                    && libc::mount(
                        c"none".as_ptr(),
                        c"/".as_ptr(),
                        std::ptr::null(),
                        libc::MS_REC | libc::MS_PRIVATE,
                        std::ptr::null(),
                    ) == 0
                    && libc::mount(
                        c"none".as_ptr(),
                        path.as_ptr(),
                        c"tmpfs".as_ptr(),
                        0,
                        c"size=1m".as_ptr().cast(),
                    ) == 0
            };
            match mounted {
                true => with(dir.path()),
                false => eprintln!("skipped: mounting a tmpfs takes root"),
            }
        });
    });
}

/// A signal would end the process, and a drive that was poisoned would fail for good.
#[test]
fn a_full_tmpfs_is_an_error_of_that_write() {
    on_a_small_tmpfs(|dir| {
        let (path, other) = (dir.join("disk"), dir.join("other"));
        let create = |path: &Path| File::create(path).unwrap();
        create(&path).set_len(4 << 20).unwrap();
        let drive = MappedDrive::open(&path, 4 << 20, false).unwrap();
        write(&drive, 0, b"before");
        std::io::copy(&mut std::io::repeat(1), &mut create(&other)).unwrap_err();
        let try_write = |offset: u64| {
            // SAFETY: inside the drive, and as long as the bytes.
            unsafe { drive.write(offset, b"new".as_ptr(), 3) }
        };
        assert!(try_write(2 << 20).is_err());
        assert_eq!(read(&drive, 2 << 20, 3), [0; 3]);
        // What has memory is written all the same, and the rest when there is room again.
        try_write(100).unwrap();
        std::fs::remove_file(&other).unwrap();
        try_write(2 << 20).unwrap();
        assert_eq!((read(&drive, 2 << 20, 3), read(&drive, 0, 6)), (b"new".to_vec(), b"before".to_vec()));
    });
}

#[test]
fn a_file_cut_behind_the_drive_is_an_error() {
    let drive = MappedDrive::anonymous(1 << 20, HugePages::Off).unwrap();
    write(&drive, 0, &[1; 4096]);
    drive.file.set_len(0).unwrap();
    let mut bytes = [0u8; 512];
    // SAFETY: inside the drive; the fault is what is tested.
    let result = unsafe { drive.read(0, bytes.as_mut_ptr(), 512) };
    assert!(matches!(result, Err(DriveError::Poisoned)));
}

/// A chunk that the process before wrote last must not read as zeroes in the one that takes over, nor one that it
/// discarded hold a page again.
#[test]
fn a_drive_taken_over_has_the_chunks_of_the_one_before() {
    let first = MappedDrive::anonymous(1 << 20, HugePages::Off).unwrap();
    write(&first, 300_000, b"written");
    write(&first, 600_000, b"discarded");
    discard(&first, 8 * SMALL_CHUNK as u64, 4 * SMALL_CHUNK as u64);
    let file = first.file.try_clone().unwrap();
    let second = MappedDrive::adopt(file, None, 1 << 20, Some(&first.presence())).unwrap();
    assert_eq!(read(&second, 300_000, 7), b"written");
    assert_eq!(read(&second, 600_000, 9), [0; 9]);
    let file = first.file.try_clone().unwrap();
    let asked = MappedDrive::adopt(file, None, 1 << 20, None).unwrap();
    assert_eq!(read(&asked, 300_000, 7), b"written");
}

#[test]
fn growing_keeps_the_content() {
    let drive = MappedDrive::anonymous(1 << 20, HugePages::Off).unwrap();
    write(&drive, 1000, b"kept");
    drop(drive.grow(2 << 20).unwrap());
    write(&drive, (2 << 20) - 4, b"tail");
    assert_eq!(read(&drive, 1000, 4), b"kept");
    assert_eq!(read(&drive, (2 << 20) - 4, 4), b"tail");
    assert!(matches!(drive.grow(u64::MAX >> 1), Err(DriveError::NoMemory { .. })));
}

/// The bits of chunks with memory were once found out anew at each growth and swapped in, while writers set them in the old
/// ones: what was written meanwhile read as zeroes.
#[test]
fn what_is_written_or_discarded_during_growth_stays_so() {
    const CHUNKS: u64 = 512;
    let drive = MappedDrive::anonymous(CHUNKS * SMALL_CHUNK as u64, HugePages::Off).unwrap();
    let at = |chunk: u64| chunk * SMALL_CHUNK as u64;
    (CHUNKS / 2..CHUNKS).for_each(|chunk| write(&drive, at(chunk), b"old"));
    let (mut outgrown, mut written) = (Vec::new(), Vec::new());
    let begin = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            begin.wait();
            for chunk in 0..CHUNKS / 2 {
                write(&drive, at(chunk), b"new");
                discard(&drive, at(CHUNKS / 2 + chunk), SMALL_CHUNK as u64);
                written.push(chunk);
            }
        });
        let mut size = CHUNKS * SMALL_CHUNK as u64;
        begin.wait();
        while !writer.is_finished() {
            size += SMALL_CHUNK as u64;
            outgrown.push(drive.grow(size).unwrap());
        }
    });
    assert!(!outgrown.is_empty());
    for chunk in written {
        assert_eq!(read(&drive, at(chunk), 3), b"new", "chunk {chunk}");
        assert_eq!(read(&drive, at(CHUNKS / 2 + chunk), 3), [0; 3], "chunk {chunk} was discarded");
    }
}

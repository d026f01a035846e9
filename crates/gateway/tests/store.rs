//! Volumes of a store, through a real socket, a real ring and real reactors.

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::*;
use ringstone_blockdev::{new_seal, wrap_anew, Key};
use ringstone_cipher::PoolKey;
use ringstone_gateway::{check_store, format_store, BackendSpec, Code, VolumeSpec};
use ringstone_store::{Answer, Command, Seal, VolumeInfo};

const SIZE: u64 = 32 << 20;

/// A store with an empty volume `vol`.
fn store(host: &Host) -> PathBuf {
    store_with(host, Seal::default())
}

/// As [`store`], of a volume with checksums.
fn store_with_sums(host: &Host) -> PathBuf {
    store_with(host, Seal { integrity: true, ..Seal::default() })
}

/// As [`store`], of an encrypted volume.
fn store_with_key(host: &Host, integrity: bool) -> PathBuf {
    store_with(host, new_seal(integrity, Some(&pool_key(1))).unwrap())
}

fn pool_key(byte: u8) -> PoolKey {
    PoolKey::new(&[byte; 32]).unwrap()
}

fn store_with(host: &Host, seal: Seal) -> PathBuf {
    let path = host.path("store");
    format_store(&path, Some(256 << 20), 64 << 10).unwrap();
    tell(host, &path, Command::Create { name: "vol".into(), size: SIZE, created_s: 1, seal });
    path
}

fn tell(host: &Host, path: &Path, command: Command) -> Answer {
    host.engine.open_store(path).unwrap().call(command).unwrap()
}

fn volumes(host: &Host, path: &Path) -> Vec<VolumeInfo> {
    match tell(host, path, Command::List { name: None }) {
        Answer::Volumes(volumes) => volumes,
        _ => panic!("a list is a list"),
    }
}

fn used(host: &Host, path: &Path) -> u64 {
    match tell(host, path, Command::Figures) {
        Answer::Figures(figures) => figures.used,
        _ => panic!("figures are figures"),
    }
}

fn backend(path: &Path, volume: &str) -> String {
    format!(r#"{{"type":"store","path":{path:?},"volume":"{volume}"}}"#)
}

fn serve(host: &Host, path: &Path, volume: &str, queues: usize) -> PathBuf {
    // It is not looked at where there is nothing encrypted.
    let key = Key::Pool(pool_key(1));
    host.volume_with_key(volume, &backend(path, volume), SIZE, queues, &key)
}

fn end(host: &Host, volume: &str) {
    host.engine.detach(volume, true).unwrap();
    host.engine.close_volume(volume).unwrap();
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn write(driver: &mut Driver, sector: u64, bytes: &[u8]) {
    driver.write(DATA, bytes);
    assert_eq!(driver.request(OUT, sector, Some((DATA, bytes.len() as u32))), 0);
}

fn read(driver: &mut Driver, sector: u64, len: usize) -> Vec<u8> {
    driver.write(DATA, &vec![0xee; len]);
    assert_eq!(driver.request(IN, sector, Some((DATA, len as u32))), 0);
    driver.read(DATA, len)
}

#[test]
fn what_was_written_is_read_and_nothing_else() {
    write_and_read(store);
}

#[test]
fn what_was_written_with_checksums_is_read_and_nothing_else() {
    write_and_read(store_with_sums);
}

#[test]
fn what_was_encrypted_is_read_and_nothing_else() {
    write_and_read(|host| store_with_key(host, false));
}

#[test]
fn what_was_encrypted_with_checksums_is_read_and_nothing_else() {
    write_and_read(|host| store_with_key(host, true));
}

fn write_and_read(store: impl Fn(&Host) -> PathBuf) {
    let host = Host::new();
    let path = store(&host);
    let socket = serve(&host, &path, "vol", 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_FLUSH);
    assert_eq!(read(&mut driver, 77, 4096), [0; 4096], "nothing was written yet");
    // A part of a block, blocks over the end of an extent, and a place of its own for each.
    write(&mut driver, 3, &pattern(1, 512));
    let bytes = pattern(2, 300 << 10);
    write(&mut driver, 100, &bytes);
    write(&mut driver, 110, &pattern(3, 1024));
    let mut expected = bytes;
    expected[5120..6144].copy_from_slice(&pattern(3, 1024));
    assert_eq!(read(&mut driver, 100, 300 << 10), expected);
    assert_eq!(read(&mut driver, 0, 2048), [vec![0; 1536], pattern(1, 512)].concat());
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    // Through a bounce buffer, both ways.
    driver.write(DATA + 13, &pattern(4, 8192));
    assert_eq!(driver.request(OUT, 4000, Some((DATA + 13, 8192))), 0);
    assert_eq!(driver.request(IN, 4000, Some((DATA + 99, 8192))), 0);
    assert_eq!(driver.read(DATA + 99, 8192), pattern(4, 8192));
    drop(driver);
    end(&host, "vol");
    host.engine.close_store(&path).unwrap();
    let report = check_store(&path, Some(&mut |_, _| true)).unwrap().unwrap();
    assert_eq!((report.faults, report.notes, report.mendable), (vec![], vec![], vec![]));
    let blocks = report.blocks.unwrap();
    let has_sums = report.volumes[0].integrity;
    assert_eq!(blocks.verified, if has_sums { blocks.blocks } else { 0 });
    // Again, as the drive has it.
    let socket = serve(&host, &path, "vol", 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1);
    assert_eq!(read(&mut driver, 100, 300 << 10), expected);
    assert_eq!(read(&mut driver, 4000, 8192), pattern(4, 8192));
}

#[test]
fn what_is_discarded_is_zero_and_its_space_is_free() {
    let host = Host::new();
    let path = store(&host);
    let socket = serve(&host, &path, "vol", 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_FLUSH);
    write(&mut driver, 0, &pattern(1, 1 << 20));
    assert_eq!(used(&host, &path), 1 << 20);
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 1), (WRITE_ZEROES, 0)] {
        write(&mut driver, 0, &pattern(1, 1 << 20));
        driver.write(DATA, &[words(&[1]), pair(2046, flags)].concat());
        assert_eq!(driver.request(kind, 0, Some((DATA, 16))), 0);
        let mut expected = vec![0; 1 << 20];
        expected[..512].copy_from_slice(&pattern(1, 1 << 20)[..512]);
        expected[(1 << 20) - 512..].copy_from_slice(&pattern(1, 1 << 20)[(1 << 20) - 512..]);
        assert_eq!(read(&mut driver, 0, 1 << 20), expected);
        if flags == 1 || kind == DISCARD {
            assert_eq!(used(&host, &path), 128 << 10, "the first and the last extent have data");
        }
    }
}

#[test]
fn snapshots_keep_what_was_and_clones_begin_with_it() {
    let host = Host::new();
    let path = store(&host);
    let socket = serve(&host, &path, "vol", 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_FLUSH);
    write(&mut driver, 0, &pattern(1, 256 << 10));
    let snapshot =
        |name: &str| Command::Snapshot { volumes: vec!["vol".into()], name: name.into(), created_s: 2 };
    tell(&host, &path, snapshot("one"));
    write(&mut driver, 8, &pattern(2, 4096));
    write(&mut driver, 17, &pattern(3, 512));
    driver.write(DATA, &[words(&[128]), pair(128, 0)].concat());
    assert_eq!(driver.request(DISCARD, 0, Some((DATA, 16))), 0);
    tell(&host, &path, snapshot("two"));
    let clone = |from: &str, name: &str| Command::Clone {
        volume: "vol".into(),
        snapshot: Some(from.into()),
        name: name.into(),
        created_s: 3,
    };
    tell(&host, &path, clone("one", "first"));
    tell(&host, &path, clone("two", "second"));
    write(&mut driver, 0, &pattern(9, 256 << 10));
    let first = pattern(1, 256 << 10);
    let mut second = first.clone();
    second[4096..8192].copy_from_slice(&pattern(2, 4096));
    second[17 * 512..18 * 512].copy_from_slice(&pattern(3, 512));
    second[64 << 10..128 << 10].fill(0);
    for (name, content) in [("first", &first), ("second", &second)] {
        let socket = serve(&host, &path, name, 1);
        let mut driver = Driver::start(&socket, 64, F_VERSION_1);
        assert_eq!(&read(&mut driver, 0, 256 << 10), content, "{name}");
        write(&mut driver, 0, &pattern(7, 512));
        assert_eq!(&read(&mut driver, 1, 256 << 10)[..1000], &content[512..1512]);
        drop(driver);
        end(&host, name);
    }
    assert_eq!(read(&mut driver, 0, 256 << 10), pattern(9, 256 << 10));
    let door = host.engine.open_store(&path).unwrap();
    let refused = door.call(Command::DeleteSnapshot { volume: "vol".into(), name: "one".into() });
    assert!(refused.err().unwrap().to_string().contains("first"), "it has a clone");
    for name in ["first", "second"] {
        door.call(Command::Delete { name: name.into() }).unwrap();
    }
    for name in ["one", "two"] {
        door.call(Command::DeleteSnapshot { volume: "vol".into(), name: name.into() }).unwrap();
    }
    wait_for("the snapshots' space", || used(&host, &path) == 256 << 10);
    assert_eq!(read(&mut driver, 0, 256 << 10), pattern(9, 256 << 10));
    assert_eq!(volumes(&host, &path)[0].own, 256 << 10);
}

/// A discard above a snapshot leaves word that older blocks are hidden. When the snapshot was gone, and nothing older was there to
/// hide, that word still hid what had been written since, once the volume was opened again.
#[test]
fn what_hid_a_snapshots_blocks_hides_nothing_when_it_is_gone() {
    let host = Host::new();
    let path = store(&host);
    let socket = serve(&host, &path, "vol", 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_FLUSH);
    write(&mut driver, 0, &pattern(1, 64 << 10));
    tell(&host, &path, Command::Snapshot { volumes: vec!["vol".into()], name: "one".into(), created_s: 2 });
    driver.write(DATA, &[words(&[0]), pair(128, 0)].concat());
    assert_eq!(driver.request(DISCARD, 0, Some((DATA, 16))), 0);
    write(&mut driver, 0, &pattern(2, 64 << 10));
    tell(&host, &path, Command::DeleteSnapshot { volume: "vol".into(), name: "one".into() });
    wait_for("the snapshot's space", || used(&host, &path) == 64 << 10);
    drop(driver);
    end(&host, "vol");
    host.engine.close_store(&path).unwrap();
    let socket = serve(&host, &path, "vol", 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1);
    assert_eq!(read(&mut driver, 0, 64 << 10), pattern(2, 64 << 10));
}

/// Two guests' worth of queues on two reactors, of which one has the keeper; and that one is removed.
#[test]
fn queues_of_other_reactors_ask_the_keeper_and_it_moves() {
    let host = Host::with(vec![0, 1], 200);
    let path = store(&host);
    tell(
        &host,
        &path,
        Command::Create { name: "other".into(), size: SIZE, created_s: 1, seal: Default::default() },
    );
    let sockets = ["vol", "other"].map(|name| serve(&host, &path, name, 1));
    let mut drivers = sockets.map(|socket| Driver::start(&socket, 64, F_VERSION_1 | F_FLUSH));
    for round in 0..40u64 {
        for (seed, driver) in drivers.iter_mut().enumerate() {
            write(driver, round * 128, &pattern(round as u8 + seed as u8, 20 << 10));
            assert_eq!(driver.request(FLUSH, 0, None), 0);
        }
        if round == 20 {
            host.engine.remove_reactor(1).unwrap();
            host.engine.add_reactor(1).unwrap();
            host.engine.remove_reactor(0).unwrap();
        }
    }
    for round in 0..40u64 {
        for (seed, driver) in drivers.iter_mut().enumerate() {
            assert_eq!(read(driver, round * 128, 20 << 10), pattern(round as u8 + seed as u8, 20 << 10));
        }
    }
}

#[test]
fn a_store_is_opened_by_one_and_refused_where_there_is_none() {
    let host = Host::new();
    let path = store(&host);
    let other = Host::new();
    let refused = other.engine.open_store(&path).err().unwrap();
    assert!(refused.to_string().contains("in use"), "{refused}");
    let file = host.disk_file(64 << 20);
    let refused = host.engine.open_store(&file).err().unwrap();
    assert!(refused.to_string().contains("no store"), "{refused}");
    let socket = serve(&host, &path, "vol", 1);
    let refused = host.engine.close_store(&path).unwrap_err();
    assert!(refused.to_string().contains("vol"), "{refused}");
    drop(socket);
    std::fs::remove_file(file).unwrap();
}

/// Nothing but the one block is lost, and it is back when it is written anew.
#[test]
fn a_block_that_rots_is_an_error_and_not_wrong_data() {
    let host = Host::new();
    let path = store_with_sums(&host);
    let socket = serve(&host, &path, "vol", 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_FLUSH);
    write(&mut driver, 0, &pattern(1, 64 << 10));
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut all = vec![0; 256 << 20];
    file.read_exact_at(&mut all, 0).unwrap();
    let wanted = &pattern(1, 64 << 10)[8192..12288];
    let at = (0..all.len()).step_by(4096).find(|at| all[*at..].starts_with(wanted)).unwrap() as u64;
    // As patterns repeat, this is the first block of all; the third is behind it.
    let third = at + 8192;
    file.write_all_at(&[all[third as usize + 77] ^ 1], third + 77).unwrap();
    driver.write(DATA, &[0; 512]);
    assert_eq!(driver.request(IN, 16, Some((DATA, 4096))), 1, "an I/O error");
    assert_eq!(driver.request(IN, 17, Some((DATA, 512))), 1, "of a part of it too");
    assert_eq!(read(&mut driver, 0, 8192), pattern(1, 64 << 10)[..8192]);
    assert_eq!(read(&mut driver, 24, 52 << 10), pattern(1, 64 << 10)[12 << 10..]);
    wait_for("an event", || {
        let events = host.engine.drain_events();
        events.iter().any(|event| format!("{event:?}").contains("not what was written"))
    });
    write(&mut driver, 16, &pattern(9, 4096));
    assert_eq!(read(&mut driver, 16, 4096), pattern(9, 4096));
}

/// The error of opening volume `vol` with a key.
fn refused(host: &Host, path: &Path, key: &Key) -> (Code, String) {
    let backend = BackendSpec::parse(&backend(path, "vol")).unwrap();
    let (name, serial) = ("vol".to_owned(), String::new());
    let spec = VolumeSpec { name, backend, size: SIZE, block_size: 512, read_only: false, serial };
    let error = host.engine.open_volume(&spec, key).unwrap_err();
    (error.code(), error.to_string())
}

#[test]
fn nothing_of_an_encrypted_volume_is_on_the_drive_as_it_is() {
    let host = Host::new();
    let path = store_with_key(&host, false);
    let socket = serve(&host, &path, "vol", 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_FLUSH);
    // First writes, overwrites in place, parts of blocks, from memory that direct I/O takes and that it does not.
    let bytes = pattern(5, 64 << 10);
    for _ in 0..2 {
        write(&mut driver, 0, &bytes);
        write(&mut driver, 1001, &pattern(6, 1024));
        driver.write(DATA + 13, &bytes[..8192]);
        assert_eq!(driver.request(OUT, 4000, Some((DATA + 13, 8192))), 0);
    }
    tell(&host, &path, Command::Snapshot { volumes: vec!["vol".into()], name: "s".into(), created_s: 1 });
    write(&mut driver, 8, &bytes[..8192]);
    write(&mut driver, 1001, &pattern(7, 512));
    assert_eq!(driver.request(FLUSH, 0, None), 0);
    assert_eq!(read(&mut driver, 1002, 512), pattern(6, 1024)[512..]);
    drop(driver);
    end(&host, "vol");
    host.engine.close_store(&path).unwrap();
    let on_drive = std::fs::read(&path).unwrap();
    let written: Vec<&[u8]> =
        on_drive.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0)).collect();
    assert!(written.len() > 16);
    // Eight bytes of 1 are the pool's key, sixteen of a pattern the guest's.
    for plain in [&bytes[..16], &pattern(6, 16), &pattern(7, 16), &[1; 8]] {
        let found = written.iter().any(|block| block.windows(plain.len()).any(|window| window == plain));
        assert!(!found, "{plain:?}");
    }
}

#[test]
fn an_encrypted_volume_is_opened_with_its_key_alone() {
    let host = Host::new();
    let path = store_with_key(&host, false);
    let (code, message) = refused(&host, &path, &Key::None);
    assert!(code == Code::Denied && message.contains("without its key"), "{message}");
    let (code, message) = refused(&host, &path, &Key::Pool(pool_key(2)));
    assert!(code == Code::Denied && message.contains("another key"), "{message}");
    assert!(volumes(&host, &path).iter().all(|volume| !volume.open));
}

#[test]
fn clones_have_their_parents_key_and_another_key_of_the_pool_opens_what_it_wrapped() {
    let host = Host::new();
    let path = store_with_key(&host, false);
    let socket = serve(&host, &path, "vol", 1);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_FLUSH);
    write(&mut driver, 0, &pattern(8, 8192));
    tell(&host, &path, Command::Snapshot { volumes: vec!["vol".into()], name: "s".into(), created_s: 1 });
    let (volume, name, snapshot) = ("vol".to_owned(), "clone".to_owned(), Some("s".to_owned()));
    tell(&host, &path, Command::Clone { volume, snapshot, name, created_s: 1 });
    tell(
        &host,
        &path,
        Command::Create { name: "plain".into(), size: SIZE, created_s: 1, seal: Seal::default() },
    );
    // Under load, and twice, as after a crash in its midst.
    let door = host.engine.open_store(&path).unwrap();
    assert_eq!(wrap_anew(&*door, &[pool_key(1)], &pool_key(2)).unwrap(), 2);
    assert_eq!(wrap_anew(&*door, &[pool_key(1)], &pool_key(2)).unwrap(), 0);
    let error = wrap_anew(&*door, &[pool_key(1)], &pool_key(3)).unwrap_err();
    assert!(error.to_string().contains("another key"), "{error}");
    assert_eq!(read(&mut driver, 0, 8192), pattern(8, 8192));
    drop(driver);
    end(&host, "vol");
    assert_eq!(refused(&host, &path, &Key::Pool(pool_key(1))).0, Code::Denied);
    let key = Key::Pool(pool_key(2));
    let socket = host.volume_with_key("clone", &backend(&path, "clone"), SIZE, 1, &key);
    let mut driver = Driver::start(&socket, 64, F_VERSION_1 | F_FLUSH);
    write(&mut driver, 1, &pattern(9, 512));
    let expected = [&pattern(8, 8192)[..512], &pattern(9, 512), &pattern(8, 8192)[1024..]].concat();
    assert_eq!(read(&mut driver, 0, 8192), expected);
    // A flattened clone has its blocks at places of its own, encrypted as they were.
    tell(&host, &path, Command::Flatten { volume: "clone".into() });
    assert_eq!(read(&mut driver, 0, 8192), expected);
}

//! The golden vectors beside docs/formats/store.md, which the Python decoder is tested with too.
//! `RINGSTONE_WRITE_VECTORS=1 cargo test -p ringstone-store vectors` writes them anew.

use super::*;
use crate::catalog::{Catalog, Change, Layer, Seal, Snapshot, Volume};
use crate::geometry::Layout;

const UUID: [u8; 16] = *b"0123456789abcdef";

fn superblock() -> Superblock {
    let catalog = catalog().encode();
    Superblock {
        uuid: UUID,
        generation: 7,
        incarnation: 3,
        began: 40,
        boot: *b"fedcba9876543210",
        table_generation: 5,
        replay_from: 33,
        replay_incarnation: 2,
        covered: 41,
        catalog_copy: 1,
        catalog_bytes: catalog.len() as u32,
        catalog_crc: crc32c::crc32c(&catalog),
        layout: Layout::new(64 << 20, 64 << 10).unwrap().grown(96 << 20).unwrap(),
    }
}

fn entries() -> Vec<Entry> {
    vec![
        Entry::data(2, 77, 0xffff),
        Entry::default(),
        Entry::data(5, 3, 0x0006),
        Entry::zero(5, 100, 9, 0xffff),
    ]
}

fn catalog() -> Catalog {
    let mut catalog = Catalog::default();
    for (id, parent) in [(1, 0), (4, 1), (7, 1)] {
        catalog.apply(Change::Layer(Layer { id, parent }));
    }
    let root = Volume {
        id: 2,
        name: "root".into(),
        size: 1 << 30,
        live: 4,
        origin: 0,
        created_s: 1_700_000_000,
        seal: Seal::default(),
    };
    let copy = Volume {
        id: 6,
        name: "größe".into(),
        size: 512,
        live: 7,
        origin: 3,
        created_s: 1_700_000_002,
        seal: Seal { integrity: true, key: b"wrapped".to_vec() },
    };
    catalog.apply(Change::Volume(root));
    catalog.apply(Change::Volume(copy));
    let (name, created_s) = ("before".into(), 1_700_000_001);
    catalog.apply(Change::Snapshot(Snapshot { id: 3, volume: 2, name, layer: 1, size: 1 << 30, created_s }));
    catalog.apply(Change::Next(8));
    catalog
}

fn journal() -> JournalBlock {
    let records = vec![
        Record::Slot(9, Entry::data(5, 77, 1)),
        Record::Slot(10, Entry::default()),
        Record::Change(Change::Volume(catalog().volumes[&2].clone())),
        Record::Change(Change::NoVolume(6)),
        Record::Change(Change::Snapshot(catalog().snapshots[&3].clone())),
        Record::Change(Change::NoSnapshot(3)),
        Record::Change(Change::Layer(Layer { id: 4, parent: 0 })),
        Record::Change(Change::NoLayer(1)),
        Record::Change(Change::Next(9)),
    ];
    let head = JournalHead { seq: 42, incarnation: 3, began: 40, marked: 41, last: true };
    JournalBlock { head, records }
}

fn golden(name: &str, bytes: &[u8]) -> Vec<u8> {
    let path = format!("{}/../../docs/formats/vectors/store-{name}.bin", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("RINGSTONE_WRITE_VECTORS").is_some() {
        std::fs::write(&path, bytes).unwrap();
    }
    std::fs::read(&path).unwrap()
}

fn block(bytes: &[u8]) -> &[u8; 4096] {
    bytes.try_into().unwrap()
}

#[test]
fn the_superblock() {
    let bytes = golden("superblock", &superblock().encode().0);
    assert_eq!(Superblock::decode(block(&bytes)).unwrap(), Some(superblock()));
    assert_eq!(superblock().encode().0[..], bytes);
}

#[test]
fn a_page() {
    let mut encoded = Block::default();
    Page::encode(&UUID, 5, 11, &entries(), &mut encoded);
    let bytes = golden("page", &encoded.0);
    let page = Page { number: 5, generation: 11, entries: entries() };
    assert_eq!(Page::decode(&UUID, 5, block(&bytes)), Some(page));
    assert_eq!(encoded.0[..], bytes);
}

#[test]
fn a_block_of_the_journal() {
    let mut out = Writer::default();
    for record in &journal().records {
        match record {
            Record::Slot(slot, entry) => JournalBlock::put_slot(&mut out, *slot, entry),
            Record::Change(change) => JournalBlock::put_change(&mut out, change),
        }
    }
    let mut encoded = Block::default();
    JournalBlock::encode(&UUID, &journal().head, &out.0, &mut encoded);
    let bytes = golden("journal", &encoded.0);
    assert_eq!(JournalBlock::decode(&UUID, block(&bytes)), Some(journal()));
    assert_eq!(encoded.0[..], bytes);
}

#[test]
fn the_catalog() {
    let bytes = golden("catalog", &catalog().encode());
    assert_eq!(Catalog::decode(&bytes), Some(catalog()));
    assert_eq!(catalog().encode(), bytes);
    assert_eq!(catalog().fault(), None);
}

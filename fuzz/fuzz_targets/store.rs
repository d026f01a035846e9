//! A drive says whatever it likes, with right checksums: superblocks, blocks of the journal, pages of the table, catalogs.
//!
//! The input overwrites parts of a store (see `ringstone_fuzz::store::spoil`). What is then opened is used: its volumes are opened,
//! written to, snapped and deleted. Nothing may panic, hang, or reach behind the end of the drive.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use ringstone_fuzz::store::{example, spoil, Memory, Served};
use ringstone_store::{begin, check, copies, mend, recover, verify, Answer, Command, Epochs, RequestKind};

/// Volumes that are used.
const MOST: usize = 3;

fn open(memory: &Memory, boot: [u8; 16]) {
    let Ok(recovered) = recover(memory, boot) else { return };
    let faults = check(&recovered);
    verify(memory, &recovered, &mut |_, _| true).expect("nobody stops it");
    let copies = copies(memory, &recovered.superblock).expect("it can be read");
    if faults.is_empty() && copies.faults.is_empty() {
        mend(memory, &copies.mends).expect("it can be written");
        recover(memory, boot).expect("what is mended is sound");
    }
    let Ok(keeper) = begin(memory, boot, Arc::new(Epochs::default())) else { return };
    let mut served = Served::new(keeper, memory);
    served.command(Command::Figures);
    served.command(Command::Scrub { rate: u64::MAX, started_s: 0 });
    let Some(Answer::Volumes(volumes)) = served.command(Command::List { name: None }) else { return };
    for info in volumes.iter().take(MOST) {
        let name = info.name.clone();
        let opened = served.command(Command::Open { name: name.clone(), cipher: None });
        let Some(Answer::Opened { volume, map, size, .. }) = opened else { continue };
        for at in [0, size / 2 / 512 * 512] {
            let _ = map.read(at, (size - at).max(1));
            let len = (size - at).clamp(512, 1 << 20) / 512 * 512;
            served.request(volume, RequestKind::Write, at, len.min(8192));
            served.request(volume, RequestKind::Zero { unmap: true }, at, len);
        }
        let (volumes, created_s) = (vec![name.clone()], 0);
        served.command(Command::Snapshot { volumes, name: "fuzz".into(), created_s });
        served.request(volume, RequestKind::Write, 0, 512);
        for snapshot in info.snapshots.iter().take(MOST) {
            let (from, to) = (Some(snapshot.name.clone()), Some("fuzz".into()));
            served.command(Command::Diff { volume: name.clone(), from, to });
            served.command(Command::DeleteSnapshot { volume: name.clone(), name: snapshot.name.clone() });
        }
        served.command(Command::Close { volume });
        served.command(Command::DeleteSnapshot { volume: name.clone(), name: "fuzz".into() });
        served.command(Command::Delete { name });
    }
    served.rest();
    served.command(Command::Shutdown);
    if faults.is_empty() {
        recover(memory, boot).expect("what was sound stays so");
    }
}

thread_local! {
    static STORE: Memory = example();
}

fuzz_target!(|input: &[u8]| {
    let Some((boot, rest)) = input.split_first() else { return };
    STORE.with(|store| open(&spoil(store, rest), [boot % 2; 16]));
});

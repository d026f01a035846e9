//! Two frontends at one volume, as while a guest moves from one QEMU to another: both may set everything up, one writes.

mod common;

use std::path::Path;

use common::*;
use ringstone_gateway::Code;

/// Both vrings of a guest, each with a sector of its own to write to.
struct Guest {
    vrings: [Driver; 2],
    name: u8,
}

impl Guest {
    /// Connect and set up all there is to set up.
    fn connect(path: &Path, name: u8) -> Self {
        let first = Driver::start(path, 16, F_VERSION_1);
        let second = first.beside(1);
        second.start_vring(0);
        Self { vrings: [first, second], name }
    }

    /// Ask for a write of this guest's name to the vring's sector.
    fn ask(&mut self, vring: usize) {
        let ring = &mut self.vrings[vring];
        let data = DATA + 512 * vring as u64;
        ring.write(data, &[self.name; 512]);
        ring.lay(0, OUT, vring as u64, Some((data, 512)));
        ring.offer(0);
    }

    fn is_answered(&mut self, vring: usize) {
        assert_eq!(self.vrings[vring].wait_used().0, 0);
        assert_eq!(self.vrings[vring].status(0), 0);
    }

    fn writes(&mut self, vring: usize) {
        self.ask(vring);
        self.is_answered(vring);
        self.sees(vring, self.name);
    }

    /// The sector holds what the guest of that name wrote.
    fn sees(&mut self, vring: usize, name: u8) {
        let data = DATA + 4096;
        assert_eq!(self.vrings[vring].request(IN, vring as u64, Some((data, 512))), 0);
        assert_eq!(self.vrings[vring].read(data, 512), [name; 512]);
    }

    /// What it asked for has not even been looked at, while somebody else was served many times over.
    fn is_held_back(&self, used: [u16; 2]) {
        assert_eq!([0, 1].map(|vring: usize| self.vrings[vring].used_index()), used);
    }
}

#[test]
fn without_sharing_a_second_frontend_is_turned_away_and_with_it_a_third() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    let mut first = Driver::start(&socket, 16, F_VERSION_1);
    Frontend::connect(&socket).wait_closed();
    host.wait_event("vol", "second frontend was turned away");
    host.engine.share("vol", true).unwrap();
    let second = Driver::prepare(&socket, 16, F_VERSION_1);
    Frontend::connect(&socket).wait_closed();
    host.wait_event("vol", "third frontend was turned away");
    let [vol] = &host.engine.attachments().unwrap()[..] else { panic!("one is attached") };
    assert_eq!((vol.shared, vol.frontends, vol.state), (true, 2, "running"));
    // There are two: which one should go is not for the engine to say.
    assert_eq!(host.engine.share("vol", false).unwrap_err().code(), Code::Busy);
    assert_eq!(host.engine.share("none", true).unwrap_err().code(), Code::NotFound);
    assert_eq!(first.request(FLUSH, 0, None), 0);
    drop(second);
    wait_for("the second to be gone", || host.engine.share("vol", false).is_ok());
    Frontend::connect(&socket).wait_closed();
    assert_eq!(first.request(FLUSH, 0, None), 0);
}

/// The whole of a migration, once there and once back after it failed.
#[test]
fn one_guest_writes_until_it_has_stopped_all_of_its_vrings() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    host.engine.share("vol", true).unwrap();
    let mut source = Guest::connect(&socket, b's');
    source.writes(0);
    source.writes(1);
    let mut target = Guest::connect(&socket, b't');
    target.ask(0);
    target.ask(1);
    (0..50).for_each(|_| source.writes(0));
    target.is_held_back([0, 0]);

    let base = source.vrings[0].stop_vring();
    assert_eq!(base, u32::from(source.vrings[0].used_index()));
    // One of its vrings is left, so nothing changes.
    (0..50).for_each(|_| source.writes(1));
    target.is_held_back([0, 0]);
    let other = source.vrings[1].stop_vring();

    target.is_answered(0);
    target.is_answered(1);
    target.sees(0, b't');
    target.sees(1, b't');

    // The source goes on after all: not before the target has let go.
    let used = [base as u16, other as u16];
    source.ask(0);
    source.vrings[0].start_vring(base);
    source.vrings[1].start_vring(other);
    source.ask(1);
    (0..50).for_each(|_| target.writes(1));
    source.is_held_back(used);
    let bases = [0, 1].map(|vring: usize| target.vrings[vring].stop_vring());
    source.is_answered(0);
    source.is_answered(1);
    source.sees(0, b's');

    // And where the source ends instead of stopping, the target has all.
    target.ask(1);
    (0..2).for_each(|vring| target.vrings[vring].start_vring(bases[vring]));
    source.writes(1);
    drop(source);
    target.is_answered(1);
    target.writes(0);
    target.sees(1, b't');
    assert_eq!(host.engine.attachments().unwrap()[0].frontends, 1);
}

/// Vrings that are disabled need no stop, as GET_VRING_BASE of a guest that never used its disk may not come.
#[test]
fn a_frontend_that_disables_its_vrings_lets_go_of_them() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    host.engine.share("vol", true).unwrap();
    let mut source = Guest::connect(&socket, b's');
    source.writes(0);
    let mut target = Guest::connect(&socket, b't');
    target.ask(0);
    let disable = |vring: u32| assert!(source.vrings[0].frontend.ack(SET_VRING_ENABLE, &pair(vring, 0), &[]));
    disable(1);
    target.is_held_back([0, 0]);
    disable(0);
    target.is_answered(0);
    target.sees(0, b't');
}

/// A device that stopped for a malformed ring runs nothing; the other may.
#[test]
fn a_broken_guest_does_not_keep_the_other_out() {
    let host = Host::new();
    let socket = host.memory_volume("vol");
    host.engine.share("vol", true).unwrap();
    let mut source = Guest::connect(&socket, b's');
    source.writes(0);
    let mut target = Guest::connect(&socket, b't');
    target.ask(0);
    source.vrings[0].offer(999);
    host.wait_event("vol", "needs a reset");
    target.is_answered(0);
    target.sees(0, b't');
    target.writes(1);
}

//! Queues go to a reactor on the node that the guest's memory is on, on a machine with two nodes that we imagine.

mod common;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;

use common::*;
use ringstone_gateway::Topology;

/// Guest address of memory that lies on node 0; what begins at 0 lies on node 1.
const NEAR: u64 = 1 << 40;

/// A reactor on each node, or none where the machine has one core.
fn host() -> Option<Host> {
    if std::thread::available_parallelism().unwrap().get() < 2 {
        eprintln!("skipped: a reactor on each of two nodes takes two cores");
        return None;
    }
    let cores = HashMap::from([(0, 0), (1, 1)]);
    let memory = HashMap::from([(0, 1), (NEAR, 0)]);
    Some(Host::on(vec![0, 1], 100, Some(Topology::imagined(cores, memory))))
}

fn reactors(host: &Host, volume: &str) -> Vec<Option<usize>> {
    let all = host.engine.attachments().unwrap();
    let attachment = all.iter().find(|attachment| attachment.volume == volume).unwrap();
    attachment.queues.iter().map(|queue| queue.reactor).collect()
}

/// Most of a guest's memory from now on, on node 0.
fn region() -> (Vec<u8>, File) {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(4 * MEMORY).unwrap();
    (words(&[0, NEAR, 4 * MEMORY, USER + NEAR, 0]), file)
}

fn serve(host: &Host, volume: &str, queues: u16, memory: impl Fn(&Driver)) -> Vec<Driver> {
    let socket = host.volume(volume, r#"{"type":"memory","hugepages":"off"}"#, 1 << 20, queues.into());
    let first = Driver::prepare(&socket, 16, F_VERSION_1);
    first.set_memory();
    memory(&first);
    let mut drivers: Vec<_> = (1..queues).map(|index| first.beside(index)).collect();
    drivers.insert(0, first);
    for driver in &mut drivers {
        driver.start_vring(0);
        assert_eq!(driver.request(FLUSH, 0, None), 0);
    }
    drivers
}

#[test]
fn queues_go_where_the_guests_memory_is() {
    let Some(host) = host() else { return };
    let (extra, file) = region();
    let far = serve(&host, "far", 2, |_| {});
    let near = serve(&host, "near", 2, |driver| {
        assert!(driver.frontend.ack(ADD_MEM_REG, &extra, &[file.as_raw_fd()]));
    });
    // Each reactor has two: none was chosen for having fewer.
    assert_eq!(reactors(&host, "far"), [Some(1); 2]);
    assert_eq!(reactors(&host, "near"), [Some(0); 2]);
    let more = serve(&host, "more", 4, |_| {});
    assert_eq!(reactors(&host, "more"), [Some(1); 4]);
    drop((far, near, more));
}

#[test]
fn a_guest_whose_memory_moves_is_followed() {
    let Some(host) = host() else { return };
    let (extra, file) = region();
    let mut guest = serve(&host, "vol", 2, |_| {});
    assert_eq!(reactors(&host, "vol"), [Some(1); 2]);
    assert!(guest[0].frontend.ack(ADD_MEM_REG, &extra, &[file.as_raw_fd()]));
    assert_eq!(reactors(&host, "vol"), [Some(0); 2]);
    assert!(guest[0].frontend.ack(REM_MEM_REG, &extra, &[]));
    assert_eq!(reactors(&host, "vol"), [Some(1); 2]);
    for driver in &mut guest {
        assert_eq!(driver.request(FLUSH, 0, None), 0);
    }
}

/// The node is a preference: a person may say otherwise, and a guest is served though its node has no reactor.
#[test]
fn another_node_serves_when_it_has_to() {
    let Some(host) = host() else { return };
    let mut guest = serve(&host, "vol", 2, |_| {});
    host.engine.move_queue("vol", 1, 0).unwrap();
    wait_for("the queue to arrive", || reactors(&host, "vol") == [Some(1), Some(0)]);
    host.engine.remove_reactor(1).unwrap();
    assert_eq!(reactors(&host, "vol"), [Some(0); 2]);
    for driver in &mut guest {
        assert_eq!(driver.request(FLUSH, 0, None), 0);
    }
    host.engine.add_reactor(1).unwrap();
    let other = serve(&host, "other", 1, |_| {});
    let on: Vec<_> =
        host.engine.reactors().unwrap().into_iter().filter(|reactor| reactor.core == 1).collect();
    assert_eq!(reactors(&host, "other"), [Some(on[0].index)]);
    drop(other);
}

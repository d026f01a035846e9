//! Requests of many segments. `seg_max` is what we announce, not what drivers keep to: virtio-win sends up to 515 segments
//! whatever it says. Once more than 256 of them stopped the device.

mod common;

use common::packed::PackedDriver;
use common::*;

/// Guest addresses: an indirect table, and the data behind it.
const TABLE: u64 = DATA;
const BYTES: u64 = DATA + (1 << 20);
/// Bytes of each segment; the drive can take them in place.
const SEGMENT: u32 = 512;
/// Segments that any request may have.
const SERVED: u32 = 1026;

/// Where a descriptor of a table has its flags: behind the id in a packed ring, before `next` in a split one.
#[derive(Clone, Copy)]
enum Layout {
    Split,
    Packed,
}

/// Lay a request of `segments` out in the table: header and status in slot 0, data in every second `SEGMENT`.
fn lay(driver: &Driver, layout: Layout, kind: u32, segments: u32) {
    let slot = driver.put_header(0, kind, 0);
    let write = u16::from(kind == IN) << 1;
    let mut table = vec![(slot, 16, 1)];
    table.extend((0..segments).map(|at| (BYTES + 2 * u64::from(at * SEGMENT), SEGMENT, 1 | write)));
    table.push((slot + 32, 1, 2));
    for (at, (address, len, flags)) in table.into_iter().enumerate() {
        let (third, fourth) = match layout {
            Layout::Split => (flags, at as u16 + 1),
            Layout::Packed => (0, flags),
        };
        driver.descriptor(TABLE, at as u16, (address, len, third, fourth));
    }
}

/// Bytes of the table.
fn table_len(segments: u32) -> u32 {
    16 * (segments + 2)
}

/// Write `segments` segments and read them back, `send` being how the driver has its ring do that: the status byte.
fn round_trip(driver: &Driver, layout: Layout, segments: u32, mut send: impl FnMut() -> u8) -> u8 {
    let bytes = |at: u32| [(at % 251) as u8 + 1; SEGMENT as usize];
    let place = |at: u32| BYTES + 2 * u64::from(at * SEGMENT);
    (0..segments).for_each(|at| driver.write(place(at), &bytes(at)));
    lay(driver, layout, OUT, segments);
    if send() != 0 {
        return driver.status(0);
    }
    (0..segments).for_each(|at| driver.write(place(at), &[0; SEGMENT as usize]));
    lay(driver, layout, IN, segments);
    let status = send();
    for at in (0..segments).filter(|_| status == 0) {
        assert_eq!(driver.read(place(at), SEGMENT as usize), bytes(at), "segment {at} of {segments}");
    }
    status
}

fn each_drive(test: impl Fn(&Host, &std::path::Path)) {
    let host = Host::new();
    test(&host, &host.memory_volume("memory"));
    let disk = host.disk_file(64 << 20);
    test(&host, &host.volume("file", &format!(r#"{{"type":"file","path":{disk:?}}}"#), 64 << 20, 1));
    std::fs::remove_file(disk).unwrap();
}

#[test]
fn a_split_ring_serves_requests_of_more_segments_than_announced() {
    each_drive(|_, socket| {
        let mut driver = Driver::start(socket, 16, F_VERSION_1 | F_INDIRECT);
        let outside = driver.beside(0);
        for segments in [126, 127, 257, 515, SERVED] {
            let status = round_trip(&outside, Layout::Split, segments, || {
                driver.descriptor(0, 0, (TABLE, table_len(segments), 4, 0));
                driver.offer(0);
                assert_eq!(driver.wait_used().0, 0);
                driver.status(0)
            });
            assert_eq!(status, 0, "{segments} segments");
        }
    });
}

#[test]
fn a_packed_ring_serves_requests_of_more_segments_than_announced() {
    each_drive(|_, socket| {
        let mut guest = PackedDriver::start(socket, 16, F_VERSION_1 | F_INDIRECT);
        let outside = guest.driver.beside(0);
        for segments in [126, 257, 515, SERVED] {
            let status =
                round_trip(&outside, Layout::Packed, segments, || guest.indirect(TABLE, table_len(segments)));
            assert_eq!(status, 0, "{segments} segments");
        }
    });
}

/// A request of more segments than anybody needs fails alone: whoever sent it goes on with the next.
#[test]
fn a_request_of_too_many_segments_is_an_io_error_and_no_more() {
    each_drive(|host, socket| {
        let name = socket.file_stem().unwrap().to_str().unwrap().to_string();
        let mut driver = Driver::start(socket, 16, F_VERSION_1 | F_INDIRECT);
        for segments in [2100, 5000] {
            lay(&driver, Layout::Split, OUT, segments);
            driver.descriptor(0, 0, (TABLE, table_len(segments), 4, 0));
            driver.offer(0);
            assert_eq!(driver.wait_used(), (0, 1));
            assert_eq!(driver.status(0), 1, "{segments} segments");
        }
        assert_eq!(driver.request(OUT, 0, Some((BYTES, 4096))), 0);
        assert_eq!(host.state(&name), "running");
        drop(driver);
        host.wait_state(&name, "listening");
        let mut guest = PackedDriver::start(socket, 16, F_VERSION_1 | F_INDIRECT);
        lay(&guest.driver, Layout::Packed, IN, 5000);
        assert_eq!(guest.indirect(TABLE, table_len(5000)), 1);
        assert_eq!(guest.request(FLUSH, 0, None), 0);
    });
}

/// The same without an indirect table: the ring itself is that long.
#[test]
fn a_long_chain_in_the_ring_itself_is_served() {
    each_drive(|_, socket| {
        let mut driver = Driver::start(socket, 4096, F_VERSION_1);
        let slot = driver.put_header(0, OUT, 0);
        let mut offer = |segments: u16| {
            driver.descriptor(0, 0, (slot, 16, 1, 1));
            for at in 1..=segments {
                driver.descriptor(0, at, (BYTES, SEGMENT, 1, at + 1));
            }
            driver.descriptor(0, segments + 1, (slot + 32, 1, 2, 0));
            driver.offer(0);
            assert_eq!(driver.wait_used(), (0, 1));
            driver.status(0)
        };
        assert_eq!(offer(SERVED as u16), 0);
        assert_eq!(offer(3000), 1);
        assert_eq!(offer(1), 0);
    });
}

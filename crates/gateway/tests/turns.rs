//! A frontend's messages come in bursts of any length, and it may wait for the answer to the last of one before it says more.

mod common;

use std::io::Read;

use common::*;

#[test]
fn the_last_message_of_a_burst_needs_no_other_to_be_answered() {
    let host = Host::new();
    let driver = Driver::start(&host.memory_volume("vol"), 16, F_VERSION_1);
    let mut replies = [0u8; 40];
    for between in 0..70 {
        // The first waits for the vring to rest, so the turn begins in the middle of a message.
        let mut burst = message(GET_VRING_BASE, &pair(0, 0));
        for _ in 0..between {
            burst.extend(message(SET_VRING_NUM, &pair(0, 16)));
        }
        burst.extend(message(GET_QUEUE_NUM, &[]));
        driver.frontend.send_raw(&burst, &[]);
        let read = (&driver.frontend.stream).read_exact(&mut replies);
        assert!(read.is_ok(), "no answer after {between} messages: {read:?}");
        assert_eq!((replies[0], replies[20]), (GET_VRING_BASE as u8, GET_QUEUE_NUM as u8));
        driver.start_vring(0);
    }
}

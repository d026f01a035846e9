//! One gateway process goes on where another stands, and no frontend notices.
//!
//! The old process and the new one speak over a Unix socket ([`Link`](ringstone_vhost_user::Link)). The new one is ready to
//! run, with its reactors started, before anything stops. Images of a cluster go over first, while everything else runs. Then the old one stops taking requests, finishes what is in flight,
//! and hands over what there is: listening and connected sockets, the sessions' state, guest memory, the drives' open files
//! with the locks on them. The new one builds everything from that and says so; only then is it told to go, and the old one
//! ends when it hears that the new one serves. Until the word to go, whatever goes wrong, the old one goes on as it was.
//!
//! | file | concern |
//! |---|---|
//! | `format.rs` | the state as it travels, and which releases understand each other |
//! | `images.rs` | images of a cluster, whose locks go over before all else |
//! | `leave.rs` | the old process's side |
//! | `arrive.rs` | the new process's side |

mod arrive;
mod format;
mod images;
mod leave;

pub use arrive::{TakenOver, Takeover};
pub use format::VolumeState;
pub use leave::HandedOver;

use std::time::Duration;

/// What either side waits for the other, where that has only to reckon.
const ANSWER: Duration = Duration::from_secs(20);

/// CLOCK_MONOTONIC in nanoseconds, which two processes of a host share.
fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

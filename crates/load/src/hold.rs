//! Connections that only exist: for what a volume costs at rest.

use std::fs::File;
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;

use serde::Serialize;

use crate::config::HoldConfig;
use crate::connection::{Connection, Request};
use crate::LoadError;

#[derive(Debug, Clone, Serialize)]
pub(crate) struct HoldReport {
    pub mode: &'static str,
    /// For each socket: from the first byte on it until every queue was enabled.
    pub connect_ns: Vec<u64>,
}

pub(crate) fn run(config: &HoldConfig) -> Result<HoldReport, LoadError> {
    let mut connections = Vec::with_capacity(config.sockets.len());
    for socket in &config.sockets {
        let request =
            Request { socket, queues: config.queues, queue_size: config.queue_size, event_idx: true };
        let mut connection = Connection::open(request, None, 0)?;
        connection.queues().iter_mut().for_each(|queue| queue.enable_calls(true));
        connections.push(connection);
    }
    // SAFETY: the descriptor is the caller's; ManuallyDrop leaves it open, and writing to a wrong one is an error.
    let mut ready = ManuallyDrop::new(unsafe { File::from_raw_fd(config.ready_fd) });
    ready.write_all(b"r").map_err(|source| LoadError::System { what: "telling ready_fd", source })?;
    wait_until_released(config.release_fd)?;
    let connect_ns = connections.iter().map(|connection| connection.connect_ns).collect();
    Ok(HoldReport { mode: "hold", connect_ns })
}

fn wait_until_released(fd: i32) -> Result<(), LoadError> {
    let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    loop {
        // SAFETY: `polled` is one live entry.
        if unsafe { libc::poll(&mut polled, 1, -1) } > 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        if source.kind() != io::ErrorKind::Interrupted {
            return Err(LoadError::System { what: "waiting for release_fd", source });
        }
    }
}

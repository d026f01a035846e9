//! The engine's log: a bounded list that the control API drains, and an eventfd that says when.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Events kept for a reader that does not come.
const KEPT: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Info,
    Warning,
    Error,
}

impl Level {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One line of the log.
#[derive(Clone, Debug)]
pub struct Event {
    /// CLOCK_REALTIME.
    pub at_ns: u64,
    pub level: Level,
    /// Empty if none is concerned.
    pub volume: String,
    pub message: String,
}

/// The log, shared by whoever writes and whoever reads.
#[derive(Clone)]
pub struct Events(Arc<Inner>);

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.bell.as_fd()
    }
}

struct Inner {
    lines: Mutex<(VecDeque<Event>, u64)>,
    bell: EventFd,
}

impl Events {
    pub fn new() -> std::io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Inner { lines: Mutex::default(), bell })))
    }

    pub fn fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }

    pub fn log(&self, level: Level, volume: &str, message: impl Into<String>) {
        let at_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        let mut lines = self.0.lines.lock().unwrap_or_else(|e| e.into_inner());
        if lines.0.len() == KEPT {
            lines.0.pop_front();
            lines.1 += 1;
        }
        lines.0.push_back(Event { at_ns, level, volume: volume.into(), message: message.into() });
        // A full counter means that the bell rings already.
        let _ = self.0.bell.write(1);
    }

    /// Take all lines; if some were dropped since the last time, the first says so.
    pub fn drain(&self) -> Vec<Event> {
        let mut lines = self.0.lines.lock().unwrap_or_else(|e| e.into_inner());
        // Nothing to read only means that nobody rang.
        let _ = self.0.bell.read();
        let dropped = std::mem::take(&mut lines.1);
        let mut taken: Vec<Event> = lines.0.drain(..).collect();
        if dropped > 0 {
            let at_ns = taken.first().map_or(0, |event| event.at_ns);
            let message = format!("{dropped} older log lines were dropped because nobody read them");
            taken.insert(0, Event { at_ns, level: Level::Warning, volume: String::new(), message });
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_nobody_reads_are_dropped_and_counted() {
        let events = Events::new().unwrap();
        for n in 0..KEPT + 3 {
            events.log(Level::Info, "v", n.to_string());
        }
        let lines = events.drain();
        assert_eq!(lines.len(), KEPT + 1);
        assert!(lines[0].message.starts_with("3 older"));
        assert_eq!(lines[1].message, "3");
        assert!(events.drain().is_empty());
    }
}

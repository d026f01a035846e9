//! The engine's log: a bounded list that the control API drains, and an eventfd that says when. What one volume may say is
//! limited, as a frontend that connects and leaves without end would otherwise fill the host's journal.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Events kept for a reader that does not come.
const KEPT: usize = 4096;

/// Lines about one volume in [`WINDOW_NS`]; the rest is counted.
const VOLUME_LINES: u64 = 200;
const WINDOW_NS: u64 = 10_000_000_000;

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
    lines: Mutex<Lines>,
    bell: EventFd,
}

#[derive(Default)]
struct Lines {
    waiting: VecDeque<Event>,
    /// Pushed out by newer ones.
    dropped: u64,
    /// By volume; one that has said nothing in this window has none.
    windows: HashMap<String, Window>,
}

/// What one volume has said since the window began.
struct Window {
    begun_ns: u64,
    lines: u64,
}

impl Lines {
    fn add(&mut self, event: Event) {
        if event.volume.is_empty() {
            return self.push(event);
        }
        let at_ns = event.at_ns;
        match self.windows.get_mut(&event.volume) {
            // A clock that was set back begins a window, too.
            Some(window) if at_ns.wrapping_sub(window.begun_ns) < WINDOW_NS => {
                window.lines += 1;
                if window.lines < VOLUME_LINES {
                    self.push(event);
                } else if window.lines == VOLUME_LINES {
                    let message = format!(
                        "more than {VOLUME_LINES} log lines in {} s, the last one: {}; the rest of this time is left out",
                        WINDOW_NS / 1_000_000_000,
                        event.message
                    );
                    self.push(Event { message, level: Level::Warning, ..event });
                }
            }
            _ => {
                let mut ended = Vec::new();
                self.windows.retain(|volume, window| {
                    let goes_on = at_ns.wrapping_sub(window.begun_ns) < WINDOW_NS;
                    if !goes_on && window.lines > VOLUME_LINES {
                        ended.push((volume.clone(), window.lines - VOLUME_LINES));
                    }
                    goes_on
                });
                for (volume, left_out) in ended {
                    let message = format!("{left_out} log lines were left out");
                    self.push(Event { at_ns, level: Level::Warning, volume, message });
                }
                self.windows.insert(event.volume.clone(), Window { begun_ns: at_ns, lines: 1 });
                self.push(event);
            }
        }
    }

    fn push(&mut self, event: Event) {
        if self.waiting.len() == KEPT {
            self.waiting.pop_front();
            self.dropped += 1;
        }
        self.waiting.push_back(event);
    }
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
        let event = Event { at_ns, level, volume: volume.into(), message: message.into() };
        self.0.lines.lock().unwrap_or_else(|e| e.into_inner()).add(event);
        // A full counter means that the bell rings already.
        let _ = self.0.bell.write(1);
    }

    /// Take all lines; if some were dropped since the last time, the first says so.
    pub fn drain(&self) -> Vec<Event> {
        let mut lines = self.0.lines.lock().unwrap_or_else(|e| e.into_inner());
        // Nothing to read only means that nobody rang.
        let _ = self.0.bell.read();
        let dropped = std::mem::take(&mut lines.dropped);
        let mut taken: Vec<Event> = lines.waiting.drain(..).collect();
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
            events.log(Level::Info, "", n.to_string());
        }
        let lines = events.drain();
        assert_eq!(lines.len(), KEPT + 1);
        assert!(lines[0].message.starts_with("3 older"));
        assert_eq!(lines[1].message, "3");
        assert!(events.drain().is_empty());
    }

    #[test]
    fn a_volume_that_says_too_much_is_cut_short_and_the_others_are_not() {
        let mut lines = Lines::default();
        let mut say = |at_s: u64, volume: &str, message: &str| {
            let (at_ns, volume, message) = (at_s * 1_000_000_000, volume.to_owned(), message.to_owned());
            lines.add(Event { at_ns, level: Level::Info, volume, message });
            let said: Vec<_> = lines.waiting.drain(..).map(|event| (event.volume, event.message)).collect();
            said
        };
        let one = |volume: &str, message: &str| vec![(volume.to_owned(), message.to_owned())];
        for _ in 1..VOLUME_LINES {
            assert_eq!(say(100, "loud", "x"), one("loud", "x"));
        }
        assert!(say(109, "loud", "y")[0].1.contains("the last one: y; the rest"));
        for _ in 0..3 {
            assert!(say(109, "loud", "x").is_empty());
        }
        assert_eq!(say(109, "calm", "x"), one("calm", "x"));
        let mut later = one("loud", "3 log lines were left out");
        later.extend(one("loud", "z"));
        assert_eq!(say(110, "loud", "z"), later);
    }
}

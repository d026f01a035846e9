//! Signs of life to the service manager (`sd_notify(3)`, `sd_watchdog_enabled(3)`), fed by the reactors.
//!
//! A thread of the engine looks at every reactor's counters and says `WATCHDOG=1` while each one that polls has also turned,
//! and the control thread too, without which no frontend connects. It does not watch the control API: Python that is slow, collecting garbage or stopped must never cost a
//! guest its disk, but a reactor that is stuck already has. So nothing here takes the GIL.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use ringstone_telemetry::ReactorView;

use crate::control::Pulse;
use crate::events::{Events, Level};

/// What of a reactor moves while it works; a reactor that has slept and woken has moved too.
type Progress = (u64, u64);

/// The running thread; dropping it ends it.
pub struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Say a sign of life to `address` (a path, or `@name` in the abstract namespace) every `interval`.
    ///
    /// # Errors
    /// The address cannot be one, or there is no thread to be had.
    pub fn start(
        reactors: Vec<ReactorView>,
        control: Arc<Pulse>,
        events: Events,
        address: &str,
        interval: Duration,
    ) -> io::Result<Self> {
        let address = match address.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(address)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        let (stop, stopped) = channel();
        let mut looks = Looks::new(reactors, control, events, interval);
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                if looks.all_alive() {
                    // A manager that has gone, or that does not read, cannot be told anything.
                    let _ = socket.send_to_addr(b"WATCHDOG=1", &address);
                }
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so on stderr.
            let _ = thread.join();
        }
    }
}

/// One look after the other.
struct Looks {
    reactors: Vec<(ReactorView, Seen)>,
    control: (Arc<Pulse>, Seen),
    events: Events,
    interval: Duration,
}

/// What the look before saw of a thread.
#[derive(Default)]
struct Seen {
    progress: Option<Progress>,
    stuck: bool,
}

impl Seen {
    /// Whether it is stuck at `now`, which is `None` while it sleeps, and whether that is news.
    fn look(&mut self, now: Option<Progress>) -> (bool, bool) {
        let stuck = now.is_some() && now == self.progress;
        self.progress = now;
        (stuck, std::mem::replace(&mut self.stuck, stuck) != stuck)
    }
}

impl Looks {
    fn new(reactors: Vec<ReactorView>, control: Arc<Pulse>, events: Events, interval: Duration) -> Self {
        let reactors = reactors.into_iter().map(|view| (view, Seen::default())).collect();
        Self { reactors, control: (control, Seen::default()), events, interval }
    }

    /// Whether every thread has turned, or slept, since the last look. Tells the log of one that is stuck once, and when it
    /// goes on.
    fn all_alive(&mut self) -> bool {
        let mut all = true;
        let ms = self.interval.as_millis();
        let (pulse, seen) = &mut self.control;
        let (stuck, news) = seen.look(pulse.progress());
        all &= !stuck;
        if news && stuck {
            let message = format!(
                "the control thread is stuck: it has done nothing for {ms} ms, and no frontend can connect or change \
                 anything; the service manager will restart the gateway unless it goes on"
            );
            self.events.log(Level::Error, "", message);
        } else if news {
            self.events.log(Level::Warning, "", "the control thread goes on");
        }
        for (index, (view, seen)) in self.reactors.iter_mut().enumerate() {
            let (stuck, news) = seen.look(view.polling().then(|| (view.turns(), view.wake_ups())));
            all &= !stuck;
            let core = view.core();
            if news && stuck {
                let message = format!(
                    "reactor {index} on core {core} is stuck: it has done nothing for {ms} ms, and neither has any volume \
                     it serves; the service manager will restart the gateway unless it goes on"
                );
                self.events.log(Level::Error, "", message);
            } else if news {
                self.events.log(Level::Warning, "", format!("reactor {index} on core {core} goes on"));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::fd::AsFd;

    use nix::poll::{poll, PollFd, PollFlags};
    use ringstone_telemetry::{ReactorCounter, StatsPage};

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn page(dir: &tempfile::TempDir) -> StatsPage {
        StatsPage::create(&dir.path().join("stats"), &[3, 5]).unwrap()
    }

    fn views(page: &StatsPage) -> Vec<ReactorView> {
        (0..2).map(|index| page.view(index)).collect()
    }

    fn messages(events: &Events) -> Vec<(Level, String)> {
        events.drain().into_iter().map(|event| (event.level, event.message)).collect()
    }

    /// Until there is an event.
    fn wait(events: &Events) {
        let bell = PollFd::new(events.as_fd(), PollFlags::POLLIN);
        assert_eq!(poll(&mut [bell], 30_000u16).unwrap(), 1);
    }

    #[test]
    fn a_reactor_that_polls_without_turning_is_stuck_and_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let page = page(&dir);
        let (first, second) = (page.reactor(0), page.reactor(1));
        let events = Events::new().unwrap();
        let mut looks = Looks::new(views(&page), Arc::default(), events.clone(), LONG);
        // Not started yet, which is no reason to worry.
        assert!(looks.all_alive() && looks.all_alive());
        first.set_asleep(false);
        second.set_asleep(false);
        assert!(looks.all_alive());
        first.add(ReactorCounter::Turns, 1);
        second.add(ReactorCounter::Turns, 1);
        assert!(looks.all_alive());
        first.add(ReactorCounter::Turns, 1);
        assert!(!looks.all_alive());
        first.add(ReactorCounter::Turns, 1);
        assert!(!looks.all_alive());
        let told = messages(&events);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].0, Level::Error);
        assert!(told[0].1.starts_with("reactor 1 on core 5 is stuck"), "{}", told[0].1);
        first.add(ReactorCounter::Turns, 1);
        second.add(ReactorCounter::Turns, 1);
        assert!(looks.all_alive());
        assert_eq!(messages(&events), [(Level::Warning, "reactor 1 on core 5 goes on".into())]);
    }

    /// It closed whatever a frontend sent, and stood still for as long as that took, while signs of life went on.
    #[test]
    fn a_control_thread_that_neither_sleeps_nor_turns_is_stuck_and_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let (events, pulse) = (Events::new().unwrap(), Arc::<Pulse>::default());
        let mut looks = Looks::new(views(&page(&dir)), pulse.clone(), events.clone(), LONG);
        // It waits for something to do.
        assert!(looks.all_alive() && looks.all_alive());
        pulse.wake();
        assert!(looks.all_alive());
        pulse.sleep();
        pulse.wake();
        assert!(looks.all_alive());
        assert!(!looks.all_alive() && !looks.all_alive());
        pulse.sleep();
        assert!(looks.all_alive());
        let told = messages(&events);
        assert!(told[0].1.starts_with("the control thread is stuck"), "{}", told[0].1);
        assert_eq!(told[1..], [(Level::Warning, "the control thread goes on".into())]);
    }

    #[test]
    fn a_reactor_that_sleeps_or_has_slept_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let page = page(&dir);
        let reactor = page.reactor(0);
        let mut looks = Looks::new(views(&page), Arc::default(), Events::new().unwrap(), LONG);
        reactor.set_asleep(true);
        assert!(looks.all_alive() && looks.all_alive());
        reactor.set_asleep(false);
        assert!(looks.all_alive());
        // It slept through the interval, and was woken the moment before the look.
        reactor.add(ReactorCounter::WakeUps, 1);
        assert!(looks.all_alive());
        assert!(!looks.all_alive());
    }

    #[test]
    fn signs_of_life_arrive_at_a_path_and_at_an_abstract_name_until_a_reactor_is_stuck() {
        let dir = tempfile::tempdir().unwrap();
        let page = page(&dir);
        let reactor = page.reactor(0);
        let path = dir.path().join("notify");
        let name = format!("ringstone-watchdog-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        let managers = [
            (path.to_str().unwrap().to_owned(), UnixDatagram::bind(&path).unwrap()),
            (format!("@{name}"), UnixDatagram::bind_addr(&abstract_address).unwrap()),
        ];
        for (address, manager) in managers {
            reactor.set_asleep(true);
            manager.set_read_timeout(Some(LONG)).unwrap();
            let events = Events::new().unwrap();
            let watchdog = Watchdog::start(
                views(&page),
                Arc::default(),
                events.clone(),
                &address,
                Duration::from_millis(1),
            )
            .unwrap();
            let mut said = [0; 64];
            for _ in 0..3 {
                let length = manager.recv(&mut said).unwrap();
                assert_eq!(&said[..length], b"WATCHDOG=1");
            }
            reactor.set_asleep(false);
            // The event is the edge: what was said before it is drained, and nothing may come after it.
            wait(&events);
            drop(watchdog);
            manager.set_nonblocking(true).unwrap();
            while manager.recv(&mut said).is_ok() {}
            assert!(messages(&events)[0].1.contains("reactor 0 on core 3 is stuck"));
            let _stuck = Watchdog::start(
                views(&page),
                Arc::default(),
                events.clone(),
                &address,
                Duration::from_millis(1),
            )
            .unwrap();
            wait(&events);
            // The first look has nothing to compare with and lets it pass; every other is silent.
            assert!(manager.recv(&mut said).is_ok());
            assert_eq!(manager.recv(&mut said).unwrap_err().kind(), ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn a_manager_that_has_gone_ends_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let page = page(&dir);
        let address = dir.path().join("nobody");
        let interval = Duration::from_millis(1);
        let events = Events::new().unwrap();
        let watchdog = Watchdog::start(
            views(&page),
            Arc::default(),
            events.clone(),
            address.to_str().unwrap(),
            interval,
        )
        .unwrap();
        let manager = UnixDatagram::bind(&address).unwrap();
        manager.set_read_timeout(Some(LONG)).unwrap();
        assert_eq!(manager.recv(&mut [0; 64]).unwrap(), 10);
        drop(watchdog);
    }
}

//! One engine goes on where another stands.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use ringstone_gateway::{Engine, EngineError, EngineSettings, Takeover};

use super::Host;

pub const DRAIN: Duration = Duration::from_secs(10);

/// A new engine on `core`, with the old one's stats page.
pub fn settings(host: &Host, core: usize) -> EngineSettings {
    EngineSettings {
        cores: vec![core],
        idle_us: 100,
        stats_path: host.path("stats"),
        balance: false,
        topology: None,
    }
}

/// Hand `host`'s engine over to a new one on `core`.
pub fn upgrade(host: &Host, core: usize) -> Result<Engine, EngineError> {
    let (old, new) = UnixStream::pair().unwrap();
    let own = settings(host, core);
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || Takeover::greet(new, "2.0.0")?.run(&own));
        let left = host.engine.hand_over(old, "1.0.0", Vec::new(), DRAIN);
        let taken = arriving.join().unwrap();
        match (left, taken) {
            (Ok(left), Ok(taken)) => {
                assert_eq!((left.version.as_str(), taken.version.as_str()), ("2.0.0", "1.0.0"));
                assert_eq!((left.volumes, taken.volumes, left.stall_ns), (1, 1, taken.stall_ns));
                host.engine.abandon();
                Ok(taken.engine)
            }
            (Err(left), Err(_)) => Err(left),
            (left, taken) => panic!("old: {left:?}, new: {:?}", taken.map(|taken| taken.version)),
        }
    })
}

//! Lets go of what takes long to let go: the memory of a large guest is unmapped for seconds, on a thread that nobody waits for.

use std::any::Any;
use std::sync::mpsc::{channel, Sender};

/// The way to the thread. It ends when this is dropped and everything is let go of.
pub struct Reaper(Option<Sender<Box<dyn Any + Send>>>);

impl Reaper {
    pub fn start() -> Self {
        let (sender, receiver) = channel::<Box<dyn Any + Send>>();
        let thread =
            std::thread::Builder::new().name("reaper".into()).spawn(move || receiver.iter().for_each(drop));
        // Without a thread things are let go of where they are.
        Self(thread.is_ok().then_some(sender))
    }

    pub fn take(&self, what: impl Any + Send) {
        if let Some(sender) = &self.0 {
            // What the thread cannot take comes back and is dropped here.
            let _ = sender.send(Box::new(what));
        }
    }
}

//! How long a reactor looks for work before it sleeps. Arithmetic on ticks, without a clock.
//!
//! A reactor with work of its own looks for all of its idle time. While librbd has its requests there is nothing that it could
//! do: what comes next is an interrupt of the network and threads of librbd, of the kernel and, where the cluster is on
//! this host too, of OSDs, and they want cores. So the reactor yields its core between its looks. To look for the answer saves
//! a wake-up, as long as answers are quick and the reactor has its core for most of the time; otherwise it is late for the
//! answer, and only takes time from those that are to give it. Which of the two it is cannot be known beforehand and
//! shows when it is tried, so that is done now and then. While librbd has many requests it is not worth trying: their answers come in
//! groups that share a wake-up, and a reactor that looks takes them one by one.

const MICROSECOND: u64 = 1000;
const MILLISECOND: u64 = 1_000_000;
/// How long it looks before it is judged. Threads need some of that to find themselves another core.
const TRIAL: u64 = 100 * MILLISECOND;
/// How long it does not look after a trial that did not pay: answers come some percent later while it lasts.
const QUIET: u64 = 2000 * MILLISECOND;
/// More requests are many.
const FEW: u32 = 4;
/// It looks for librbd's answer so many idle times, as the core it yields is not wasted.
const LONGER: u64 = 2;
/// Between two looks lie some turns without work, well below a microsecond. If it is so much, somebody else had the core.
const INTERRUPTION: u64 = 4 * MICROSECOND;
/// Drivers that were answered are given so long to ask again, which saves them the kick and us the wake-up.
const BRIEF: u64 = 20 * MICROSECOND;

/// What a reactor waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// Work that it finds by looking.
    Work,
    /// librbd, which has `of` requests, and `drivers` that were just answered.
    Answers { of: u32, drivers: bool },
}

impl Awaited {
    /// Whether it is worth trying to look for them.
    fn few(self) -> bool {
        matches!(self, Self::Answers { of: ..=FEW, .. })
    }
}

/// All times are ticks.
pub struct Patience {
    idle: u64,
    brief: u64,
    interruption: u64,
    trial: u64,
    quiet: u64,
    /// It does not look for answers before.
    quiet_until: u64,
    tried: Trial,
}

/// What came of looking since `began`.
#[derive(Default)]
struct Trial {
    began: Option<u64>,
    found: u32,
    missed: u32,
    looked: u64,
    interrupted: u64,
}

impl Trial {
    /// Six of seven answers came while it looked, and the core was the reactor's for a quarter of that time. With OSDs on the
    /// same two cores reads miss less than a tenth, and have lost up to 0.6 of the time to those; of writes a sixth to all
    /// are missed.
    fn pays(&self) -> bool {
        self.missed <= self.found / 6 && self.interrupted / 3 < self.looked / 4
    }
}

impl Patience {
    /// `idle`: the idle time; `ticks`: of so many nanoseconds.
    pub fn new(idle: u64, ticks: impl Fn(u64) -> u64) -> Self {
        Self {
            idle,
            brief: ticks(BRIEF).min(idle),
            interruption: ticks(INTERRUPTION),
            trial: ticks(TRIAL),
            quiet: ticks(QUIET),
            quiet_until: 0,
            tried: Trial::default(),
        }
    }

    /// How long to look since the last work.
    pub fn limit(&self, awaited: Awaited, now: u64) -> u64 {
        match awaited {
            Awaited::Work => self.idle,
            Awaited::Answers { .. } if awaited.few() && now >= self.quiet_until => self.idle * LONGER,
            Awaited::Answers { drivers: true, .. } => self.brief,
            Awaited::Answers { drivers: false, .. } => 0,
        }
    }

    /// It looked for what it waits for, which took so long. Whether it is to yield its core before it looks again: one that
    /// is to sleep soon gets it back sooner by that.
    pub fn looked(&mut self, awaited: Awaited, took: u64, now: u64) -> bool {
        if !awaited.few() || now < self.quiet_until {
            return false;
        }
        let began = *self.tried.began.get_or_insert(now);
        self.tried.looked += took;
        if took > self.interruption {
            self.tried.interrupted += took;
        }
        if now - began > self.trial {
            if !self.tried.pays() {
                self.quiet_until = now + self.quiet;
            }
            self.tried = Trial::default();
        }
        true
    }

    /// Work came while it looked.
    pub fn found(&mut self, awaited: Awaited) {
        self.tried.found += u32::from(awaited.few() && self.tried.began.is_some());
    }

    /// None did, and it sleeps.
    pub fn missed(&mut self, awaited: Awaited) {
        self.tried.missed += u32::from(awaited.few() && self.tried.began.is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBRBD: Awaited = Awaited::Answers { of: 1, drivers: false };
    const DRIVERS: Awaited = Awaited::Answers { of: 1, drivers: true };

    /// Ticks are nanoseconds here.
    fn patience() -> Patience {
        Patience::new(200 * MICROSECOND, |ns| ns)
    }

    /// Waits for librbd from `now` on, of which a share is answered in time; the tick at the end.
    fn wait(patience: &mut Patience, mut now: u64, waits: u32, found_of_ten: u32, look: u64) -> u64 {
        for one in 0..waits {
            for _ in 0..100 {
                now += look;
                patience.looked(LIBRBD, look, now);
            }
            if one % 10 < found_of_ten {
                patience.found(LIBRBD)
            } else {
                patience.missed(LIBRBD)
            }
        }
        now
    }

    #[test]
    fn looking_goes_on_while_answers_come_in_time() {
        let mut patience = patience();
        let now = wait(&mut patience, 1, 6000, 9, 200);
        assert_eq!(patience.limit(LIBRBD, now), LONGER * 200 * MICROSECOND);
    }

    #[test]
    fn answers_that_take_longer_are_slept_for_and_tried_again_later() {
        let mut patience = patience();
        let now = wait(&mut patience, 1, 6000, 5, 200);
        assert_eq!(patience.limit(LIBRBD, now), 0);
        assert_eq!(patience.limit(DRIVERS, now), BRIEF);
        assert_eq!(patience.limit(Awaited::Work, now), 200 * MICROSECOND);
        // What is slept for meanwhile says nothing about the next trial.
        wait(&mut patience, now, 10, 0, 200);
        let later = now + QUIET;
        assert_eq!(patience.limit(LIBRBD, later), LONGER * 200 * MICROSECOND);
        let now = wait(&mut patience, later, 6000, 10, 200);
        assert_eq!(patience.limit(LIBRBD, now), LONGER * 200 * MICROSECOND);
    }

    #[test]
    fn a_core_that_others_want_is_given_up() {
        let mut patience = patience();
        let mut now = wait(&mut patience, 1, 10, 10, 200);
        for _ in 0..TRIAL / INTERRUPTION {
            now += 2 * INTERRUPTION;
            patience.looked(LIBRBD, 2 * INTERRUPTION, now);
            patience.found(LIBRBD);
        }
        assert_eq!(patience.limit(LIBRBD, now), 0);
    }

    #[test]
    fn many_answers_are_slept_for_without_a_trial() {
        let mut patience = patience();
        let many = Awaited::Answers { of: FEW + 1, drivers: false };
        assert_eq!(patience.limit(many, 1), 0);
        assert_eq!(patience.limit(Awaited::Answers { of: FEW + 1, drivers: true }, 1), BRIEF);
        for now in 0..2 * TRIAL / MICROSECOND {
            patience.looked(many, MICROSECOND, now * MICROSECOND);
            patience.missed(many);
        }
        assert_eq!(patience.limit(LIBRBD, 2 * TRIAL), LONGER * 200 * MICROSECOND);
    }

    #[test]
    fn without_idle_time_it_never_looks() {
        let patience = Patience::new(0, |ns| ns);
        for awaited in [Awaited::Work, DRIVERS, LIBRBD] {
            assert_eq!(patience.limit(awaited, 1), 0);
        }
    }
}

//! Runs the watchdog's tests: connects the self-test's socket, keeps its records from the connections, and looks at the
//! programs' counters.

use std::{fmt, time::Duration};

use selfconn_ebpf::{Transition, state};
use tokio::time::Instant;

use super::Daemon;
use crate::{
    event::{Lost, What},
    kernel::attach::Method,
    selftest::{self, SelfTest},
    watchdog::{Counts, Dead, Verdict, Watchdog},
};

/// The watchdog, and what it tests with. Without privileges to make that there is no test, but the tests of other
/// daemons are known all the same.
pub(super) struct Guard {
    watchdog: Option<(Watchdog, SelfTest)>,
    uid: u32,
}

impl Guard {
    pub(super) fn new() -> Self {
        Self { watchdog: None, uid: rustix::process::getuid().as_raw() }
    }

    /// Whether this is about a test, and about nothing else that anybody wants to know.
    pub(super) fn takes(&mut self, t: &Transition) -> bool {
        let Some((watchdog, test)) = &mut self.watchdog else { return selftest::is_marked(t, self.uid) };
        let is_ours = test.owns(t);
        let is_test = is_ours || selftest::is_marked(t, self.uid);
        if is_test {
            watchdog.record(is_ours, t.new == state::ESTABLISHED);
        }
        is_test
    }
}

/// Why the run ends by itself, in words.
pub struct Blind(Dead);

impl fmt::Display for Blind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(Dead { methods, ring }) = self;
        let methods: Vec<_> = methods.iter().map(|method| method.name()).collect();
        match (methods.is_empty(), ring) {
            (true, _) => write!(f, "the ring buffer gives nothing any more")?,
            (false, _) => write!(f, "{} sees nothing any more", methods.join(" and "))?,
        }
        write!(f, ", as self-connections of our own have shown: the run ends, to be started anew")
    }
}

impl Daemon {
    /// Has the hooks tested at this pace.
    pub fn test_by(&mut self, test: SelfTest, pace: Duration) {
        let live = self.tracer.methods().live.iter().map(|(method, ())| *method).collect();
        self.guard.watchdog = Some((Watchdog::new(live, pace, Instant::now()), test));
    }

    /// What the self-tests came to; `None`: there are none.
    #[must_use]
    pub fn self_tests(&self) -> Option<Counts> {
        self.guard.watchdog.as_ref().map(|(watchdog, _)| watchdog.counts())
    }

    /// Whether the hooks saw the last self-test; true where there are none.
    #[must_use]
    pub fn hooks_see(&self) -> bool {
        self.guard.watchdog.as_ref().is_none_or(|(watchdog, _)| watchdog.is_well())
    }

    /// When the watchdog has something to do.
    pub(super) fn watch_at(&self) -> Option<Instant> {
        self.guard.watchdog.as_ref().map(|(watchdog, _)| watchdog.next())
    }

    /// Begins a test, or ends one. `Some`: the hooks are dead.
    pub(super) fn watch_hooks(&mut self) -> Option<Blind> {
        let now = Instant::now();
        let (watchdog, test) = self.guard.watchdog.as_mut()?;
        if watchdog.is_due(now) {
            let begun = self.tracer.counters().and_then(|before| Ok((before, test.connect()?)));
            match begun {
                Ok((before, ())) => watchdog.begin(before, now),
                Err(error) => {
                    log::error!("the hooks can't be tested: {error:#}");
                    watchdog.put_off(now);
                }
            }
        } else if watchdog.may_end(now) {
            // A daemon that was stopped for a while finds its time up, and the records still there.
            while self.take() > 0 {}
            let after = self.tracer.counters();
            let (watchdog, test) = self.guard.watchdog.as_mut()?;
            let verdict = match after {
                Ok(after) => watchdog.judge(&after, now)?,
                Err(error) => {
                    log::error!("the programs' counters can't be read: {error:#}");
                    watchdog.put_off(now);
                    return None;
                }
            };
            test.disconnect();
            match verdict {
                Verdict::Passed => log::debug!("self-test passed"),
                Verdict::Failed(dead) => log::warn!("self-test failed: {dead:?}"),
                Verdict::Blind(dead) => {
                    self.tell_blind(&dead);
                    return Some(Blind(dead));
                }
            }
        }
        None
    }

    fn tell_blind(&mut self, dead: &Dead) {
        let none = (dead.ring && dead.methods.is_empty()).then_some(None);
        for method in dead.methods.iter().copied().map(Some).chain(none) {
            let method = method.map(Method::name);
            self.story.out.emit(What::Lost(Lost { r#where: "hooks", count: 1, method }));
            self.blind += 1;
        }
    }
}

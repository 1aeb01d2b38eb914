//! Runs the self-tests of the hooks: connects the self-test's socket, keeps its records away from the
//! connections, and reads the probes' counters.

use std::{fmt, time::Duration};

use selfconn_ebpf::{Transition, state};
use tokio::time::Instant;

use super::Daemon;
use crate::{
    bpf::attach::Method,
    detect::probe_health::{DeadProbes, ProbeHealth, SelfTestCounts, SelfTestOutcome},
    event::{EventKind, LossCause, Lost},
};
use socket::SelfTestSocket;

pub mod socket;

/// The schedule of the self-tests, and their socket. Without the privileges to create the socket there are no
/// self-tests, but the self-tests of other daemons are recognized nevertheless.
pub(super) struct SelfTest {
    health: Option<(ProbeHealth, SelfTestSocket)>,
    uid: u32,
}

impl SelfTest {
    pub(super) fn new() -> Self {
        Self { health: None, uid: rustix::process::getuid().as_raw() }
    }

    /// Handles a transition of a self-test. Returns true if it was one: such a transition is not processed
    /// further.
    pub(super) fn consume(&mut self, t: &Transition) -> bool {
        let Some((health, test)) = &mut self.health else { return socket::is_self_test(t, self.uid) };
        let is_ours = test.owns(t);
        let is_test = is_ours || socket::is_self_test(t, self.uid);
        if is_test {
            health.on_record(is_ours, t.new == state::ESTABLISHED);
        }
        is_test
    }
}

/// The self-tests have shown that the hooks do not work any more: the reason why the run ends.
pub struct HooksDead(DeadProbes);

impl fmt::Display for HooksDead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(DeadProbes { methods, ring }) = self;
        let methods: Vec<_> = methods.iter().map(|method| method.name()).collect();
        match (methods.is_empty(), ring) {
            (true, _) => write!(f, "the ring buffer delivers no records any more")?,
            (false, _) => write!(f, "{} observes no transitions any more", methods.join(" and "))?,
        }
        write!(
            f,
            ", as repeated self-tests have shown: exiting, so that a restart can attach the hooks again"
        )
    }
}

impl Daemon {
    /// Enables self-tests at this interval.
    pub fn enable_self_test(&mut self, test: SelfTestSocket, interval: Duration) {
        let live = self.tracer.methods().live.iter().map(|(method, ())| *method).collect();
        self.self_test.health = Some((ProbeHealth::new(live, interval, Instant::now()), test));
    }

    /// Results of the self-tests. `None`: self-tests are not enabled.
    #[must_use]
    pub fn self_test_counts(&self) -> Option<SelfTestCounts> {
        self.self_test.health.as_ref().map(|(health, _)| health.counts())
    }

    /// True if the last self-test passed, or if self-tests are not enabled.
    #[must_use]
    pub fn hooks_are_healthy(&self) -> bool {
        self.self_test.health.as_ref().is_none_or(|(health, _)| health.is_healthy())
    }

    /// When the next self-test begins, or the current one times out.
    pub(super) fn next_self_test_at(&self) -> Option<Instant> {
        self.self_test.health.as_ref().map(|(health, _)| health.next_at())
    }

    /// Begins or evaluates a self-test, if due. `Some`: the hooks are dead.
    pub(super) fn run_self_test(&mut self) -> Option<HooksDead> {
        let now = Instant::now();
        let (health, test) = self.self_test.health.as_mut()?;
        if health.is_due(now) {
            let started = self.tracer.counters().and_then(|before| Ok((before, test.connect()?)));
            match started {
                Ok((before, ())) => health.begin(before, now),
                Err(error) => {
                    log::error!("the self-test can't be started: {error:#}");
                    health.postpone(now);
                }
            }
        } else if health.can_evaluate(now) {
            // If the daemon was stopped for a while, the test has timed out but its records are still in the
            // ring buffer.
            while self.drain_batch() > 0 {}
            let after = self.tracer.counters();
            let (health, test) = self.self_test.health.as_mut()?;
            let outcome = match after {
                Ok(after) => health.evaluate(&after, now)?,
                Err(error) => {
                    log::error!("the probes' counters can't be read: {error:#}");
                    health.postpone(now);
                    return None;
                }
            };
            test.disconnect();
            match outcome {
                SelfTestOutcome::Passed => log::debug!("self-test passed"),
                SelfTestOutcome::Failed(dead) => log::warn!("self-test failed: {dead:?}"),
                SelfTestOutcome::HooksDead(dead) => {
                    self.report_dead_hooks(&dead);
                    return Some(HooksDead(dead));
                }
            }
        }
        None
    }

    fn report_dead_hooks(&mut self, dead: &DeadProbes) {
        let ring_only = (dead.ring && dead.methods.is_empty()).then_some(None);
        for method in dead.methods.iter().copied().map(Some).chain(ring_only) {
            let method = method.map(Method::name);
            self.pipeline.out.emit(EventKind::Lost(Lost::new(LossCause::Hooks, 1, method)));
            self.dead_hooks += 1;
        }
    }
}

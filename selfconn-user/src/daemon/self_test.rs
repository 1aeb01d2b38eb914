//! Runs the self-tests of the hooks: connects the self-test's socket, keeps its records away from the
//! connections, and reads the probes' counters.

use std::{fmt, time::Duration};

use selfconn_ebpf::{Transition, state};
use tokio::time::Instant;

use crate::{
    bpf::{attach::Method, loader::Tracer},
    detect::probe_health::{DeadProbes, ProbeHealth, SelfTestCounts, SelfTestOutcome},
};
use socket::SelfTestSocket;

pub mod socket;

/// The schedule of the self-tests, and their socket. Without the privileges to create the socket there are no
/// self-tests, but the self-tests of other daemons are recognized nevertheless.
pub struct SelfTest {
    health: Option<(ProbeHealth, SelfTestSocket)>,
    uid: u32,
}

impl SelfTest {
    /// Tests these methods at this interval.
    #[must_use]
    pub fn new(socket: Option<SelfTestSocket>, interval: Duration, methods: Vec<Method>) -> Self {
        let health = socket.map(|socket| (ProbeHealth::new(methods, interval, Instant::now()), socket));
        Self { health, uid: rustix::process::getuid().as_raw() }
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

    /// Results so far. `None`: there are no self-tests.
    pub(super) fn counts(&self) -> Option<SelfTestCounts> {
        self.health.as_ref().map(|(health, _)| health.counts())
    }

    /// True if the last self-test passed, or if there are no self-tests.
    pub(super) fn is_healthy(&self) -> bool {
        self.health.as_ref().is_none_or(|(health, _)| health.is_healthy())
    }

    /// When the next self-test begins, or the current one times out.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.health.as_ref().map(|(health, _)| health.next_at())
    }

    /// Begins a self-test, if due.
    pub(super) fn begin_if_due(&mut self, tracer: &Tracer) {
        let now = Instant::now();
        let Some((health, test)) = self.health.as_mut().filter(|(health, _)| health.is_due(now)) else {
            return;
        };
        match tracer.counters().and_then(|before| Ok((before, test.connect()?))) {
            Ok((before, ())) => health.begin(before, now),
            Err(error) => {
                log::error!("the self-test can't be started: {error:#}");
                health.postpone(now);
            }
        }
    }

    /// True if a self-test has its record, or has timed out.
    pub(super) fn can_evaluate(&self) -> bool {
        self.health.as_ref().is_some_and(|(health, _)| health.can_evaluate(Instant::now()))
    }

    /// Evaluates the self-test. All records so far must have been drained: if the daemon was stopped for a
    /// while, the test has timed out but its records are still in the ring buffer. `Some`: the hooks are dead.
    pub(super) fn evaluate(&mut self, tracer: &Tracer) -> Option<DeadProbes> {
        let now = Instant::now();
        let (health, test) = self.health.as_mut()?;
        let outcome = match tracer.counters() {
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
            SelfTestOutcome::HooksDead(dead) => return Some(dead),
        }
        None
    }
}

/// The self-tests have shown that the hooks do not work any more: the reason why the run ends.
pub struct HooksDead(pub(super) DeadProbes);

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

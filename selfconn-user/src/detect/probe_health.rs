//! Health of the probes: decides when to test whether the hooks still work, and what the outcome of a test
//! means. Pure.
//!
//! Every probe counts the transitions of self-connections that it observes. A self-test makes a
//! self-connection. After it, the count of every attached probe must have grown, and the record must have
//! arrived through the ring buffer. A single failed test can be chance, because the kernel can skip a probe.
//! Several failed tests in a row are not chance.

use std::time::Duration;

use tokio::time::Instant;

use crate::bpf::{attach::Method, loader::Counters};

/// Maximum duration of a test. The kernel runs the probes within microseconds, unless the host is very busy.
const TEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Time between a failed test and the next test.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Number of failed tests in a row after which the hooks are considered dead.
const MAX_CONSECUTIVE_FAILURES: u32 = 3;

/// Results of the self-tests so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelfTestCounts {
    /// Tests that every probe observed and whose record arrived.
    pub passed: u64,
    /// Tests with a count or record missing.
    pub failed: u64,
    /// Tests whose socket was not connected in time.
    pub not_connected: u64,
    /// Records in the ring buffer about self-tests, of this daemon or another one.
    pub records: u64,
}

/// The parts that failed a self-test.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeadProbes {
    /// Attach methods whose probe did not observe the test.
    pub methods: Vec<Method>,
    /// The probes observed the test, but its record did not arrive through the ring buffer.
    pub ring: bool,
}

/// Outcome of a self-test.
#[derive(Debug, PartialEq, Eq)]
pub enum SelfTestOutcome {
    /// Every probe observed it.
    Passed,
    /// The test failed and is repeated. These parts failed it.
    Failed(DeadProbes),
    /// Too many tests failed in a row: the daemon must exit.
    HooksDead(DeadProbes),
    /// The socket was not connected in time, so there was nothing to observe.
    NotConnected,
}

/// The schedule of the self-tests, and their results.
#[derive(Debug)]
pub struct ProbeHealth {
    live: Vec<Method>,
    interval: Duration,
    phase: TestPhase,
    failures: u32,
    counts: SelfTestCounts,
}

#[derive(Debug)]
enum TestPhase {
    Waiting { until: Instant },
    Testing { until: Instant, before: Counters, record_arrived: bool },
}

impl ProbeHealth {
    /// Tests the methods in `live` every `interval`. The first test is due one interval after `now`.
    #[must_use]
    pub fn new(live: Vec<Method>, interval: Duration, now: Instant) -> Self {
        Self {
            live,
            interval,
            phase: TestPhase::Waiting { until: now + interval },
            failures: 0,
            counts: SelfTestCounts::default(),
        }
    }

    /// Results of the self-tests so far.
    #[must_use]
    pub fn counts(&self) -> SelfTestCounts {
        self.counts
    }

    /// True if the last test passed, or if there was none yet.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.failures == 0
    }

    /// When the next test begins, or when the current one times out.
    #[must_use]
    pub fn next_at(&self) -> Instant {
        let (TestPhase::Waiting { until } | TestPhase::Testing { until, .. }) = self.phase;
        until
    }

    /// True if a test must begin now.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        matches!(self.phase, TestPhase::Waiting { until } if until <= now)
    }

    /// A test begins. `before` are the probes' counters before it.
    pub fn begin(&mut self, before: Counters, now: Instant) {
        self.phase = TestPhase::Testing { until: now + TEST_TIMEOUT, before, record_arrived: false };
    }

    /// Postpones the test by one interval, because it is not possible now.
    pub fn postpone(&mut self, now: Instant) {
        self.phase = TestPhase::Waiting { until: now + self.interval };
    }

    /// A record about a self-test arrived. It counts for the current test if `is_ours` and `is_established`.
    pub fn on_record(&mut self, is_ours: bool, is_established: bool) {
        self.counts.records += 1;
        if let TestPhase::Testing { record_arrived, .. } = &mut self.phase {
            *record_arrived |= is_ours && is_established;
        }
    }

    /// True if the counters should be read: the record has arrived, or the test has timed out.
    #[must_use]
    pub fn can_evaluate(&self, now: Instant) -> bool {
        matches!(self.phase, TestPhase::Testing { until, record_arrived, .. } if record_arrived || until <= now)
    }

    /// Outcome of the test. All records so far must have been drained before. `is_connected`: the test's socket is. A
    /// full backlog of the CPU (`net.core.netdev_max_backlog`) drops its SYN, also on loopback. `None`: the test goes on.
    pub fn evaluate(
        &mut self,
        after: &Counters,
        is_connected: bool,
        now: Instant,
    ) -> Option<SelfTestOutcome> {
        let TestPhase::Testing { until, before, record_arrived } = &self.phase else { return None };
        let has_observed = |method: &Method| after.seen[*method as usize] > before.seen[*method as usize];
        let missing: Vec<_> = self.live.iter().filter(|method| !has_observed(method)).copied().collect();
        let is_timed_out = *until <= now;
        // A full ring buffer is reported as a loss of its own.
        let ring_was_full = after.ring_full > before.ring_full;
        let dead = DeadProbes {
            ring: missing.len() < self.live.len() && !record_arrived && !ring_was_full,
            methods: missing,
        };
        if dead == DeadProbes::default() && (*record_arrived || is_timed_out) {
            self.phase = TestPhase::Waiting { until: now + self.interval };
            self.failures = 0;
            self.counts.passed += 1;
            return Some(SelfTestOutcome::Passed);
        }
        if !is_timed_out {
            return None;
        }
        if !is_connected {
            self.counts.not_connected += 1;
            self.postpone(now);
            return Some(SelfTestOutcome::NotConnected);
        }
        self.phase = TestPhase::Waiting { until: now + RETRY_DELAY };
        self.failures += 1;
        self.counts.failed += 1;
        Some(if self.failures < MAX_CONSECUTIVE_FAILURES {
            SelfTestOutcome::Failed(dead)
        } else {
            SelfTestOutcome::HooksDead(dead)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(60);

    /// The other methods have observed nothing.
    fn counters(seen: [u64; 4], ring_full: u64) -> Counters {
        let mut counters = Counters { ring_full, ..Counters::default() };
        counters.seen[..seen.len()].copy_from_slice(&seen);
        counters
    }

    /// Runs one test of `tp_btf` and `perf` with these counters, with or without its record, and with or
    /// without a timeout.
    fn test(
        health: &mut ProbeHealth,
        seen: [u64; 4],
        ring_full: u64,
        record_arrives: bool,
        is_timed_out: bool,
    ) -> Option<SelfTestOutcome> {
        let at = health.next_at();
        assert!(health.is_due(at));
        health.begin(counters([5, 5, 5, 5], 1), at);
        if record_arrives {
            health.on_record(true, true);
        }
        let end = if is_timed_out { at + TEST_TIMEOUT } else { at };
        assert_eq!(health.can_evaluate(end), record_arrives || is_timed_out);
        health.evaluate(&counters(seen, ring_full), true, end)
    }

    fn two_probes() -> ProbeHealth {
        ProbeHealth::new(vec![Method::TpBtf, Method::Perf], INTERVAL, Instant::now())
    }

    #[test]
    fn a_test_passes_if_every_live_probe_observed_it_and_its_record_arrived() {
        let dead = |methods: &[Method], ring| {
            Some(SelfTestOutcome::Failed(DeadProbes { methods: methods.to_vec(), ring }))
        };
        for (seen, ring_full, record_arrives, is_timed_out, outcome) in [
            ([6, 6, 5, 5], 1, true, false, Some(SelfTestOutcome::Passed)),
            ([9, 7, 9, 9], 1, true, true, Some(SelfTestOutcome::Passed)),
            // The second probe may run a moment later.
            ([6, 5, 5, 5], 1, true, false, None),
            ([6, 6, 5, 5], 1, false, false, None),
            ([6, 5, 5, 5], 1, true, true, dead(&[Method::Perf], false)),
            ([5, 6, 6, 6], 1, true, true, dead(&[Method::TpBtf], false)),
            ([5, 5, 6, 6], 1, false, true, dead(&[Method::TpBtf, Method::Perf], false)),
            ([6, 6, 5, 5], 1, false, true, dead(&[], true)),
            // The ring buffer was full. That is reported elsewhere.
            ([6, 6, 5, 5], 2, false, true, Some(SelfTestOutcome::Passed)),
            ([6, 5, 5, 5], 2, false, true, dead(&[Method::Perf], false)),
        ] {
            let got = test(&mut two_probes(), seen, ring_full, record_arrives, is_timed_out);
            assert_eq!(got, outcome, "{seen:?} {ring_full} {record_arrives} {is_timed_out}");
        }
    }

    #[test]
    fn only_consecutive_failures_mean_dead_hooks() {
        let mut health = two_probes();
        let fails = |health: &mut ProbeHealth| test(health, [6, 5, 5, 5], 1, true, true).unwrap();
        let perf = || DeadProbes { methods: vec![Method::Perf], ring: false };
        assert_eq!(fails(&mut health), SelfTestOutcome::Failed(perf()));
        assert_eq!(fails(&mut health), SelfTestOutcome::Failed(perf()));
        assert!(!health.is_healthy());
        assert_eq!(test(&mut health, [6, 6, 5, 5], 1, true, false), Some(SelfTestOutcome::Passed));
        assert!(health.is_healthy());
        assert_eq!(fails(&mut health), SelfTestOutcome::Failed(perf()));
        assert_eq!(fails(&mut health), SelfTestOutcome::Failed(perf()));
        assert_eq!(fails(&mut health), SelfTestOutcome::HooksDead(perf()));
        assert_eq!(health.counts(), SelfTestCounts { passed: 1, failed: 5, records: 6, not_connected: 0 });
    }

    #[test]
    fn a_test_whose_socket_was_not_connected_says_nothing_of_the_hooks() {
        let mut health = two_probes();
        for number in 1..=4 {
            let at = health.next_at();
            health.begin(counters([5, 5, 5, 5], 1), at);
            // A self-connection of somebody else moves the counters.
            let evaluate =
                |health: &mut ProbeHealth, now| health.evaluate(&counters([6, 5, 5, 5], 1), false, now);
            assert_eq!(evaluate(&mut health, at), None);
            let end = at + TEST_TIMEOUT;
            assert_eq!(evaluate(&mut health, end), Some(SelfTestOutcome::NotConnected));
            assert_eq!((health.next_at(), health.is_healthy()), (end + INTERVAL, true));
            assert_eq!(health.counts().not_connected, number);
        }
        assert_eq!(health.counts().failed, 0);
    }

    #[test]
    fn tests_run_at_the_interval_and_sooner_only_after_a_failure() {
        let now = Instant::now();
        let mut health = ProbeHealth::new(vec![Method::TpBtf], INTERVAL, now);
        assert_eq!(health.next_at(), now + INTERVAL);
        assert!(!health.is_due(now) && !health.can_evaluate(now + INTERVAL));
        test(&mut health, [6, 5, 5, 5], 1, true, false);
        assert_eq!(health.next_at(), now + 2 * INTERVAL);
        test(&mut health, [5, 5, 5, 5], 1, false, true);
        assert_eq!(health.next_at(), now + 2 * INTERVAL + TEST_TIMEOUT + RETRY_DELAY);
    }

    #[test]
    fn another_daemons_test_proves_nothing() {
        let mut health = two_probes();
        health.begin(counters([0; 4], 0), health.next_at());
        health.on_record(false, true);
        health.on_record(true, false);
        assert!(!health.can_evaluate(health.next_at() - TEST_TIMEOUT));
    }
}

//! Whether the hooks still see: when to test them, and what a test's outcome means. Pure.
//!
//! The programs count what they see of self-connections, each for itself; a test makes one, and every program that is
//! attached must have counted something. The record of it must come through the ring buffer. One test that fails may be
//! chance, for a program can be kept from running; some in a row are not.

use std::time::Duration;

use tokio::time::Instant;

use crate::kernel::{attach::Method, tracer::Counters};

/// How long a test may take. What counts is in the kernel within microseconds, unless the host is very busy.
const LIMIT: Duration = Duration::from_secs(2);

/// How soon after one that failed comes the next.
const AGAIN: Duration = Duration::from_secs(1);

/// So many in a row are no chance.
const FAILURES: u32 = 3;

/// What the tests came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Every program saw it, and its record came.
    pub passed: u64,
    /// Something was missing.
    pub failed: u64,
    /// Records of the ring buffer that were about tests, ours or another daemon's.
    pub records: u64,
}

/// Who is dead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dead {
    /// These programs don't see any more.
    pub methods: Vec<Method>,
    /// The programs see, but nothing comes through the ring buffer.
    pub ring: bool,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every program saw it.
    Passed,
    /// It failed, and shall be repeated; so far these look dead.
    Failed(Dead),
    /// Give up.
    Blind(Dead),
}

/// The watch over the hooks.
#[derive(Debug)]
pub struct Watchdog {
    live: Vec<Method>,
    pace: Duration,
    phase: Phase,
    failures: u32,
    counts: Counts,
}

#[derive(Debug)]
enum Phase {
    Waiting { until: Instant },
    Testing { until: Instant, before: Counters, has_come: bool },
}

impl Watchdog {
    /// Tests `live` methods every `pace`, from then on.
    #[must_use]
    pub fn new(live: Vec<Method>, pace: Duration, now: Instant) -> Self {
        Self {
            live,
            pace,
            phase: Phase::Waiting { until: now + pace },
            failures: 0,
            counts: Counts::default(),
        }
    }

    /// What the tests came to.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether the last test passed.
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.failures == 0
    }

    /// When there is something to do.
    #[must_use]
    pub fn next(&self) -> Instant {
        let (Phase::Waiting { until } | Phase::Testing { until, .. }) = self.phase;
        until
    }

    /// Whether a test is to begin now.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        matches!(self.phase, Phase::Waiting { until } if until <= now)
    }

    /// It begins; `before` is what the programs have counted so far.
    pub fn begin(&mut self, before: Counters, now: Instant) {
        self.phase = Phase::Testing { until: now + LIMIT, before, has_come: false };
    }

    /// It can't be done now.
    pub fn put_off(&mut self, now: Instant) {
        self.phase = Phase::Waiting { until: now + self.pace };
    }

    /// A record of a test; `is_ours` and it came to ESTABLISHED: then the test may be over, and this is true.
    pub fn record(&mut self, is_ours: bool, is_established: bool) {
        self.counts.records += 1;
        if let Phase::Testing { has_come, .. } = &mut self.phase {
            *has_come |= is_ours && is_established;
        }
    }

    /// Whether it is worth looking at the counters: the record has come, or the time is up.
    #[must_use]
    pub fn may_end(&self, now: Instant) -> bool {
        matches!(self.phase, Phase::Testing { until, has_come, .. } if has_come || until <= now)
    }

    /// What the test came to, when every record until then is taken in; `None`: it goes on.
    pub fn judge(&mut self, after: &Counters, now: Instant) -> Option<Verdict> {
        let Phase::Testing { until, before, has_come } = &self.phase else { return None };
        let has_seen = |method: &Method| after.seen[*method as usize] > before.seen[*method as usize];
        let blind: Vec<_> = self.live.iter().filter(|method| !has_seen(method)).copied().collect();
        let is_up = *until <= now;
        // A full ring buffer is told as such.
        let no_room = after.ring_full > before.ring_full;
        let dead = Dead { ring: blind.len() < self.live.len() && !has_come && !no_room, methods: blind };
        if dead == Dead::default() && (*has_come || is_up) {
            self.phase = Phase::Waiting { until: now + self.pace };
            self.failures = 0;
            self.counts.passed += 1;
            return Some(Verdict::Passed);
        }
        if !is_up {
            return None;
        }
        self.phase = Phase::Waiting { until: now + AGAIN };
        self.failures += 1;
        self.counts.failed += 1;
        Some(if self.failures < FAILURES { Verdict::Failed(dead) } else { Verdict::Blind(dead) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Duration = Duration::from_secs(60);

    fn counters(seen: [u64; 4], ring_full: u64) -> Counters {
        Counters { seen, ring_full, ..Counters::default() }
    }

    /// One test of `tp_btf` and `perf`: what they count, whether the record comes, and whether the time is up.
    fn test(
        watchdog: &mut Watchdog,
        seen: [u64; 4],
        ring_full: u64,
        comes: bool,
        is_up: bool,
    ) -> Option<Verdict> {
        let at = watchdog.next();
        assert!(watchdog.is_due(at));
        watchdog.begin(counters([5, 5, 5, 5], 1), at);
        if comes {
            watchdog.record(true, true);
        }
        let end = if is_up { at + LIMIT } else { at };
        assert_eq!(watchdog.may_end(end), comes || is_up);
        watchdog.judge(&counters(seen, ring_full), end)
    }

    fn pair() -> Watchdog {
        Watchdog::new(vec![Method::TpBtf, Method::Perf], PACE, Instant::now())
    }

    #[test]
    fn a_test_is_passed_when_every_live_program_saw_it_and_its_record_came() {
        let dead = |methods: &[Method], ring| Some(Verdict::Failed(Dead { methods: methods.to_vec(), ring }));
        for (seen, ring_full, comes, is_up, verdict) in [
            ([6, 6, 5, 5], 1, true, false, Some(Verdict::Passed)),
            ([9, 7, 9, 9], 1, true, true, Some(Verdict::Passed)),
            // The second witness may come a moment later.
            ([6, 5, 5, 5], 1, true, false, None),
            ([6, 6, 5, 5], 1, false, false, None),
            ([6, 5, 5, 5], 1, true, true, dead(&[Method::Perf], false)),
            ([5, 6, 6, 6], 1, true, true, dead(&[Method::TpBtf], false)),
            ([5, 5, 6, 6], 1, false, true, dead(&[Method::TpBtf, Method::Perf], false)),
            ([6, 6, 5, 5], 1, false, true, dead(&[], true)),
            // The ring buffer had no room, which is told elsewhere.
            ([6, 6, 5, 5], 2, false, true, Some(Verdict::Passed)),
            ([6, 5, 5, 5], 2, false, true, dead(&[Method::Perf], false)),
        ] {
            let got = test(&mut pair(), seen, ring_full, comes, is_up);
            assert_eq!(got, verdict, "{seen:?} {ring_full} {comes} {is_up}");
        }
    }

    #[test]
    fn only_failures_in_a_row_are_the_end() {
        let mut watchdog = pair();
        let fails = |watchdog: &mut Watchdog| test(watchdog, [6, 5, 5, 5], 1, true, true).unwrap();
        let perf = || Dead { methods: vec![Method::Perf], ring: false };
        assert_eq!(fails(&mut watchdog), Verdict::Failed(perf()));
        assert_eq!(fails(&mut watchdog), Verdict::Failed(perf()));
        assert!(!watchdog.is_well());
        assert_eq!(test(&mut watchdog, [6, 6, 5, 5], 1, true, false), Some(Verdict::Passed));
        assert!(watchdog.is_well());
        assert_eq!(fails(&mut watchdog), Verdict::Failed(perf()));
        assert_eq!(fails(&mut watchdog), Verdict::Failed(perf()));
        assert_eq!(fails(&mut watchdog), Verdict::Blind(perf()));
        assert_eq!(watchdog.counts(), Counts { passed: 1, failed: 5, records: 6 });
    }

    #[test]
    fn it_wakes_at_its_pace_and_sooner_only_when_something_is_wrong() {
        let now = Instant::now();
        let mut watchdog = Watchdog::new(vec![Method::TpBtf], PACE, now);
        assert_eq!(watchdog.next(), now + PACE);
        assert!(!watchdog.is_due(now) && !watchdog.may_end(now + PACE));
        test(&mut watchdog, [6, 5, 5, 5], 1, true, false);
        assert_eq!(watchdog.next(), now + 2 * PACE);
        test(&mut watchdog, [5, 5, 5, 5], 1, false, true);
        assert_eq!(watchdog.next(), now + 2 * PACE + LIMIT + AGAIN);
    }

    #[test]
    fn anothers_test_proves_nothing() {
        let mut watchdog = pair();
        watchdog.begin(counters([0; 4], 0), watchdog.next());
        watchdog.record(false, true);
        watchdog.record(true, false);
        assert!(!watchdog.may_end(watchdog.next() - LIMIT));
    }
}

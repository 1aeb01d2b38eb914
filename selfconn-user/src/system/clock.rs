//! Converts nanoseconds of `CLOCK_BOOTTIME`, which the eBPF programs use, to wall-clock time; waits for a time.

use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, sleep_until};

/// Two clocks cannot be read at the same moment. If the reads of `CLOCK_BOOTTIME` before and after the wall
/// clock are not further apart than this, the offset is precise enough.
const MAX_READ_GAP_NS: i128 = 2_000;

/// The current time of `CLOCK_BOOTTIME`, as `bpf_ktime_get_boot_ns` returns it in the kernel.
#[must_use]
pub fn boot_ns() -> u64 {
    read(ClockId::Boottime).try_into().unwrap_or(0)
}

/// Waits until this time. `None`: waits forever. Cancel safe.
pub async fn sleep_until_some(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The offset of the wall clock from `CLOCK_BOOTTIME`. It is read once for each batch of events, so that the
/// events of a batch keep their distances and an adjustment of the wall clock takes effect with the next
/// batch.
#[derive(Clone, Copy, Debug)]
pub struct Offset(i128);

impl Offset {
    /// Reads both clocks. Retries if the thread was interrupted between the reads.
    #[must_use]
    pub fn now() -> Self {
        let mut best = (i128::MAX, 0);
        for _ in 0..5 {
            let (before, wall, after) =
                (read(ClockId::Boottime), read(ClockId::Realtime), read(ClockId::Boottime));
            best = best.min((after - before, wall - before));
            if best.0 < MAX_READ_GAP_NS {
                break;
            }
        }
        Self(best.1)
    }

    /// Converts a time of `CLOCK_BOOTTIME` to wall-clock time.
    #[must_use]
    pub fn wall(self, at_boot_ns: u64) -> Timestamp {
        Timestamp::from_nanosecond(i128::from(at_boot_ns) + self.0).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

/// Notices that the host was suspended. `CLOCK_BOOTTIME` goes on then; `CLOCK_MONOTONIC` stands still, and so do
/// jiffies, by which the kernel ends a TIME_WAIT.
#[derive(Debug)]
pub struct SuspendWatch {
    /// Time of the last check: `CLOCK_BOOTTIME`, nanoseconds.
    last_ns: u64,
    /// How long the host had been suspended by then, since it booted.
    suspended_ns: u64,
    last: Option<Suspension>,
}

/// The host was suspended between two checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspension {
    /// Times of the two checks: `CLOCK_BOOTTIME`, nanoseconds.
    pub after_ns: u64,
    before_ns: u64,
    pub duration_ns: u64,
}

/// A shorter suspension cannot be distinguished from the time between two reads of clocks. They are added up.
const MIN_SUSPENSION_NS: u64 = 100_000_000;

impl SuspendWatch {
    #[must_use]
    pub fn start() -> Self {
        let (last_ns, suspended_ns) = boot_and_suspended_ns();
        Self { last_ns, suspended_ns, last: None }
    }

    /// The suspension since the last check, if there was one.
    pub fn check(&mut self) -> Option<Suspension> {
        let (boot_ns, suspended_ns) = boot_and_suspended_ns();
        self.update(boot_ns, suspended_ns)
    }

    fn update(&mut self, boot_ns: u64, suspended_ns: u64) -> Option<Suspension> {
        let duration_ns = suspended_ns.saturating_sub(self.suspended_ns);
        let after_ns = std::mem::replace(&mut self.last_ns, boot_ns);
        if duration_ns < MIN_SUSPENSION_NS {
            return None;
        }
        self.suspended_ns = suspended_ns;
        self.last = Some(Suspension { after_ns, before_ns: boot_ns, duration_ns });
        self.last
    }

    /// False if the host was certainly not suspended since then.
    #[must_use]
    pub fn may_have_slept_since(&self, at_ns: u64) -> bool {
        self.last.is_some_and(|last| last.may_follow(at_ns))
    }
}

impl Suspension {
    /// False if what happened then was certainly after it. What was before it is older now than it was long.
    #[must_use]
    fn may_follow(&self, at_ns: u64) -> bool {
        self.before_ns.saturating_sub(at_ns) > self.duration_ns
    }
}

/// The time of `CLOCK_BOOTTIME`, and how far it is ahead of `CLOCK_MONOTONIC`. An interruption between the reads makes
/// the second too small, never too large.
fn boot_and_suspended_ns() -> (u64, u64) {
    let read = || {
        let boot = read(ClockId::Boottime);
        (boot, boot - read(ClockId::Monotonic))
    };
    let [first, second, third] = [read(), read(), read()];
    let suspended = first.1.max(second.1).max(third.1);
    (third.0.try_into().unwrap_or(0), suspended.try_into().unwrap_or(0))
}

fn read(clock: ClockId) -> i128 {
    let time = clock_gettime(clock);
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspension_is_noticed_once_and_short_ones_are_added_up() {
        const SECOND_NS: u64 = 1_000_000_000;
        let mut watch = SuspendWatch { last_ns: 5 * SECOND_NS, suspended_ns: SECOND_NS, last: None };
        assert_eq!(watch.update(6 * SECOND_NS, SECOND_NS + 60_000_000), None);
        assert_eq!(watch.update(7 * SECOND_NS, SECOND_NS - 60_000_000), None, "read late");
        let suspension = watch.update(100 * SECOND_NS, 91 * SECOND_NS).unwrap();
        assert_eq!((suspension.after_ns, suspension.duration_ns), (7 * SECOND_NS, 90 * SECOND_NS));
        // Awake for 3 of these 93 seconds.
        for (at_s, may_follow) in [(7, true), (9, true), (10, false), (11, false), (100, false), (101, false)]
        {
            assert_eq!(suspension.may_follow(at_s * SECOND_NS), may_follow, "{at_s}");
        }
        assert_eq!(watch.update(101 * SECOND_NS, 91 * SECOND_NS), None);
        // A record of before it may be drained later.
        let may_have_slept = [9, 10, 100, 101].map(|at_s| watch.may_have_slept_since(at_s * SECOND_NS));
        assert_eq!(may_have_slept, [true, false, false, false]);
        assert_eq!(SuspendWatch::start().check(), None, "not while this test runs");
    }

    #[test]
    fn the_offset_matches_the_wall_clock_and_keeps_distances() {
        let (offset, now_ns) = (Offset::now(), boot_ns());
        let difference = Timestamp::now().duration_since(offset.wall(now_ns));
        assert!(difference.as_millis().abs() < 1_000, "{difference:?}");
        assert_eq!(offset.wall(now_ns).as_nanosecond() - offset.wall(now_ns - 7).as_nanosecond(), 7);
    }
}

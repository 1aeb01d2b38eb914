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

fn read(clock: ClockId) -> i128 {
    let time = clock_gettime(clock);
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_matches_the_wall_clock_and_keeps_distances() {
        let (offset, now_ns) = (Offset::now(), boot_ns());
        let difference = Timestamp::now().duration_since(offset.wall(now_ns));
        assert!(difference.as_millis().abs() < 1_000, "{difference:?}");
        assert_eq!(offset.wall(now_ns).as_nanosecond() - offset.wall(now_ns - 7).as_nanosecond(), 7);
    }
}

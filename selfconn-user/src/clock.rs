//! Kernel boot-time nanoseconds as wall time.

use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};

/// Reading two clocks is not one moment; between two reads of the first, this is near enough.
const APART_NS: i128 = 2_000;

/// Now, as the kernel's `bpf_ktime_get_boot_ns` has it.
#[must_use]
pub fn boot_ns() -> u64 {
    read(ClockId::Boottime).try_into().unwrap_or(0)
}

/// How far the wall clock is from `CLOCK_BOOTTIME` now. One is taken for each batch of events, so that events of one
/// batch keep their distances, and a wall clock that somebody sets is followed.
#[derive(Clone, Copy, Debug)]
pub struct Offset(i128);

impl Offset {
    /// Reads both clocks, again if something came between.
    #[must_use]
    pub fn now() -> Self {
        let mut best = (i128::MAX, 0);
        for _ in 0..5 {
            let (before, wall, after) =
                (read(ClockId::Boottime), read(ClockId::Realtime), read(ClockId::Boottime));
            best = best.min((after - before, wall - before));
            if best.0 < APART_NS {
                break;
            }
        }
        Self(best.1)
    }

    /// The wall time of a moment of `CLOCK_BOOTTIME`.
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
    fn now_is_now_and_distances_stay() {
        let (offset, now_ns) = (Offset::now(), boot_ns());
        let apart = Timestamp::now().duration_since(offset.wall(now_ns));
        assert!(apart.as_millis().abs() < 1_000, "{apart:?}");
        assert_eq!(offset.wall(now_ns).as_nanosecond() - offset.wall(now_ns - 7).as_nanosecond(), 7);
    }
}

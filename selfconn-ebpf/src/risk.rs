//! Refused dials of an address to one of its own ports: what the programs count of them, and when they tell user space.
//!
//! Whoever dials a closed port of its own host over and over hits itself in the end, if `connect()` can choose that port
//! as a source. The programs don't know a namespace's range, so they count every such port, and say so only at the
//! twentieth dial within a minute and at each tenfold count: a storm of dials puts next to nothing into the ring
//! buffer.

use crate::{Opener, Tuple};

/// So many refused dials within [`WINDOW_NS`] are told; then ten times as many, and so on.
pub const FIRST: u64 = 20;

/// Within how long, and after how much silence nobody dials any more: nanoseconds.
pub const WINDOW_NS: u64 = 60_000_000_000;

/// How long is waited after there was no room to tell: a try with each dial of a storm would be as many records lost.
const RETRY_NS: u64 = 100_000_000;

/// How many of the newest dials are kept one by one: a power of two, and at least [`FIRST`].
const RECENT: usize = 32;

/// Words of the set of diallers.
const WORDS: usize = 16;

/// What is dialled: the key of [`crate::names::REFUSALS`], and the record that tells user space to look there.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Source and destination address, network byte order; IPv4 as v4-mapped.
    pub addr: [u32; 4],
    /// Inode of the network namespace. 0: unknown.
    pub netns: u32,
    /// Destination port, host byte order.
    pub port: u16,
    /// Zero.
    pub padding: u16,
}

impl Target {
    /// Whatever the socket's family: both dial the same port.
    #[inline(always)]
    #[must_use]
    pub const fn of(tuple: &Tuple) -> Self {
        Self { addr: tuple.addr, netns: tuple.netns, port: tuple.dport, padding: 0 }
    }

    /// Reads a record out of the ring buffer. `None`: not one of these, by its length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was compared above, `read_unaligned` asks for no alignment, and a Target holds integers
        // only, for which every bit pattern is a value.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

/// The refused dials of one [`Target`]: the value of [`crate::names::REFUSALS`].
///
/// Two CPUs may count at once. `total` is added to in one instruction; of all else a write may be lost, so that a pid
/// may be missing, and user space may be told twice. It is not told only where the ring buffer was full and nobody dials any more
/// once a try is due again.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Refused dials since the entry was made.
    pub total: u64,
    /// The newest: `CLOCK_BOOTTIME`, nanoseconds.
    pub last_ns: u64,
    /// The first of the dials that made it often. 0: it isn't often yet.
    pub began_ns: u64,
    /// How many dials were before that.
    pub before: u64,
    /// The `total` at which user space is told next. 0: not told yet.
    pub next: u64,
    /// Not before. 0: at once.
    retry_ns: u64,
    /// Who made the newest.
    pub newest: Opener,
    /// When the newest dials were, by their number.
    at_ns: [u64; RECENT],
    /// And whose they were.
    pids: [u32; RECENT],
    /// A bit for each pid since `began_ns`, by its remainder.
    dialers: [u64; WORDS],
}

const _: () = {
    assert!(RECENT.is_power_of_two() && RECENT as u64 >= FIRST);
    assert!(size_of::<Target>() == 24);
    assert!(size_of::<Tally>() == 112 + 8 * RECENT + 4 * RECENT + 8 * WORDS);
};

impl Tally {
    /// None yet.
    pub const NONE: Self = Self {
        total: 0,
        last_ns: 0,
        began_ns: 0,
        before: 0,
        next: 0,
        retry_ns: 0,
        newest: Opener::UNKNOWN,
        at_ns: [0; RECENT],
        pids: [0; RECENT],
        dialers: [0; WORDS],
    };

    /// Takes in the dial that made `total` what it is; says whether user space is to be told.
    #[inline(always)]
    pub fn take(&mut self, total: u64, now_ns: u64, dialler: &Opener) -> bool {
        self.last_ns = now_ns;
        self.newest = *dialler;
        if self.began_ns != 0 {
            self.mark(dialler.task.pid);
            return total >= self.next && now_ns >= self.retry_ns;
        }
        let slot = |number: u64| number as usize & (RECENT - 1);
        self.at_ns[slot(total)] = now_ns;
        self.pids[slot(total)] = dialler.task.pid;
        if total < FIRST {
            return false;
        }
        let began_ns = self.at_ns[slot(total - (FIRST - 1))];
        if now_ns.saturating_sub(began_ns) > WINDOW_NS {
            return false;
        }
        self.began_ns = began_ns;
        self.before = total - FIRST;
        self.dialers = [0; WORDS];
        for back in 0..FIRST {
            self.mark(self.pids[slot(total - back)]);
        }
        true
    }

    /// User space was told.
    #[inline(always)]
    pub fn told(&mut self) {
        let last = if self.next == 0 { FIRST } else { self.next - self.before };
        self.next = self.before + last * 10;
    }

    /// User space could not be told now. Where a storm goes on until it can, it may be told at once again.
    #[inline(always)]
    pub const fn not_told(&mut self, now_ns: u64) {
        self.retry_ns = now_ns.saturating_add(RETRY_NS);
    }

    #[inline(always)]
    fn mark(&mut self, pid: u32) {
        self.dialers[(pid / 64) as usize & (WORDS - 1)] |= 1 << (pid % 64);
    }

    /// Refused dials since `began_ns`.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.total.saturating_sub(self.before)
    }

    /// How many pids made them: never too many, and too few only where two are a multiple of 1,024 apart.
    #[must_use]
    pub fn dialers(&self) -> u32 {
        self.dialers.iter().map(|word| word.count_ones()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;
    const START_NS: u64 = 1_000 * SECOND_NS;

    /// Dials at these times, in seconds, each by the pid beside it; the numbers of those that were told.
    fn told(dials: impl IntoIterator<Item = (u64, u32)>) -> (std::vec::Vec<u64>, Tally) {
        let (mut tally, mut told) = (Tally::NONE, std::vec::Vec::new());
        for (at, pid) in dials {
            tally.total += 1;
            let mut dialler = Opener::UNKNOWN;
            dialler.task.pid = pid;
            if tally.take(tally.total, START_NS + at * SECOND_NS, &dialler) {
                tally.told();
                told.push(tally.total);
            }
        }
        (told, tally)
    }

    #[test]
    fn the_twentieth_within_a_minute_is_told_and_each_tenfold() {
        for (what, times, expected) in [
            ("nineteen at once", [0; 19].to_vec(), [].to_vec()),
            ("twenty at once", [0; 20].to_vec(), [20].to_vec()),
            ("a storm", [0; 25_000].to_vec(), [20, 200, 2_000, 20_000].to_vec()),
            ("one each third second", (0..20).map(|n| n * 3).collect(), [20].to_vec()),
            ("twenty in 61 seconds", (0..19).map(|n| n * 3).chain([61]).collect(), [].to_vec()),
            ("one each fourth second, for ever", (0..1_000).map(|n| n * 4).collect(), [].to_vec()),
            // Of windows that follow each other none would have twenty.
            ("across minutes", [50; 19].into_iter().chain([61; 19]).collect(), [20].to_vec()),
            ("slow, and then fast", (0..100).map(|n| n * 10).chain([1_000; 20]).collect(), [114].to_vec()),
        ] {
            let (told, _) = told(times.into_iter().map(|at| (at, 7)));
            assert_eq!(told, expected, "{what}");
        }
    }

    #[test]
    fn what_could_not_be_told_is_told_later_and_not_tried_with_each_dial() {
        let (mut tally, mut tries, mut told) = (Tally::NONE, std::vec::Vec::new(), std::vec::Vec::new());
        // A dial a millisecond, and no room for anything from the 10th to the 310th.
        for dial in 1..=3_000_u64 {
            tally.total += 1;
            let now_ns = START_NS + dial * 1_000_000;
            if tally.take(tally.total, now_ns, &Opener::UNKNOWN) {
                if (10..310).contains(&dial) {
                    tries.push(dial);
                    tally.not_told(now_ns);
                } else {
                    told.push((dial, tally.refused()));
                    tally.told();
                }
            }
        }
        assert_eq!(tries, [20, 120, 220]);
        assert_eq!(told, [(320, 320), (321, 321), (2_000, 2_000)]);
    }

    #[test]
    fn the_window_begins_with_the_first_of_the_twenty() {
        let (_, tally) = told((0..100).map(|n| (n * 10, 7)).chain([(1_000, 7); 20]));
        // The six from 940 s on, and the first fourteen of those at 1,000 s.
        assert_eq!((tally.began_ns, tally.before), (START_NS + 940 * SECOND_NS, 94));
        assert_eq!(tally.refused(), 26);
    }

    #[test]
    fn diallers_are_counted_from_the_window_on() {
        for (what, pids, expected) in [
            ("one", [7; 300].to_vec(), 1),
            ("a shell loop", (5_000..5_300).collect(), 300),
            ("two in turns", [7, 9].repeat(150), 2),
            ("more than there are bits", (1..3_000).collect(), 1_024),
        ] {
            let (_, tally) = told(pids.into_iter().map(|pid| (0, pid)));
            assert_eq!(tally.dialers(), expected, "{what}");
        }
        // Six of the slow ones are in the window.
        let slow = (0..100).map(|n| (n * 10, 100 + n as u32));
        let (_, tally) = told(slow.chain([(1_000, 7); 20]));
        assert_eq!(tally.dialers(), 7);
    }
}

//! Refused connection attempts from an address to itself: what the programs count, and when they report to
//! user space.
//!
//! A process that keeps connecting to a closed port of its own host will eventually connect to itself, if
//! `connect()` can choose that port as the source port. The programs do not know the local port range of a
//! network namespace, so they count the refused attempts for every such port. They report a port only at the
//! twentieth attempt within a minute, and then at each tenfold count. So even a very high rate of attempts
//! adds almost nothing to the ring buffer.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{endpoint::Endpoint, owner::Owner, task::Opener};

/// Number of refused attempts within [`WINDOW_NS`] that causes the first report. The next report comes at ten
/// times as many, and so on.
pub const REPORT_THRESHOLD: u64 = 20;

/// An owner's entries, together with those of its user in all control groups, may be one in this many of the free
/// entries. The same holds for an owner's together with those of all users of its control group. So one owner alone
/// takes a ninth of what is free, and a user or a control group a fifth, whoever came before.
const FREE_SHARE: u64 = 4;

/// A control group may have one entry in this many of the table, and at least one, as long as there is a free one:
/// however few are free, and whatever others took under the same uid.
const NEWCOMER_SHARE: u32 = 2_048;

/// By these entries of control groups that have few, a user may have one entry in this many of the table.
const NEWCOMERS_OF_USER_SHARE: u32 = 2;

/// In place of an owner: everybody. No control group has this id, and no user this uid.
pub const EVERYBODY: Owner = Owner::new(u32::MAX, u64::MAX);

/// How many entries of the table exist already, of those who pay for a new one.
#[derive(Clone, Copy, Debug)]
pub struct UsedEntries {
    /// Of its owner.
    pub owner: u64,
    /// Of its owner's [user](Owner::everywhere). 0: no user pays.
    pub user: u64,
    /// Of [all users](Owner::everybody) of its control group.
    pub cgroup: u64,
    /// Of [`EVERYBODY`].
    pub everybody: u64,
}

impl UsedEntries {
    /// True if a table of `size` entries has room for one more of this owner.
    #[inline(always)]
    #[must_use]
    pub const fn leave_room(&self, size: u32) -> bool {
        let free = (size as u64).saturating_sub(self.everybody);
        if self.cgroup < at_least_one(size / NEWCOMER_SHARE) {
            return free > 0 && self.user < at_least_one(size / NEWCOMERS_OF_USER_SHARE);
        }
        let more = if self.user > self.cgroup { self.user } else { self.cgroup };
        // The new entry counts twice, as each entry of the owner does.
        (self.owner + more + 2) * FREE_SHARE <= free
    }
}

#[inline(always)]
const fn at_least_one(entries: u32) -> u64 {
    if entries == 0 { 1 } else { entries as u64 }
}

/// All who pay for an entry of this owner.
pub fn payers(owner: Owner) -> impl Iterator<Item = Owner> {
    [Some(owner), owner.everywhere(), Some(owner.everybody()), Some(EVERYBODY)].into_iter().flatten()
}

/// Length of the window for [`REPORT_THRESHOLD`], in nanoseconds. After the same time without an attempt, the
/// attempts to a port count as finished.
pub const WINDOW_NS: u64 = 60_000_000_000;

/// Delay before a report is tried again after the ring buffer was full, in nanoseconds. A try at each attempt
/// would count one lost record per attempt.
const REPORT_RETRY_NS: u64 = 100_000_000;

/// Number of newest attempts that are stored one by one: a power of two, and at least [`REPORT_THRESHOLD`].
const RECENT_SLOTS: usize = 32;

/// Number of words in the set of pids of connecting processes.
const PID_SET_WORDS: usize = 16;

/// The number of refused attempts to a destination crossed a threshold: a record in the ring buffer. User space
/// then reads the entry of this key.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct RefusedConnectsReport {
    /// [`crate::tag::REFUSED_CONNECTS`].
    pub tag: u16,
    /// Always zero. Two numbers, because the compiler sets an array of zeroes with a call to memset.
    pub padding: u16,
    pub more_padding: u32,
    /// The key.
    pub destination: Endpoint,
}

/// The refused attempts to one destination: the value of [`crate::names::REFUSED_CONNECTS`]. Its key is an
/// [`Endpoint`] of [any family](Endpoint::any_family), because IPv4 sockets and IPv6 sockets with a v4-mapped
/// address connect to the same port.
///
/// Two CPUs can count at the same time. `total` is incremented by one atomic instruction. A write to any
/// other field can be lost, so a pid can be missing, and a report can be sent twice. A report is missing only
/// if the ring buffer was full and no further attempt follows after the retry delay.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct RefusedCount {
    /// Refused attempts since the entry was created.
    pub total: u64,
    /// Time of the newest attempt: `CLOCK_BOOTTIME`, nanoseconds.
    pub last_ns: u64,
    /// Time of the first attempt in the window that reached the threshold. 0: the threshold is not reached
    /// yet.
    pub window_start_ns: u64,
    /// Number of attempts before that window.
    pub total_before_window: u64,
    /// The `total` at which the next report is due. 0: nothing is reported yet.
    pub next_report: u64,
    /// No report before this time. 0: no restriction.
    retry_after_ns: u64,
    /// The task that made the newest attempt.
    pub last_opener: Opener,
    /// Who is charged for the entry: the owner of the first attempt.
    pub owner: Owner,
    /// Time of the newest attempt whose source port came from the namespace's range. 0: there was none.
    pub netns_range_ns: u64,
    /// Time of the newest attempt of a socket with a port range of its own. 0: there was none.
    pub own_range_ns: u64,
    /// That socket's range: the last port in the upper half, the first in the lower. 0: there was none.
    pub own_range: u32,
    /// Always zero.
    padding: u32,
    /// Times of the newest attempts; the slot is the number of the attempt modulo [`RECENT_SLOTS`].
    recent_ns: [u64; RECENT_SLOTS],
    /// Pids of the newest attempts, in the same slots.
    recent_pids: [u32; RECENT_SLOTS],
    /// Pids since `window_start_ns`: one bit per pid, at the pid modulo the number of bits.
    pid_set: [u64; PID_SET_WORDS],
}

const _: () = {
    assert!(RECENT_SLOTS.is_power_of_two() && RECENT_SLOTS as u64 >= REPORT_THRESHOLD);
    assert!(size_of::<RefusedConnectsReport>() == 48);
    assert!(size_of::<RefusedCount>() == 176 + 8 * RECENT_SLOTS + 4 * RECENT_SLOTS + 8 * PID_SET_WORDS);
};

impl RefusedCount {
    /// A count without attempts.
    pub const ZERO: Self = Self {
        total: 0,
        last_ns: 0,
        window_start_ns: 0,
        total_before_window: 0,
        next_report: 0,
        retry_after_ns: 0,
        last_opener: Opener::UNKNOWN,
        owner: Owner::UNKNOWN,
        netns_range_ns: 0,
        own_range_ns: 0,
        own_range: 0,
        padding: 0,
        recent_ns: [0; RECENT_SLOTS],
        recent_pids: [0; RECENT_SLOTS],
        pid_set: [0; PID_SET_WORDS],
    };

    /// Records one attempt, which is already counted in `total`. Returns true if a report is due.
    #[inline(always)]
    pub fn record(&mut self, total: u64, now_ns: u64, opener: &Opener) -> bool {
        self.last_ns = now_ns;
        self.last_opener = *opener;
        if self.window_start_ns != 0 {
            self.add_pid(opener.task.pid);
            return total >= self.next_report && now_ns >= self.retry_after_ns;
        }
        let slot = |number: u64| number as usize & (RECENT_SLOTS - 1);
        self.recent_ns[slot(total)] = now_ns;
        self.recent_pids[slot(total)] = opener.task.pid;
        if total < REPORT_THRESHOLD {
            return false;
        }
        let window_start_ns = self.recent_ns[slot(total - (REPORT_THRESHOLD - 1))];
        if now_ns.saturating_sub(window_start_ns) > WINDOW_NS {
            return false;
        }
        self.window_start_ns = window_start_ns;
        self.total_before_window = total - REPORT_THRESHOLD;
        self.pid_set = [0; PID_SET_WORDS];
        for back in 0..REPORT_THRESHOLD {
            self.add_pid(self.recent_pids[slot(total - back)]);
        }
        true
    }

    /// Records the range that the source port of an attempt came from. `own_range`: see [`Self::own_range`].
    #[inline(always)]
    pub const fn set_range(&mut self, own_range: u32, now_ns: u64) {
        if own_range == 0 {
            self.netns_range_ns = now_ns;
        } else {
            (self.own_range, self.own_range_ns) = (own_range, now_ns);
        }
    }

    /// Sets the next threshold after a report was submitted.
    #[inline(always)]
    pub fn mark_reported(&mut self) {
        let last = if self.next_report == 0 {
            REPORT_THRESHOLD
        } else {
            self.next_report - self.total_before_window
        };
        self.next_report = self.total_before_window + last * 10;
    }

    /// Delays the report after the ring buffer was full. The first attempt after the delay submits it, if
    /// there is one.
    #[inline(always)]
    pub const fn postpone_report(&mut self, now_ns: u64) {
        self.retry_after_ns = now_ns.saturating_add(REPORT_RETRY_NS);
    }

    #[inline(always)]
    fn add_pid(&mut self, pid: u32) {
        self.pid_set[(pid / 64) as usize & (PID_SET_WORDS - 1)] |= 1 << (pid % 64);
    }

    /// Refused attempts since `window_start_ns`.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.total.saturating_sub(self.total_before_window)
    }

    /// Number of pids that made these attempts. It is never too high, and it is too low only if two pids
    /// differ by a multiple of 1,024.
    #[must_use]
    pub fn pid_count(&self) -> u32 {
        self.pid_set.iter().map(|word| word.count_ones()).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, vec::Vec};

    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;
    const START_NS: u64 = 1_000 * SECOND_NS;

    /// Records attempts, each with its time in seconds and its pid. Returns the totals at which a report was
    /// due.
    fn record_all(attempts: impl IntoIterator<Item = (u64, u32)>) -> (Vec<u64>, RefusedCount) {
        let (mut count, mut reported) = (RefusedCount::ZERO, Vec::new());
        for (at, pid) in attempts {
            count.total += 1;
            let mut opener = Opener::UNKNOWN;
            opener.task.pid = pid;
            if count.record(count.total, START_NS + at * SECOND_NS, &opener) {
                count.mark_reported();
                reported.push(count.total);
            }
        }
        (reported, count)
    }

    #[test]
    fn the_twentieth_attempt_within_a_minute_and_each_tenfold_count_are_reported() {
        for (case, times, expected) in [
            ("nineteen at once", [0; 19].to_vec(), [].to_vec()),
            ("twenty at once", [0; 20].to_vec(), [20].to_vec()),
            ("25,000 at once", [0; 25_000].to_vec(), [20, 200, 2_000, 20_000].to_vec()),
            ("one every 3 seconds", (0..20).map(|n| n * 3).collect(), [20].to_vec()),
            ("twenty in 61 seconds", (0..19).map(|n| n * 3).chain([61]).collect(), [].to_vec()),
            ("one every 4 seconds, 1,000 times", (0..1_000).map(|n| n * 4).collect(), [].to_vec()),
            // With fixed windows of a minute, no window would contain twenty.
            ("across a minute boundary", [50; 19].into_iter().chain([61; 19]).collect(), [20].to_vec()),
            ("slow, then fast", (0..100).map(|n| n * 10).chain([1_000; 20]).collect(), [114].to_vec()),
        ] {
            let (reported, _) = record_all(times.into_iter().map(|at| (at, 7)));
            assert_eq!(reported, expected, "{case}");
        }
    }

    #[test]
    fn a_failed_report_is_retried_after_a_delay_and_not_at_each_attempt() {
        let (mut count, mut failed, mut reported) = (RefusedCount::ZERO, Vec::new(), Vec::new());
        // One attempt per millisecond. The ring buffer is full from the 10th to the 309th.
        for attempt in 1..=3_000_u64 {
            count.total += 1;
            let now_ns = START_NS + attempt * 1_000_000;
            if count.record(count.total, now_ns, &Opener::UNKNOWN) {
                if (10..310).contains(&attempt) {
                    failed.push(attempt);
                    count.postpone_report(now_ns);
                } else {
                    reported.push((attempt, count.refused()));
                    count.mark_reported();
                }
            }
        }
        assert_eq!(failed, [20, 120, 220]);
        assert_eq!(reported, [(320, 320), (321, 321), (2_000, 2_000)]);
    }

    #[test]
    fn the_window_starts_at_the_first_of_the_twenty_attempts() {
        let (_, count) = record_all((0..100).map(|n| (n * 10, 7)).chain([(1_000, 7); 20]));
        // The window contains the six attempts from 940 s on, and the first fourteen of those at 1,000 s.
        assert_eq!((count.window_start_ns, count.total_before_window), (START_NS + 940 * SECOND_NS, 94));
        assert_eq!(count.refused(), 26);
    }

    #[test]
    fn pids_are_counted_from_the_start_of_the_window() {
        for (case, pids, expected) in [
            ("one", [7; 300].to_vec(), 1),
            ("a shell loop", (5_000..5_300).collect(), 300),
            ("two alternating", [7, 9].repeat(150), 2),
            ("more pids than bits", (1..3_000).collect(), 1_024),
        ] {
            let (_, count) = record_all(pids.into_iter().map(|pid| (0, pid)));
            assert_eq!(count.pid_count(), expected, "{case}");
        }
        // Six of the slow attempts are in the window.
        let slow = (0..100).map(|n| (n * 10, 100 + n as u32));
        let (_, count) = record_all(slow.chain([(1_000, 7); 20]));
        assert_eq!(count.pid_count(), 7);
    }

    const SIZE: u32 = 4_096;

    /// The entries of a table by who pays for them.
    #[derive(Default)]
    struct Table(HashMap<Owner, u64>);

    impl Table {
        fn used(&self, party: Owner) -> u64 {
            self.0.get(&party).copied().unwrap_or(0)
        }

        /// Makes entries of this owner as long as there is room, at most `limit`. Returns how many.
        fn fill(&mut self, owner: Owner, limit: u64) -> u64 {
            let has_room = |table: &Self| {
                let used = UsedEntries {
                    owner: table.used(owner),
                    user: owner.everywhere().map_or(0, |user| table.used(user)),
                    cgroup: table.used(owner.everybody()),
                    everybody: table.used(EVERYBODY),
                };
                used.leave_room(SIZE)
            };
            let mut count = 0;
            while count < limit && has_room(self) {
                for party in payers(owner) {
                    *self.0.entry(party).or_default() += 1;
                }
                count += 1;
            }
            count
        }

        fn fill_all(&mut self, owners: impl IntoIterator<Item = Owner>) -> u64 {
            owners.into_iter().map(|owner| self.fill(owner, u64::MAX)).sum()
        }
    }

    /// The owners of a container whose root takes one uid after another, beginning with this one.
    fn container(cgroup: u64, first_uid: u32) -> impl Iterator<Item = Owner> {
        (first_uid..first_uid + 10_000).map(move |uid| Owner::new(uid, cgroup))
    }

    #[test]
    fn an_owner_a_user_and_a_control_group_take_a_part_of_what_is_free() {
        let sessions = |count| (0..count).map(|session| Owner::new(1_000, 100 + session));
        for (case, owners, expected) in [
            ("an owner: a ninth", Vec::from([Owner::new(1_000, 7)]), 455),
            ("a user: a fifth", sessions(8).collect(), 818),
            ("and two for each further session", sessions(108).collect(), 818 + 2 * 100),
            ("but never more than half", sessions(1_000).collect(), 2_048),
            ("a control group: a fifth", container(7, 1).collect(), 818),
            ("two of them", container(7, 1).chain(container(8, 1)).collect(), 818 + 655),
        ] {
            assert_eq!(Table::default().fill_all(owners), expected, "{case}");
        }
    }

    #[test]
    fn many_containers_and_users_leave_entries_to_who_has_none() {
        for (case, containers, users, free) in
            [("containers", 30, 0, 9), ("users", 0, 18, 42), ("both", 10, 8, 45)]
        {
            let mut table = Table::default();
            for number in 0..containers {
                table.fill_all(container(100 + number, 1 + 20_000 * number as u32));
            }
            for user in 0..users {
                table.fill_all(
                    (0..8)
                        .map(|session| Owner::new(900_000 + user, 10_000 + 100 * u64::from(user) + session)),
                );
            }
            assert_eq!(u64::from(SIZE) - table.used(EVERYBODY), free, "{case}");
            for newcomer in [Owner::new(0, 50_000), Owner::new(65_532, 50_001)] {
                assert_eq!(table.fill(newcomer, 2), 2, "{case}: {newcomer:?}");
            }
        }
    }

    #[test]
    fn containers_of_one_uid_leave_entries_to_others_of_that_uid() {
        let mut table = Table::default();
        // With all of their share under this uid, and then with others, so that less is free.
        table.fill_all((0..10).map(|pod| Owner::new(65_532, 100 + pod)));
        table.fill_all((0..10).flat_map(|pod| container(100 + pod, 100_000)));
        for pod in 200..300 {
            assert_eq!(table.fill(Owner::new(65_532, pod), 2), 2, "{pod}");
        }
    }

    #[test]
    fn a_container_that_is_refused_uses_up_nothing_of_a_users() {
        let mut table = Table::default();
        table.fill_all(container(7, 1));
        let (user, before) = (Owner::new(20_000, 8), table.0.clone());
        assert_eq!(table.fill_all((0..1_000).map(|_| Owner::new(20_000, 7))), 0);
        assert_eq!(table.0, before);
        assert!(table.fill(user, u64::MAX) > 300);
    }

    #[test]
    fn users_of_one_control_group_leave_room_for_the_next() {
        let mut table = Table::default();
        let taken: Vec<_> = (1..=10).map(|uid| table.fill(Owner::new(uid, 7), u64::MAX)).collect();
        assert_eq!(taken, [455, 202, 90, 40, 18, 8, 3, 1, 1, 0]);
    }

    #[test]
    fn a_small_table_has_one_entry_for_a_newcomer_and_a_full_one_none() {
        let used = |cgroup, everybody| UsedEntries { owner: cgroup, user: 0, cgroup, everybody };
        for (case, used, size, has_room) in [
            ("the last one", used(0, 0), 1, true),
            ("none", used(0, 1), 1, false),
            ("more than all", used(0, 5), 1, false),
            ("the second of four", used(1, 1), 4, false),
            ("another control group's", used(0, 3), 4, true),
        ] {
            assert_eq!(used.leave_room(size), has_room, "{case}");
        }
    }
}

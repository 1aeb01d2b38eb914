//! Finds the self-connection that keeps a server from binding its port, and decides when to report it. Pure:
//! the input is failed binds, open connections and connections in TIME_WAIT; the output is the holder of the
//! port and the number of failures to report.

use std::collections::HashMap;

use selfconn_ebpf::{BindOptions, COMM_LEN, Endpoint, Owner, bind_failure::BindFailure};

use super::{
    connection::{Connection, SocketId, TIME_WAIT_NS},
    port_set::PortSet,
};
use crate::{
    budget::{
        OwnerLosses, SharedLimit,
        memory::{self, MAX_BIND_FAILURES, MAX_TIME_WAITS},
    },
    system::process::{Attribution, ClosedAttribution},
};
use rules::{BindParty, refuses};

pub mod rules;

const SECOND_NS: u64 = 1_000_000_000;

/// Time between the first two reports of a server that keeps retrying. Every report doubles the interval.
const FIRST_REPORT_INTERVAL_NS: u64 = 10 * SECOND_NS;

/// Maximum time between two reports of a server that keeps retrying.
const MAX_REPORT_INTERVAL_NS: u64 = 3_600 * SECOND_NS;

// Beside an entry: the table that leads to it, with its key, up to 16 bytes of the allocation, and the share of an
// owner. It has no holders, which could be more than the entry.
const _: () = assert!(
    size_of::<TimeWaitEntry>()
        + 16
        + (size_of::<(SocketId, Box<TimeWaitEntry>)>() + 1) * 8 / 7
        + SharedLimit::OWNER_BYTES
        <= memory::TIME_WAIT_BYTES
);
const _: () =
    assert!(2 * (size_of::<BindFailureKey>() + size_of::<BindFailureState>()) <= memory::BIND_FAILURE_BYTES);

/// A self-connection in TIME_WAIT.
#[derive(Clone, Debug)]
pub struct TimeWaitEntry {
    /// The connection. Its number is 0 if it was closed before this run.
    pub connection: Connection,
    /// The process behind it.
    pub attribution: ClosedAttribution,
    /// When TIME_WAIT ends: `CLOCK_BOOTTIME`, nanoseconds.
    pub until_ns: u64,
}

/// The self-connection that holds a port.
#[derive(Clone, Copy, Debug)]
pub enum PortHolder<'a> {
    /// An open self-connection.
    Open(&'a Connection),
    /// A closed self-connection in TIME_WAIT.
    TimeWait(&'a TimeWaitEntry),
}

/// Failed binds, and the TIME_WAIT entries that can cause them.
#[derive(Debug)]
pub struct BindConflicts {
    /// By socket: a TIME_WAIT has the cookie of its socket (`inet_twsk_alloc`, net/ipv4/inet_timewait_sock.c at
    /// v5.10). Boxed, so that empty slots of the table take little memory.
    time_waits: HashMap<SocketId, Box<TimeWaitEntry>>,
    /// How many an owner has of them.
    time_wait_shares: SharedLimit,
    /// The TIME_WAITs for which there was no room: the newest ones, and those before.
    unkept: [UnkeptTimeWaits; 2],
    /// When expired entries were last removed.
    last_sweep_ns: u64,
    bind_failures: HashMap<BindFailureKey, BindFailureState>,
    /// How many an owner has of them: the owner whose bind failed first.
    failure_shares: SharedLimit,
    /// Failed binds that have no report, although a self-connection holds the port, or may hold it.
    pub losses: OwnerLosses,
    /// Number of conflicts so far.
    conflicts: u64,
    failures: u64,
}

/// TIME_WAITs for which there was no room.
#[derive(Clone, Debug, Default)]
struct UnkeptTimeWaits {
    ports: PortSet,
    /// When the last one ends: `CLOCK_BOOTTIME`, nanoseconds.
    until_ns: u64,
}

/// Server, requested port, and self-connection that holds it. The server is identified by its user and name, not by
/// pid or control group, because it has others after a restart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct BindFailureKey {
    /// Of any family: servers of both families request the same port.
    requested: Endpoint,
    name: [u8; COMM_LEN],
    uid: u32,
    holder: u64,
}

impl BindFailureKey {
    fn new(failure: &BindFailure, holder: u64) -> Self {
        let name = if failure.task.leader[0] == 0 { failure.task.comm } else { failure.task.leader };
        Self { requested: failure.endpoint.any_family(), name, uid: failure.owner.uid, holder }
    }
}

#[derive(Debug)]
struct BindFailureState {
    owner: Owner,
    /// The number of the conflict.
    conflict: u64,
    failures: u64,
    last_ns: u64,
    /// Time of the next report, and the interval to the one after that.
    next_report_ns: u64,
    report_interval_ns: u64,
}

/// A server that can't bind its port because of a self-connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindConflict {
    /// Its number in this run: the same in each report of the same server and self-connection.
    pub number: u64,
    /// How often the server has failed because of the self-connection.
    pub failures: u64,
}

impl TimeWaitEntry {
    fn id(&self) -> SocketId {
        SocketId::new(self.connection.cookie, &self.connection.endpoint)
    }
}

impl PortHolder<'_> {
    #[must_use]
    pub fn connection(&self) -> &Connection {
        match self {
            Self::Open(connection) => connection,
            Self::TimeWait(entry) => &entry.connection,
        }
    }
}

/// True if the kernel refuses this bind because of this self-connection.
fn is_refused_by(failure: &BindFailure, connection: &Connection, uid: Option<u32>) -> bool {
    let held = BindParty { endpoint: connection.endpoint, options: connection.options, uid };
    refuses(&held, &requested_by(failure))
}

/// True if the kernel may refuse this bind because of this self-connection: it would, had the user of the
/// self-connection changed its options and its device since they were last known.
fn may_be_refused_by(failure: &BindFailure, connection: &Connection) -> bool {
    // IPV6_V6ONLY of a socket that has a port does not change.
    let unshared = |ipv6only| BindOptions::new(false, false, ipv6only);
    let options = connection.options.is_ipv6only().map_or(BindOptions::UNKNOWN, unshared);
    let endpoint = Endpoint { ifindex: 0, ..connection.endpoint };
    refuses(&BindParty { endpoint, options, uid: connection.uid }, &requested_by(failure))
}

/// What the kernel compares of the socket that was to be bound.
#[must_use]
pub fn requested_by(failure: &BindFailure) -> BindParty {
    BindParty { endpoint: failure.endpoint, options: failure.options, uid: Some(failure.sock_uid) }
}

impl Default for BindConflicts {
    fn default() -> Self {
        Self {
            time_waits: HashMap::new(),
            time_wait_shares: SharedLimit::new(MAX_TIME_WAITS),
            unkept: Default::default(),
            last_sweep_ns: 0,
            bind_failures: HashMap::new(),
            failure_shares: SharedLimit::new(MAX_BIND_FAILURES),
            losses: OwnerLosses::default(),
            conflicts: 0,
            failures: 0,
        }
    }
}

impl BindConflicts {
    /// Adds a self-connection that was closed and is in TIME_WAIT now.
    pub fn insert_time_wait(&mut self, entry: TimeWaitEntry, now_ns: u64) {
        // At most once a second, because this visits all entries.
        if now_ns.saturating_sub(self.last_sweep_ns) >= SECOND_NS {
            self.remove_expired(now_ns);
        }
        let (id, owner) = (entry.id(), entry.connection.payer());
        let replaced = self.time_waits.remove(&id).map(|replaced| replaced.connection.payer());
        if replaced != Some(owner) {
            if let Some(other) = replaced {
                self.time_wait_shares.give_back(other, 1);
            }
            if !self.time_wait_shares.try_take(owner, 1) {
                self.insert_unkept(&entry, now_ns);
                return;
            }
        }
        self.time_waits.insert(id, Box::new(entry));
    }

    fn insert_unkept(&mut self, entry: &TimeWaitEntry, now_ns: u64) {
        // A set forgets nothing by itself. In a flood each of the two is that of a minute.
        if self.unkept[1].until_ns <= now_ns {
            self.unkept[1] = std::mem::take(&mut self.unkept[0]);
        }
        let newest = &mut self.unkept[0];
        newest.ports.insert(&entry.connection.endpoint);
        newest.until_ns = newest.until_ns.max(entry.until_ns);
    }

    /// Sets the process behind a connection in TIME_WAIT, because its look-up has ended after the close.
    pub fn attribute_time_wait(&mut self, connection: &Connection, attribution: &Attribution) {
        let entry = self.time_waits.get_mut(&SocketId::new(connection.cookie, &connection.endpoint));
        if let Some(entry) = entry.filter(|entry| entry.connection.number == connection.number) {
            entry.attribution = attribution.into();
        }
    }

    /// Removes the connections that are not in TIME_WAIT any more.
    pub fn remove_expired(&mut self, now_ns: u64) {
        self.remove_ended(|entry| entry.until_ns <= now_ns);
        self.last_sweep_ns = now_ns;
    }

    /// The host was suspended for `duration_ns`, at some time after `after_ns`. TIME_WAIT did not go on meanwhile.
    pub fn on_suspension(&mut self, after_ns: u64, duration_ns: u64) {
        self.remove_expired(after_ns);
        for unkept in &mut self.unkept {
            unkept.until_ns = unkept.until_ns.saturating_add(duration_ns);
        }
        for entry in self.time_waits.values_mut() {
            entry.until_ns = entry.until_ns.saturating_add(duration_ns);
        }
    }

    /// Adds a self-connection that the socket table lists in TIME_WAIT, unless it is known.
    pub fn insert_listed_time_wait(&mut self, entry: TimeWaitEntry, now_ns: u64) {
        let known = self.time_waits.get(&entry.id());
        if known.is_none_or(|known| known.until_ns < now_ns) {
            self.insert_time_wait(entry, now_ns);
        }
    }

    /// Removes the TIME_WAIT entries that have ended early. `has_ended` returns true if the kernel does not have this
    /// one any more.
    pub fn remove_ended(&mut self, has_ended: impl Fn(&TimeWaitEntry) -> bool) {
        let Self { time_waits, time_wait_shares, .. } = self;
        time_waits.retain(|_, entry| {
            let has_ended = has_ended(entry);
            if has_ended {
                time_wait_shares.give_back(entry.connection.payer(), 1);
            }
            !has_ended
        });
    }

    /// Where the connections in TIME_WAIT are.
    pub fn time_wait_endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.time_waits.values().map(|entry| &entry.connection.endpoint)
    }

    /// Number of binds that failed because of a self-connection.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// The self-connection that holds the requested port. `None`: no known self-connection; something else
    /// holds it.
    pub fn find_holder<'a>(
        &'a self,
        failure: &BindFailure,
        mut open: impl Iterator<Item = &'a Connection>,
    ) -> Option<PortHolder<'a>> {
        if let Some(connection) = open.find(|connection| is_refused_by(failure, connection, connection.uid)) {
            return Some(PortHolder::Open(connection));
        }
        // The entry that expires last.
        let time_waits = self.time_waits.values().map(|entry| &**entry);
        let time_waits = time_waits.filter(|entry| {
            // A failure that is handled after the close may be of before it, when the socket had its owner.
            let was_open = failure.at_ns < entry.until_ns.saturating_sub(TIME_WAIT_NS);
            let uid = entry.connection.uid.filter(|_| was_open);
            entry.until_ns > failure.at_ns && is_refused_by(failure, &entry.connection, uid)
        });
        time_waits.max_by_key(|entry| entry.until_ns).map(PortHolder::TimeWait)
    }

    /// The open self-connections that may hold the requested port if [`Self::find_holder`] knows none: what is known of
    /// their options does not say so, and their users may have changed them since.
    pub fn possible_holders<'a>(
        failure: &BindFailure,
        open: impl Iterator<Item = &'a Connection>,
    ) -> impl Iterator<Item = &'a Connection> {
        open.filter(|connection| may_be_refused_by(failure, connection))
    }

    /// The ports of the TIME_WAITs for which there was no room, and that last until later than this.
    #[must_use]
    pub fn unkept_ports(&self, at_ns: u64) -> PortSet {
        let mut ports = PortSet::default();
        self.unkept.iter().filter(|unkept| at_ns < unkept.until_ns).for_each(|one| ports.extend(&one.ports));
        ports
    }

    /// A bind has failed, and [`Self::find_holder`] knows no holder. That proves nothing if there was no room for a
    /// TIME_WAIT that may hold the port, or, as `lacks_open_one` says, for an open self-connection that may. With
    /// another port, or in another namespace, such a one is no cause.
    pub fn record_unexplained(&mut self, failure: &BindFailure, lacks_open_one: bool) {
        let may_hold = |unkept: &UnkeptTimeWaits| {
            failure.at_ns < unkept.until_ns && unkept.ports.may_have(&failure.endpoint)
        };
        if lacks_open_one || self.unkept.iter().any(may_hold) {
            self.losses.count(failure.owner, failure.failures);
        }
    }

    /// Counts a bind that failed because of the self-connection with number `holder`. `Some`: a report is
    /// due.
    pub fn record_failure(&mut self, failure: &BindFailure, holder: u64) -> Option<BindConflict> {
        let (now_ns, failures) = (failure.at_ns, failure.failures);
        self.failures += failures;
        let key = BindFailureKey::new(failure, holder);
        if !self.bind_failures.contains_key(&key) && !self.take_failure_room(failure.owner, now_ns) {
            self.losses.count(failure.owner, failures);
            return None;
        }
        let state = self.bind_failures.entry(key).or_insert_with(|| {
            self.conflicts += 1;
            BindFailureState {
                owner: failure.owner,
                conflict: self.conflicts,
                failures: 0,
                last_ns: 0,
                next_report_ns: 0,
                report_interval_ns: FIRST_REPORT_INTERVAL_NS,
            }
        });
        state.failures += failures;
        state.last_ns = now_ns;
        if now_ns < state.next_report_ns {
            return None;
        }
        state.next_report_ns = now_ns.saturating_add(state.report_interval_ns);
        state.report_interval_ns = (state.report_interval_ns * 2).min(MAX_REPORT_INTERVAL_NS);
        Some(BindConflict { number: state.conflict, failures: state.failures })
    }

    /// The report of this failure is not made: the self-connection does not refuse such a bind any more. Whether it did
    /// is unknown, so it counts as lost, and the next failure is reported at once.
    pub fn take_back(&mut self, failure: &BindFailure, holder: u64) {
        self.failures = self.failures.saturating_sub(failure.failures);
        self.losses.count(failure.owner, failure.failures);
        if let Some(state) = self.bind_failures.get_mut(&BindFailureKey::new(failure, holder)) {
            state.failures = state.failures.saturating_sub(failure.failures);
            (state.next_report_ns, state.report_interval_ns) = (0, FIRST_REPORT_INTERVAL_NS);
        }
    }

    /// False: there is no room for one more server of this owner. Servers that fail no more give theirs back.
    fn take_failure_room(&mut self, owner: Owner, now_ns: u64) -> bool {
        let Self { bind_failures, failure_shares, .. } = self;
        failure_shares.try_take(owner, 1) || {
            bind_failures.retain(|_, state| {
                let is_failing = now_ns.saturating_sub(state.last_ns) < state.report_interval_ns;
                if !is_failing {
                    failure_shares.give_back(state.owner, 1);
                }
                is_failing
            });
            failure_shares.try_take(owner, 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::{BindOptions, held_port_slot};

    use super::*;
    use crate::detect::samples;

    fn connection(number: u64, addr: &str, port: u16) -> Connection {
        samples::connection(number, samples::endpoint(addr, port))
    }

    fn failure(addr: &str, port: u16, at_s: u64) -> BindFailure {
        samples::bind_failure(samples::endpoint(addr, port), at_s * SECOND_NS)
    }

    fn entry(number: u64, addr: &str, port: u16, until_s: u64) -> TimeWaitEntry {
        let connection = connection(number, addr, port);
        TimeWaitEntry { connection, attribution: ClosedAttribution::default(), until_ns: until_s * SECOND_NS }
    }

    fn number(holder: Option<PortHolder<'_>>) -> Option<u64> {
        holder.map(|holder| holder.connection().number)
    }

    #[test]
    fn a_port_is_held_by_the_same_address_and_by_any_address_within_a_wildcard() {
        let open = [connection(1, "127.0.0.1", 80), connection(2, "::1", 80), connection(3, "10.0.0.1", 81)];
        for (requested, port, holder) in [
            ("127.0.0.1", 80, Some(1)),
            ("127.0.0.2", 80, None),
            ("127.0.0.1", 81, None),
            ("0.0.0.0", 80, Some(1)),
            ("0.0.0.0", 81, Some(3)),
            ("0.0.0.0", 82, None),
            ("::1", 80, Some(2)),
            ("::", 80, Some(1)),
            ("::", 81, Some(3)),
            ("::ffff:10.0.0.1", 81, Some(3)),
        ] {
            let conflicts = BindConflicts::default();
            let got = number(conflicts.find_holder(&failure(requested, port, 0), open.iter()));
            assert_eq!(got, holder, "{requested}:{port}");
        }
        let mut elsewhere = failure("127.0.0.1", 80, 0);
        elsewhere.endpoint.netns = 8;
        assert!(BindConflicts::default().find_holder(&elsewhere, open.iter()).is_none());
        let v6 = [connection(2, "::1", 80)];
        assert!(BindConflicts::default().find_holder(&failure("0.0.0.0", 80, 0), v6.iter()).is_none());
    }

    #[test]
    fn a_self_connection_may_hold_the_port_whatever_its_options_were() {
        let reuse = BindOptions::new(true, true, false);
        let shared = [Connection { options: reuse, ..connection(1, "127.0.0.1", 80) }];
        for (requested, port, may_hold) in
            [("127.0.0.1", 80, true), ("0.0.0.0", 80, true), ("127.0.0.2", 80, false), ("0.0.0.0", 81, false)]
        {
            let failure = BindFailure { options: reuse, ..failure(requested, port, 0) };
            assert!(BindConflicts::default().find_holder(&failure, shared.iter()).is_none());
            let possible = BindConflicts::possible_holders(&failure, shared.iter()).count();
            assert_eq!(possible, usize::from(may_hold), "{requested}:{port}");
        }
    }

    #[test]
    fn a_report_that_is_not_made_is_a_loss_and_the_next_failure_is_reported() {
        let mut conflicts = BindConflicts::default();
        let at = |at_s| failure("127.0.0.1", 80, at_s);
        assert!(conflicts.record_failure(&at(0), 1).is_some());
        conflicts.take_back(&at(0), 1);
        assert_eq!((conflicts.losses.total(), conflicts.failures()), (1, 0));
        let next = conflicts.record_failure(&at(1), 1);
        assert_eq!(next, Some(BindConflict { number: 1, failures: 1 }));
        assert_eq!(conflicts.record_failure(&at(2), 1), None, "the interval has begun");
    }

    #[test]
    fn a_time_wait_entry_holds_its_port_until_it_expires() {
        let mut conflicts = BindConflicts::default();
        conflicts.insert_time_wait(entry(1, "127.0.0.1", 80, 60), 0);
        conflicts.insert_time_wait(entry(2, "127.0.0.2", 80, 70), 0);
        for (requested, at_s, holder) in [
            ("127.0.0.1", 59, Some(1)),
            ("127.0.0.1", 60, None),
            ("0.0.0.0", 59, Some(2)),
            ("0.0.0.0", 69, Some(2)),
            ("0.0.0.0", 70, None),
        ] {
            let got = number(conflicts.find_holder(&failure(requested, 80, at_s), std::iter::empty()));
            assert_eq!(got, holder, "{requested} at {at_s}");
        }
        // The next connection at the same endpoint.
        let open = [connection(3, "127.0.0.1", 80)];
        assert_eq!(number(conflicts.find_holder(&failure("127.0.0.1", 80, 59), open.iter())), Some(3));
        // An entry from the socket table does not replace a known one.
        conflicts.insert_listed_time_wait(entry(0, "127.0.0.1", 80, 61), 59 * SECOND_NS);
        assert_eq!(number(conflicts.find_holder(&failure("127.0.0.1", 80, 59), std::iter::empty())), Some(1));
        conflicts.insert_listed_time_wait(entry(0, "127.0.0.1", 80, 90), 61 * SECOND_NS);
        assert_eq!(number(conflicts.find_holder(&failure("127.0.0.1", 80, 62), std::iter::empty())), Some(0));
    }

    #[test]
    fn a_failure_from_before_the_close_is_judged_by_the_owner_of_the_socket() {
        let shared = BindOptions::new(false, true, false);
        let mut held = entry(1, "127.0.0.1", 80, 100);
        (held.connection.options, held.connection.uid) = (shared, Some(1_000));
        let mut conflicts = BindConflicts::default();
        conflicts.insert_time_wait(held, 0);
        // It was closed at 40 s. Users do not share a port; nobody owns what is in TIME_WAIT.
        for (at_s, uid, holder) in [(39, 0, Some(1)), (39, 1_000, None), (40, 0, None)] {
            let mut failure = failure("127.0.0.1", 80, at_s);
            (failure.options, failure.sock_uid) = (shared, uid);
            assert_eq!(number(conflicts.find_holder(&failure, std::iter::empty())), holder, "{at_s} {uid}");
        }
    }

    #[test]
    fn a_time_wait_entry_lasts_longer_by_a_suspend_and_an_expired_one_does_not_come_back() {
        let mut conflicts = BindConflicts::default();
        conflicts.insert_time_wait(entry(1, "127.0.0.1", 80, 60), 0);
        conflicts.insert_time_wait(entry(2, "127.0.0.1", 81, 70), 0);
        // It has ended by the last check before the suspend.
        conflicts.on_suspension(65 * SECOND_NS, 1_000 * SECOND_NS);
        for (port, at_s, holder) in
            [(80, 66, None), (81, 1_066, Some(2)), (81, 1_069, Some(2)), (81, 1_070, None)]
        {
            let got = number(conflicts.find_holder(&failure("127.0.0.1", port, at_s), std::iter::empty()));
            assert_eq!(got, holder, "{port} at {at_s}");
        }
    }

    #[test]
    fn a_server_that_retries_is_reported_at_growing_intervals_and_its_failures_are_counted() {
        let mut conflicts = BindConflicts::default();
        let reports: Vec<_> = (0..200)
            .filter_map(|at_s| Some((at_s, conflicts.record_failure(&failure("127.0.0.1", 80, at_s), 1)?)))
            .collect();
        let report = |number, failures| Some(BindConflict { number, failures });
        let expected = [(0, 1), (10, 11), (30, 31), (70, 71), (150, 151)];
        assert_eq!(reports, expected.map(|(at_s, failures)| (at_s, BindConflict { number: 1, failures })));
        // Another port, another self-connection, another name.
        let again = failure("127.0.0.1", 80, 200);
        assert_eq!(conflicts.record_failure(&failure("127.0.0.1", 81, 200), 1), report(2, 1));
        assert_eq!(conflicts.record_failure(&again, 2), report(3, 1));
        let mut other = again;
        other.task.leader[0] = b'N';
        assert_eq!(conflicts.record_failure(&other, 1), report(4, 1));
        // Failures that the probe aggregated are counted, too.
        let burst = BindFailure { failures: 40, ..failure("127.0.0.1", 82, 200) };
        assert_eq!(conflicts.record_failure(&burst, 1), report(5, 40));
        assert_eq!(conflicts.failures(), 243);
    }

    #[test]
    fn expired_entries_are_removed_long_before_the_limit() {
        let mut conflicts = BindConflicts::default();
        for second in 0..600_u64 {
            let port = u16::try_from(second).unwrap() + 1;
            conflicts.insert_time_wait(entry(second, "127.0.0.1", port, second + 60), second * SECOND_NS);
            assert!(conflicts.time_waits.len() <= 60, "{} after {second} s", conflicts.time_waits.len());
        }
        conflicts.remove_expired(700 * SECOND_NS);
        assert!(conflicts.time_waits.is_empty());
    }

    #[test]
    fn the_number_of_entries_is_bounded() {
        let mut conflicts = BindConflicts::default();
        for port in 1..=u16::try_from(MAX_TIME_WAITS).unwrap() + 9 {
            conflicts.insert_time_wait(entry(1, "127.0.0.1", port, 60), 0);
            conflicts.record_failure(&failure("127.0.0.1", port, 0), 1);
        }
        assert_eq!(conflicts.time_waits.len(), MAX_TIME_WAITS * 3 / 4, "the share of one owner");
        assert_eq!(conflicts.bind_failures.len(), MAX_BIND_FAILURES * 3 / 4);
        conflicts.insert_time_wait(entry(2, "127.0.0.1", 9_999, 120), 61 * SECOND_NS);
        assert_eq!(conflicts.time_waits.len(), 1, "expired entries are removed first");
    }

    #[test]
    fn one_owner_neither_repeats_nor_ends_the_reports_of_another() {
        let of = |uid, port, at_s| {
            let owner = Owner::new(uid, uid.into());
            BindFailure { owner, ..failure("127.0.0.1", port, at_s) }
        };
        let mut conflicts = BindConflicts::default();
        assert!(conflicts.record_failure(&of(1, 9, 0), 1).is_some());
        let ports = 10..10 + u16::try_from(MAX_BIND_FAILURES).unwrap();
        let reports = ports.filter(|port| conflicts.record_failure(&of(2, *port, 1), 1).is_some()).count();
        assert_eq!(reports, (MAX_BIND_FAILURES - 1) * 3 / 4);
        let lost = (MAX_BIND_FAILURES - reports) as u64;
        assert_eq!(conflicts.losses.take_unreported(), [(Owner::new(2, 2), lost)]);
        assert_eq!(conflicts.record_failure(&of(1, 9, 2), 1), None, "it was reported a moment ago");
        assert!(conflicts.record_failure(&of(3, 9_999, 2), 1).is_some());
        assert!(conflicts.record_failure(&of(4, 9, 2), 1).is_some(), "the same name, of another user");
        // Servers that fail no more.
        assert!(conflicts.record_failure(&of(2, 9_998, 60), 1).is_some());
        assert_eq!((conflicts.bind_failures.len(), conflicts.failure_shares.used()), (1, 1));
        assert_eq!(conflicts.losses.total(), lost);
    }

    #[test]
    fn a_failed_bind_is_lost_if_a_time_wait_without_room_may_hold_the_port() {
        let mut conflicts = BindConflicts::default();
        let share = u16::try_from(MAX_TIME_WAITS * 3 / 4).unwrap();
        for port in 1..=share {
            conflicts.insert_time_wait(entry(port.into(), "127.0.0.1", port, 60), 0);
        }
        conflicts.record_unexplained(&failure("127.0.0.1", 9_999, 1), false);
        // The same socket takes no more room.
        conflicts.insert_time_wait(entry(1, "127.0.0.1", 1, 61), 0);
        assert_eq!((conflicts.time_wait_shares.used(), conflicts.losses.total()), (share.into(), 0));
        assert_eq!(number(conflicts.find_holder(&failure("127.0.0.1", 1, 60), std::iter::empty())), Some(1));
        conflicts.insert_time_wait(entry(9_999, "127.0.0.1", 9_999, 70), 0);
        for at_s in [69, 70] {
            let failure = BindFailure { failures: 3, ..failure("127.0.0.1", 9_999, at_s) };
            conflicts.record_unexplained(&failure, false);
        }
        assert_eq!(conflicts.losses.total(), 3);
        // Another port, and the same port in another namespace.
        let other = failure("127.0.0.1", 9_998, 69);
        let mut elsewhere = failure("127.0.0.1", 9_999, 69);
        elsewhere.endpoint.netns += 1;
        conflicts.record_unexplained(&other, false);
        conflicts.record_unexplained(&elsewhere, false);
        assert_eq!(conflicts.losses.total(), 3);
        let slot = held_port_slot(&failure("127.0.0.1", 9_999, 0).endpoint);
        assert_eq!(conflicts.unkept_ports(69 * SECOND_NS).slots().collect::<Vec<_>>(), [slot]);
        assert!(conflicts.unkept_ports(70 * SECOND_NS).is_empty());
    }

    #[test]
    fn the_ports_of_time_waits_without_room_are_forgotten_when_these_have_ended() {
        let mut conflicts = BindConflicts::default();
        let share = MAX_TIME_WAITS as u64 * 3 / 4;
        for number in 1..=share {
            conflicts.insert_time_wait(entry(number, "127.0.0.1", number as u16, 100_000), 0);
        }
        // One more each second, for ten minutes.
        let port = |second: u64| 10_000 + second as u16;
        for second in 0..600 {
            let unkept = entry(share + second, "127.0.0.1", port(second), second + 60);
            conflicts.insert_time_wait(unkept, second * SECOND_NS);
            let ports = conflicts.unkept_ports(second * SECOND_NS);
            for earlier in second.saturating_sub(59)..=second {
                assert!(
                    ports.may_have(&failure("127.0.0.1", port(earlier), second).endpoint),
                    "{earlier} {second}"
                );
            }
            assert!(ports.slots().count() <= 122, "of two minutes: {} at {second}", ports.slots().count());
        }
    }
}

//! The servers whose binds failed because of self-connections: what is counted of each, and when a report about it is
//! due. Pure.

use std::collections::HashMap;

use selfconn_ebpf::{COMM_LEN, Endpoint, Owner, bind_failure::BindFailure};

use super::SECOND_NS;
use crate::budget::{
    OwnerLosses, SharedLimit,
    memory::{self, MAX_BIND_FAILURES},
};

/// Time between the first two reports of a server that keeps retrying. Every report doubles the interval.
const FIRST_REPORT_INTERVAL_S: u32 = 10;

/// Time between two looks at the self-connection because of which a server keeps failing, if no report is due.
const LOOK_INTERVAL_S: u32 = 10;

/// Maximum time between two reports of a server that keeps retrying.
const MAX_REPORT_INTERVAL_S: u32 = 3_600;

const _: () = assert!(2 * (size_of::<ServerKey>() + size_of::<ServerState>()) <= memory::BIND_FAILURE_BYTES);

/// The servers, and how often each has failed.
#[derive(Debug)]
pub struct FailedServers {
    by_key: HashMap<ServerKey, ServerState>,
    /// How many an owner has of them: the owner whose bind failed first.
    shares: SharedLimit,
    /// Failed binds that have no report, although a self-connection holds the port, or may hold it.
    pub losses: OwnerLosses,
    /// Number of conflicts so far.
    conflicts: u64,
    failures: u64,
}

/// Server, requested port, and self-connection that holds it. The server is identified by its user and name, not by
/// pid or control group, because it has others after a restart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ServerKey {
    /// Of any family: servers of both families request the same port.
    requested: Endpoint,
    name: [u8; COMM_LEN],
    uid: u32,
    holder: u64,
}

impl ServerKey {
    fn new(failure: &BindFailure, holder: u64) -> Self {
        let name = if failure.task.leader[0] == 0 { failure.task.comm } else { failure.task.leader };
        Self { requested: failure.endpoint.any_family(), name, uid: failure.owner.uid, holder }
    }
}

#[derive(Debug)]
struct ServerState {
    owner: Owner,
    /// The number of the conflict.
    conflict: u64,
    failures: u64,
    last_ns: u64,
    /// Time of the next report, and the interval to the one after that.
    next_report_ns: u64,
    report_interval_s: u32,
    /// When the self-connection was last looked at: `CLOCK_BOOTTIME`, seconds.
    looked_at_s: u32,
}

impl ServerState {
    fn report_interval_ns(&self) -> u64 {
        u64::from(self.report_interval_s) * SECOND_NS
    }
}

/// Seconds of `CLOCK_BOOTTIME`, for a hundred years.
fn seconds(boottime_ns: u64) -> u32 {
    u32::try_from(boottime_ns / SECOND_NS).unwrap_or(u32::MAX)
}

/// A server that can't bind its port because of a self-connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindConflict {
    /// Its number in this run: the same in each report of the same server and self-connection.
    pub number: u64,
    /// How often the server has failed because of the self-connection.
    pub failures: u64,
}

impl Default for FailedServers {
    fn default() -> Self {
        Self {
            by_key: HashMap::new(),
            shares: SharedLimit::new(MAX_BIND_FAILURES),
            losses: OwnerLosses::default(),
            conflicts: 0,
            failures: 0,
        }
    }
}

impl FailedServers {
    /// Number of binds that failed because of a self-connection.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// A self-connection has refused this bind, by the most that can be known.
    pub fn confirm(&mut self, failure: &BindFailure) {
        self.failures += failure.failures;
    }

    /// True if the self-connection that is known as the holder is to be looked at, although no report is due: it may
    /// refuse such binds no more, while another one does.
    pub fn is_look_due(&mut self, failure: &BindFailure, holder: u64) -> bool {
        let Some(state) = self.by_key.get_mut(&ServerKey::new(failure, holder)) else { return false };
        let now_s = seconds(failure.at_ns);
        let is_due = now_s.saturating_sub(state.looked_at_s) >= LOOK_INTERVAL_S;
        if is_due {
            state.looked_at_s = now_s;
        }
        is_due
    }

    /// Counts a failure of this server, as one because of the self-connection with number `holder`. `Some`: a report is
    /// due.
    pub fn record_failure(&mut self, failure: &BindFailure, holder: u64) -> Option<BindConflict> {
        let (now_ns, failures) = (failure.at_ns, failure.failures);
        let key = ServerKey::new(failure, holder);
        if !self.by_key.contains_key(&key) && !self.take_room(failure.owner, now_ns) {
            self.losses.count(failure.owner, failures);
            return None;
        }
        let state = self.by_key.entry(key).or_insert_with(|| {
            self.conflicts += 1;
            ServerState {
                owner: failure.owner,
                conflict: self.conflicts,
                failures: 0,
                last_ns: 0,
                next_report_ns: 0,
                report_interval_s: FIRST_REPORT_INTERVAL_S,
                looked_at_s: 0,
            }
        });
        state.failures += failures;
        state.last_ns = now_ns;
        if now_ns < state.next_report_ns {
            return None;
        }
        state.looked_at_s = seconds(now_ns);
        state.next_report_ns = now_ns.saturating_add(state.report_interval_ns());
        state.report_interval_s = (state.report_interval_s * 2).min(MAX_REPORT_INTERVAL_S);
        Some(BindConflict { number: state.conflict, failures: state.failures })
    }

    /// The self-connection does not refuse such a bind any more: the failure has another cause, or is lost. If it does
    /// again, the next failure is reported at once.
    pub fn take_back(&mut self, failure: &BindFailure, holder: u64) {
        if let Some(state) = self.by_key.get_mut(&ServerKey::new(failure, holder)) {
            state.failures = state.failures.saturating_sub(failure.failures);
            (state.next_report_ns, state.report_interval_s) = (0, FIRST_REPORT_INTERVAL_S);
        }
    }

    /// False: there is no room for one more server of this owner. Servers that fail no more give theirs back.
    fn take_room(&mut self, owner: Owner, now_ns: u64) -> bool {
        let Self { by_key, shares, .. } = self;
        shares.try_take(owner, 1) || {
            by_key.retain(|_, state| {
                let is_failing = now_ns.saturating_sub(state.last_ns) < state.report_interval_ns();
                if !is_failing {
                    shares.give_back(state.owner, 1);
                }
                is_failing
            });
            shares.try_take(owner, 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::samples;

    fn failure(addr: &str, port: u16, at_s: u64) -> BindFailure {
        samples::bind_failure(samples::endpoint(addr, port), at_s * SECOND_NS)
    }

    #[test]
    fn a_report_that_is_not_made_is_taken_back_and_the_next_failure_is_reported() {
        let mut servers = FailedServers::default();
        let at = |at_s| failure("127.0.0.1", 80, at_s);
        assert!(servers.record_failure(&at(0), 1).is_some());
        servers.take_back(&at(0), 1);
        let next = servers.record_failure(&at(1), 1);
        assert_eq!(next, Some(BindConflict { number: 1, failures: 1 }));
        assert_eq!(servers.record_failure(&at(2), 1), None, "the interval has begun");
    }

    #[test]
    fn a_server_that_retries_is_reported_at_growing_intervals_and_its_failures_are_counted() {
        let mut servers = FailedServers::default();
        let reports: Vec<_> = (0..200)
            .filter_map(|at_s| Some((at_s, servers.record_failure(&failure("127.0.0.1", 80, at_s), 1)?)))
            .collect();
        let report = |number, failures| Some(BindConflict { number, failures });
        let expected = [(0, 1), (10, 11), (30, 31), (70, 71), (150, 151)];
        assert_eq!(reports, expected.map(|(at_s, failures)| (at_s, BindConflict { number: 1, failures })));
        // Another port, another self-connection, another name.
        let again = failure("127.0.0.1", 80, 200);
        assert_eq!(servers.record_failure(&failure("127.0.0.1", 81, 200), 1), report(2, 1));
        assert_eq!(servers.record_failure(&again, 2), report(3, 1));
        let mut other = again;
        other.task.leader[0] = b'N';
        assert_eq!(servers.record_failure(&other, 1), report(4, 1));
        // Failures that the probe aggregated are counted, too.
        let burst = BindFailure { failures: 40, ..failure("127.0.0.1", 82, 200) };
        assert_eq!(servers.record_failure(&burst, 1), report(5, 40));
    }

    #[test]
    fn the_self_connection_is_looked_at_every_ten_seconds_while_a_server_fails() {
        let mut servers = FailedServers::default();
        let looks: Vec<_> = (0..60)
            .filter(|at_s| {
                let failure = failure("127.0.0.1", 80, *at_s);
                servers.record_failure(&failure, 1).is_some() || servers.is_look_due(&failure, 1)
            })
            .collect();
        assert_eq!(looks, [0, 10, 20, 30, 40, 50]);
        assert!(!servers.is_look_due(&failure("127.0.0.1", 80, 60), 2), "no server failed because of it");
    }

    #[test]
    fn the_number_of_servers_is_bounded() {
        let mut servers = FailedServers::default();
        for port in 1..=u16::try_from(MAX_BIND_FAILURES).unwrap() {
            servers.record_failure(&failure("127.0.0.1", port, 0), 1);
        }
        assert_eq!(servers.by_key.len(), MAX_BIND_FAILURES * 3 / 4, "the share of one owner");
    }

    #[test]
    fn one_owner_neither_repeats_nor_ends_the_reports_of_another() {
        let of = |uid, port, at_s| {
            let owner = Owner::new(uid, uid.into());
            BindFailure { owner, ..failure("127.0.0.1", port, at_s) }
        };
        let mut servers = FailedServers::default();
        assert!(servers.record_failure(&of(1, 9, 0), 1).is_some());
        let ports = 10..10 + u16::try_from(MAX_BIND_FAILURES).unwrap();
        let reports = ports.filter(|port| servers.record_failure(&of(2, *port, 1), 1).is_some()).count();
        assert_eq!(reports, (MAX_BIND_FAILURES - 1) * 3 / 4);
        let lost = (MAX_BIND_FAILURES - reports) as u64;
        assert_eq!(servers.losses.take_unreported(), [(Owner::new(2, 2), lost)]);
        assert_eq!(servers.record_failure(&of(1, 9, 2), 1), None, "it was reported a moment ago");
        assert!(servers.record_failure(&of(3, 9_999, 2), 1).is_some());
        assert!(servers.record_failure(&of(4, 9, 2), 1).is_some(), "the same name, of another user");
        // Servers that fail no more.
        assert!(servers.record_failure(&of(2, 9_998, 60), 1).is_some());
        assert_eq!((servers.by_key.len(), servers.shares.used()), (1, 1));
        assert_eq!(servers.losses.total(), lost);
    }
}

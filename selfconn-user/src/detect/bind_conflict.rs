//! Finds the self-connection that keeps a server from binding its port. Pure: the input is failed binds, open
//! connections and connections in TIME_WAIT ([`TimeWaits`]); the output is the holder of the port. When it is reported,
//! and how often a server has failed, is in [`servers`].

use selfconn_ebpf::{BindOptions, Endpoint, bind_failure::BindFailure};

use super::connection::{Connection, TIME_WAIT_NS};
use crate::{budget::first_in_turns, sockets::SocketEntry};
use rules::{BindParty, refuses};
use servers::FailedServers;

pub use time_waits::{TimeWaitEntry, TimeWaits};

pub mod rules;
pub mod servers;
mod time_waits;

const SECOND_NS: u64 = 1_000_000_000;

/// The self-connection that holds a port.
#[derive(Clone, Copy, Debug)]
pub enum PortHolder<'a> {
    /// An open self-connection.
    Open(&'a Connection),
    /// A closed self-connection in TIME_WAIT.
    TimeWait(&'a TimeWaitEntry),
}

/// Failed binds, and the TIME_WAIT entries that can cause them.
#[derive(Debug, Default)]
pub struct BindConflicts {
    pub time_waits: TimeWaits,
    /// The servers that fail.
    pub servers: FailedServers,
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

/// The open self-connections that may hold the requested port, `max` at most, also if by the record of their options
/// they do not: their users may have changed the options since. The payers take turns, so that one user's
/// self-connections do not keep another's out. The recorded holders of a payer come before its others, and the oldest
/// first.
#[must_use]
pub fn possible_holders<'a>(
    failure: &BindFailure,
    open: impl Iterator<Item = &'a Connection>,
    max: usize,
) -> PossibleHolders<'a> {
    let may_hold = open.filter(|connection| may_be_refused_by(failure, connection));
    let of_payer = |connection: &'a Connection| {
        let order = (!is_refused_by(failure, connection, connection.uid), connection.number);
        (order, connection.payer(), connection)
    };
    // There may be thousands, each of another payer.
    let may_hold: Vec<_> = may_hold.map(of_payer).collect();
    let are_all = may_hold.len() <= max;
    PossibleHolders { are_all, connections: first_in_turns(may_hold, max) }
}

/// The self-connections that may hold a port.
#[derive(Debug, Default)]
pub struct PossibleHolders<'a> {
    pub connections: Vec<&'a Connection>,
    /// False if there are more.
    pub are_all: bool,
}

/// True if the kernel refuses this bind because of this socket, as it is now. `None`: its options are unknown.
#[must_use]
pub fn is_refused_by_entry(failure: &BindFailure, entry: &SocketEntry) -> Option<bool> {
    let &SocketEntry { endpoint, options, uid, .. } = entry;
    let held = BindParty { endpoint, options, uid };
    options.is_known().then(|| refuses(&held, &requested_by(failure)))
}

/// What the kernel compares of the socket that was to be bound.
fn requested_by(failure: &BindFailure) -> BindParty {
    BindParty { endpoint: failure.endpoint, options: failure.options, uid: Some(failure.sock_uid) }
}

impl BindConflicts {
    /// The self-connection that holds the requested port: the oldest of the open ones, or the TIME_WAIT that ends last.
    /// `None`: no known self-connection; something else holds it.
    pub fn find_holder<'a>(
        &'a self,
        failure: &BindFailure,
        open: impl Iterator<Item = &'a Connection>,
    ) -> Option<PortHolder<'a>> {
        let open = open.filter(|connection| is_refused_by(failure, connection, connection.uid));
        let oldest = open.min_by_key(|connection| connection.number).map(PortHolder::Open);
        oldest.or_else(|| self.find_time_wait(failure).map(PortHolder::TimeWait))
    }

    /// The connection in TIME_WAIT that holds the requested port.
    #[must_use]
    pub fn find_time_wait(&self, failure: &BindFailure) -> Option<&TimeWaitEntry> {
        let time_waits = self.time_waits.iter().filter(|entry| {
            // A failure that is handled after the close may be of before it, when the socket had its owner.
            let was_open = failure.at_ns < entry.until_ns.saturating_sub(TIME_WAIT_NS);
            let uid = entry.connection.uid.filter(|_| was_open);
            entry.until_ns > failure.at_ns && is_refused_by(failure, &entry.connection, uid)
        });
        time_waits.max_by_key(|entry| entry.until_ns)
    }

    /// A bind has failed, and [`Self::find_holder`] knows no holder. That proves nothing if there was no room for a
    /// TIME_WAIT that may hold the port, or, as `lacks_open_one` says, for an open self-connection that may. With
    /// another port, or in another namespace, such a one is no cause.
    pub fn record_unexplained(&mut self, failure: &BindFailure, lacks_open_one: bool) {
        if lacks_open_one || self.time_waits.may_lack_one_at(&failure.endpoint, failure.at_ns) {
            self.servers.losses.count(failure.owner, failure.failures);
        }
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::{BindOptions, held_port_slot};

    use super::*;
    use crate::{budget::memory::MAX_TIME_WAITS, detect::samples, system::process::ClosedAttribution};

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
            let possible = possible_holders(&failure, shared.iter(), 8).connections.len();
            assert_eq!(possible, usize::from(may_hold), "{requested}:{port}");
        }
    }

    #[test]
    fn what_one_user_has_at_a_port_does_not_stand_before_all_of_another() {
        let reuse = BindOptions::new(true, false, false);
        let of = |number, uid, options| {
            let addr = format!("127.0.0.{number}");
            Connection { uid: Some(uid), options, ..connection(number, &addr, 80) }
        };
        let plain = BindOptions::new(false, false, false);
        let open = [
            of(1, 7, reuse),
            of(2, 7, plain),
            of(3, 7, plain),
            of(4, 8, plain),
            of(5, 9, reuse),
            of(6, 9, plain),
        ];
        let failure = BindFailure { options: reuse, ..failure("0.0.0.0", 80, 0) };
        for (max, are_all, expected) in
            [(7, true, &[2, 4, 6, 3, 5, 1][..]), (6, true, &[2, 4, 6, 3, 5, 1]), (4, false, &[2, 4, 6, 3])]
        {
            let possible = possible_holders(&failure, open.iter().rev(), max);
            let order: Vec<_> = possible.connections.iter().map(|one| one.number).collect();
            assert_eq!((possible.are_all, &order[..]), (are_all, expected));
        }
        assert_eq!(number(BindConflicts::default().find_holder(&failure, open.iter().rev())), Some(2));
    }

    #[test]
    fn a_time_wait_entry_holds_its_port_until_it_expires() {
        let mut conflicts = BindConflicts::default();
        conflicts.time_waits.insert(entry(1, "127.0.0.1", 80, 60), 0);
        conflicts.time_waits.insert(entry(2, "127.0.0.2", 80, 70), 0);
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
        conflicts.time_waits.insert_listed(entry(0, "127.0.0.1", 80, 61), 59 * SECOND_NS);
        assert_eq!(number(conflicts.find_holder(&failure("127.0.0.1", 80, 59), std::iter::empty())), Some(1));
        conflicts.time_waits.insert_listed(entry(0, "127.0.0.1", 80, 90), 61 * SECOND_NS);
        assert_eq!(number(conflicts.find_holder(&failure("127.0.0.1", 80, 62), std::iter::empty())), Some(0));
    }

    #[test]
    fn a_failure_from_before_the_close_is_judged_by_the_owner_of_the_socket() {
        let shared = BindOptions::new(false, true, false);
        let mut held = entry(1, "127.0.0.1", 80, 100);
        (held.connection.options, held.connection.uid) = (shared, Some(1_000));
        let mut conflicts = BindConflicts::default();
        conflicts.time_waits.insert(held, 0);
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
        conflicts.time_waits.insert(entry(1, "127.0.0.1", 80, 60), 0);
        conflicts.time_waits.insert(entry(2, "127.0.0.1", 81, 70), 0);
        // It has ended by the last check before the suspend.
        conflicts.time_waits.on_suspension(65 * SECOND_NS, 1_000 * SECOND_NS);
        for (port, at_s, holder) in
            [(80, 66, None), (81, 1_066, Some(2)), (81, 1_069, Some(2)), (81, 1_070, None)]
        {
            let got = number(conflicts.find_holder(&failure("127.0.0.1", port, at_s), std::iter::empty()));
            assert_eq!(got, holder, "{port} at {at_s}");
        }
    }

    #[test]
    fn a_failed_bind_is_lost_if_a_time_wait_without_room_may_hold_the_port() {
        let mut conflicts = BindConflicts::default();
        let share = u16::try_from(MAX_TIME_WAITS * 3 / 4).unwrap();
        for port in 1..=share {
            conflicts.time_waits.insert(entry(port.into(), "127.0.0.1", port, 60), 0);
        }
        conflicts.record_unexplained(&failure("127.0.0.1", 9_999, 1), false);
        // The same socket takes no more room.
        conflicts.time_waits.insert(entry(1, "127.0.0.1", 1, 61), 0);
        assert_eq!(
            (conflicts.time_waits.iter().count(), conflicts.servers.losses.total()),
            (usize::from(share), 0)
        );
        assert_eq!(number(conflicts.find_holder(&failure("127.0.0.1", 1, 60), std::iter::empty())), Some(1));
        conflicts.time_waits.insert(entry(9_999, "127.0.0.1", 9_999, 70), 0);
        for at_s in [69, 70] {
            let failure = BindFailure { failures: 3, ..failure("127.0.0.1", 9_999, at_s) };
            conflicts.record_unexplained(&failure, false);
        }
        assert_eq!(conflicts.servers.losses.total(), 3);
        // Another port, and the same port in another namespace.
        let other = failure("127.0.0.1", 9_998, 69);
        let mut elsewhere = failure("127.0.0.1", 9_999, 69);
        elsewhere.endpoint.netns += 1;
        conflicts.record_unexplained(&other, false);
        conflicts.record_unexplained(&elsewhere, false);
        assert_eq!(conflicts.servers.losses.total(), 3);
        let slot = held_port_slot(&failure("127.0.0.1", 9_999, 0).endpoint);
        assert_eq!(conflicts.time_waits.unkept_ports(69 * SECOND_NS).slots().collect::<Vec<_>>(), [slot]);
        assert!(conflicts.time_waits.unkept_ports(70 * SECOND_NS).is_empty());
    }
}

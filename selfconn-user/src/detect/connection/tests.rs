//! Table tests and property tests of connection tracking.

use std::collections::HashSet;

use proptest::prelude::*;
use selfconn_ebpf::state::*;

use super::*;
use crate::{
    budget::memory::{MAX_CLOSED_DURING_SNAPSHOT, MAX_CONNECTIONS},
    detect::samples::{self, transition},
    sockets::Coverage,
};

const TWO_PROBES: u8 = 2;

/// All transitions of a self-connection that is closed in order.
const ORDERLY: [(u8, u8); 6] = [
    (CLOSE, SYN_SENT),
    (SYN_SENT, SYN_RECV),
    (SYN_RECV, ESTABLISHED),
    (ESTABLISHED, FIN_WAIT1),
    (FIN_WAIT1, CLOSING),
    (CLOSING, CLOSE),
];
const RESET: [(u8, u8); 4] =
    [(CLOSE, SYN_SENT), (SYN_SENT, SYN_RECV), (SYN_RECV, ESTABLISHED), (ESTABLISHED, CLOSE)];
const REFUSED: [(u8, u8); 2] = [(CLOSE, SYN_SENT), (SYN_SENT, CLOSE)];

/// The events in order: `+N` for established, `-N` for closed.
fn events(probe_count: u8, transitions: &[Transition]) -> Vec<String> {
    let mut connections = Connections::new(probe_count);
    let mut events = Vec::new();
    for t in transitions {
        connections.apply(t, |event| match event {
            ConnectionEvent::Established(connection) => events.push(format!("+{}", connection.number)),
            ConnectionEvent::Closed(connection, _) => events.push(format!("-{}", connection.number)),
            ConnectionEvent::State(..) => {}
        });
    }
    events
}

#[test]
fn a_flood_at_few_addresses_queues_each_address_once_and_expires_it() {
    const SOCKS: u64 = 4;
    let mut connections = Connections::new(TWO_PROBES);
    let mut closed = 0;
    for index in 0..20_000 {
        for (step, (old, new)) in RESET.into_iter().enumerate() {
            let t = transition(index % SOCKS, index * 10_000 + step as u64, old, new);
            connections.apply(&t, |event| closed += u64::from(matches!(event, ConnectionEvent::Closed(..))));
        }
        assert!(connections.duplicate_queue.len() as u64 <= SOCKS, "{index}");
    }
    assert_eq!(closed, 20_000);
    // Long after the last close.
    connections.apply(&transition(SOCKS, 2 * DUPLICATE_WINDOW_NS, CLOSE, SYN_SENT), |_| {});
    assert_eq!(
        (connections.tracked.len(), connections.duplicate_queue.len(), connections.awaiting_duplicates.len()),
        (1, 0, 0)
    );
}

#[test]
fn each_connection_is_established_once_and_closed_once_no_matter_which_probes_reported_it() {
    for (transitions, expected) in
        [(&ORDERLY[..], &["+1", "-1"][..]), (&RESET, &["+1", "-1"]), (&REFUSED, &[])]
    {
        let reported_once: Vec<_> = transitions
            .iter()
            .enumerate()
            .map(|(n, (old, new))| transition(1, n as u64, *old, *new))
            .collect();
        let reported_twice: Vec<_> =
            reported_once.iter().flat_map(|t| [*t, Transition { probe_id: 1, ..*t }]).collect();
        assert_eq!(events(1, &reported_once), expected);
        assert_eq!(events(TWO_PROBES, &reported_once), expected);
        assert_eq!(events(TWO_PROBES, &reported_twice), expected);
    }
}

#[test]
fn the_close_reason_follows_from_the_last_state_and_the_errno() {
    for (old, error, counters, reason, received, leaves_time_wait) in [
        (CLOSING, 0, 1, Some(CloseReason::Fin), Some(18), true),
        (ESTABLISHED, 0, 1, Some(CloseReason::Rst), Some(19), false),
        (ESTABLISHED, ECONNRESET, 1, Some(CloseReason::Rst), Some(19), false),
        (ESTABLISHED, ECONNABORTED, 1, Some(CloseReason::Destroyed), Some(19), false),
        (CLOSING, ECONNABORTED, 1, Some(CloseReason::Destroyed), Some(18), false),
        (FIN_WAIT1, 110, 1, None, Some(19), false),
        (CLOSING, 0, 0, None, None, false),
    ] {
        let mut connections = Connections::new(1);
        connections.apply(&transition(1, 1_000, SYN_RECV, ESTABLISHED), |_| {});
        let last = Transition {
            error,
            has_counters: counters,
            bytes_sent: 20,
            bytes_retrans: 2,
            bytes_received: 19,
            ..transition(1, 5_000, old, CLOSE)
        };
        let last = Transition { opener: Opener { at_ns: 1_001, ..last.opener }, ..last };
        let mut ends = Vec::new();
        connections.apply(&last, |event| {
            if let ConnectionEvent::Closed(_, end) = event {
                ends.push(end);
            }
        });
        let expected = ConnectionEnd {
            duration_ns: Some(4_000),
            bytes_sent: (counters == 1).then_some(18),
            bytes_received: received,
            reason,
            port_blocked_until_ns: leaves_time_wait.then_some(5_000 + TIME_WAIT_NS),
        };
        assert_eq!(ends, [expected], "from {} with errno {error}", name(old));
    }
}

#[test]
fn it_is_not_known_how_long_the_port_is_held_if_there_may_be_no_room_for_a_time_wait() {
    for is_time_wait_full in [0, 1] {
        let mut connections = Connections::new(1);
        connections.apply(&transition(1, 1_000, SYN_RECV, ESTABLISHED), |_| {});
        let close = Transition { is_time_wait_full, ..transition(1, 1_500, CLOSING, CLOSE) };
        let mut until_ns = None;
        connections.apply(&close, |event| {
            if let ConnectionEvent::Closed(_, end) = event {
                assert_eq!(end.reason, Some(CloseReason::Fin));
                until_ns = Some(end.port_blocked_until_ns);
            }
        });
        assert_eq!(until_ns, Some((is_time_wait_full == 0).then_some(1_500 + TIME_WAIT_NS)));
    }
}

#[test]
fn a_socket_of_the_kernel_is_known_from_any_record_and_unknown_without_one() {
    const UNSEEN: Opener = Opener::UNKNOWN;
    const PROGRAM: Opener = Opener { at_ns: 7, arg_start: 0x7fff_0000_0101, ..UNSEEN };
    const KERNEL_THREAD: Opener = Opener { arg_start: Opener::KERNEL_THREAD, ..PROGRAM };
    for (records, opener, expected) in [
        (&[socket_file::UNKNOWN, socket_file::UNKNOWN][..], PROGRAM, None),
        (&[socket_file::PRESENT, socket_file::UNKNOWN], PROGRAM, Some(false)),
        (&[socket_file::ABSENT, socket_file::UNKNOWN], UNSEEN, Some(true)),
        (&[socket_file::UNKNOWN, socket_file::ABSENT], UNSEEN, Some(true)),
        // NFS has a file for its socket.
        (&[socket_file::PRESENT, socket_file::PRESENT], KERNEL_THREAD, Some(true)),
        (&[socket_file::PRESENT, socket_file::PRESENT], UNSEEN, None),
        // The kernel connects the further subflows of a program's MPTCP socket.
        (&[socket_file::OF_MPTCP, socket_file::UNKNOWN], KERNEL_THREAD, Some(false)),
    ] {
        let mut connections = Connections::new(1);
        for (at_ns, socket_file) in (1_000..).zip(records) {
            let new = if at_ns == 1_000 { ESTABLISHED } else { FIN_WAIT1 };
            let old = if at_ns == 1_000 { SYN_RECV } else { ESTABLISHED };
            let transition =
                Transition { socket_file: *socket_file, opener, ..transition(1, at_ns, old, new) };
            connections.apply(&transition, |_| {});
        }
        assert_eq!(connections.iter().next().unwrap().is_kernel_socket, expected, "{records:?}");
    }
}

#[test]
fn a_missed_close_is_reported_when_the_kernel_address_is_reused() {
    let mut first: Vec<_> =
        (0..3).map(|n| transition(1, n, ORDERLY[n as usize].0, ORDERLY[n as usize].1)).collect();
    first.extend((0..6).map(|n| transition(1, 10_000 + n, ORDERLY[n as usize].0, ORDERLY[n as usize].1)));
    assert_eq!(events(1, &first), ["+1", "-1", "+2", "-2"]);
}

fn listed(port: u16, state: u8) -> SocketEntry {
    samples::entry(samples::endpoint("127.0.0.1", port), state)
}

/// The events and the number of missed connections when the same table is read at 100 and again at 200, with
/// transitions before the first snapshot, during it, and after the second.
fn events_with_snapshots(
    before: &[Transition],
    during: &[Transition],
    table: &[SocketEntry],
    after: &[Transition],
    coverage: Coverage,
) -> (Vec<String>, u64) {
    let mut connections = Connections::new(1);
    let events = std::cell::RefCell::new(Vec::new());
    let record = |event: ConnectionEvent<'_>| match event {
        ConnectionEvent::Established(connection) => {
            let mark = if connection.source == Source::Scan { "scan" } else { "" };
            events.borrow_mut().push(format!("+{}{mark}", connection.number));
        }
        ConnectionEvent::Closed(connection, _) => events.borrow_mut().push(format!("-{}", connection.number)),
        ConnectionEvent::State(..) => {}
    };
    before.iter().for_each(|t| connections.apply(t, record));
    connections.begin_snapshot();
    during.iter().for_each(|t| connections.apply(t, record));
    let missed = connections.reconcile(table, 100, |_| coverage, record);
    connections.begin_snapshot();
    let missed = missed + connections.reconcile(table, 200, |_| coverage, record);
    after.iter().for_each(|t| connections.apply(t, record));
    (events.into_inner(), missed)
}

#[test]
fn a_connection_has_vanished_after_two_snapshots_that_read_its_namespace_whatever_lies_between() {
    use Coverage::{Read, Unknown};
    for (snapshots, closed_in) in [
        (vec![(Read, false), (Unknown, false), (Unknown, false), (Read, false)], Some(4)),
        (vec![(Unknown, false), (Read, false), (Unknown, false), (Unknown, false)], None),
        (vec![(Read, false), (Unknown, true), (Read, false), (Unknown, false)], None),
    ] {
        let mut connections = Connections::new(1);
        connections.apply(&transition(1, 10, SYN_RECV, ESTABLISHED), |_| {});
        let mut closed = None;
        for (number, (coverage, is_listed)) in (1..).zip(&snapshots) {
            let table = is_listed.then(|| listed(40_000, ESTABLISHED));
            connections.begin_snapshot();
            connections.reconcile(
                table.as_slice(),
                100 * number,
                |_| *coverage,
                |event| {
                    if let ConnectionEvent::Closed(..) = event {
                        closed = Some(number);
                    }
                },
            );
        }
        assert_eq!(closed, closed_in, "{snapshots:?}");
    }
}

#[test]
fn the_socket_table_establishes_missed_connections_and_closes_vanished_ones() {
    let open = transition(1, 10, SYN_RECV, ESTABLISHED);
    let connecting = transition(1, 10, CLOSE, SYN_SENT);
    let opened_during = transition(1, 110, SYN_RECV, ESTABLISHED);
    let closed_after = transition(1, 310, ESTABLISHED, CLOSE);
    let again = transition(2, 320, SYN_RECV, ESTABLISHED);
    let same = |t: &Transition| Transition { opener: open.opener, ..*t };
    let table = [listed(40_000, ESTABLISHED)];
    let with_entry =
        [SocketEntry { connect_entry: Some(Box::new((1, open.opener))), ..listed(40_000, ESTABLISHED) }];
    use Coverage::{NetnsEnded, Read, Unknown};
    // (before, during, table, after, what an absence means, events, missed)
    type ReconcileCase<'a> = (
        &'a [Transition],
        &'a [Transition],
        &'a [SocketEntry],
        &'a [Transition],
        Coverage,
        &'a [&'a str],
        u64,
    );
    let rows: [ReconcileCase<'_>; 13] = [
        // the hooks and the table agree: both have it, neither has it
        (&[open], &[], &table, &[], Read, &["+1"], 0),
        (&[], &[], &[], &[], Read, &[], 0),
        // missed; then its close is reported, or the next connection at the same endpoint
        (&[], &[], &table, &[], Read, &["+1scan"], 1),
        (&[], &[], &table, &[closed_after], Read, &["+1scan", "-1"], 1),
        (&[], &[], &with_entry, &[same(&closed_after)], Read, &["+1scan", "-1"], 1),
        (&[], &[], &table, &[again], Read, &["+1scan", "-1", "+2"], 1),
        // connect() was reported, and the rest was missed
        (&[connecting], &[], &table, &[], Read, &["+1"], 1),
        // its close was missed; but nothing follows if the table was not read
        (&[open], &[], &[], &[], Read, &["+1", "-1"], 0),
        (&[open], &[], &[], &[], Unknown, &["+1"], 0),
        // its namespace has ended; but it was established, or listed, after the snapshot began
        (&[open], &[], &[], &[], NetnsEnded, &["+1", "-1"], 0),
        (&[], &[opened_during], &[], &[], NetnsEnded, &["+1", "-1"], 0),
        (&[open], &[], &table, &[], NetnsEnded, &["+1"], 0),
        // it was established while the table was read
        (&[], &[opened_during], &table, &[], Read, &["+1"], 0),
    ];
    for (row, (before, during, table, after, coverage, events, missed)) in rows.into_iter().enumerate() {
        let got = events_with_snapshots(before, during, table, after, coverage);
        assert_eq!(got, (events.iter().map(ToString::to_string).collect(), missed), "row {row}");
    }
    // A socket in TIME_WAIT is not a self-connection any more, and a connecting socket is none yet.
    let not_self_connections = [listed(40_000, TIME_WAIT), listed(40_001, SYN_SENT)];
    assert_eq!(events_with_snapshots(&[], &[], &not_self_connections, &[], Read), (vec![], 0));
}

#[test]
fn one_snapshot_without_it_closes_nothing_and_an_outdated_one_establishes_nothing() {
    let mut connections = Connections::new(1);
    let open = transition(1, 10, SYN_RECV, ESTABLISHED);
    let closed = Transition { opener: open.opener, ..transition(1, 250, ESTABLISHED, CLOSE) };
    let events = std::cell::RefCell::new(Vec::new());
    let record = |event: ConnectionEvent<'_>| match event {
        ConnectionEvent::Established(connection) => {
            events.borrow_mut().push(format!("+{}", connection.number));
        }
        ConnectionEvent::Closed(connection, _) => events.borrow_mut().push(format!("-{}", connection.number)),
        ConnectionEvent::State(..) => {}
    };
    let listing = [listed(40_000, ESTABLISHED)];
    connections.apply(&open, record);
    // Skipped, listed, skipped: never skipped twice in a row.
    for (began_ns, table) in [(100, &[][..]), (120, &listing), (140, &[])] {
        connections.begin_snapshot();
        connections.reconcile(table, began_ns, |_| Coverage::Read, record);
    }
    // It is closed while the table is read, and the table still lists it.
    connections.begin_snapshot();
    connections.apply(&closed, record);
    assert_eq!(connections.reconcile(&listing, 240, |_| Coverage::Read, record), 0);
    assert_eq!(events.into_inner(), ["+1", "-1"]);
}

#[test]
fn a_task_name_ends_at_its_nul() {
    assert_eq!(comm(b"nginx\0old\0\0\0\0\0\0\0"), "nginx");
    assert_eq!(comm(b"sixteen-bytes-xx"), "sixteen-bytes-xx");
    assert_eq!(comm(&[0; COMM_LEN]), "");
}

/// Connections of several sockets, each with the records that its probes lost, in the kernel's order for each
/// socket.
fn arbitrary_connections() -> impl Strategy<Value = Vec<(u64, Vec<(usize, u8)>)>> {
    // (socket, the transitions of an orderly connection, each with a bit mask of the probes that reported it)
    let seen = proptest::collection::vec((0..6_usize, 1..4_u8), 0..6);
    proptest::collection::vec((0..3_u64, seen), 1..20)
}

proptest! {
    /// No loss of records causes two `established`, a `closed` without its `established`, or a wrong opener.
    #[test]
    fn events_are_paired_whatever_is_lost(inputs in arbitrary_connections()) {
        let mut connections = Connections::new(TWO_PROBES);
        let mut open = HashSet::new();
        let mut ever_established = HashSet::new();
        for (index, (sock, seen)) in inputs.iter().enumerate() {
            let mut seen = seen.clone();
            seen.sort_unstable();
            seen.dedup_by_key(|(at, _)| *at);
            let pid = u32::try_from(index).unwrap() + 1;
            for (at, probes) in seen {
                let (old, new) = ORDERLY[at];
                for probe_id in (0..2).filter(|probe_id| probes & 1 << probe_id != 0) {
                    let at_ns = index as u64 * 1_000_000 + at as u64;
                    let mut t = Transition { probe_id, ..transition(*sock, at_ns, old, new) };
                    t.opener = Opener { at_ns: index as u64 * 1_000_000 + 1, ..t.opener };
                    t.opener.task.pid = pid;
                    connections.apply(&t, |event| match event {
                        ConnectionEvent::Established(connection) => {
                            assert!(ever_established.insert(connection.number), "established twice");
                            open.insert(connection.number);
                            assert_eq!(connection.opener.unwrap().task.pid, pid);
                        }
                        ConnectionEvent::Closed(connection, _) => {
                            assert!(open.remove(&connection.number), "closed but not open");
                        }
                        ConnectionEvent::State(connection, ..) => {
                            assert_eq!(connection.opener.unwrap().task.pid, pid);
                        }
                    });
                }
            }
        }
        prop_assert_eq!(connections.iter().count(), open.len());
    }

    /// Without losses there is one `established` and one `closed` for each connection, no matter which probes
    /// report twice.
    #[test]
    fn without_losses_no_connections_are_merged(inputs in proptest::collection::vec((0..3_u64, 1..4_u8), 1..30)) {
        let mut transitions = Vec::new();
        for (index, (sock, probes)) in inputs.iter().enumerate() {
            for (at, (old, new)) in ORDERLY.into_iter().enumerate() {
                for probe_id in (0..2).filter(|probe_id| probes & 1 << probe_id != 0) {
                    let mut t = transition(*sock, index as u64 * 1_000_000 + at as u64, old, new);
                    t.opener.at_ns = index as u64 * 1_000_000 + 1;
                    transitions.push(Transition { probe_id, ..t });
                }
            }
        }
        let events = events(TWO_PROBES, &transitions);
        let expected: Vec<_> = (1..=inputs.len()).flat_map(|n| [format!("+{n}"), format!("-{n}")]).collect();
        prop_assert_eq!(events, expected);
    }

    /// Arbitrary transitions cause no panic and no unpaired close.
    #[test]
    fn arbitrary_transitions_keep_events_paired(
        steps in proptest::collection::vec((0..3_u64, 0..16_u8, 0..16_u8, 0..4_u8, 0..3_u64), 0..200)
    ) {
        let mut connections = Connections::new(TWO_PROBES);
        let mut open = HashSet::new();
        for (n, (sock, old, new, probe_id, opener_at_ns)) in steps.into_iter().enumerate() {
            let mut t = Transition { probe_id, ..transition(sock, n as u64, old, new) };
            t.opener.at_ns = opener_at_ns;
            connections.apply(&t, |event| match event {
                ConnectionEvent::Established(connection) => assert!(open.insert(connection.number)),
                ConnectionEvent::Closed(connection, _) => assert!(open.remove(&connection.number)),
                ConnectionEvent::State(..) => {}
            });
        }
        prop_assert_eq!(connections.iter().count(), open.len());
    }
}

/// A transition of a socket whose opener has this owner.
fn of_owner(owner: Owner, sock: u64, old: u8, new: u8) -> Transition {
    let mut t = transition(sock, sock * 10_000, old, new);
    t.opener.owner = owner;
    t.endpoint.port = u16::try_from(1 + sock % 65_000).unwrap();
    t.cookie = sock;
    t
}

#[test]
fn connections_beyond_an_owners_share_are_counted_once_and_another_owner_finds_room() {
    let (storm, victim) = (Owner::new(1_000, 7), Owner::new(0, 8));
    let share = MAX_CONNECTIONS as u64 * 3 / 4;
    let mut connections = Connections::new(TWO_PROBES);
    let mut established = 0;
    for sock in 1..=share + 100 {
        for probe_id in [0, 1] {
            let t = Transition { probe_id, ..of_owner(storm, sock, SYN_RECV, ESTABLISHED) };
            connections.apply(&t, |event| {
                established += u64::from(matches!(event, ConnectionEvent::Established(_)));
            });
        }
    }
    assert_eq!((established, connections.untracked()), (share, 100));
    assert_eq!(connections.take_untracked(), [(storm, 100)]);
    assert!(connections.take_untracked().is_empty());
    // What is not followed has no later events, as long as there is no room.
    let close = |sock| of_owner(storm, sock, ESTABLISHED, FIN_WAIT1);
    connections.apply(&close(share + 1), |event| panic!("{event:?}"));
    assert_eq!(connections.untracked(), 100);

    let mut events = Vec::new();
    for (old, new) in [(SYN_RECV, ESTABLISHED), (ESTABLISHED, FIN_WAIT1)] {
        connections
            .apply(&of_owner(victim, 1 << 32, old, new), |event| events.push(event.connection().number));
    }
    assert_eq!(events, [share + 1; 3], "established, and two changes of state");

    // One that ends makes room for one.
    for sock in 1..=2 {
        let t = of_owner(storm, sock, ESTABLISHED, CLOSE);
        connections.apply(&t, |_| {});
        connections.apply(&Transition { probe_id: 1, ..t }, |_| {});
    }
    let mut numbers = Vec::new();
    connections.apply(&close(share + 1), |event| numbers.push(event.connection().number));
    assert_eq!(numbers, [share + 2; 2], "reported late");
}

#[test]
fn listed_connections_without_room_are_counted_once_in_all_snapshots() {
    let entries: Vec<_> = (1..=MAX_CONNECTIONS as u64)
        .map(|cookie| {
            let port = u16::try_from(cookie).unwrap();
            let entry = samples::entry(samples::endpoint("127.0.0.1", port), ESTABLISHED);
            SocketEntry { cookie: Some(cookie), inode: cookie, uid: Some(1_000), ..entry }
        })
        .collect();
    let share = MAX_CONNECTIONS as u64 * 3 / 4;
    let mut connections = Connections::new(TWO_PROBES);
    for (round, expected) in [(0, share), (1, 0), (2, 0)] {
        connections.begin_snapshot();
        let missed = connections.reconcile(&entries, round * 60_000, |_| Coverage::Read, |_| {});
        assert_eq!(missed, expected, "round {round}");
        assert_eq!(connections.untracked(), MAX_CONNECTIONS as u64 - share);
    }
    // All end. The next ones find room.
    for round in 3..=4 {
        connections.begin_snapshot();
        connections.reconcile(&[], round * 60_000, |_| Coverage::Read, |_| {});
    }
    assert_eq!(connections.tracked.len(), 0);
    connections.begin_snapshot();
    assert_eq!(connections.reconcile(&entries[..5_000], 300_000, |_| Coverage::Read, |_| {}), 5_000);
    assert_eq!(connections.untracked(), MAX_CONNECTIONS as u64 - share);
}

/// A socket of this user that a snapshot lists.
fn listed_of_user(uid: Option<u32>, cookie: u64) -> SocketEntry {
    let port = u16::try_from(50_000 + cookie % 10_000).unwrap();
    let entry = samples::entry(samples::endpoint("127.0.0.1", port), ESTABLISHED);
    SocketEntry { uid, cookie: Some(cookie), inode: uid.map_or(0, |_| cookie), ..entry }
}

/// Opens and closes this many self-connections of an owner, whose sockets have this uid.
fn open_and_close(connections: &mut Connections, owner: Owner, uid: u32, count: u64) {
    for sock in 1..=count {
        for (old, new) in [(SYN_RECV, ESTABLISHED), (ESTABLISHED, CLOSE)] {
            let t = Transition { inode: sock, uid, ..of_owner(owner, sock, old, new) };
            connections.apply(&t, |_| {});
        }
    }
}

/// The cookies of the connections that a snapshot of these sockets, begun at `began_ns`, opens.
fn opened_by(connections: &mut Connections, entries: &[SocketEntry], began_ns: u64) -> Vec<u64> {
    let mut opened = Vec::new();
    let missed = connections.reconcile(
        entries,
        began_ns,
        |_| Coverage::Unknown,
        |event| {
            if let ConnectionEvent::Established(connection) = event {
                opened.push(connection.cookie.unwrap());
            }
        },
    );
    assert_eq!(missed, opened.len() as u64);
    opened
}

#[test]
fn who_closes_more_than_are_kept_during_a_snapshot_hides_only_his_own_and_they_are_counted() {
    const SHARE: u64 = MAX_CLOSED_DURING_SNAPSHOT as u64 * 3 / 4;
    let (attacker, other) = (1_000, 1_001);
    let entries = [
        listed_of_user(Some(other), 1 << 40),
        listed_of_user(Some(attacker), 2 << 40),
        listed_of_user(None, 3 << 40),
        // Closed, and kept: no loss.
        listed_of_user(Some(attacker), 1),
    ];
    let cookies = |of: &[usize]| of.iter().map(|at| entries[*at].cookie.unwrap()).collect::<Vec<_>>();
    for (closed, opened, counted) in [(SHARE, &[0, 1, 2][..], 0), (SHARE + 1, &[0], 2), (3 * SHARE, &[0], 2)]
    {
        let mut connections = Connections::new(1);
        connections.begin_snapshot();
        open_and_close(&mut connections, Owner::new(attacker, 7), attacker, closed);
        assert_eq!(opened_by(&mut connections, &entries, 5), cookies(opened), "{closed}");
        assert_eq!(connections.untracked(), counted, "{closed}");
        let by_owner = [(Owner::UNKNOWN, 1), (Owner::new(attacker, 0), 1)];
        assert_eq!(connections.take_untracked(), by_owner[..counted as usize], "{closed}");
        connections.begin_snapshot();
        let found_later = [1, 2].into_iter().filter(|at| !opened.contains(at)).collect::<Vec<_>>();
        assert_eq!(opened_by(&mut connections, &entries[..3], 6), cookies(&found_later), "the next one");
        assert_eq!(connections.untracked(), counted, "counted once");
    }
}

#[test]
fn a_mapped_user_hides_its_range_and_a_connect_from_before_the_snapshot_shows_that_a_socket_is_open() {
    let (maker, mapped) = (1_000, 200_123);
    let owned = |at_ns, cookie| {
        let opener = Opener { at_ns, owner: Owner::new(maker, 7), ..Opener::UNKNOWN };
        SocketEntry {
            connect_entry: Some(Box::new((cookie, opener))),
            ..listed_of_user(Some(mapped), cookie)
        }
    };
    let entries = [
        listed_of_user(Some(mapped + 1), 1 << 40),
        listed_of_user(Some(maker), 2 << 40),
        listed_of_user(Some(mapped + 65_536), 3 << 40),
        owned(4, 4 << 40),
        owned(5, 5 << 40),
    ];
    let mut connections = Connections::new(1);
    connections.begin_snapshot();
    open_and_close(&mut connections, Owner::new(maker, 7), mapped, MAX_CLOSED_DURING_SNAPSHOT as u64);
    assert_eq!(opened_by(&mut connections, &entries, 5), [3 << 40, 4 << 40]);
    assert_eq!(connections.untracked(), 3);
}

#[test]
fn a_close_in_this_process_has_an_unknown_closer_unless_it_destroyed_the_socket() {
    const OWN: u32 = 77;
    let close = |new, error, has_counters, pid| {
        let mut close =
            Transition { error, has_counters, is_owned: 1, ..transition(1, 20, ESTABLISHED, new) };
        close.current.pid = pid;
        close
    };
    for (close, closer) in [
        (close(FIN_WAIT1, 0, 1, OWN), None),
        (close(FIN_WAIT1, 0, 0, OWN), None),
        (close(CLOSE, 0, 1, OWN), None),
        (close(CLOSE, ECONNRESET, 1, OWN), None),
        (close(CLOSE, ECONNABORTED, 1, OWN), Some(OWN)),
        // Whether it was destroyed is unknown.
        (close(CLOSE, 0, 0, OWN), Some(OWN)),
        (close(FIN_WAIT1, 0, 1, 78), Some(78)),
        (close(CLOSE, 0, 1, 78), Some(78)),
    ] {
        let mut connections = Connections::new(1).with_own_pid(Some(OWN));
        let mut found = None;
        let end = transition(1, 30, FIN_WAIT1, CLOSE);
        for t in [transition(1, 10, SYN_RECV, ESTABLISHED), close, end] {
            connections.apply(&t, |event| {
                if let (ConnectionEvent::Closed(connection, _), None) = (event, found) {
                    found = Some(connection.closer.map(|closer| closer.pid));
                }
            });
        }
        assert_eq!(found, Some(closer), "{close:?}");
    }
}

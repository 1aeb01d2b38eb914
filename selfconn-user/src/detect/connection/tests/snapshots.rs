//! What snapshots of the socket table open and close.

use super::*;
use crate::sockets::Coverage;

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
    let first = Transition { cookie: 7, ..open };
    let second = [SocketEntry { cookie: Some(8), ..listed(40_001, ESTABLISHED) }];
    let second_at_its_address =
        second.clone().map(|entry| SocketEntry { connect_entry: Some(Box::new((1, open.opener))), ..entry });
    let of_second =
        Transition { cookie: 8, endpoint: second[0].endpoint, ..transition(1, 310, ESTABLISHED, CLOSE) };
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
    let rows: [ReconcileCase<'_>; 15] = [
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
        // its close was missed, and so was the next connection, whose socket has the same address
        (&[first], &[], &second_at_its_address, &[], Read, &["+1", "-1", "+2scan"], 1),
        // the same, and only a transition shows the address
        (&[first], &[], &second, &[of_second], Unknown, &["+1", "+2scan", "-1", "-2"], 1),
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

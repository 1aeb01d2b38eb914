//! Tests of connection tracking.

use selfconn_ebpf::state::*;

use super::*;
use crate::detect::samples::{self, transition};

mod properties;
mod shares;
mod snapshots;

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
        (
            connections.tracked.count(),
            connections.duplicate_queue.len(),
            connections.awaiting_duplicates.len()
        ),
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

#[test]
fn a_task_name_ends_at_its_nul() {
    assert_eq!(comm(b"nginx\0old\0\0\0\0\0\0\0"), "nginx");
    assert_eq!(comm(b"sixteen-bytes-xx"), "sixteen-bytes-xx");
    assert_eq!(comm(&[0; COMM_LEN]), "");
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

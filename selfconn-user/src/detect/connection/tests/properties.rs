//! Property tests: what holds whatever is reported, twice or not at all.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

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

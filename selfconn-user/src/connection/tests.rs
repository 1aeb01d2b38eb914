//! Tables and properties of lifetimes.

use std::collections::HashSet;

use proptest::prelude::*;
use selfconn_ebpf::state::*;

use super::*;

const BOTH: u8 = 2;

fn transition(sock: u64, at_ns: u64, old: u8, new: u8) -> Transition {
    let mut addr = [0; 16];
    addr[10..].copy_from_slice(&[0xff, 0xff, 127, 0, 0, 1]);
    let task = Task { pid: 7, tid: 8, ..Task::UNKNOWN };
    Transition {
        at_ns,
        sock,
        cookie: 0,
        bytes_sent: 0,
        bytes_retrans: 0,
        bytes_received: 0,
        addr,
        netns: 1,
        ifindex: 0,
        snd_una: 101,
        rcv_nxt: 101,
        error: 0,
        port: 40_000,
        family: family::INET,
        old,
        new,
        witness: 0,
        has_counters: 1,
        is_owned: 0,
        current: task,
        opener: Opener { at_ns: at_ns / 1_000 * 1_000 + 1, task, ..Opener::UNKNOWN },
    }
}

/// A whole life: SYN_SENT to an orderly end.
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

/// `+N` for an open, `-N` for a close, in order.
fn story(witnesses: u8, transitions: &[Transition]) -> Vec<String> {
    let mut connections = Connections::new(witnesses);
    let mut story = Vec::new();
    for t in transitions {
        connections.apply(t, |happening| match happening {
            Happening::Established(connection) => story.push(format!("+{}", connection.number)),
            Happening::Closed(connection, _) => story.push(format!("-{}", connection.number)),
            Happening::State(..) => {}
        });
    }
    story
}

#[test]
fn a_flood_at_few_addresses_keeps_few_ends_and_forgets_them() {
    const SOCKS: u64 = 4;
    let mut connections = Connections::new(BOTH);
    let mut closed = 0;
    for life in 0..20_000 {
        for (step, (old, new)) in RESET.into_iter().enumerate() {
            let t = transition(life % SOCKS, life * 10_000 + step as u64, old, new);
            connections
                .apply(&t, |happening| closed += u64::from(matches!(happening, Happening::Closed(..))));
        }
        assert!(connections.echoes.len() as u64 <= SOCKS, "{life}");
    }
    assert_eq!(closed, 20_000);
    // Long after.
    connections.apply(&transition(SOCKS, 2 * ECHO_NS, CLOSE, SYN_SENT), |_| {});
    assert_eq!((connections.lives.len(), connections.echoes.len(), connections.echoing.len()), (1, 0, 0));
}

#[test]
fn each_life_opens_once_and_closes_once_whoever_saw_it() {
    for (life, expected) in [(&ORDERLY[..], &["+1", "-1"][..]), (&RESET, &["+1", "-1"]), (&REFUSED, &[])] {
        let once: Vec<_> =
            life.iter().enumerate().map(|(n, (old, new))| transition(1, n as u64, *old, *new)).collect();
        let twice: Vec<_> = once.iter().flat_map(|t| [*t, Transition { witness: 1, ..*t }]).collect();
        assert_eq!(story(1, &once), expected);
        assert_eq!(story(BOTH, &once), expected);
        assert_eq!(story(BOTH, &twice), expected);
    }
}

#[test]
fn the_end_says_what_it_was() {
    for (old, error, counters, how, received, blocked) in [
        (CLOSING, 0, 1, Some(How::Fin), Some(18), true),
        (ESTABLISHED, 0, 1, Some(How::Rst), Some(19), false),
        (ESTABLISHED, ECONNRESET, 1, Some(How::Rst), Some(19), false),
        (ESTABLISHED, ECONNABORTED, 1, Some(How::Destroyed), Some(19), false),
        (CLOSING, ECONNABORTED, 1, Some(How::Destroyed), Some(18), false),
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
        connections.apply(&last, |happening| {
            if let Happening::Closed(_, end) = happening {
                ends.push(end);
            }
        });
        let expected = End {
            duration_ns: Some(4_000),
            bytes_sent: (counters == 1).then_some(18),
            bytes_received: received,
            how,
            port_blocked_until_ns: blocked.then_some(5_000 + TIME_WAIT_NS),
        };
        assert_eq!(ends, [expected], "from {} with errno {error}", name(old));
    }
}

#[test]
fn a_missed_close_is_told_when_the_address_lives_again() {
    let mut first: Vec<_> =
        (0..3).map(|n| transition(1, n, ORDERLY[n as usize].0, ORDERLY[n as usize].1)).collect();
    first.extend((0..6).map(|n| transition(1, 10_000 + n, ORDERLY[n as usize].0, ORDERLY[n as usize].1)));
    assert_eq!(story(1, &first), ["+1", "-1", "+2", "-2"]);
}

fn listed(port: u16, state: u8) -> Listed {
    Listed {
        netns: 1,
        addr: [127, 0, 0, 1].into(),
        port,
        is_ipv6: false,
        ifindex: None,
        cookie: Some(9),
        uid: Some(0),
        state,
        dial: None,
    }
}

/// The story of a table read at 100 and again at 200, with transitions before it, while it is read, and after it.
fn reconciled(
    before: &[Transition],
    meanwhile: &[Transition],
    table: &[Listed],
    after: &[Transition],
    has_read: bool,
) -> (Vec<String>, u64) {
    let mut connections = Connections::new(1);
    let story = std::cell::RefCell::new(Vec::new());
    let tell = |happening: Happening<'_>| match happening {
        Happening::Established(connection) => {
            let mark = if connection.source == Source::Scan { "scan" } else { "" };
            story.borrow_mut().push(format!("+{}{mark}", connection.number));
        }
        Happening::Closed(connection, _) => story.borrow_mut().push(format!("-{}", connection.number)),
        Happening::State(..) => {}
    };
    before.iter().for_each(|t| connections.apply(t, tell));
    connections.begin_reading();
    meanwhile.iter().for_each(|t| connections.apply(t, tell));
    let missed = connections.reconcile(table, 100, |_| has_read, tell);
    connections.begin_reading();
    let missed = missed + connections.reconcile(table, 200, |_| has_read, tell);
    after.iter().for_each(|t| connections.apply(t, tell));
    (story.into_inner(), missed)
}

#[test]
fn the_socket_table_opens_what_was_missed_and_closes_what_is_gone() {
    let open = transition(1, 10, SYN_RECV, ESTABLISHED);
    let dialled = transition(1, 10, CLOSE, SYN_SENT);
    let opened_meanwhile = transition(1, 110, SYN_RECV, ESTABLISHED);
    let closed_after = transition(1, 310, ESTABLISHED, CLOSE);
    let again = transition(2, 320, SYN_RECV, ESTABLISHED);
    let same = |t: &Transition| Transition { opener: open.opener, ..*t };
    let table = [listed(40_000, ESTABLISHED)];
    let dial = [Listed { dial: Some((1, open.opener)), ..listed(40_000, ESTABLISHED) }];
    // (before, meanwhile, table, after, whether its namespace was read, story, missed)
    type Row<'a> =
        (&'a [Transition], &'a [Transition], &'a [Listed], &'a [Transition], bool, &'a [&'a str], u64);
    let rows: [Row<'_>; 10] = [
        // both know it, neither does
        (&[open], &[], &table, &[], true, &["+1"], 0),
        (&[], &[], &[], &[], true, &[], 0),
        // missed, and then its end is heard, or the next life at its place
        (&[], &[], &table, &[], true, &["+1scan"], 1),
        (&[], &[], &table, &[closed_after], true, &["+1scan", "-1"], 1),
        (&[], &[], &dial, &[same(&closed_after)], true, &["+1scan", "-1"], 1),
        (&[], &[], &table, &[again], true, &["+1scan", "-1", "+2"], 1),
        // dialled, and the rest was missed
        (&[dialled], &[], &table, &[], true, &["+1"], 1),
        // its end was missed; but not where the table was not read
        (&[open], &[], &[], &[], true, &["+1", "-1"], 0),
        (&[open], &[], &[], &[], false, &["+1"], 0),
        // it came or went while the table was read
        (&[], &[opened_meanwhile], &table, &[], true, &["+1"], 0),
    ];
    for (row, (before, meanwhile, table, after, has_read, story, missed)) in rows.into_iter().enumerate() {
        let got = reconciled(before, meanwhile, table, after, has_read);
        assert_eq!(got, (story.iter().map(ToString::to_string).collect(), missed), "row {row}");
    }
    // What TIME_WAIT leaves is no self-connection any more, and a dial is none yet.
    let leftovers = [listed(40_000, TIME_WAIT), listed(40_001, SYN_SENT)];
    assert_eq!(reconciled(&[], &[], &leftovers, &[], true), (vec![], 0));
}

#[test]
fn one_reading_without_it_proves_nothing_and_an_old_one_opens_nothing() {
    let mut connections = Connections::new(1);
    let open = transition(1, 10, SYN_RECV, ESTABLISHED);
    let closed = Transition { opener: open.opener, ..transition(1, 250, ESTABLISHED, CLOSE) };
    let story = std::cell::RefCell::new(Vec::new());
    let tell = |happening: Happening<'_>| match happening {
        Happening::Established(connection) => story.borrow_mut().push(format!("+{}", connection.number)),
        Happening::Closed(connection, _) => story.borrow_mut().push(format!("-{}", connection.number)),
        Happening::State(..) => {}
    };
    let there = [listed(40_000, ESTABLISHED)];
    connections.apply(&open, tell);
    // Passed over, there, passed over: never twice in a row.
    for (began_ns, table) in [(100, &[][..]), (120, &there), (140, &[])] {
        connections.begin_reading();
        connections.reconcile(table, began_ns, |_| true, tell);
    }
    // It ends while the table is read, which has it still.
    connections.begin_reading();
    connections.apply(&closed, tell);
    assert_eq!(connections.reconcile(&there, 240, |_| true, tell), 0);
    assert_eq!(story.into_inner(), ["+1", "-1"]);
}

#[test]
fn a_name_ends_at_its_nul() {
    assert_eq!(comm(b"nginx\0old\0\0\0\0\0\0\0"), "nginx");
    assert_eq!(comm(b"sixteen-bytes-xx"), "sixteen-bytes-xx");
    assert_eq!(comm(&[0; COMM_LEN]), "");
}

/// Lives of several sockets, each life with its witnesses' losses, in the kernel's order for each socket.
fn lives() -> impl Strategy<Value = Vec<(u64, Vec<(usize, u8)>)>> {
    // (socket, the losses: for each transition of an orderly life, which of the witnesses saw it)
    let seen = proptest::collection::vec((0..6_usize, 1..4_u8), 0..6);
    proptest::collection::vec((0..3_u64, seen), 1..20)
}

proptest! {
    /// Whatever is lost: never two opens, never a close without its open, never another's opener.
    #[test]
    fn opens_and_closes_pair_whatever_is_lost(lives in lives()) {
        let mut connections = Connections::new(BOTH);
        let mut open = HashSet::new();
        let mut ever = HashSet::new();
        for (life, (sock, seen)) in lives.iter().enumerate() {
            let mut seen = seen.clone();
            seen.sort_unstable();
            seen.dedup_by_key(|(at, _)| *at);
            let pid = u32::try_from(life).unwrap() + 1;
            for (at, by) in seen {
                let (old, new) = ORDERLY[at];
                for witness in (0..2).filter(|witness| by & 1 << witness != 0) {
                    let at_ns = life as u64 * 1_000_000 + at as u64;
                    let mut t = Transition { witness, ..transition(*sock, at_ns, old, new) };
                    t.opener = Opener { at_ns: life as u64 * 1_000_000 + 1, ..t.opener };
                    t.opener.task.pid = pid;
                    connections.apply(&t, |happening| match happening {
                        Happening::Established(connection) => {
                            assert!(ever.insert(connection.number), "opened twice");
                            open.insert(connection.number);
                            assert_eq!(connection.opener.unwrap().task.pid, pid);
                        }
                        Happening::Closed(connection, _) => {
                            assert!(open.remove(&connection.number), "closed without being open");
                        }
                        Happening::State(connection, ..) => {
                            assert_eq!(connection.opener.unwrap().task.pid, pid);
                        }
                    });
                }
            }
        }
        prop_assert_eq!(connections.iter().count(), open.len());
    }

    /// Nothing lost: as many opens and closes as lives, however the witnesses repeat each other.
    #[test]
    fn nothing_lost_is_nothing_merged(lives in proptest::collection::vec((0..3_u64, 1..4_u8), 1..30)) {
        let mut transitions = Vec::new();
        for (life, (sock, by)) in lives.iter().enumerate() {
            for (at, (old, new)) in ORDERLY.into_iter().enumerate() {
                for witness in (0..2).filter(|witness| by & 1 << witness != 0) {
                    let mut t = transition(*sock, life as u64 * 1_000_000 + at as u64, old, new);
                    t.opener.at_ns = life as u64 * 1_000_000 + 1;
                    transitions.push(Transition { witness, ..t });
                }
            }
        }
        let story = story(BOTH, &transitions);
        let expected: Vec<_> = (1..=lives.len()).flat_map(|n| [format!("+{n}"), format!("-{n}")]).collect();
        prop_assert_eq!(story, expected);
    }

    /// Bytes of any kind make no panic and no unpaired close.
    #[test]
    fn senseless_transitions_do_no_harm(
        steps in proptest::collection::vec((0..3_u64, 0..16_u8, 0..16_u8, 0..4_u8, 0..3_u64), 0..200)
    ) {
        let mut connections = Connections::new(BOTH);
        let mut open = HashSet::new();
        for (n, (sock, old, new, witness, dial)) in steps.into_iter().enumerate() {
            let mut t = Transition { witness, ..transition(sock, n as u64, old, new) };
            t.opener.at_ns = dial;
            connections.apply(&t, |happening| match happening {
                Happening::Established(connection) => assert!(open.insert(connection.number)),
                Happening::Closed(connection, _) => assert!(open.remove(&connection.number)),
                Happening::State(..) => {}
            });
        }
        prop_assert_eq!(connections.iter().count(), open.len());
    }
}

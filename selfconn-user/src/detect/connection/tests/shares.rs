//! The shares of owners in the tracked connections, and in the list of connections closed during a snapshot.

use super::*;
use crate::{
    budget::memory::{MAX_CLOSED_DURING_SNAPSHOT, MAX_CONNECTIONS},
    sockets::{Coverage, LeftOut},
};

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
fn an_untracked_connection_may_hold_its_port_in_its_namespace_and_no_other() {
    let share = MAX_CONNECTIONS as u64 * 3 / 4;
    let mut connections = Connections::new(1);
    let established = |sock| of_owner(Owner::new(1_000, 7), sock, SYN_RECV, ESTABLISHED);
    for sock in 1..=share {
        connections.apply(&established(sock), |_| {});
    }
    assert!(connections.untracked_ports().is_empty(), "all are tracked");
    let untracked = established(share + 1);
    let at = untracked.endpoint;
    let other_port = Endpoint { port: at.port + 1, ..at };
    let elsewhere = Endpoint { netns: at.netns + 1, ..at };
    let wildcard = Endpoint { addr: [0; 4], ..at };
    connections.begin_snapshot();
    connections.apply(&untracked, |_| {});
    assert!(connections.may_lack_open_at(&at) && connections.may_lack_open_at(&wildcard));
    assert!(!connections.may_lack_open_at(&other_port) && !connections.may_lack_open_at(&elsewhere));
    // It was established after the snapshot began, which may not have it; the next one shows that it has ended.
    for is_open in [true, false] {
        connections.reconcile(&[], 1, |_| Coverage::Unknown, |_| {});
        assert_eq!(connections.may_lack_open_at(&at), is_open);
        connections.begin_snapshot();
    }
    // A snapshot lists another one of this user, who has no more room in all sessions together, and leaves one out.
    for sock in 20_000..23_000 {
        connections.apply(&of_owner(Owner::new(1_000, 8), sock, SYN_RECV, ESTABLISHED), |_| {});
    }
    let another = listed_of_user(Some(1_000), 1 << 40);
    for listed in [&[][..], std::slice::from_ref(&another)] {
        connections.begin_snapshot();
        connections.set_left_out(&LeftOut::sample(1_001, &elsewhere));
        connections.reconcile(listed, 1, |_| Coverage::Unknown, |_| {});
        assert_eq!(connections.may_lack_open_at(&another.endpoint), !listed.is_empty());
        assert!(connections.may_lack_open_at(&elsewhere) && !connections.may_lack_open_at(&at));
    }
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
    assert_eq!(connections.tracked.count(), 0);
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

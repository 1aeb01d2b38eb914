//! The connect table, which holds the connects in flight: its entries, and what happens when it is full.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::Duration,
};

use aya::maps::{Array, Map, MapData};
use rustix::process::Signal;
use selfconn::{
    bpf::{attach::RequestedHooks, guard::GuardOptions, object::ObjectOptions},
    guard::{rules::GuardRules, start::Guard},
};
use selfconn_ebpf::{ConnectEntry, ConnectSet, Endpoint, Record, WAYS, guard::mode, names, set_index, state};

use crate::support::{
    client::{
        NOBODY, assert_opened_by_this_thread, become_user, connect_to_self, connect_until_self,
        unanswered_connects,
    },
    daemon::{HookVariant, TestDaemon, is_event, scaled},
    direct_tracer::{entry_count, with_object, with_tracer},
    guard::connect_itself,
    helper_process::HelperProcess,
    netns::TestNetns,
};

#[test]
fn refused_connects_leave_no_entries_in_the_connect_table() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", "40000 40199");
    with_tracer(|tracer| {
        // An odd port is never hit.
        let closed = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 40_101);
        assert!(connect_until_self(closed, scaled(20_000)).is_none());
        assert_eq!(entry_count(tracer, net), 0);
    });
}

/// Each record of a failed attempt would wake the daemon twice, once for each probe.
#[test]
fn a_connect_to_itself_that_fails_leaves_no_entry_and_has_no_record_unless_all_states_are_reported() {
    let net = TestNetns::enter_new();
    for (states, expected) in
        [(false, vec![]), (true, vec![(state::CLOSE, state::SYN_SENT), (state::SYN_SENT, state::CLOSE)])]
    {
        let guard = GuardOptions { mode: mode::REFUSE, ..GuardOptions::OFF };
        let object = ObjectOptions { states, guard, ..ObjectOptions::MINIMAL };
        with_object(RequestedHooks::default(), object, |tracer| {
            let program = tracer.take_guard().unwrap();
            let rules = GuardRules::default();
            let guard = Guard::start(program, None, rules, true).unwrap();
            assert!(!connect_itself(Ipv4Addr::LOCALHOST.into()).is_connected);
            drop(guard);
            assert_eq!(entry_count(tracer, net), 0);
            let mut seen = BTreeSet::new();
            tracer.drain(100, |record, _| match record {
                Record::Transition(t) if u64::from(t.endpoint.netns) == net.inode => {
                    seen.insert((t.old, t.new));
                }
                _ => {}
            });
            assert_eq!(seen, expected.into_iter().collect());
        });
    }
}

#[test]
fn a_self_connection_stays_in_the_connect_table_until_it_ends() {
    let net = TestNetns::enter_new();
    with_tracer(|tracer| {
        let (connection, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        assert_eq!(entry_count(tracer, net), 1);
        let (_, entry) = tracer
            .connect_entries()
            .unwrap()
            .into_iter()
            .find(|(_, entry)| entry.endpoint.port == port)
            .unwrap();
        assert_eq!(entry.opener.task.pid, std::process::id());
        drop(connection);
        assert_eq!(entry_count(tracer, net), 0);
    });
}

#[test]
fn a_full_connect_table_costs_the_names_of_the_user_who_filled_it() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--connect-table", "1", "-vv"]);
    // One set has several ways, and a backlog of zero accepts one or two connections.
    let flood = || {
        become_user(NOBODY);
        unanswered_connects(3 * WAYS)
    };
    let connections: Vec<_> = thread::scope(|scope| {
        let before = connect_to_self(Ipv4Addr::LOCALHOST.into());
        let waiting = scope.spawn(flood).join().unwrap();
        let after = connect_to_self(Ipv4Addr::LOCALHOST.into());
        let again = scope.spawn(flood).join().unwrap();
        vec![(before, waiting), (after, again)]
    });
    let established = daemon.expect(2, is_event("established", net.inode));
    for event in &established {
        assert_opened_by_this_thread(event);
    }
    let lost = daemon.expect(1, |event| event["event"] == "lost" && event["where"] == "opener_table");
    assert!(lost[0]["count"].as_u64().is_some_and(|count| count > 0), "{lost:#?}");
    drop(connections);
    daemon.expect(2, is_event("closed", net.inode));
    daemon.stop();
}

#[test]
fn a_user_who_fills_the_connect_table_keeps_the_names_of_the_newest_connects() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--connect-table", "1"]);
    let (server, waiting) = unanswered_connects(3 * WAYS);
    let newest = connect_to_self(Ipv4Addr::LOCALHOST.into());
    assert_opened_by_this_thread(&daemon.expect(1, is_event("established", net.inode))[0]);
    drop((newest, server, waiting));
    daemon.expect(1, is_event("closed", net.inode));
    daemon.stop();
}

#[test]
fn self_connections_already_reported_make_room_for_new_connects() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--connect-table", "1"]);
    let held: Vec<_> = (0..3 * WAYS).map(|_| connect_to_self(Ipv4Addr::LOCALHOST.into())).collect();
    let established = daemon.expect(held.len(), is_event("established", net.inode));
    assert!(established.iter().all(|event| event["pid"] == std::process::id()), "{established:#?}");
    drop(held);
    let closed = daemon.expect(3 * WAYS, is_event("closed", net.inode));
    assert!(closed.iter().all(|event| event["pid"] == std::process::id()), "{closed:#?}");
    daemon.stop();
}

/// A reported entry makes room for others, because user space has its opener.
#[test]
fn a_state_whose_record_the_ring_buffer_did_not_take_is_not_marked_as_reported() {
    let net = TestNetns::enter_new();
    let daemon = TestDaemon::start(&HookVariant(vec![]), &["--ring-size", "4K"]);
    // A stopped daemon drains no ring buffer. One page holds about twenty records.
    daemon.signal(Signal::STOP);
    let sockets: Vec<_> = (0..60).map(|_| connect_to_self(Ipv4Addr::LOCALHOST.into())).collect();
    let table = DaemonConnectTable::open(&daemon);
    let is_reported = |port| {
        let (_, entry) = table.find_by_port(net, port).expect("the connect table has the entry");
        entry.has_flags(1 << state::ESTABLISHED)
    };
    let (first, last) = (sockets[0].1, sockets[59].1);
    assert_eq!([is_reported(first), is_reported(last)], [true, false]);
    daemon.signal(Signal::CONT);
    drop(sockets);
    daemon.stop();
}

/// The connect table of a running daemon.
struct DaemonConnectTable(Array<MapData, [u8; size_of::<ConnectSet>()]>);

impl DaemonConnectTable {
    fn open(daemon: &TestDaemon) -> Self {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid())).unwrap();
        let map_id =
            |text: String| text.lines().find_map(|line| line.strip_prefix("map_id:")?.trim().parse().ok());
        let ids =
            descriptors.filter_map(|entry| map_id(std::fs::read_to_string(entry.unwrap().path()).ok()?));
        let as_connect_table = |id: u32| {
            let map = MapData::from_id(id).unwrap();
            (map.info().unwrap().name_as_str() == Some(names::CONNECT_TABLE)).then_some(map)
        };
        let map = ids.into_iter().find_map(as_connect_table).expect("the daemon has the map open");
        Self(Array::try_from(Map::Array(map)).unwrap())
    }

    fn set(&self, index: u32) -> ConnectSet {
        // SAFETY: the programs wrote a ConnectSet there, which consists of integers and byte arrays.
        unsafe { std::mem::transmute(self.0.get(&index, 0).unwrap()) }
    }

    /// The entry for a connect to this port.
    fn find_by_port(&self, net: TestNetns, port: u16) -> Option<(u64, ConnectEntry)> {
        let slots = (0..self.0.len()).flat_map(|index| {
            let ConnectSet { socks, entries } = self.set(index);
            socks.into_iter().zip(entries)
        });
        let is_match = |(sock, entry): &(u64, ConnectEntry)| {
            *sock != 0 && u64::from(entry.endpoint.netns) == net.inode && entry.endpoint.port == port
        };
        slots.into_iter().find(is_match)
    }

    fn insert(&mut self, sock: u64, entry: ConnectEntry) {
        let index = set_index(sock as u32, self.0.len());
        let mut set = self.set(index);
        let way = set.socks.iter().position(|sock| *sock == 0).expect("a free entry");
        (set.socks[way], set.entries[way]) = (sock, entry);
        // SAFETY: a ConnectSet consists of integers and byte arrays without padding.
        let bytes = unsafe { std::mem::transmute::<ConnectSet, [u8; size_of::<ConnectSet>()]>(set) };
        self.0.set(index, bytes, 0).unwrap();
    }
}

#[test]
fn an_entry_is_removed_only_when_its_socket_is_gone() {
    let net = TestNetns::enter_new();
    // A snapshot finds namespaces through their processes, and only a thread is in this one.
    let mut netns_process = HelperProcess::start("wait");
    netns_process.read_output();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1", "-vv"]);
    let (connection, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, is_event("established", net.inode));
    let mut table = DaemonConnectTable::open(&daemon);
    let (sock, live_entry) = table.find_by_port(net, port).expect("the connect table has the entry");
    // The state after both probes missed the end of a connect: an entry for the address of no socket.
    let endpoint = Endpoint { port: port ^ 1, ..live_entry.endpoint };
    // A running daemon might remove the entry before the check.
    daemon.signal(Signal::STOP);
    table.insert(sock ^ 1, ConnectEntry::new((sock ^ 1) as u32, endpoint, live_entry.opener, 0));
    assert!(table.find_by_port(net, port ^ 1).is_some());
    daemon.signal(Signal::CONT);
    daemon.run_until_snapshots(2, || thread::sleep(Duration::from_millis(20)));
    assert!(table.find_by_port(net, port ^ 1).is_none(), "the stale entry is removed");
    assert_eq!(table.find_by_port(net, port), Some((sock, live_entry)), "the live entry stays");
    drop(connection);
    daemon.expect(1, is_event("closed", net.inode));
    daemon.stop();
    netns_process.finish();
}

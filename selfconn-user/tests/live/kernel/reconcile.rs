//! The daemon and the socket table of the kernel: connections from before the daemon, connections that it
//! missed, and connections that are gone.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, TcpListener},
    sync::{Barrier, Mutex, mpsc::sync_channel},
    thread,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::Value;
use socket2::Socket;

use crate::support::{
    another_program,
    client::{connect_to_self, own_comm, run_self_connection},
    daemon::{HookVariant, TestDaemon, is_event, scaled},
    helper_process::HelperProcess,
    netns::TestNetns,
    retries::{Missed, PREEMPTED, for_each_variant_retrying},
};

/// A namespace with a process in it, and not only a thread, because the daemon finds namespaces through their
/// processes.
fn netns_with_process() -> (TestNetns, HelperProcess) {
    let net = TestNetns::enter_new();
    let mut netns_process = HelperProcess::start("wait");
    netns_process.read_output();
    (net, netns_process)
}

fn open_self_connections(count: usize) -> Vec<Socket> {
    let connect = |_| {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        // No TIME_WAIT, so that the same ports can be used again.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        socket
    };
    (0..count).map(connect).collect()
}

/// Checks that each id has one `established` and one `closed`. Returns the `established` events.
#[track_caller]
fn assert_pairs(events: &[Value], net: TestNetns, count: usize) -> Vec<&Value> {
    let by_id = |kind| {
        let mut ids = HashMap::new();
        for event in events.iter().filter(|event| is_event(kind, net.inode)(event)) {
            *ids.entry(event["id"].to_string()).or_insert(0) += 1;
        }
        ids
    };
    let (opened, closed) = (by_id("established"), by_id("closed"));
    assert_eq!(opened.len(), count);
    assert_eq!(opened, closed, "one `closed` for each `established`");
    assert!(opened.values().all(|times| *times == 1), "{opened:?}");
    events.iter().filter(|event| is_event("established", net.inode)(event)).collect()
}

/// An upgrade: what happens while no daemon runs. What is still there is found; what began and ended is not.
#[test]
fn what_begins_and_ends_between_two_daemons_has_no_event_but_its_time_wait_explains_a_failed_bind() {
    let (net, netns_process) = netns_with_process();
    let mut first = TestDaemon::start(&HookVariant(vec![]), &[]);
    // Open across the restart, and closed in between.
    let mut across = open_self_connections(2);
    let established = first.expect(2, is_event("established", net.inode));
    let (events, _) = first.stop();
    assert_eq!(events.last().unwrap()["open"], 2, "{:?}", events.last());
    drop(across.pop());
    let reset_port = {
        let (reset, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        reset.set_linger(Some(Duration::ZERO)).unwrap();
        port
    };
    let time_wait_port = run_self_connection(Ipv4Addr::LOCALHOST.into());

    let mut second = TestDaemon::start(&HookVariant(vec![]), &[]);
    let found = second.expect(1, is_event("established", net.inode)).remove(0);
    assert_eq!((&found["source"], &found["port"]), (&"scan".into(), &established[0]["port"]), "{found}");
    assert_ne!(found["id"], established[0]["id"], "a new run");
    TcpListener::bind((Ipv4Addr::LOCALHOST, time_wait_port)).unwrap_err();
    let blocked = second.expect(1, is_event("blocked", net.inode)).remove(0);
    assert_eq!(
        (&blocked["port"], &blocked["holder"]["state"]),
        (&time_wait_port.into(), &"TIME_WAIT".into())
    );
    assert_eq!(blocked["holder"]["pid"], Value::Null, "whose it was is lost: {blocked}");
    // The reset one left nothing. This connection shows that all events before it have arrived.
    drop((TcpListener::bind((Ipv4Addr::LOCALHOST, reset_port)).unwrap(), across));
    let last = connect_to_self(Ipv4Addr::LOCALHOST.into());
    second.expect(2, is_event("established", net.inode));
    let (events, _) = second.stop();
    let ports: Vec<_> = events.iter().filter(|event| is_event("established", net.inode)(event)).collect();
    assert_eq!(ports.len(), 2, "{ports:#?}");
    assert_eq!(ports[1]["port"], last.1);
    drop(netns_process);
}

#[test]
fn a_restarted_daemon_finds_the_open_self_connections() {
    let (net, netns_process) = netns_with_process();
    let count = scaled(500);
    for_each_variant_retrying(PREEMPTED, |variant| {
        let mut killed = TestDaemon::start(variant, &[]);
        let sockets = open_self_connections(count);
        killed.try_expect(count, is_event("established", net.inode))?;
        killed.signal(Signal::KILL);
        drop(killed);

        // What a method has lost is found soon, and the test goes on.
        let mut daemon = TestDaemon::start(variant, &["--reconcile", "5"]);
        daemon.expect(count, is_event("established", net.inode));
        drop(sockets);
        for event in daemon.try_expect(count, is_event("closed", net.inode))? {
            Missed::if_null(&event, &["how", "closer"])?;
        }
        let (events, _) = daemon.stop();
        for event in assert_pairs(&events, net, count) {
            assert_eq!(event["source"], "scan", "{variant:?}: {event}");
            assert_eq!(event["owner"], "holder", "{event}");
            assert_eq!(event["pid"], std::process::id(), "{event}");
            assert_eq!(event["comm"], own_comm(), "{event}");
            assert_eq!(event["holders"][0]["pid"], std::process::id(), "{event}");
            assert!(event["cookie"].is_u64(), "{event}");
            assert_eq!(event["cause"], Value::Null, "no program saw it: {event}");
        }
        for event in events.iter().filter(|event| is_event("closed", net.inode)(event)) {
            assert_eq!(event["how"], "rst", "{event}");
            assert_eq!(event["closer"]["pid"], std::process::id(), "{event}");
        }
        let stopped = events.last().unwrap();
        assert_eq!(
            stopped["lost"]["missed"], 0,
            "connections from before the daemon are not missed: {stopped}"
        );
        Ok(())
    });
    netns_process.finish();
}

#[test]
fn records_lost_by_a_full_ring_buffer_are_found_in_the_socket_table() {
    let (net, netns_process) = netns_with_process();
    assert_found_in_the_table_and_counted(net);
    netns_process.finish();
}

#[test]
fn records_lost_in_a_namespace_of_one_thread_are_found_by_the_connect_table() {
    assert_found_in_the_table_and_counted(TestNetns::enter_new());
}

fn assert_found_in_the_table_and_counted(net: TestNetns) {
    // Many times the capacity of one page, on an emulated kernel, too.
    let count = 300;
    let mut daemon =
        TestDaemon::start(&HookVariant(vec![]), &["--ring-size", "4K", "--reconcile", "1", "-vv"]);
    // Connections in the first snapshot existed before the daemon and do not count as missed.
    daemon.run_until_snapshots(1, || thread::sleep(Duration::from_millis(20)));
    // A stopped daemon drains no ring buffer, so one page is full at once.
    daemon.signal(Signal::STOP);
    let sockets = open_self_connections(count);
    daemon.signal(Signal::CONT);
    daemon.expect(count, is_event("established", net.inode));
    daemon.signal(Signal::STOP);
    drop(sockets);
    daemon.signal(Signal::CONT);
    daemon.expect(count, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    let established = assert_pairs(&events, net, count);
    let scanned = established.iter().filter(|event| event["source"] == "scan").count();
    assert!(scanned > count / 2, "{scanned} of {count} were found in the table");
    // The programs recorded the connect all the same, so the opener is known.
    for event in established {
        assert_eq!(event["pid"], std::process::id(), "{event}");
        assert_eq!(event["owner"], "witnessed", "{event}");
    }
    let reported = |location: &str| -> u64 {
        let is_match = |event: &&Value| event["event"] == "lost" && event["where"] == location;
        events.iter().filter(is_match).map(|event| event["count"].as_u64().unwrap()).sum()
    };
    let lost = &events.last().unwrap()["lost"];
    assert!(reported("ring") > 0 && reported("missed") >= scanned as u64, "{lost}");
    assert_eq!((&lost["ring"], &lost["missed"]), (&reported("ring").into(), &reported("missed").into()));
}

#[test]
fn socket_table_snapshots_repeat_no_event() {
    let (net, netns_process) = netns_with_process();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1", "-vv"]);
    let before = open_self_connections(20);
    daemon.expect(20, is_event("established", net.inode));
    // Connections are opened and closed during several snapshots.
    let mut made = 20;
    daemon.run_until_snapshots(4, || {
        drop(open_self_connections(5));
        made += 5;
        thread::sleep(Duration::from_millis(5));
    });
    drop(before);
    daemon.expect(made, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    for event in assert_pairs(&events, net, made) {
        assert_eq!(event["source"], "live", "{event}");
    }
    assert_eq!(events.last().unwrap()["lost"]["missed"], 0);
    netns_process.finish();
}

#[test]
fn holders_are_distinguished_from_the_opener() {
    let (net, netns_process) = netns_with_process();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1", "-vv"]);
    let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, is_event("established", net.inode));
    let mut child = HelperProcess::start_with_fd("hold", &socket);
    child.read_output();
    drop(socket);
    // One snapshot may be under way; the second starts after this.
    daemon.run_until_snapshots(2, || thread::sleep(Duration::from_millis(20)));
    let pid = child.pid();
    child.finish();
    let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
    assert_eq!(closed["pid"], std::process::id(), "the opener: {closed}");
    assert_eq!(closed["holders"], serde_json::json!([{ "pid": pid, "comm": "a-child" }]), "{closed}");
    assert_eq!(closed["closer"]["pid"], pid, "{closed}");
    daemon.stop();
    netns_process.finish();
}

/// Its opener is not known, so its holder is named, and this can be another process at each event.
#[test]
fn the_facts_of_a_holder_are_those_of_the_process_that_is_named() {
    let (net, netns_process) = netns_with_process();
    let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1", "-vv"]);
    let own_arguments: Vec<_> = std::env::args().collect();
    let established = daemon.expect(1, is_event("established", net.inode)).remove(0);
    assert_eq!((&established["owner"], &established["pid"]), (&"holder".into(), &std::process::id().into()));
    assert_eq!(established["comm"], own_comm(), "{established}");
    assert_eq!(established["cmdline"][0], own_arguments[0], "{established}");
    let mut child = HelperProcess::start_with_fd("hold and exec", &socket);
    assert_eq!(child.read_output(), "waiting");
    drop(socket);
    // The first may be under way. The second finds the child, which is looked up before the third is there.
    daemon.run_until_snapshots(3, || thread::sleep(Duration::from_millis(20)));
    let pid = child.pid();
    child.finish();
    let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
    assert_eq!((&closed["owner"], &closed["pid"]), (&"holder".into(), &pid.into()), "{closed}");
    assert_eq!(closed["cmdline"][0], another_program::NAME, "not the arguments of the first one: {closed}");
    assert_ne!(closed["exe"], established["exe"], "{closed}");
    daemon.stop();
    netns_process.finish();
}

#[test]
fn ten_thousand_in_fifty_namespaces_are_reported_with_namespace_and_opener() {
    let each = scaled(200);
    // Room for all records at once, because this test is not about the speed of the daemon.
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--ring-size", "32M"]);
    // The inode number of a removed namespace is reused, so all of them stay until the end.
    let all_are_done = Barrier::new(50);
    // One namespace after another, because this test is not about the speed of the reader of stdout either.
    let (turn, (done, threads_of)) = (Mutex::new(()), sync_channel(0));
    let in_a_namespace = || {
        let net = TestNetns::enter_new();
        let own_turn = turn.lock().unwrap();
        drop(open_self_connections(each));
        done.send((net.inode, rustix::thread::gettid().as_raw_nonzero().get())).unwrap();
        drop(own_turn);
        all_are_done.wait();
    };
    let mut threads: HashMap<u64, i32> = HashMap::new();
    thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(in_a_namespace);
        }
        for _ in 0..50 {
            let (inode, thread) = threads_of.recv().unwrap();
            threads.insert(inode, thread);
            daemon.expect(threads.len() * each, |event| {
                event["event"] == "closed"
                    && event["netns"].as_u64().is_some_and(|netns| threads.contains_key(&netns))
            });
        }
    });
    assert_eq!(threads.len(), 50);
    let is_ours = |event: &Value| event["netns"].as_u64().is_some_and(|netns| threads.contains_key(&netns));
    let (events, _) = daemon.stop();
    let mut counts = HashMap::new();
    for event in events.iter().filter(|event| event["event"] == "established" && is_ours(event)) {
        let netns = event["netns"].as_u64().unwrap();
        *counts.entry(netns).or_insert(0) += 1;
        assert_eq!(event["tid"], threads[&netns], "{event}");
        assert_eq!(event["pid"], std::process::id(), "{event}");
    }
    assert_eq!(counts.len(), 50);
    assert!(counts.values().all(|count| *count == each), "{counts:?}");
}

//! The daemon and the kernel's socket table: what was there before it, what it missed, and what is gone.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::{Barrier, Mutex, mpsc::sync_channel},
    thread,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::Value;
use socket2::Socket;

use crate::{
    client::{connect_to_self, own_comm},
    daemon::{Daemon, Variant, for_each_variant, of, scaled},
    net::Net,
    role::Role,
};

/// A namespace that a process is in, and not only a thread: scanning finds namespaces by their processes.
fn inhabited() -> (Net, Role) {
    let net = Net::private();
    let mut inhabitant = Role::start("wait");
    inhabitant.says();
    (net, inhabitant)
}

fn open(count: usize) -> Vec<Socket> {
    let connect = |_| {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        // No TIME_WAIT, so that the same ports can be had again.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        socket
    };
    (0..count).map(connect).collect()
}

/// Checks that each id is opened once and closed once, and gives the `established`.
#[track_caller]
fn pairs(events: &[Value], net: Net, count: usize) -> Vec<&Value> {
    let by_id = |kind| {
        let mut ids = HashMap::new();
        for event in events.iter().filter(|event| of(kind, net.inode)(event)) {
            *ids.entry(event["id"].to_string()).or_insert(0) += 1;
        }
        ids
    };
    let (opened, closed) = (by_id("established"), by_id("closed"));
    assert_eq!(opened.len(), count);
    assert_eq!(opened, closed, "one close for each open");
    assert!(opened.values().all(|times| *times == 1), "{opened:?}");
    events.iter().filter(|event| of("established", net.inode)(event)).collect()
}

#[test]
fn a_daemon_that_was_killed_finds_what_is_open_when_it_starts_again() {
    let (net, inhabitant) = inhabited();
    let count = scaled(500);
    for_each_variant(|variant| {
        let mut killed = Daemon::start(variant, &[]);
        let sockets = open(count);
        killed.expect(count, of("established", net.inode));
        killed.signal(Signal::KILL);
        drop(killed);

        let mut daemon = Daemon::start(variant, &[]);
        daemon.expect(count, of("established", net.inode));
        drop(sockets);
        daemon.expect(count, of("closed", net.inode));
        let (events, _) = daemon.stop();
        for event in pairs(&events, net, count) {
            assert_eq!(event["source"], "scan", "{variant:?}: {event}");
            assert_eq!(event["owner"], "holder", "{event}");
            assert_eq!(event["pid"], std::process::id(), "{event}");
            assert_eq!(event["comm"], own_comm(), "{event}");
            assert_eq!(event["holders"][0]["pid"], std::process::id(), "{event}");
            assert!(event["cookie"].is_u64(), "{event}");
            assert_eq!(event["cause"], Value::Null, "nobody saw it: {event}");
        }
        for event in events.iter().filter(|event| of("closed", net.inode)(event)) {
            assert_eq!(event["how"], "rst", "{event}");
            assert_eq!(event["closer"]["pid"], std::process::id(), "{event}");
        }
        let stopped = events.last().unwrap();
        assert_eq!(stopped["lost"]["missed"], 0, "what was there before is not missed: {stopped}");
    });
    inhabitant.end();
}

#[test]
fn what_a_full_ring_hid_is_found_in_the_table_and_counted() {
    let (net, inhabitant) = inhabited();
    found_in_the_table_and_counted(net);
    inhabitant.end();
}

#[test]
fn what_a_full_ring_hid_in_a_namespace_of_one_thread_is_found_by_its_dial() {
    found_in_the_table_and_counted(Net::private());
}

fn found_in_the_table_and_counted(net: Net) {
    // Many times what one page holds, on an emulated kernel, too.
    let count = 300;
    let mut daemon = Daemon::start(&Variant(vec![]), &["--ring-size", "4K", "--reconcile", "1", "-vv"]);
    // What the first reading has was there before the daemon, and is not missed.
    daemon.while_reading(1, || thread::sleep(Duration::from_millis(20)));
    // A daemon that doesn't run reads no ring, and one page of it is full at once.
    daemon.signal(Signal::STOP);
    let sockets = open(count);
    daemon.signal(Signal::CONT);
    daemon.expect(count, of("established", net.inode));
    daemon.signal(Signal::STOP);
    drop(sockets);
    daemon.signal(Signal::CONT);
    daemon.expect(count, of("closed", net.inode));
    let (events, _) = daemon.stop();
    let established = pairs(&events, net, count);
    let scanned = established.iter().filter(|event| event["source"] == "scan").count();
    assert!(scanned > count / 2, "{scanned} of {count} were found in the table");
    // The dial was seen by the programs all the same, and so the opener is known.
    for event in established {
        assert_eq!(event["pid"], std::process::id(), "{event}");
        assert_eq!(event["owner"], "witnessed", "{event}");
    }
    let told = |place: &str| -> u64 {
        let is_it = |event: &&Value| event["event"] == "lost" && event["where"] == place;
        events.iter().filter(is_it).map(|event| event["count"].as_u64().unwrap()).sum()
    };
    let lost = &events.last().unwrap()["lost"];
    assert!(told("ring") > 0 && told("missed") >= scanned as u64, "{lost}");
    assert_eq!((&lost["ring"], &lost["missed"]), (&told("ring").into(), &told("missed").into()));
}

#[test]
fn readings_of_the_table_repeat_nothing() {
    let (net, inhabitant) = inhabited();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--reconcile", "1", "-vv"]);
    let before = open(20);
    daemon.expect(20, of("established", net.inode));
    // Opened and closed all the while, across some readings.
    let mut made = 20;
    daemon.while_reading(4, || {
        drop(open(5));
        made += 5;
        thread::sleep(Duration::from_millis(5));
    });
    drop(before);
    daemon.expect(made, of("closed", net.inode));
    let (events, _) = daemon.stop();
    for event in pairs(&events, net, made) {
        assert_eq!(event["source"], "live", "{event}");
    }
    assert_eq!(events.last().unwrap()["lost"]["missed"], 0);
    inhabitant.end();
}

#[test]
fn holders_are_told_apart_from_the_opener() {
    let (net, inhabitant) = inhabited();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--reconcile", "1", "-vv"]);
    let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, of("established", net.inode));
    let mut child = Role::start_with("hold", &socket);
    child.says();
    drop(socket);
    // One may be under way; the second began after this.
    daemon.while_reading(2, || thread::sleep(Duration::from_millis(20)));
    let pid = child.pid();
    child.end();
    let closed = daemon.expect(1, of("closed", net.inode)).remove(0);
    assert_eq!(closed["pid"], std::process::id(), "the opener: {closed}");
    assert_eq!(closed["holders"], serde_json::json!([{ "pid": pid, "comm": "a-child" }]), "{closed}");
    assert_eq!(closed["closer"]["pid"], pid, "{closed}");
    daemon.stop();
    inhabitant.end();
}

#[test]
fn ten_thousand_in_fifty_namespaces_have_their_own_namespace_and_opener() {
    let each = scaled(200);
    // Room for all of them at once: this is not about how fast they are read.
    let mut daemon = Daemon::start(&Variant(vec![]), &["--ring-size", "32M"]);
    // The number of a namespace that is gone is given to the next.
    let all_are_done = Barrier::new(50);
    // One after another, for this is not about how fast stdout is read either.
    let (turn, (done, places_of)) = (Mutex::new(()), sync_channel(0));
    let in_a_namespace = || {
        let net = Net::private();
        let own_turn = turn.lock().unwrap();
        drop(open(each));
        done.send((net.inode, rustix::thread::gettid().as_raw_nonzero().get())).unwrap();
        drop(own_turn);
        all_are_done.wait();
    };
    let mut places: HashMap<u64, i32> = HashMap::new();
    thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(in_a_namespace);
        }
        for _ in 0..50 {
            let (inode, thread) = places_of.recv().unwrap();
            places.insert(inode, thread);
            daemon.expect(places.len() * each, |event| {
                event["event"] == "closed"
                    && event["netns"].as_u64().is_some_and(|netns| places.contains_key(&netns))
            });
        }
    });
    assert_eq!(places.len(), 50);
    let is_ours = |event: &Value| event["netns"].as_u64().is_some_and(|netns| places.contains_key(&netns));
    let (events, _) = daemon.stop();
    let mut counts = HashMap::new();
    for event in events.iter().filter(|event| event["event"] == "established" && is_ours(event)) {
        let netns = event["netns"].as_u64().unwrap();
        *counts.entry(netns).or_insert(0) += 1;
        assert_eq!(event["tid"], places[&netns], "{event}");
        assert_eq!(event["pid"], std::process::id(), "{event}");
    }
    assert_eq!(counts.len(), 50);
    assert!(counts.values().all(|count| *count == each), "{counts:?}");
}

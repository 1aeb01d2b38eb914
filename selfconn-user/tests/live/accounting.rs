//! The two sums that make silence mean something: what the programs had for the daemon is what it got and what the ring
//! buffer had no room for; the events that were made are those written and those lost. Each place is starved in turn.

use std::{fs, net::Ipv4Addr, time::Duration};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    client::connect_to_self,
    daemon::{Daemon, Variant, of, scaled, steady_variants, variants},
    disk::Disk,
    net::Net,
    openers::unanswered,
};

fn number(stopped: &Value, key: &str) -> u64 {
    stopped.pointer(key).and_then(Value::as_u64).unwrap_or_else(|| panic!("{key} in {stopped}"))
}

/// Both sums of the last event.
#[track_caller]
fn assert_exact(stopped: &Value) {
    let of = |key| number(stopped, key);
    assert_eq!(of("/matched"), of("/delivered") + of("/lost/ring"), "{stopped}");
    if stopped["written"].is_u64() {
        assert_eq!(of("/made"), of("/written") + of("/lost/log"), "{stopped}");
    }
}

/// Self-connections that end at once.
fn flood(count: usize) {
    for _ in 0..count {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
}

#[test]
fn with_room_for_all_nothing_is_lost_and_the_sums_hold() {
    let net = Net::private();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    for (number_of, variant) in steady_variants().enumerate() {
        let log = log.with_extension(number_of.to_string());
        let mut daemon = Daemon::start(&variant, &["--log", log.to_str().unwrap(), "--states"]);
        flood(scaled(500));
        daemon.expect(scaled(500), of("closed", net.inode));
        let (events, _) = daemon.stop();
        let stopped = events.last().unwrap();
        assert_exact(stopped);
        assert!(number(stopped, "/matched") >= 2 * scaled(500) as u64, "{variant:?}: {stopped}");
        assert_eq!((number(stopped, "/lost/ring"), number(stopped, "/lost/log")), (0, 0), "{stopped}");
        let lines = fs::read_to_string(&log).unwrap().lines().count() as u64;
        assert_eq!((lines, events.len() as u64), (number(stopped, "/written"), number(stopped, "/made")));
    }
}

#[test]
fn a_ring_of_one_page_loses_and_counts_each_record() {
    Net::private();
    for variant in variants() {
        let mut daemon = Daemon::start(&variant, &["--ring-size", "4K", "--states"]);
        for _ in 0..5 {
            // A daemon that doesn't run reads no ring, and one page of it is full at once.
            daemon.signal(Signal::STOP);
            flood(50);
            daemon.signal(Signal::CONT);
            daemon.expect(1, |event| event["event"] == "lost" && event["where"] == "ring");
        }
        let (events, _) = daemon.stop();
        let stopped = events.last().unwrap();
        assert_exact(stopped);
        let told: u64 = events
            .iter()
            .filter(|event| event["event"] == "lost" && event["where"] == "ring")
            .map(|event| number(event, "/count"))
            .sum();
        assert_eq!(told, number(stopped, "/lost/ring"), "{variant:?}: {stopped}");
        assert!(told > 100, "{variant:?}: {stopped}");
    }
}

#[test]
fn a_table_of_eight_forgets_names_and_counts_each() {
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--dials", "8"]);
    // Dials in flight take every place of it, and keep it: no entry makes way for another before its name is told.
    let in_flight = unanswered(64);
    let sockets: Vec<_> = (0..200).map(|_| connect_to_self(Ipv4Addr::LOCALHOST.into()).0).collect();
    let established = daemon.expect(200, of("established", net.inode));
    drop((sockets, in_flight));
    daemon.expect(200, of("closed", net.inode));
    let (events, _) = daemon.stop();
    let stopped = events.last().unwrap();
    assert_exact(stopped);
    let unnamed = established.iter().filter(|event| event["pid"].is_null()).count() as u64;
    assert_eq!(unnamed, 200, "{stopped}");
    assert!(number(stopped, "/not_remembered") >= unnamed, "{stopped}");
}

#[test]
fn a_disk_of_sixteen_pages_loses_and_counts_each_event() {
    let net = Net::private();
    let disk = Disk::private(64);
    let log = disk.join("events.jsonl");
    let mut daemon = Daemon::start(&Variant(vec![]), &["--log", log.to_str().unwrap(), "--states"]);
    // More than waits for a disk that is full; and so that stdout, which has a reader, is never behind.
    for batch in 1..=15 {
        flood(200);
        daemon.expect(batch * 200, of("closed", net.inode));
    }
    let (events, _) = daemon.stop();
    let stopped = events.last().unwrap();
    assert_exact(stopped);
    assert!(number(stopped, "/lost/log") > 0, "{stopped}");
    let written = fs::read(&log).unwrap();
    let lines = written.iter().filter(|byte| **byte == b'\n').count() as u64;
    assert_eq!(lines, number(stopped, "/written"), "{stopped}");
    assert_eq!(events.len() as u64, number(stopped, "/made"), "stdout has them all");
}

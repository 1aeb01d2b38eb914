//! The two sums that show that no loss is silent. Records: matched by the programs = delivered to the daemon
//! + lost by the ring buffer. Events: made = written + lost. Each resource is made scarce in turn.

use std::{fs, net::Ipv4Addr, time::Duration};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    kernel::connect_table::unanswered_connects,
    support::{
        client::connect_to_self,
        daemon::{HookVariant, TestDaemon, hook_variants, is_event, lossless_variants, scaled},
        disk::Disk,
        netns::TestNetns,
    },
};

fn number(stopped: &Value, key: &str) -> u64 {
    stopped.pointer(key).and_then(Value::as_u64).unwrap_or_else(|| panic!("{key} in {stopped}"))
}

/// Checks both sums of the `stopped` event.
#[track_caller]
fn assert_sums_hold(stopped: &Value) {
    let field = |key| number(stopped, key);
    assert_eq!(field("/matched"), field("/delivered") + field("/lost/ring"), "{stopped}");
    if stopped["written"].is_u64() {
        assert_eq!(field("/made"), field("/written") + field("/lost/log"), "{stopped}");
    }
}

/// Makes self-connections that end at once.
fn make_self_connections(count: usize) {
    for _ in 0..count {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
}

#[test]
fn with_room_for_all_events_nothing_is_lost_and_the_sums_hold() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    for (index, variant) in lossless_variants().enumerate() {
        let log = log.with_extension(index.to_string());
        let mut daemon = TestDaemon::start(&variant, &["--log", log.to_str().unwrap(), "--states"]);
        make_self_connections(scaled(500));
        daemon.expect(scaled(500), is_event("closed", net.inode));
        let (events, _) = daemon.stop();
        let stopped = events.last().unwrap();
        assert_sums_hold(stopped);
        assert!(number(stopped, "/matched") >= 2 * scaled(500) as u64, "{variant:?}: {stopped}");
        assert_eq!((number(stopped, "/lost/ring"), number(stopped, "/lost/log")), (0, 0), "{stopped}");
        let lines = fs::read_to_string(&log).unwrap().lines().count() as u64;
        assert_eq!((lines, events.len() as u64), (number(stopped, "/written"), number(stopped, "/made")));
    }
}

#[test]
fn a_one_page_ring_buffer_counts_each_lost_record() {
    TestNetns::enter_new();
    for variant in hook_variants() {
        let mut daemon = TestDaemon::start(&variant, &["--ring-size", "4K", "--states"]);
        for _ in 0..5 {
            // A stopped daemon drains no ring buffer, so one page is full at once.
            daemon.signal(Signal::STOP);
            make_self_connections(50);
            daemon.signal(Signal::CONT);
            let lost = |event: &Value| event["event"] == "lost" && event["where"] == "ring";
            assert_eq!(daemon.expect(1, lost)[0]["kind"], "record");
        }
        let (events, _) = daemon.stop();
        let stopped = events.last().unwrap();
        assert_sums_hold(stopped);
        let reported: u64 = events
            .iter()
            .filter(|event| event["event"] == "lost" && event["where"] == "ring")
            .map(|event| number(event, "/count"))
            .sum();
        assert_eq!(reported, number(stopped, "/lost/ring"), "{variant:?}: {stopped}");
        assert!(reported > 100, "{variant:?}: {stopped}");
    }
}

#[test]
fn a_table_of_eight_entries_counts_each_unknown_opener() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--connect-table", "8"]);
    // Connects in flight occupy every slot of the table and cannot be evicted.
    let in_flight = unanswered_connects(64);
    let sockets: Vec<_> = (0..200).map(|_| connect_to_self(Ipv4Addr::LOCALHOST.into()).0).collect();
    let established = daemon.expect(200, is_event("established", net.inode));
    drop((sockets, in_flight));
    daemon.expect(200, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    let stopped = events.last().unwrap();
    assert_sums_hold(stopped);
    let unnamed = established.iter().filter(|event| event["pid"].is_null()).count() as u64;
    assert_eq!(unnamed, 200, "{stopped}");
    let not_remembered = number(stopped, "/not_remembered");
    assert!(not_remembered >= unnamed, "{stopped}");
    let is_opener_loss = |event: &&Value| event["event"] == "lost" && event["where"] == "opener_table";
    let reported = events.iter().filter(is_opener_loss);
    let reported: u64 = reported
        .inspect(|event| assert_eq!(event["kind"], "fact"))
        .map(|event| number(event, "/count"))
        .sum();
    assert_eq!(reported, not_remembered, "{stopped}");
    // A fact is not part of the totals.
    assert!(stopped["lost"]["opener_table"].is_null(), "{stopped}");
}

#[test]
fn a_disk_of_sixteen_pages_counts_each_lost_event() {
    let net = TestNetns::enter_new();
    let disk = Disk::mount_private(64);
    let log = disk.join("events.jsonl");
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--log", log.to_str().unwrap(), "--states"]);
    // More than the queue of a full disk holds. The batches keep stdout, which is read, from falling behind.
    for batch in 1..=15 {
        make_self_connections(200);
        daemon.expect(batch * 200, is_event("closed", net.inode));
    }
    let (events, _) = daemon.stop();
    let stopped = events.last().unwrap();
    assert_sums_hold(stopped);
    assert!(number(stopped, "/lost/log") > 0, "{stopped}");
    let written = fs::read(&log).unwrap();
    let lines = written.iter().filter(|byte| **byte == b'\n').count() as u64;
    assert_eq!(lines, number(stopped, "/written"), "{stopped}");
    assert_eq!(events.len() as u64, number(stopped, "/made"), "stdout has all events");
}

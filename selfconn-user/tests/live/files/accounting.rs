//! A full disk: each event that is not written is counted.

use std::fs;

use crate::support::{
    accounting::{assert_sums_hold, make_self_connections, number},
    daemon::{HookVariant, TestDaemon, is_event},
    disk::Disk,
    netns::TestNetns,
};

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

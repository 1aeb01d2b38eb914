//! A full disk, and a log at its limit: each event that is not written is counted.

use std::fs;

use rustix::process::Signal;

use crate::support::{
    accounting::{assert_sums_hold, make_self_connections, missing_events, number, parse_log},
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
    // The disk has cut the last line.
    let text = fs::read_to_string(&log).unwrap();
    let written = parse_log(&text[..=text.rfind('\n').unwrap()]);
    assert_eq!(written.len() as u64, number(stopped, "/written"), "{stopped}");
    assert_eq!(events.len() as u64, number(stopped, "/made"), "stdout has all events");
    assert_eq!((missing_events(&events), number(stopped, "/seq")), (0, number(stopped, "/made")));
    // The log's own last event may be lost, too. Its number is known from stdout.
    let lost_last = number(stopped, "/seq") - number(written.last().unwrap(), "/seq");
    assert_eq!(missing_events(&written) + lost_last, number(stopped, "/lost/log"), "{stopped}");
}

#[test]
fn a_log_at_its_limit_counts_each_lost_event_and_says_so_after_the_rotation() {
    const LIMIT: u64 = 16 << 20;
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let (log, moved) = (folder.path().join("events.jsonl"), folder.path().join("events.jsonl.1"));
    let options = ["--log", log.to_str().unwrap(), "--log-limit", "16M", "--states", "--cmdline", "off"];
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &options);
    // More than the file and the queue hold: a batch is 0.8 MB.
    let (mut batch, mut batches_at_limit) = (0, 0);
    while batches_at_limit < 16 {
        batch += 1;
        make_self_connections(200);
        daemon.expect(batch * 200, is_event("closed", net.inode));
        batches_at_limit += usize::from(daemon.stderr_so_far().contains("--log-limit"));
    }
    let len = fs::metadata(&log).unwrap().len();
    assert!(len <= LIMIT && len > LIMIT - 8_192, "{len}");
    fs::rename(&log, &moved).unwrap();
    daemon.signal(Signal::HUP);
    let lost = daemon.expect(1, |event| event["event"] == "lost" && event["where"] == "log").remove(0);
    let (events, _) = daemon.stop();
    let stopped = events.last().unwrap();
    assert_sums_hold(stopped);
    let text = [&moved, &log].map(|path| fs::read_to_string(path).unwrap()).concat();
    let written = parse_log(&text);
    assert_eq!(fs::metadata(&moved).unwrap().len(), len);
    assert!(fs::metadata(&log).unwrap().len() <= LIMIT);
    assert!(number(&lost, "/count") > 0, "{lost}");
    assert_eq!(written.len() as u64, number(stopped, "/written"), "{stopped}");
    let lost_last = number(stopped, "/seq") - number(written.last().unwrap(), "/seq");
    assert_eq!(missing_events(&written) + lost_last, number(stopped, "/lost/log"), "{stopped}");
}

//! A full disk, and a log with a limit: each event that is not written is counted.

use std::fs;

use serde_json::Value;

use crate::support::{
    accounting::{assert_sums_hold, make_self_connections, missing_events, number, parse_log},
    daemon::{HookVariant, TestDaemon, is_event},
    disk::Disk,
    helper_process::{HelperProcess, UNPRIVILEGED},
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
fn who_fills_its_share_of_a_log_with_a_limit_loses_its_own_events_and_each_is_counted() {
    const LIMIT: u64 = 16 << 20;
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let (log, moved) = (folder.path().join("events.jsonl"), folder.path().join("events.jsonl.1"));
    let options = ["--log", log.to_str().unwrap(), "--log-limit", "16M", "--states", "--cmdline", "off"];
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &options);
    // A connection is 4 KB.
    const STORM: usize = 4_000;
    let of_user = |kind, uid| move |event: &Value| is_event(kind, net.inode)(event) && event["uid"] == uid;
    // The batches keep stdout, which is read, from falling behind.
    for batch in 1..=8 {
        let mut storm = HelperProcess::start_unprivileged(&format!("connect storm {}", STORM / 8), None);
        storm.read_output();
        storm.finish();
        daemon.expect(batch * STORM / 8, of_user("closed", UNPRIVILEGED));
    }
    let is_lost = |event: &Value| event["event"] == "lost" && event["where"] == "log";
    let lost = daemon.expect(1, is_lost).remove(0);
    assert_eq!(lost["uid"], UNPRIVILEGED, "{lost}");
    let (len, share) = (fs::metadata(&log).unwrap().len(), LIMIT * 3 / 4);
    assert!((share - 8_192..share + (64 << 10)).contains(&len), "{len}");
    assert!(daemon.stderr_so_far().contains("--log-limit"), "{}", daemon.stderr_so_far());
    // Another user's connections are in the same file.
    make_self_connections(20);
    daemon.expect(20, of_user("closed", 0));
    let text = fs::read_to_string(&log).unwrap();
    assert_eq!(parse_log(&text).iter().filter(|event| of_user("closed", 0)(event)).count(), 20);
    fs::rename(&log, &moved).unwrap();
    // In the new file there is room again.
    let mut storm = HelperProcess::start_unprivileged("connect storm 1", None);
    storm.read_output();
    storm.finish();
    daemon.expect(STORM + 1, of_user("closed", UNPRIVILEGED));
    let (events, _) = daemon.stop();
    let stopped = events.last().unwrap();
    assert_sums_hold(stopped);
    let [before, after] = [&moved, &log].map(|path| fs::read_to_string(path).unwrap());
    assert!(parse_log(&after).iter().any(of_user("closed", UNPRIVILEGED)), "{after}");
    let written = parse_log(&(before + &after));
    assert_eq!(written.len() as u64, number(stopped, "/written"), "{stopped}");
    let reported: u64 =
        events.iter().filter(|event| is_lost(event)).map(|event| number(event, "/count")).sum();
    assert_eq!(reported, number(stopped, "/lost/log"), "{stopped}");
    assert_eq!(missing_events(&written), reported, "{stopped}");
}

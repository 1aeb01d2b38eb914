//! The log of the daemon on a full disk and under rotation: its contents, and the counts of written and lost
//! events.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{
    client::run_self_connection,
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event, scaled},
    disk::Disk,
    netns::TestNetns,
};

/// The events in a log. Checks that each line is complete.
#[track_caller]
fn read_log(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    assert!(
        text.is_empty() || text.ends_with('\n'),
        "a partial last line: {:?}",
        &text[text.len().saturating_sub(200)..]
    );
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn start(log: &Path, options: &[&str]) -> TestDaemon {
    let mut all = vec!["--log", log.to_str().unwrap()];
    all.extend(options);
    TestDaemon::start(&HookVariant(vec![]), &all)
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn make_self_connections(count: usize) {
    for _ in 0..count {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
    }
}

/// Checks made = written + lost in the last event, and returns the three numbers.
#[track_caller]
fn assert_event_sum(events: &[Value]) -> (u64, u64, u64) {
    let stopped = events.last().unwrap();
    assert_eq!(stopped["event"], "stopped");
    let number = |value: &Value| value.as_u64().unwrap();
    let (made, written, lost) =
        (number(&stopped["made"]), number(&stopped["written"]), number(&stopped["lost"]["log"]));
    assert_eq!(made, written + lost, "{stopped}");
    (made, written, lost)
}

#[test]
fn events_refused_by_a_full_disk_are_written_once_when_there_is_room() {
    let (net, disk) = (TestNetns::enter_new(), Disk::mount_private(64));
    let log = disk.join("events.jsonl");
    let mut daemon = start(&log, &[]);
    let filler = disk.fill_except(2);
    // An event has about 700 bytes.
    make_self_connections(20);
    daemon.expect(20, is_event("closed", net.inode));
    assert!(fs::metadata(&log).unwrap().len() <= 4 * 4_096, "the disk was full");
    fs::remove_file(filler).unwrap();
    // The queue is written although no further event happens.
    wait_until("the queue is written", || {
        fs::read(&log).unwrap().iter().filter(|byte| **byte == b'\n').count() > 40
    });
    let (events, stderr) = daemon.stop();
    assert_eq!(read_log(&log), events);
    assert_eq!(assert_event_sum(&events), (events.len() as u64, events.len() as u64, 0));
    assert_eq!(stderr.matches("No space left on device").count(), 1, "reported once: {stderr}");
    assert_eq!(stderr.matches("can be written again").count(), 1, "{stderr}");
}

#[test]
fn events_beyond_the_queue_are_reported_as_lost_after_the_disk_has_room() {
    let (net, disk) = (TestNetns::enter_new(), Disk::mount_private(16 << 10));
    let log = disk.join("events.jsonl");
    let mut daemon = start(&log, &["--states"]);
    let filler = disk.fill_except(2);
    let (mut made, mut bytes) = (0, 0);
    while bytes < 9 << 20 {
        make_self_connections(200);
        made += 200;
        daemon.expect(made, is_event("closed", net.inode));
        bytes = daemon.expect(0, |_| true).iter().map(|event| event.to_string().len()).sum();
    }
    fs::remove_file(filler).unwrap();
    let lost = daemon.expect(1, |event| event["event"] == "lost" && event["where"] == "log").remove(0);
    let (events, _) = daemon.stop();
    let in_log = read_log(&log);
    let (made, written, lost_of_log) = assert_event_sum(&events);
    assert_eq!(made, events.len() as u64);
    assert_eq!(written, in_log.len() as u64);
    assert!(lost["count"].as_u64().unwrap() > 0 && in_log.contains(&lost), "{lost}");
    assert_eq!(lost["count"], lost_of_log);
    // The events in the log are in order and without duplicates.
    let mut rest = events.iter();
    for event in &in_log {
        assert!(rest.any(|next| next == event), "{event} is out of order");
    }
}

#[test]
fn a_run_that_ends_on_a_full_disk_counts_its_losses_and_the_next_run_starts_a_new_line() {
    let (net, disk) = (TestNetns::enter_new(), Disk::mount_private(64));
    let log = disk.join("events.jsonl");
    let mut daemon = start(&log, &[]);
    let filler = disk.fill_except(2);
    make_self_connections(20);
    daemon.expect(20, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    let (made, written, lost) = assert_event_sum(&events);
    assert_eq!(made, events.len() as u64);
    assert!(lost > 0);
    let left = fs::read(&log).unwrap();
    assert_eq!(written, left.iter().filter(|byte| **byte == b'\n').count() as u64);
    assert!(!left.ends_with(b"\n"), "the disk cut a line");
    fs::remove_file(filler).unwrap();
    start(&log, &[]).stop();
    let text = fs::read_to_string(&log).unwrap();
    let whole = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count();
    assert_eq!(text.lines().count(), whole + 1, "one line is partial, and no other line is damaged");
    assert_eq!(whole as u64, written + 2, "plus `started` and `stopped`");
}

#[test]
fn a_file_size_limit_is_a_write_error_and_does_not_end_the_run() {
    let (net, disk) = (TestNetns::enter_new(), Disk::mount_private(256));
    let log = disk.join("events.jsonl");
    let mut daemon = start(&log, &[]);
    let limit = rustix::process::Rlimit { current: Some(16 << 10), maximum: Some(16 << 10) };
    let pid = rustix::process::Pid::from_raw(daemon.pid().cast_signed());
    rustix::process::prlimit(pid, rustix::process::Resource::Fsize, limit).unwrap();
    make_self_connections(20);
    daemon.expect(20, is_event("closed", net.inode));
    assert_eq!(fs::metadata(&log).unwrap().len(), 16 << 10);
    let moved = disk.join("moved");
    fs::rename(&log, &moved).unwrap();
    // A new file has room. The partial line cannot be completed in the old file, because the limit applies to
    // it.
    fs::remove_file(&moved).unwrap();
    wait_until("the new file is written", || fs::metadata(&log).is_ok_and(|metadata| metadata.len() > 0));
    let (events, stderr) = daemon.stop();
    assert!(stderr.contains("File too large"), "{stderr}");
    assert_event_sum(&events);
}

#[test]
fn a_moved_log_file_gets_no_further_lines() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let moved = |number: usize| folder.path().join(format!("events.jsonl.{number}"));
    let mut daemon = start(&log, &[]);
    for round in 1..=3 {
        make_self_connections(scaled(10));
        daemon.expect(round * scaled(10), is_event("closed", net.inode));
        let before = read_log(&log);
        fs::rename(&log, moved(round)).unwrap();
        match round {
            1 => {
                daemon.signal(Signal::HUP);
                wait_until("SIGHUP opens a new file although no event happens", || log.exists());
            }
            2 => fs::write(&log, "").unwrap(),
            _ => {}
        }
        make_self_connections(1);
        daemon.expect(round * scaled(10) + round, is_event("closed", net.inode));
        assert_eq!(read_log(&moved(round)), before, "round {round}");
    }
    // The file is removed, not moved.
    fs::remove_file(&log).unwrap();
    daemon.signal(Signal::HUP);
    wait_until("the log exists again", || log.exists());
    let (events, _) = daemon.stop();
    assert_eq!(assert_event_sum(&events).0, events.len() as u64);
    assert_eq!(read_log(&log).last(), events.last());
}

#[test]
fn a_hundred_sighups_lose_nothing() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut daemon = start(&log, &[]);
    for _ in 0..100 {
        daemon.signal(Signal::HUP);
        make_self_connections(1);
    }
    daemon.expect(100, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    assert_eq!(read_log(&log), events);
    assert_eq!(assert_event_sum(&events).2, 0);
}

//! The daemon's log on a disk that fills up and under rotation: what is in it, what is not, and the account of both.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    client::talk_to_self,
    daemon::{DEADLINE, Daemon, Variant, of, scaled},
    disk::Disk,
    net::Net,
};

/// The events of a log, each line whole.
#[track_caller]
fn logged(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    assert!(
        text.is_empty() || text.ends_with('\n'),
        "a torn end: {:?}",
        &text[text.len().saturating_sub(200)..]
    );
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn start(log: &Path, options: &[&str]) -> Daemon {
    let mut all = vec!["--log", log.to_str().unwrap()];
    all.extend(options);
    Daemon::start(&Variant(vec![]), &all)
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn talk(count: usize) {
    for _ in 0..count {
        talk_to_self(Ipv4Addr::LOCALHOST.into());
    }
}

/// Of the last event: made = written + lost.
#[track_caller]
fn account(events: &[Value]) -> (u64, u64, u64) {
    let stopped = events.last().unwrap();
    assert_eq!(stopped["event"], "stopped");
    let number = |value: &Value| value.as_u64().unwrap();
    let (made, written, lost) =
        (number(&stopped["made"]), number(&stopped["written"]), number(&stopped["lost"]["log"]));
    assert_eq!(made, written + lost, "{stopped}");
    (made, written, lost)
}

#[test]
fn what_a_full_disk_refuses_waits_and_is_written_once_when_there_is_room() {
    let (net, disk) = (Net::private(), Disk::private(64));
    let log = disk.join("events.jsonl");
    let mut daemon = start(&log, &[]);
    let filler = disk.fill_but(2);
    // An event has some 700 bytes.
    talk(20);
    daemon.expect(20, of("closed", net.inode));
    assert!(fs::metadata(&log).unwrap().len() <= 4 * 4_096, "the disk was full");
    fs::remove_file(filler).unwrap();
    // Without another event.
    wait_until("what waited is written", || {
        fs::read(&log).unwrap().iter().filter(|byte| **byte == b'\n').count() > 40
    });
    let (events, said) = daemon.stop();
    assert_eq!(logged(&log), events);
    assert_eq!(account(&events), (events.len() as u64, events.len() as u64, 0));
    assert_eq!(said.matches("No space left on device").count(), 1, "said once: {said}");
    assert_eq!(said.matches("can be written again").count(), 1, "{said}");
}

#[test]
fn what_does_not_fit_while_the_disk_is_full_is_told_once_it_is_not() {
    let (net, disk) = (Net::private(), Disk::private(16 << 10));
    let log = disk.join("events.jsonl");
    let mut daemon = start(&log, &["--states"]);
    let filler = disk.fill_but(2);
    let (mut made, mut bytes) = (0, 0);
    while bytes < 9 << 20 {
        talk(200);
        made += 200;
        daemon.expect(made, of("closed", net.inode));
        bytes = daemon.expect(0, |_| true).iter().map(|event| event.to_string().len()).sum();
    }
    fs::remove_file(filler).unwrap();
    let lost = daemon.expect(1, |event| event["event"] == "lost" && event["where"] == "log").remove(0);
    let (events, _) = daemon.stop();
    let in_log = logged(&log);
    let (made, written, lost_of_log) = account(&events);
    assert_eq!(made, events.len() as u64);
    assert_eq!(written, in_log.len() as u64);
    assert!(lost["count"].as_u64().unwrap() > 0 && in_log.contains(&lost), "{lost}");
    assert_eq!(lost["count"], lost_of_log);
    // What is there is in order, and nothing is there twice.
    let mut rest = events.iter();
    for event in &in_log {
        assert!(rest.any(|next| next == event), "{event} is out of order");
    }
}

#[test]
fn a_run_that_ends_on_a_full_disk_accounts_for_itself_and_the_next_one_begins_a_line() {
    let (net, disk) = (Net::private(), Disk::private(64));
    let log = disk.join("events.jsonl");
    let mut daemon = start(&log, &[]);
    let filler = disk.fill_but(2);
    talk(20);
    daemon.expect(20, of("closed", net.inode));
    let (events, _) = daemon.stop();
    let (made, written, lost) = account(&events);
    assert_eq!(made, events.len() as u64);
    assert!(lost > 0);
    let left = fs::read(&log).unwrap();
    assert_eq!(written, left.iter().filter(|byte| **byte == b'\n').count() as u64);
    assert!(!left.ends_with(b"\n"), "the disk tore a line");
    fs::remove_file(filler).unwrap();
    start(&log, &[]).stop();
    let text = fs::read_to_string(&log).unwrap();
    let whole = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count();
    assert_eq!(text.lines().count(), whole + 1, "one line is torn, and it spoils no other");
    assert_eq!(whole as u64, written + 2, "started and stopped");
}

#[test]
fn a_limit_on_file_size_is_an_error_of_writing_and_not_the_end() {
    let (net, disk) = (Net::private(), Disk::private(256));
    let log = disk.join("events.jsonl");
    let mut daemon = start(&log, &[]);
    let limit = rustix::process::Rlimit { current: Some(16 << 10), maximum: Some(16 << 10) };
    let pid = rustix::process::Pid::from_raw(daemon.pid().cast_signed());
    rustix::process::prlimit(pid, rustix::process::Resource::Fsize, limit).unwrap();
    talk(20);
    daemon.expect(20, of("closed", net.inode));
    assert_eq!(fs::metadata(&log).unwrap().len(), 16 << 10);
    let moved = disk.join("moved");
    fs::rename(&log, &moved).unwrap();
    // A new file has room; but the torn line can't be completed in the old one, which the limit holds for.
    fs::remove_file(&moved).unwrap();
    wait_until("the new file is written", || fs::metadata(&log).is_ok_and(|metadata| metadata.len() > 0));
    let (events, said) = daemon.stop();
    assert!(said.contains("File too large"), "{said}");
    account(&events);
}

#[test]
fn a_file_that_was_moved_gets_no_further_line_with_and_without_a_signal() {
    let net = Net::private();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let moved = |number: usize| folder.path().join(format!("events.jsonl.{number}"));
    let mut daemon = start(&log, &[]);
    for round in 1..=3 {
        talk(scaled(10));
        daemon.expect(round * scaled(10), of("closed", net.inode));
        let before = logged(&log);
        fs::rename(&log, moved(round)).unwrap();
        match round {
            1 => {
                daemon.signal(Signal::HUP);
                wait_until("SIGHUP opens a new file though nothing happens", || log.exists());
            }
            2 => fs::write(&log, "").unwrap(),
            _ => {}
        }
        talk(1);
        daemon.expect(round * scaled(10) + round, of("closed", net.inode));
        assert_eq!(logged(&moved(round)), before, "round {round}");
    }
    // Removed, not moved.
    fs::remove_file(&log).unwrap();
    daemon.signal(Signal::HUP);
    wait_until("the log is back", || log.exists());
    let (events, _) = daemon.stop();
    assert_eq!(account(&events).0, events.len() as u64);
    assert_eq!(logged(&log).last(), events.last());
}

#[test]
fn a_hundred_hangups_do_no_harm() {
    let net = Net::private();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut daemon = start(&log, &[]);
    for _ in 0..100 {
        daemon.signal(Signal::HUP);
        talk(1);
    }
    daemon.expect(100, of("closed", net.inode));
    let (events, _) = daemon.stop();
    assert_eq!(logged(&log), events);
    assert_eq!(account(&events).2, 0);
}

//! Who reads the daemon's stdout may be slow, frozen, or gone: the log is none the worse for it.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _},
    net::Ipv4Addr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    client::talk_to_self,
    daemon::{DEADLINE, selfconn},
    net::Net,
};

fn start(log: &Path, stdout: impl Into<Stdio>) -> Child {
    let mut command = Command::new(selfconn());
    command.args(["run", "--json", "--states", "--log"]).arg(log).stdout(stdout);
    let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let until = Instant::now() + DEADLINE;
    while !fs::read_to_string(log).is_ok_and(|text| text.contains("started")) {
        assert!(Instant::now() < until, "it did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn parse(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// Waits until the log has so many closed self-connections of this namespace; and how long the log is then.
fn wait_for_closed(log: &Path, net: Net, count: usize) -> usize {
    let until = Instant::now() + DEADLINE;
    loop {
        let text = fs::read_to_string(log).unwrap_or_default();
        let wanted = format!("\"netns\":{},", net.inode);
        let is_ours = |line: &&str| line.contains("\"event\":\"closed\"") && line.contains(&wanted);
        let seen = text.lines().filter(is_ours).count();
        if seen >= count {
            return text.len();
        }
        assert!(Instant::now() < until, "{seen} of {count} are in the log");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Until the log is this long.
fn talk_until(log: &Path, net: Net, bytes: usize) -> usize {
    let mut count = 0;
    loop {
        for _ in 0..100 {
            talk_to_self(Ipv4Addr::LOCALHOST.into());
        }
        count += 100;
        if wait_for_closed(log, net, count) > bytes {
            return count;
        }
    }
}

fn end(child: &mut Child) {
    kill_process(Pid::from_child(child), Signal::TERM).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_frozen_reader_stops_nothing_and_is_told_what_it_lost_when_it_reads_again() {
    let net = Net::private();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut child = start(&log, Stdio::piped());
    let stdout = child.stdout.take().unwrap();
    // What waits for it and what is in the pipe is less than this.
    talk_until(&log, net, 9 << 20);
    let (lines, read) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            let line = line.unwrap();
            lines.send(serde_json::from_str::<Value>(&line).unwrap()).unwrap();
        }
    });
    let mut events = Vec::new();
    while !events.last().is_some_and(|event: &Value| event["event"] == "lost" && event["where"] == "stdout") {
        events.push(read.recv_timeout(DEADLINE).expect("a lost event"));
    }
    let told = events.last().unwrap()["count"].as_u64().unwrap();
    assert!(told > 0);
    end(&mut child);
    events.extend(read.iter());
    let in_log = parse(&fs::read_to_string(&log).unwrap());
    let stopped = events.last().unwrap();
    assert_eq!(in_log.last(), Some(stopped), "both have the end");
    assert_eq!(stopped["lost"]["log"], 0);
    assert_eq!(stopped["made"], in_log.len());
    assert_eq!(stopped["lost"]["stdout"], told);
    assert_eq!(stopped["made"], events.len() as u64 + told, "what came and what is told as lost is all");
}

#[test]
fn a_slow_reader_that_is_the_only_one_loses_nothing_of_a_flood() {
    let net = Net::private();
    let mut command = Command::new(selfconn());
    command
        .args(["run", "--json", "--states", "--ring-size", "32M"])
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (started, is_live) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let (mut text, mut portion) = (Vec::new(), vec![0; 32 << 10]);
        loop {
            let count = stdout.read(&mut portion).unwrap();
            text.extend_from_slice(&portion[..count]);
            let _ = started.send(());
            if count == 0 {
                return String::from_utf8(text).unwrap();
            }
            // Longer than it takes to make as much.
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    is_live.recv_timeout(DEADLINE).unwrap();
    const MADE: usize = 3_000;
    for _ in 0..MADE {
        talk_to_self(Ipv4Addr::LOCALHOST.into());
    }
    end(&mut child);
    let text = reader.join().unwrap();
    assert!(text.len() > 10 << 20, "{} bytes could have waited", text.len());
    let events = parse(&text);
    let stopped = events.last().unwrap();
    assert_eq!((&stopped["lost"]["stdout"], &stopped["lost"]["ring"]), (&0.into(), &0.into()), "{stopped}");
    assert_eq!(stopped["made"], events.len());
    let is_ours = |event: &&Value| event["event"] == "closed" && event["netns"] == net.inode;
    assert_eq!(events.iter().filter(is_ours).count(), MADE);
}

#[test]
fn a_reader_that_stays_frozen_does_not_keep_a_run_from_ending() {
    let net = Net::private();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut child = start(&log, Stdio::piped());
    // More than the pipe holds.
    talk_until(&log, net, 200 << 10);
    end(&mut child);
    let in_log = parse(&fs::read_to_string(&log).unwrap());
    let stopped = in_log.last().unwrap();
    assert_eq!(stopped["event"], "stopped");
    assert_eq!((&stopped["lost"]["log"], &stopped["made"]), (&0.into(), &in_log.len().into()));
    // This is a lower bound by what the pipe took.
    assert!(stopped["lost"]["stdout"].as_u64().unwrap() > 10, "{stopped}");
}

#[test]
fn a_reader_that_has_gone_ends_the_run_in_order() {
    let net = Net::private();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut child = start(&log, Stdio::piped());
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("started"), "{line}");
    talk_to_self(Ipv4Addr::LOCALHOST.into());
    assert_eq!(child.wait().unwrap().code(), Some(0), "a broken pipe is not an error");
    let in_log = parse(&fs::read_to_string(&log).unwrap());
    let stopped = in_log.last().unwrap();
    assert_eq!(stopped["event"], "stopped");
    assert_eq!(stopped["made"], in_log.len());
    let _ = net;
}

#[test]
fn a_file_as_stdout_has_every_line() {
    let net = Net::private();
    let folder = tempfile::tempdir().unwrap();
    let (log, out) = (folder.path().join("events.jsonl"), folder.path().join("out"));
    let mut child = start(&log, File::create(&out).unwrap());
    talk_until(&log, net, 100 << 10);
    end(&mut child);
    assert_eq!(fs::read_to_string(&out).unwrap(), fs::read_to_string(&log).unwrap());
}

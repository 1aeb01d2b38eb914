//! A slow, stopped or absent reader of stdout or stderr must not affect the log.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::Ipv4Addr,
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc::Receiver,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::metrics::{self, free_port};
use crate::support::{
    accounting::{missing_events, parse_log},
    client::{become_user, connect_to_self, run_self_connection},
    daemon::{DEADLINE, selfconn},
    dedicated::time_limit,
    guard::{is_refused_within, wait_until},
    helper_process::HelperProcess,
    netns::TestNetns,
    nobody::Nobody,
};

fn start(log: &Path, stdout: impl Into<Stdio>) -> Child {
    start_with(log, &["--states"], stdout, Stdio::null())
}

fn start_with(log: &Path, options: &[&str], stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> Child {
    let mut command = Command::new(selfconn());
    command.args(["run", "--json", "--log"]).arg(log).args(options).stdout(stdout).stderr(stderr);
    let child = command.stdin(Stdio::null()).spawn().unwrap();
    let until = Instant::now() + DEADLINE;
    while !fs::read_to_string(log).is_ok_and(|text| text.contains("started")) {
        assert!(Instant::now() < until, "the daemon did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

/// Waits until the log has this many closed self-connections of this namespace. Returns the length of the
/// log.
fn wait_for_closed(log: &Path, net: TestNetns, count: usize) -> usize {
    let until = Instant::now() + DEADLINE;
    loop {
        let text = fs::read_to_string(log).unwrap_or_default();
        let netns_field = format!("\"netns\":{},", net.inode);
        let is_ours = |line: &&str| line.contains("\"event\":\"closed\"") && line.contains(&netns_field);
        let seen = text.lines().filter(is_ours).count();
        if seen >= count {
            return text.len();
        }
        assert!(Instant::now() < until, "{seen} of {count} are in the log");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Makes self-connections until the log is this long. Returns how many.
fn fill_log_to(log: &Path, net: TestNetns, bytes: usize) -> usize {
    let mut count = 0;
    loop {
        for _ in 0..100 {
            run_self_connection(Ipv4Addr::LOCALHOST.into());
        }
        count += 100;
        if wait_for_closed(log, net, count) > bytes {
            return count;
        }
    }
}

fn terminate(child: &mut Child) {
    kill_process(Pid::from_child(child), Signal::TERM).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_stopped_reader_blocks_nothing_and_gets_a_lost_event_when_it_reads_again() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut child = start(&log, Stdio::piped());
    let stdout = child.stdout.take().unwrap();
    // More than the queue of the daemon and the pipe hold.
    fill_log_to(&log, net, 9 << 20);
    let (lines, received) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            let line = line.unwrap();
            lines.send(serde_json::from_str::<Value>(&line).unwrap()).unwrap();
        }
    });
    let mut events = Vec::new();
    while !events.last().is_some_and(|event: &Value| event["event"] == "lost" && event["where"] == "stdout") {
        events.push(received.recv_timeout(DEADLINE).expect("a lost event"));
    }
    let reported = events.last().unwrap()["count"].as_u64().unwrap();
    assert!(reported > 0);
    terminate(&mut child);
    events.extend(received.iter());
    let in_log = parse_log(&fs::read_to_string(&log).unwrap());
    let stopped = events.last().unwrap();
    assert_eq!(in_log.last(), Some(stopped), "both end with `stopped`");
    assert_eq!(stopped["lost"]["log"], 0);
    assert_eq!(stopped["made"], in_log.len());
    assert_eq!(stopped["lost"]["stdout"], reported);
    assert_eq!(
        stopped["made"],
        events.len() as u64 + reported,
        "received plus reported as lost is everything"
    );
    assert_eq!((missing_events(&in_log), missing_events(&events)), (0, reported), "each lost event is a gap");
}

/// How long a process has run.
fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // In clock ticks, of which the kernel has 100 a second for user space on every architecture here.
    let ticks = |field: usize| stat.split(' ').nth(field).unwrap().parse::<u64>().unwrap();
    Duration::from_millis(10 * (ticks(13) + ticks(14)))
}

/// Reads this many bytes at once, rests for 5 ms, and so on. It says when it has read something, and rests no longer
/// when nobody listens.
fn read_slowly(mut stdout: ChildStdout, bytes: usize) -> (JoinHandle<String>, Receiver<()>) {
    let (started, is_live) = std::sync::mpsc::channel();
    let read = move || {
        let (mut text, mut chunk) = (Vec::new(), vec![0; bytes]);
        loop {
            let count = stdout.read(&mut chunk).unwrap();
            text.extend_from_slice(&chunk[..count]);
            let is_slow = started.send(()).is_ok();
            if count == 0 {
                return String::from_utf8(text).unwrap();
            }
            if is_slow {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    };
    (std::thread::spawn(read), is_live)
}

/// A daemon without a log, whose events and records may be many.
fn start_without_log(options: &[&str]) -> Child {
    let mut command = Command::new(selfconn());
    command.args(["run", "--json", "--states", "--ring-size", "32M"]).args(options).stdin(Stdio::null());
    command.stderr(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
}

/// Asserts that a run that wrote more than the queues hold wrote every event, and this many closed self-connections.
fn assert_nothing_lost(text: &str, net: TestNetns, closed: usize) {
    assert!(text.len() > 10 << 20, "{} bytes fit into the queues", text.len());
    let events = parse_log(text);
    let stopped = events.last().unwrap();
    assert_eq!((&stopped["lost"]["stdout"], &stopped["lost"]["ring"]), (&0.into(), &0.into()), "{stopped}");
    assert_eq!(stopped["made"], events.len());
    let is_ours = |event: &&Value| event["event"] == "closed" && event["netns"] == net.inode;
    assert_eq!(events.iter().filter(is_ours).count(), closed);
}

#[test]
fn a_slow_reader_without_a_log_loses_nothing() {
    let net = TestNetns::enter_new();
    let mut child = start_without_log(&[]);
    // Longer than it takes to produce as much.
    let (reader, is_live) = read_slowly(child.stdout.take().unwrap(), 32 << 10);
    is_live.recv_timeout(DEADLINE).unwrap();
    const COUNT: usize = 3_000;
    for _ in 0..COUNT {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
    }
    terminate(&mut child);
    let text = reader.join().unwrap();
    assert_nothing_lost(&text, net, COUNT);
}

/// A program whose path takes 22 KB in an event. Returns the path.
fn program_with_a_long_path(folder: &Path) -> PathBuf {
    let mut path = folder.to_owned();
    path.extend(std::iter::repeat_n("\u{1}".repeat(250), 15));
    fs::create_dir_all(&path).unwrap();
    path.push("program");
    let own = std::env::current_exe().unwrap();
    if fs::hard_link(&own, &path).is_err() {
        fs::copy(&own, &path).unwrap();
    }
    path
}

#[test]
fn many_long_events_at_once_are_not_lost_without_a_log() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let program = program_with_a_long_path(folder.path());
    let mut child = start_without_log(&[]);
    let (lines, events) = std::sync::mpsc::channel();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let reader = std::thread::spawn(move || {
        stdout.lines().map_while(Result::ok).for_each(|line| lines.send(line + "\n").unwrap());
    });
    let mut text = events.recv_timeout(DEADLINE).unwrap();
    let mut process = HelperProcess::start_program(&program, "connect once, and then often");
    assert_eq!(process.read_output(), "connected");
    let is_known = format!("\"pid\":{},", process.pid());
    while !text.contains(&is_known) {
        text += &events.recv_timeout(DEADLINE).unwrap();
    }
    // The process is known for a moment, and all records are in one batch.
    let pids = [child.id(), process.pid()].map(|pid| Pid::from_raw(pid.cast_signed()).unwrap());
    kill_process(pids[0], Signal::STOP).unwrap();
    let stat = || fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
    wait_until(DEADLINE, "it does not stop", || stat().rsplit(") ").next().unwrap().starts_with('T'));
    kill_process(pids[1], Signal::CONT).unwrap();
    assert_eq!(process.read_output(), "connected often");
    kill_process(pids[0], Signal::CONT).unwrap();
    process.finish();
    terminate(&mut child);
    reader.join().unwrap();
    text.extend(events.try_iter());
    assert_nothing_lost(&text, net, 151);
}

#[test]
fn a_slow_reader_delays_no_event_of_a_new_process_in_the_log() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut child = start(&log, Stdio::piped());
    let (reader, is_live) = read_slowly(child.stdout.take().unwrap(), 1 << 10);
    is_live.recv_timeout(DEADLINE).unwrap();
    // More than stdout's queue has room for.
    fill_log_to(&log, net, 6 << 20);
    // Its events wait for a look-up, and could then wait for stdout.
    let mut process = HelperProcess::start("connect");
    process.read_output();
    let field = format!("\"pid\":{},", process.pid());
    let is_in_log = || fs::read_to_string(&log).unwrap().contains(&field);
    wait_until(Duration::from_millis(500), "the log waits for the reader of stdout", is_in_log);
    process.finish();
    drop(is_live);
    terminate(&mut child);
    let events = parse_log(&reader.join().unwrap());
    assert!(events.last().unwrap()["lost"]["stdout"].as_u64().unwrap() > 0, "stdout's queue was not full");
}

#[test]
fn a_slow_reader_delays_no_guard_of_a_new_namespace() {
    let net = TestNetns::enter_new();
    // Only a user that nobody else has, because the daemon guards every namespace of the host.
    const USER: u32 = 31_998;
    let mut child = start_without_log(&["--guard", "refuse", "--guard-only", "uid=31998"]);
    let (reader, is_live) = read_slowly(child.stdout.take().unwrap(), 1 << 10);
    is_live.recv_timeout(DEADLINE).unwrap();
    // Some 8 MiB of events, for which this reader takes forty seconds.
    for _ in 0..1_500 {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
    }
    let inside = std::thread::spawn(|| {
        TestNetns::enter_new_in_helper();
        become_user(USER);
        // The first one is how the daemon learns of the namespace.
        drop(connect_to_self(Ipv4Addr::LOCALHOST.into()));
        // An attachment by clsact loses packets.
        let is_guarded = || is_refused_within(Ipv4Addr::LOCALHOST.into(), Duration::from_millis(20));
        wait_until(Duration::from_secs(1), "the namespace waits for the reader", is_guarded);
    });
    inside.join().unwrap();
    drop(is_live);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    let events = parse_log(&reader.join().unwrap());
    assert!(
        events.iter().any(|event| event["event"] == "prevented" && event["uid"] == USER),
        "no `prevented`"
    );
    assert!(events.iter().any(|event| event["event"] == "closed" && event["netns"] == net.inode));
}

#[test]
fn a_slow_reader_delays_no_scrape() {
    let net = TestNetns::enter_new();
    let at = free_port();
    let mut child = start_without_log(&["--metrics", &at.to_string()]);
    let (reader, is_live) = read_slowly(child.stdout.take().unwrap(), 1 << 10);
    is_live.recv_timeout(DEADLINE).unwrap();
    for _ in 0..1_500 {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
    }
    const COUNT: u32 = 10;
    let scrape = |_| {
        // A response is used again for 200 ms.
        std::thread::sleep(Duration::from_millis(250));
        let begin = Instant::now();
        assert_eq!(metrics::get(at, "/metrics").unwrap().0, 200);
        begin.elapsed()
    };
    let (cpu, begin) = (cpu_time(child.id()), Instant::now());
    let mut times: Vec<_> = (0..COUNT).map(scrape).collect();
    let (cpu, elapsed) = (cpu_time(child.id()) - cpu, begin.elapsed());
    assert!(cpu < elapsed / 4, "waiting took {cpu:?} of a processor in {elapsed:?}");
    times.sort();
    // A loop that waits for room in the queue lets a scrape wait for up to 100 ms.
    let median = times[times.len() / 2];
    assert!(median < Duration::from_millis(25), "{times:?}");
    drop(is_live);
    terminate(&mut child);
    let events = parse_log(&reader.join().unwrap());
    assert!(events.iter().any(|event| event["event"] == "closed" && event["netns"] == net.inode));
}

#[test]
fn a_reader_that_stays_stopped_does_not_prevent_the_run_from_ending() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut child = start(&log, Stdio::piped());
    // More than the pipe holds.
    fill_log_to(&log, net, 200 << 10);
    terminate(&mut child);
    let in_log = parse_log(&fs::read_to_string(&log).unwrap());
    let stopped = in_log.last().unwrap();
    assert_eq!(stopped["event"], "stopped");
    assert_eq!((&stopped["lost"]["log"], &stopped["made"]), (&0.into(), &in_log.len().into()));
    // A lower bound, because the pipe has taken an unknown number.
    assert!(stopped["lost"]["stdout"].as_u64().unwrap() > 10, "{stopped}");
}

#[test]
fn a_frozen_reader_without_a_log_does_not_prevent_the_run_from_ending() {
    let net = TestNetns::enter_new();
    let mut child = start_without_log(&[]);
    let mut stdout = child.stdout.take().unwrap();
    // The first event. What follows is more than the pipe and a quarter of the queue hold.
    stdout.read_exact(&mut [0]).unwrap();
    for _ in 0..2_000 {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
    }
    let asked = Instant::now();
    terminate(&mut child);
    // Half a second without progress, and what there is to do.
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?} in {}", asked.elapsed(), net.inode);
    drop(stdout);
}

/// As `2>&1 | less` leaves it, or a service manager that hangs.
#[test]
fn a_reader_of_stderr_that_does_not_read_blocks_nothing() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let (reader, writer) = io::pipe().unwrap();
    let of_test = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let mut of_test = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(of_test).unwrap();
    let mut daemon = start_with(&log, &[], Stdio::null(), writer);
    while of_test.write(b"x").is_ok() {}
    // The loop has a line about each process that hangs.
    let Some(mut hung) = Nobody::hung() else { return terminate(&mut daemon) };
    hung.wait();
    for count in 1..=10 {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
        let began = Instant::now();
        wait_for_closed(&log, net, count);
        assert!(began.elapsed() < time_limit(Duration::from_millis(300), Duration::from_secs(2)));
        std::thread::sleep(Duration::from_millis(100));
    }
    let began = Instant::now();
    terminate(&mut daemon);
    assert!(began.elapsed() < time_limit(Duration::from_secs(1), Duration::from_secs(5)));
    drop((of_test, reader));
}

#[test]
fn a_closed_stdout_ends_the_run_in_order() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut child = start(&log, Stdio::piped());
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("started"), "{line}");
    run_self_connection(Ipv4Addr::LOCALHOST.into());
    assert_eq!(child.wait().unwrap().code(), Some(0), "a broken pipe is not an error");
    let in_log = parse_log(&fs::read_to_string(&log).unwrap());
    let stopped = in_log.last().unwrap();
    assert_eq!(stopped["event"], "stopped");
    assert_eq!(stopped["made"], in_log.len());
    let _ = net;
}

#[test]
fn a_regular_file_as_stdout_gets_every_line() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let (log, out) = (folder.path().join("events.jsonl"), folder.path().join("out"));
    let mut child = start(&log, File::create(&out).unwrap());
    fill_log_to(&log, net, 100 << 10);
    terminate(&mut child);
    assert_eq!(fs::read_to_string(&out).unwrap(), fs::read_to_string(&log).unwrap());
}

//! The budget of the daemon's memory: a storm of connections that never close is followed up to its owner's share, and
//! counted beyond, also if a snapshot finds it; the memory stays below the budget, also of one that closes, and another
//! owner is reported as ever. A look at a port keeps none of the sockets there.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{
    accounting::assert_sums_hold,
    client::connect_to_self,
    daemon::{DEADLINE, HookVariant, TestDaemon, doctor, is_event, scaled},
    helper_process::{HelperProcess, UNPRIVILEGED},
    netns::TestNetns,
    refused_connects::{at, connect_refused, enter_wide_range_netns, is_at_risk},
};

/// The daemon follows 14,336 self-connections, at most three quarters of them of one owner.
const SHARE: usize = 14_336 * 3 / 4;

/// A snapshot lists 12,288 sockets, at most three quarters of them of one user.
const SNAPSHOT_SHARE: usize = 12_288 * 3 / 4;

/// What an owner has less because others have connections, too: some three for each of theirs.
const TOLERANCE: usize = 32;

/// What the storm has: some hundred more, of processes with 2,000 arguments each.
const PROCESSES: usize = 12;
const CONNECTIONS: usize = 12 * 950;

/// The memory of a process that no file is behind.
fn own_memory_bytes(pid: u32) -> usize {
    memory_bytes(pid, "RssAnon:")
}

fn memory_bytes(pid: u32, field: &str) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap_or_else(|| panic!("{value} is not a number"))).unwrap()
}

/// The events in a log that may be written meanwhile.
fn read_log(path: &Path) -> Vec<Value> {
    let lines = fs::read_to_string(path).unwrap();
    lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn established(events: &[Value], netns: u64, uid: u32) -> usize {
    events.iter().filter(|event| is_event("established", netns)(event) && event["uid"] == uid).count()
}

/// Asserts that what the storm has beyond its share is counted, and that the sums match.
fn assert_counted(events: &[Value], netns: u64, share: usize) {
    let stopped = events.last().unwrap();
    let untracked = number(&stopped["lost"]["untracked"]);
    assert_eq!(established(events, netns, UNPRIVILEGED) + untracked, CONNECTIONS, "{stopped}");
    assert!((share - TOLERANCE..=share).contains(&established(events, netns, UNPRIVILEGED)), "{stopped}");
    let is_untracked = |event: &&Value| event["event"] == "lost" && event["where"] == "untracked";
    let lost: Vec<_> = events.iter().filter(is_untracked).collect();
    assert_eq!(lost.iter().map(|event| number(&event["count"])).sum::<usize>(), untracked);
    for event in lost {
        assert_eq!((&event["kind"], &event["uid"]), (&"record".into(), &UNPRIVILEGED.into()), "{event}");
    }
    let closed = events.iter().filter(|event| event["event"] == "closed").count();
    let all = events.iter().filter(|event| event["event"] == "established").count();
    assert_eq!(all, closed + number(&stopped["open"]), "{stopped}");
    assert_eq!(number(&stopped["matched"]), number(&stopped["delivered"]), "{stopped}");
}

/// Runs a daemon beside the storm. `start_storm` is called when it observes.
fn run_daemon(net: &TestNetns, share: usize, start_storm: impl FnOnce()) {
    let budget = number(&doctor()["memory"]["budget_bytes"]);
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let options = ["--log", log.to_str().unwrap(), "--states", "--remedy", "dry-run", "--remedy-grace", "1h"];
    // The storm is counted exactly only if no record is lost.
    let options = [&options[..], &["--log-rate", "1000000", "--ring-size", "64M"]].concat();
    let daemon = TestDaemon::start(&HookVariant(vec![]), &options);
    start_storm();
    let (_victim, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let is_victim = |event: &Value| is_event("established", net.inode)(event) && event["port"] == port;
    // The events that the snapshot finds come in portions.
    let until = Instant::now() + DEADLINE;
    let events = || read_log(&log);
    loop {
        let events = events();
        if let Some(victim) = events.iter().find(|event| is_victim(event))
            && established(&events, net.inode, UNPRIVILEGED) >= share - TOLERANCE
        {
            assert!(victim["uid"] == 0 && victim["exe"].is_string(), "{victim}");
            break;
        }
        assert!(Instant::now() < until, "{} events", events.len());
        thread::sleep(Duration::from_millis(200));
    }
    let used = own_memory_bytes(daemon.pid());
    println!("RssAnon beside {CONNECTIONS} open connections: {} KiB", used >> 10);
    assert!(used < budget, "{used} of {budget}");
    daemon.stop();
    assert_counted(&events(), net.inode, share);
}

#[test]
fn a_storm_that_never_closes_stays_within_the_budget_and_is_counted_and_another_owner_is_named() {
    let net = TestNetns::enter_new();
    let arguments = vec!["a"; 2_000];
    let task = format!("connect and hold {}", CONNECTIONS / PROCESSES);
    let mut storm = Vec::new();
    run_daemon(&net, SHARE, || {
        for _ in 0..PROCESSES {
            let mut process = HelperProcess::start_unprivileged_with(&task, None, &arguments);
            process.read_output();
            storm.push(process);
        }
    });
    // The next daemon finds them.
    run_daemon(&net, SNAPSHOT_SHARE, || {});
    storm.into_iter().for_each(HelperProcess::finish);
}

/// Each close leaves a TIME_WAIT, which explains failed binds and keeps facts of its process. Most records are lost, so
/// that snapshots find the connections, and notice that they are closed.
#[test]
fn a_storm_that_closes_while_records_are_lost_stays_within_the_budget() {
    const PROCESSES: usize = 8;
    let each = scaled(900);
    let all = PROCESSES * each;
    let net = TestNetns::enter_new();
    let budget = number(&doctor()["memory"]["budget_bytes"]);
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    // All that is ever kept of a command line.
    let options = ["--log", log.to_str().unwrap(), "--cmdline", "full", "--log-rate", "1000000"];
    let options = [&options[..], &["--ring-size", "4K", "--reconcile", "1"]].concat();
    let daemon = TestDaemon::start(&HookVariant(vec![]), &options);
    // The daemon finds namespaces through their processes.
    let mut netns_process = HelperProcess::start("wait");
    netns_process.read_output();
    let arguments = vec!["a"; 2_000];
    let task = format!("connect and close {each}");
    let mut used = 0;
    let mut storm = Vec::new();
    for number in 0..PROCESSES {
        // A stopped daemon drains no ring buffer. One page holds about twenty records.
        if number == 0 {
            daemon.signal(Signal::STOP);
        }
        let mut process = HelperProcess::start_unprivileged_with(&task, None, &arguments);
        process.read_output();
        daemon.signal(Signal::CONT);
        // A snapshot or two find what is open now.
        thread::sleep(Duration::from_secs(2));
        used = used.max(own_memory_bytes(daemon.pid()));
        storm.push(process);
    }
    storm.into_iter().for_each(HelperProcess::finish);
    let time_waits = time_waits();
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(300));
        used = used.max(own_memory_bytes(daemon.pid()));
    }
    println!("FACT rss_anon_kib={} time_waits={time_waits}", used >> 10);
    assert!(time_waits >= all * 9 / 10, "{time_waits}");
    assert!(used < budget, "{used} of {budget}");
    daemon.stop();
    netns_process.finish();
    let events = read_log(&log);
    let stopped = events.last().unwrap();
    assert_sums_hold(stopped);
    assert!(number(&stopped["lost"]["ring"]) > 0, "no record was lost: {stopped}");
    let established = established(&events, net.inode, UNPRIVILEGED);
    let closed = events.iter().filter(|event| is_event("closed", net.inode)(event)).count();
    println!("FACT established={established} closed={closed} of {all}");
    assert!(established > all / 2, "{stopped}");
    assert_eq!(established, closed + number(&stopped["open"]), "{stopped}");
}

#[test]
fn a_few_connections_lose_nothing() {
    let net = TestNetns::enter_new();
    let daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let mut client = HelperProcess::start_unprivileged("connect and hold 50", None);
    client.read_output();
    client.finish();
    let (events, _) = daemon.stop();
    assert_eq!(established(&events, net.inode, UNPRIVILEGED), 50);
    let losses = events.last().unwrap()["lost"].as_object().unwrap();
    assert!(losses.values().all(|count| *count == 0), "{losses:?}");
    assert!(!events.iter().any(|event| event["event"] == "lost"), "{events:?}");
}

/// Leaves entries in TIME_WAIT at a local port, whose server is gone then.
fn leave_time_waits(port: u16, count: usize) {
    /// Few connections between the same two addresses, so that none takes the ports of an earlier one.
    const OF_AN_ADDRESS: usize = 2_000;
    let server = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
    for number in 0..count {
        let address = Ipv4Addr::new(127, 0, 0, u8::try_from(1 + number / OF_AN_ADDRESS).unwrap());
        let client = TcpStream::connect((address, port)).unwrap();
        // The end that closes first has the TIME_WAIT.
        drop(server.accept().unwrap());
        drop(client);
    }
}

/// Number of entries in TIME_WAIT in the network namespace of the calling thread.
fn time_waits() -> usize {
    let text = fs::read_to_string("/proc/thread-self/net/sockstat").unwrap();
    let mut words = text.lines().find_map(|line| line.strip_prefix("TCP:")).unwrap().split_whitespace();
    words.by_ref().find(|word| *word == "tw").unwrap();
    words.next().unwrap().parse().unwrap()
}

#[test]
fn a_look_at_a_port_with_many_time_waits_takes_no_memory() {
    const PORT: u16 = 40_060;
    const OTHER_PORT: u16 = 40_062;
    // 50,000 rows of the socket table would take more.
    const MAX_GROWTH: usize = 4 << 20;
    let net = enter_wide_range_netns();
    net.set_sysctl("tcp_max_tw_buckets", "262144");
    let count = scaled(50_000);
    let begin = Instant::now();
    leave_time_waits(PORT, count);
    let left_after = begin.elapsed();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    // What the first look needs, the second has.
    connect_refused(at(OTHER_PORT), 20);
    daemon.expect(1, is_at_risk(OTHER_PORT, net));
    // Peaks count from here on (`clear_refs_write`, fs/proc/task_mmu.c at v5.10).
    fs::write(format!("/proc/{}/clear_refs", daemon.pid()), "5").unwrap();
    let before = memory_bytes(daemon.pid(), "VmHWM:");
    connect_refused(at(PORT), 20);
    let at_risk = daemon.expect(1, is_at_risk(PORT, net)).remove(0);
    assert_eq!(at_risk["may_be_bound"], true, "the look saw them: {at_risk}");
    let growth = memory_bytes(daemon.pid(), "VmHWM:").saturating_sub(before);
    let left = time_waits();
    println!("FACT time_waits={left} seconds={} growth_kib={}", left_after.as_secs(), growth >> 10);
    assert!(left >= count * 9 / 10, "{left} of {count} after {:?}", begin.elapsed());
    assert!(growth < MAX_GROWTH, "{growth} bytes for {left} entries");
    daemon.stop();
}

//! The log's shares: a storm of one user is suppressed and counted, and takes nothing from others; a command line of
//! any length makes a short line.

use std::{collections::HashSet, fs, net::Ipv4Addr};

use serde_json::Value;

use crate::support::{
    accounting::{missing_events, parse_log},
    client::connect_to_self,
    daemon::{HookVariant, TestDaemon, is_event, scaled},
    helper_process::{HelperProcess, UNPRIVILEGED},
    netns::TestNetns,
};

/// Connections of the other user.
const VICTIMS: usize = 20;

/// Runs a storm and then the victim's connections. Returns the storm's size, the events of the namespace in the
/// log, the `lost` events of suppressed ones, and `stopped`.
fn run_storm(options: &[&str]) -> (usize, Vec<Value>, Vec<Value>, Value) {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let options = [&["--log", log.to_str().unwrap()], options].concat();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &options);
    let count = scaled(3_000).max(500);
    let mut storm = HelperProcess::start_unprivileged(&format!("connect storm {count}"), None);
    storm.read_output();
    for _ in 0..VICTIMS {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
    daemon.expect(VICTIMS, |event| is_event("closed", net.inode)(event) && event["uid"] == 0);
    storm.finish();
    let (events, _) = daemon.stop();
    let lines = fs::read_to_string(log).unwrap();
    let logged = parse_log(&lines);
    let stopped = events.last().unwrap().clone();
    assert_eq!(
        missing_events(&logged),
        number(&stopped["lost"]["suppressed"]),
        "each suppressed event is a gap"
    );
    let lost = logged.iter().filter(|event| event["event"] == "lost" && event["where"] == "suppressed");
    let lost = lost.cloned().collect();
    let here = logged.into_iter().filter(|event| event["netns"] == net.inode).collect();
    (count, here, lost, stopped)
}

fn ids(events: &[Value], kind: &str, uid: u32) -> HashSet<String> {
    let is_match = |event: &&Value| event["event"] == kind && event["uid"] == uid;
    events.iter().filter(is_match).map(|event| event["id"].as_str().unwrap().to_owned()).collect()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a number"))
}

#[test]
fn a_storm_of_one_user_is_suppressed_and_counted_and_another_user_loses_nothing() {
    let (count, events, lost, stopped) = run_storm(&["--log-rate", "20"]);
    let suppressed = number(&stopped["lost"]["suppressed"]);
    assert_eq!(
        number(&stopped["made"]),
        number(&stopped["written"]) + number(&stopped["lost"]["log"]) + suppressed,
        "{stopped}"
    );
    // A burst of ten seconds is admitted; the storm itself may last as long.
    let storm = ids(&events, "established", UNPRIVILEGED);
    println!("{} of {count} connections in the log, {suppressed} events suppressed", storm.len());
    assert!(storm.len() >= 100 && storm.len() < count, "{} of {count}", storm.len());
    assert_eq!(suppressed, 2 * (count - storm.len()) as u64, "whole connections: {stopped}");
    assert_eq!(storm, ids(&events, "closed", UNPRIVILEGED));
    for kind in ["established", "closed"] {
        assert_eq!(ids(&events, kind, 0).len(), VICTIMS, "{kind} of the victim");
    }
    assert!(!lost.is_empty());
    assert_eq!(lost.iter().map(|event| number(&event["count"])).sum::<u64>(), suppressed);
    for event in &lost {
        assert_eq!((&event["kind"], &event["uid"]), (&"event".into(), &UNPRIVILEGED.into()), "{event}");
        assert!(event["program"].as_str().is_some_and(|program| program.contains("live")), "{event}");
        assert!(number(&event["first_port"]) <= number(&event["last_port"]), "{event}");
    }
}

/// The negative twin.
#[test]
fn a_storm_within_the_rate_is_not_suppressed() {
    let (count, events, lost, stopped) = run_storm(&[]);
    assert_eq!((number(&stopped["lost"]["suppressed"]), lost.len()), (0, 0), "{stopped}");
    assert_eq!(ids(&events, "closed", UNPRIVILEGED).len(), count);
}

#[test]
fn a_command_line_of_any_length_makes_a_short_line() {
    let net = TestNetns::enter_new();
    for (limit, max_bytes, has_arguments) in [
        ("1024", 1_024, true),
        ("64", 64, true),
        ("name", 1_024, true),
        ("off", 4, false),
        ("full", 24_600, true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("events.jsonl");
        let mut daemon =
            TestDaemon::start(&HookVariant(vec![]), &["--log", log.to_str().unwrap(), "--cmdline", limit]);
        let is_of =
            |pid: u32| move |event: &Value| is_event("established", net.inode)(event) && event["pid"] == pid;
        for argument in ["a", "\u{1}"] {
            let arguments = vec![argument; 2_040];
            let mut client = HelperProcess::start_unprivileged_with("connect", None, &arguments);
            client.read_output();
            let event = daemon.expect(1, is_of(client.pid())).remove(0);
            assert_eq!(event["cmdline"].is_array(), has_arguments, "{limit}: {event}");
            let encoded = event["cmdline"].to_string().len();
            assert!(encoded <= max_bytes, "{limit}: {encoded} bytes");
            // 2,040 arguments of one byte, with their ends, are some 4,080 bytes beside the helper's own.
            assert_eq!(event["cmdline_truncated"], true, "{limit}: {event}");
            client.finish();
        }
        let mut client = HelperProcess::start_unprivileged("connect", None);
        client.read_output();
        let event = daemon.expect(1, is_of(client.pid())).remove(0);
        assert_eq!(event["cmdline_truncated"], ["64", "name", "off"].contains(&limit), "{limit}: {event}");
        client.finish();
        daemon.stop();
        let longest = fs::read_to_string(&log).unwrap().lines().map(str::len).max().unwrap();
        println!("--cmdline {limit}: the longest line has {longest} bytes");
        assert!(longest < max_bytes + 2_048, "{limit}: {longest}");
    }
}

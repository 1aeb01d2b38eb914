//! What each event says about where it is from, so that the events of many hosts can be in one store.

use std::{collections::HashSet, fs, net::Ipv4Addr, process::Command};

use serde_json::Value;

use crate::support::{
    accounting::{make_self_connections, missing_events, parse_log},
    client::run_self_connection,
    daemon::{HookVariant, TestDaemon, is_event, selfconn},
    netns::TestNetns,
};

/// The number of an event in a store: no other event has it.
fn key(event: &Value) -> (String, String, u64) {
    let text = |name: &str| event[name].as_str().unwrap_or_else(|| panic!("{name} in {event}")).to_owned();
    (text("boot_id"), text("run"), event["seq"].as_u64().unwrap())
}

#[test]
fn two_daemons_and_a_restart_make_no_key_twice_and_the_log_has_what_stdout_has() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = |name: &str| folder.path().join(name);
    let (mut keys, mut ids, mut events_seen) = (HashSet::new(), HashSet::new(), 0);
    let mut finish = |mut daemon: TestDaemon, name: &str| {
        daemon.expect(20, is_event("closed", net.inode));
        let (events, _) = daemon.stop();
        assert_eq!(parse_log(&fs::read_to_string(log(name)).unwrap()), events);
        assert_eq!(missing_events(&events), 0);
        events_seen += events.len();
        keys.extend(events.iter().map(key));
        let closed = events.iter().filter(|event| is_event("closed", net.inode)(event));
        ids.extend(closed.map(|event| event["id"].as_str().unwrap().to_owned()));
        events
    };
    let start = |name: &str| {
        let path = log(name);
        TestDaemon::start(&HookVariant(vec![]), &["--host-name", name, "--log", path.to_str().unwrap()])
    };
    let (one, other) = (start("one"), start("other"));
    make_self_connections(20);
    let of_one = finish(one, "one");
    finish(other, "other");
    let again = start("again");
    make_self_connections(20);
    let of_again = finish(again, "again");
    assert_eq!(keys.len(), events_seen);
    assert_eq!(ids.len(), 60, "each daemon gives a connection an id of its own");
    for (events, name) in [(&of_one, "one"), (&of_again, "again")] {
        assert!(events.iter().all(|event| event["host"] == name && event["schema"] == "selfconn/1"));
    }
    assert_ne!(of_one[0]["run"], of_again[0]["run"]);
    assert_eq!(
        (&of_one[0]["boot_id"], &of_one[0]["machine_id"]),
        (&of_again[0]["boot_id"], &of_again[0]["machine_id"])
    );
    let id = of_one[0]["boot_id"].as_str().unwrap();
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().replace('-', "");
    assert_eq!(id, boot_id);
}

#[test]
fn the_node_of_a_pod_is_the_host_and_the_option_wins() {
    let _net = TestNetns::enter_new();
    let host = |node: Option<&str>, options: &[&str]| {
        let daemon = TestDaemon::start_with(&HookVariant(vec![]), options, |command| {
            command.env_remove("NODE_NAME").envs(node.map(|node| ("NODE_NAME", node))).spawn().unwrap()
        });
        let host = daemon.received()[0]["host"].clone();
        daemon.stop();
        host
    };
    let nodename = rustix::system::uname().nodename().to_string_lossy().into_owned();
    assert_eq!(host(None, &[]), nodename);
    assert_eq!(host(Some(""), &[]), nodename);
    assert_eq!(host(Some("no host\u{1b}"), &[]), nodename);
    assert_eq!(host(Some("node-7"), &[]), "node-7");
    assert_eq!(host(Some("node-7"), &["--host-name", "web-1.example"]), "web-1.example");
}

#[test]
fn text_does_not_repeat_where_it_is_from() {
    let _net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    let mut daemon =
        TestDaemon::start(&HookVariant(vec![]), &["--host-name", "far-away", "--log", log.to_str().unwrap()]);
    run_self_connection(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, |event| event["event"] == "closed");
    daemon.stop();
    let text = Command::new(selfconn()).arg("tail").arg(&log).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("closed") && !text.contains("far-away"), "{text}");
}

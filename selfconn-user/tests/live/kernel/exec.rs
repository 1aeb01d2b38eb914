//! `selfconn exec`: whose self-connections are in the report of a command.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

use crate::support::{
    client::connect_to_self,
    daemon::selfconn,
    guard::connect_itself,
    helper_process::{HelperProcess, command_below},
    netns::TestNetns,
    schema::parse_line,
};

const LOCALHOST: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// Runs a task of a helper process as the command, and returns its output and the events of the report.
fn exec(options: &[&str], task: &str) -> (Output, Vec<Value>) {
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("report");
    let mut runner = Command::new(selfconn());
    runner.args(["exec", "--json", "--report"]).arg(&report).args(options).arg("--").stdin(Stdio::null());
    let output = command_below(runner, task).output().unwrap();
    (output, events_in(&report))
}

fn events_in(report: &Path) -> Vec<Value> {
    fs::read_to_string(report).unwrap().lines().map(|line| parse_line("events", line)).collect()
}

fn count(events: &[Value], name: &str) -> usize {
    events.iter().filter(|event| event["event"] == name).count()
}

fn can_make_group() -> bool {
    let group = selfconn::system::cgroup::own_group();
    let is_writable = group.is_ok_and(|group| {
        let test = group.directory.join("selfconn-test");
        fs::create_dir(&test).and_then(|()| fs::remove_dir(&test)).is_ok()
    });
    if !is_writable {
        println!("skipped: no control group can be made here");
    }
    is_writable
}

#[test]
fn a_command_is_reported_and_its_neighbour_is_not() {
    let net = TestNetns::enter_new();
    if !can_make_group() {
        return;
    }
    let before = connect_to_self(LOCALHOST);
    let mut neighbour = HelperProcess::start("connect again and again");
    neighbour.read_output();
    let (output, events) = exec(&["--fail"], "connect storm 3");
    neighbour.finish();
    drop(before);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("helper: done"), "{output:?}");
    assert_eq!((count(&events, "established"), count(&events, "closed")), (3, 3), "{events:#?}");
    for event in events.iter().filter(|event| event["event"] == "established") {
        assert_eq!((&event["netns"], &event["refused_before"]), (&net.inode.into(), &0.into()), "{event}");
        assert_eq!(event["pid"], events[1]["pid"], "{event}");
    }
    let lost = events.last().unwrap()["lost"].as_object().unwrap();
    assert!(lost.iter().all(|(_, count)| count == 0), "{lost:?}");
    assert_no_group_is_left();
}

#[test]
fn a_grandchild_whose_parents_have_ended_is_of_the_command() {
    TestNetns::enter_new();
    for options in [&["--process-tree"][..], &[]] {
        if options.is_empty() && !can_make_group() {
            return;
        }
        let (output, events) = exec(options, "connect by an orphan");
        assert!(output.status.success(), "{output:?}");
        assert_eq!(count(&events, "established"), 1, "{options:?}: {events:#?}");
        // The neighbour of the tree, which has another parent.
        let mut neighbour = HelperProcess::start("connect again and again");
        neighbour.read_output();
        let (_, events) = exec(options, "connect storm 0");
        assert_eq!(count(&events, "established"), 0, "{options:?}: {events:#?}");
        neighbour.finish();
    }
}

#[test]
fn a_guarded_command_cannot_connect_to_itself_and_its_neighbour_can() {
    TestNetns::enter_new();
    if !can_make_group() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("report");
    for (mode, expected) in [("refuse", "refused"), ("dry-run", "connected")] {
        let mut runner = Command::new(selfconn());
        runner.args(["exec", "--guard", mode, "--json", "--report"]).arg(&report).arg("--");
        let mut guarded = HelperProcess::start_below(runner, "connect itself twice");
        assert_eq!([guarded.read_output(), guarded.read_output()], [expected, expected], "{mode}");
        assert!(connect_itself(LOCALHOST).is_connected, "the neighbour of {mode}");
        guarded.finish();
        let events = events_in(&report);
        let prevented = events.iter().filter(|event| event["event"] == "prevented");
        assert_eq!(
            prevented.filter_map(|event| event["count"].as_u64()).sum::<u64>(),
            2,
            "{mode}: {events:#?}"
        );
        let established = if mode == "refuse" { 0 } else { 2 };
        assert_eq!(count(&events, "established"), established, "{mode}: {events:#?}");
    }
    assert!(connect_itself(LOCALHOST).is_connected, "the guard is gone");
}

/// In the control group of this process.
fn assert_no_group_is_left() {
    let group = selfconn::system::cgroup::own_group().unwrap();
    let names = fs::read_dir(group.directory).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with("selfconn-exec-")).collect();
    assert!(left.is_empty(), "{left:?}");
}

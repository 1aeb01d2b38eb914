//! The end of the guard: what is left after it, what is reported until then, and a second daemon that goes on.

use std::{process::Command, thread, time::Duration};

use selfconn::system::rtnetlink;
use serde_json::Value;

use super::{LOOPBACK, is_refused};
use crate::support::{
    daemon::{is_event, selfconn},
    guard::{count_of, guard_methods, refusing, wait_until},
    netns::TestNetns,
};

/// What `doctor` says about the guard, as JSON.
fn doctor_check() -> Value {
    let doctor = Command::new(selfconn()).args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == "guard").unwrap().clone()
}

#[test]
fn a_killed_daemon_leaves_no_guard_or_one_that_doctor_shows_and_the_next_start_removes() {
    TestNetns::enter_new();
    let none = doctor_check();
    assert!(none["ok"] == true && none["finding"].as_str().unwrap().starts_with("none"), "{none}");
    for method in guard_methods() {
        let daemon = refusing(method, &[]);
        assert!(is_refused());
        let (found, pid) = (doctor_check(), daemon.pid());
        let finding = found["finding"].as_str().unwrap();
        assert!(found["ok"] == true && finding.contains("on lo") && finding.contains(method), "{found}");
        daemon.signal(rustix::process::Signal::KILL);
        drop(daemon);
        if *method == "tcx" {
            wait_until(Duration::from_secs(5), "the link outlives its daemon", || !is_refused());
            continue;
        }
        // A filter stays, and names its daemon.
        assert!(is_refused());
        let left = rtnetlink::filters(LOOPBACK).unwrap();
        assert_eq!(left.len(), 1, "{left:?}");
        let found = doctor_check();
        let finding = found["finding"].as_str().unwrap();
        assert!(found["ok"] == false && finding.contains(&format!("pid {pid} has ended")), "{found}");
        assert!(found["hint"].as_str().unwrap().contains("tc filter del dev lo egress pref 1"), "{found}");
        let daemon = refusing(method, &[]);
        let now = rtnetlink::filters(LOOPBACK).unwrap();
        assert_eq!(now.len(), 1, "{now:?}");
        assert_ne!(now[0].name, left[0].name, "the left-over filter is removed");
        assert!(is_refused());
        daemon.stop();
        assert!(rtnetlink::filters(LOOPBACK).unwrap().is_empty() && !is_refused());
    }
}

#[test]
fn nothing_of_the_guard_is_left_on_lo_after_its_end() {
    TestNetns::enter_new();
    for method in guard_methods() {
        let daemon = refusing(method, &[]);
        assert!(is_refused());
        daemon.stop();
        wait_until(Duration::from_secs(5), "it still refuses", || !is_refused());
        assert!(rtnetlink::add_clsact(LOOPBACK).unwrap(), "{method}: clsact was left");
        rtnetlink::remove_unused_clsact(LOOPBACK).unwrap();
    }
}

#[test]
fn a_second_daemon_says_that_the_first_one_guards_and_goes_on_when_that_one_ends() {
    let net = TestNetns::enter_new();
    for method in guard_methods() {
        let first = refusing(method, &[]);
        let second = refusing(method, &[]);
        let is_second = |events: &[Value]| events[0]["guard"]["is_second"].clone();
        assert_eq!(is_second(first.received()), false, "{method}");
        assert_eq!(is_second(second.received()), true, "{method}");
        assert!(is_refused());
        first.signal(rustix::process::Signal::TERM);
        let (code, events, _) = first.wait_for_exit();
        assert_eq!((code, count_of(&events)), (Some(0), 1), "{method}");
        wait_until(Duration::from_secs(1), "nobody refuses", is_refused);
        let (events, _) = second.stop();
        let prevented: Vec<_> =
            events.iter().filter(|event| is_event("prevented", net.inode)(event)).collect();
        assert_eq!(count_of(prevented), 1, "{method}: the one after the end of the first");
    }
}

#[test]
fn every_connect_that_is_refused_until_the_end_is_in_an_event() {
    for method in guard_methods() {
        TestNetns::enter_new();
        let daemon = refusing(method, &[]);
        let client = thread::spawn(|| {
            let mut refused = 0;
            while is_refused() {
                refused += 1;
            }
            refused
        });
        thread::sleep(Duration::from_millis(300));
        let (events, _) = daemon.stop();
        let refused: u64 = client.join().unwrap();
        println!("FACT refused_until_the_end={refused} method={method}");
        assert!(refused > 0, "{method}");
        assert_eq!(count_of(&events), refused, "{method}");
    }
}

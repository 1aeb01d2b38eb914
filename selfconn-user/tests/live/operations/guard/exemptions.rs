//! What the guard exempts.

use std::{fs, process::Command, thread, time::Duration};

use super::{LOCALHOST, is_refused};
use crate::support::{
    cgroup::TestCgroup,
    client::{NOBODY, become_user, socket},
    daemon::selfconn,
    guard::{connect, count_of, guard_methods, refusing, wait_until},
    helper_process::HelperProcess,
    netns::TestNetns,
};

/// Binds this port, and connects to it.
fn is_refused_at(port: u16) -> bool {
    let socket = socket(LOCALHOST);
    socket.set_reuse_address(true).unwrap();
    socket.bind(&std::net::SocketAddr::new(LOCALHOST, port).into()).unwrap();
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    !connect(&socket, (LOCALHOST, port).into()).is_connected
}

#[test]
fn exempt_ports_and_users_connect_to_themselves_and_their_neighbours_do_not() {
    TestNetns::enter_new();
    for method in guard_methods() {
        let daemon = refusing(method, &["--guard-except", "port=41000-41002", "--guard-except", "uid=65534"]);
        for (port, expected) in [(40_999, true), (41_000, false), (41_002, false), (41_003, true)] {
            assert_eq!(is_refused_at(port), expected, "{method}: port {port}");
        }
        let as_user = |uid| {
            thread::spawn(move || {
                become_user(uid);
                is_refused()
            })
            .join()
            .unwrap()
        };
        assert!(!as_user(NOBODY) && as_user(NOBODY - 1), "{method}");
        let (events, _) = daemon.stop();
        assert_eq!(count_of(&events), 3, "{method}");
        let daemon = refusing(method, &["--guard-only", "port=41000", "--guard-only", "uid=0"]);
        assert!(is_refused_at(41_000) && !is_refused_at(41_001), "{method}");
        daemon.stop();
    }
}

#[test]
fn repro_says_that_it_is_refused_and_which_exemption_lets_it_pass() {
    TestNetns::enter_new();
    let repro = |port: &str, mode| {
        Command::new(selfconn()).args(["repro", "127.0.0.1", port, "--mode", mode]).output().unwrap()
    };
    // Inside the range, and of the parity that connect() chooses.
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "42000 42099").unwrap();
    for method in guard_methods() {
        let daemon = refusing(method, &["--guard-except", "port=42010"]);
        for mode in ["bind", "retry"] {
            let refused = repro("42020", mode);
            let stderr = String::from_utf8(refused.stderr).unwrap();
            assert_eq!(refused.status.code(), Some(2), "{method} {mode}: {stderr}");
            assert!(stderr.contains("--guard-except port=42020"), "{method} {mode}: {stderr}");
        }
        let (events, _) = daemon.stop();
        assert_eq!(count_of(&events), 2, "{method}: it does not try again");
    }
    let daemon = refusing(guard_methods()[0], &["--guard-except", "port=42010"]);
    let passed = repro("42010", "retry");
    assert!(passed.status.success(), "{passed:?}");
    daemon.stop();
}

#[test]
fn a_unit_is_exempt_when_it_appears_and_only_if_root_gave_it_its_name() {
    TestNetns::enter_new();
    let connect_in = |group: &TestCgroup, below: &str| {
        let directory = group.path().join(below);
        fs::create_dir_all(&directory).unwrap();
        let mut client = HelperProcess::start(&format!("connect itself in cgroup {}", directory.display()));
        let outcome = client.read_output();
        client.finish();
        outcome
    };
    let daemon = refusing(guard_methods()[0], &["--guard-except", "unit=exempt-*.service"]);
    // The unit is not there at the start of the daemon. Its group is new after each restart.
    for restart in 0..2 {
        let group = match TestCgroup::create("exempt-1.service") {
            Ok(group) => group,
            Err(why) => return println!("skipped: {why}"),
        };
        wait_until(Duration::from_secs(10), "the unit is never exempt", || {
            connect_in(&group, "") == "connected"
        });
        assert_eq!(connect_in(&group, "below"), "connected", "a group of the unit, {restart}");
    }
    let neighbour = TestCgroup::create("neighbour.service").unwrap();
    assert_eq!(connect_in(&neighbour, ""), "refused");
    let delegated = TestCgroup::create("user@65534.service").unwrap();
    delegated.delegate();
    fs::create_dir_all(delegated.path().join("exempt-2.service")).unwrap();
    thread::sleep(Duration::from_millis(2_500));
    assert_eq!(connect_in(&delegated, "exempt-2.service"), "refused", "a name that a user gave");
    daemon.stop();
}

#[test]
fn rules_that_cannot_be_are_errors_at_the_start() {
    for (rule, expected) in [
        ("comm=java", "unknown key comm"),
        ("port=65536", "port 65536 is not a number from 1 to 65535"),
        ("port=0", "port 0 is not"),
        ("uid=root", "uid root is not"),
    ] {
        let output = Command::new(selfconn())
            .args(["run", "--guard", "refuse", "--guard-except", rule])
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{rule}: {stderr}");
        assert!(stderr.contains(expected), "{rule}: {stderr}");
    }
}

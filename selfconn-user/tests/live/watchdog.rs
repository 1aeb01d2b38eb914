//! The daemon proves to itself that its hooks see, is fooled by nobody, and says so when they don't.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    client::{connect_to_self, socket, talk_to_self},
    daemon::{DEADLINE, Daemon, Variant, of, selfconn, variants},
    hands,
    net::Net,
};

/// Where self-tests are connected.
const MARK: &str = "127.83.67.84";

fn passed(daemon: &Daemon) -> usize {
    daemon.said_so_far().matches("self-test passed").count()
}

/// Waits until it has tested itself so often.
fn wait_for_tests(daemon: &Daemon, count: usize, mut meanwhile: impl FnMut()) {
    let until = Instant::now() + DEADLINE;
    while passed(daemon) < count {
        assert!(Instant::now() < until, "{}", daemon.said_so_far());
        meanwhile();
    }
}

fn nap() {
    std::thread::sleep(Duration::from_millis(20));
}

#[test]
fn self_tests_pass_and_leave_no_trace_in_this_daemon_or_another() {
    let net = Net::private();
    for variant in variants() {
        let options = ["--self-test", "1", "--states", "-vv"];
        let daemons = [(); 2].map(|()| Daemon::start(&variant, &options));
        for daemon in &daemons {
            wait_for_tests(daemon, 2, nap);
        }
        // And a real one beside them is told.
        let port = talk_to_self(Ipv4Addr::LOCALHOST.into());
        for mut daemon in daemons {
            let closed = daemon.expect(1, of("closed", net.inode)).remove(0);
            assert_eq!(closed["port"], port);
            let (events, said) = daemon.stop();
            let traces: Vec<_> = events.iter().filter(|event| event["addr"] == MARK).collect();
            assert_eq!(traces, [&Value::Null; 0], "{variant:?}");
            assert!(!said.contains("self-test failed"), "{variant:?}: {said}");
            let is_blind = |event: &Value| event["event"] == "lost" && event["where"] == "hooks";
            assert!(!events.iter().any(is_blind), "{variant:?}: {events:#?}");
            assert_eq!(events.last().unwrap()["lost"]["hooks"], 0);
        }
    }
}

#[test]
fn tests_pass_among_thousands_of_self_connections() {
    let _net = Net::private();
    let daemon = Daemon::start(&Variant(vec![]), &["--self-test", "1", "-vv", "--ring-size", "32M"]);
    wait_for_tests(&daemon, 3, || {
        for _ in 0..200 {
            let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
    });
    let (events, _) = daemon.stop();
    assert!(!events.iter().any(|event| event["event"] == "lost" && event["where"] == "hooks"));
}

#[test]
fn a_socket_of_another_user_at_the_mark_is_told_like_any_other() {
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
    let mark = SocketAddr::new(MARK.parse().unwrap(), 50_883);
    let connect = || {
        let socket = socket(mark.ip());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        socket.bind(&mark.into()).unwrap();
        socket.connect(&mark.into()).unwrap();
    };
    // By root, it is taken for the test of another daemon.
    connect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: no memory is involved. The system call, and not glibc's function, is for this thread alone.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 1_000, 1_000, 1_000) }, 0);
            connect();
        });
    });
    let closed = daemon.expect(1, of("closed", net.inode)).remove(0);
    assert_eq!((&closed["uid"], &closed["addr"]), (&1_000.into(), &MARK.into()), "{closed}");
    let (events, _) = daemon.stop();
    assert_eq!(events.iter().filter(|event| of("closed", net.inode)(event)).count(), 1);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_method_that_was_detached_is_told_by_its_name_and_the_run_ends_with_2() {
    let _net = Net::private();
    for variant in variants() {
        let mut daemon = Daemon::start(&variant, &["--self-test", "1", "-vv"]);
        let started = daemon.expect(1, |event| event["event"] == "started").remove(0);
        let hooks = started["hooks"].as_array().unwrap().clone();
        let live: Vec<String> =
            hooks.iter().filter_map(|hook| hook["method"].as_str()).map(str::to_owned).collect();
        daemon.stop();
        for method in &live {
            // Without the tracepoints of `bind`, which are perf's, too.
            let options = ["--self-test", "1", "-vv", "--bind-method", "off"];
            let mut daemon = Daemon::start(&variant, &options);
            wait_for_tests(&daemon, 1, nap);
            let links = hands::links(daemon.pid(), method);
            assert_eq!(links.len(), 1, "{variant:?}: of {method}");
            hands::take_away(daemon.pid(), links[0]);
            let lost = |event: &Value| event["event"] == "lost" && event["where"] == "hooks";
            let lost = daemon.expect(1, lost).remove(0);
            assert_eq!((&lost["method"], &lost["count"]), (&method.as_str().into(), &1.into()), "{lost}");
            let (code, events, said) = daemon.ends();
            assert_eq!(code, Some(2), "{said}");
            assert!(said.contains(&format!("{method} sees nothing any more")), "{said}");
            let stopped = events.last().unwrap();
            assert_eq!((&stopped["event"], &stopped["lost"]["hooks"]), (&"stopped".into(), &1.into()));
        }
    }
}

#[test]
fn doctor_proves_that_what_it_would_attach_sees() {
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--states"]);
    let output = Command::new(selfconn()).args(["doctor", "--live", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert_eq!((&report["live"]["passed"], &report["live"]["record"]), (&true.into(), &true.into()));
    let sees: Vec<_> = report["live"]["methods"].as_array().unwrap().iter().collect();
    assert_eq!(sees.len(), report["would_attach"].as_array().unwrap().len());
    assert!(sees.iter().all(|method| method["sees"] == true), "{report}");
    let text = Command::new(selfconn()).args(["doctor", "--live"]).output().unwrap().stdout;
    assert!(String::from_utf8(text).unwrap().contains("saw it"));
    let output = Command::new(selfconn()).args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["live"], Value::Null);
    // It is no news to a daemon.
    talk_to_self(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, of("closed", net.inode));
    let (events, _) = daemon.stop();
    assert!(!events.iter().any(|event| event["addr"] == MARK), "{events:#?}");
}

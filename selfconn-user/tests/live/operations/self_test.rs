//! Self-tests of the daemon: it verifies that its hooks see connections, cannot be misled by other processes,
//! and reports when a hook is dead.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    time::{Duration, Instant},
};

use rustix::{process::Signal, thread::set_thread_res_uid};
use selfconn_ebpf::WAYS;
use serde_json::Value;
use socket2::Socket;

#[cfg(target_arch = "x86_64")]
use crate::support::fd_injection;
use crate::support::{
    client::{connect_to_self, run_self_connection, socket, unanswered_connects},
    daemon::{DEADLINE, HookVariant, TestDaemon, hook_variants, is_event, selfconn},
    netns::TestNetns,
    nobody::NOBODY,
};

/// The address of self-test connections.
const SELF_TEST_ADDRESS: &str = "127.83.67.84";

fn passed_count(daemon: &TestDaemon) -> usize {
    daemon.stderr_so_far().matches("self-test passed").count()
}

/// Runs `work` until the daemon has passed this many self-tests.
fn wait_for_self_tests(daemon: &TestDaemon, count: usize, mut work: impl FnMut()) {
    let until = Instant::now() + DEADLINE;
    while passed_count(daemon) < count {
        assert!(Instant::now() < until, "{}", daemon.stderr_so_far());
        work();
    }
}

fn sleep_briefly() {
    std::thread::sleep(Duration::from_millis(20));
}

#[test]
fn self_tests_pass_and_are_reported_by_no_daemon() {
    let net = TestNetns::enter_new();
    for variant in hook_variants() {
        let options = ["--self-test", "1", "--states", "-vv"];
        let first = TestDaemon::start(&variant, &options);
        wait_for_self_tests(&first, 1, sleep_briefly);
        // It is between two self-tests, which are a second apart: of one that has begun before it, a daemon sees the end
        // only, and not who has connected.
        first.signal(Signal::STOP);
        let daemons = [TestDaemon::start(&variant, &options), first];
        daemons[1].signal(Signal::CONT);
        for daemon in &daemons {
            wait_for_self_tests(daemon, 2, sleep_briefly);
        }
        // A real self-connection at the same time is reported.
        let port = run_self_connection(Ipv4Addr::LOCALHOST.into());
        for mut daemon in daemons {
            let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
            assert_eq!(closed["port"], port);
            let (events, stderr) = daemon.stop();
            let traces: Vec<_> = events.iter().filter(|event| event["addr"] == SELF_TEST_ADDRESS).collect();
            assert_eq!(traces, [&Value::Null; 0], "{variant:?}");
            assert!(!stderr.contains("self-test failed"), "{variant:?}: {stderr}");
            let is_hook_loss = |event: &Value| event["event"] == "lost" && event["where"] == "hooks";
            assert!(!events.iter().any(is_hook_loss), "{variant:?}: {events:#?}");
            assert_eq!(events.last().unwrap()["lost"]["hooks"], 0);
        }
    }
}

#[test]
fn self_tests_pass_among_thousands_of_self_connections() {
    let _net = TestNetns::enter_new();
    let daemon = TestDaemon::start(&HookVariant(vec![]), &["--self-test", "1", "-vv", "--ring-size", "32M"]);
    wait_for_self_tests(&daemon, 3, || {
        for _ in 0..200 {
            let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
    });
    let (events, _) = daemon.stop();
    assert!(!events.iter().any(|event| event["event"] == "lost" && event["where"] == "hooks"));
}

fn self_test_endpoint() -> SocketAddr {
    SocketAddr::new(SELF_TEST_ADDRESS.parse().unwrap(), 50_883)
}

/// A socket that is bound to the endpoint of self-tests.
fn bound_socket() -> Socket {
    let endpoint = self_test_endpoint();
    let socket = socket(endpoint.ip());
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    socket.bind(&endpoint.into()).unwrap();
    socket
}

/// Calls `work` on a thread of this user. Network namespace and process stay the same.
fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let work = || {
            let uid = rustix::fs::Uid::from_raw(uid);
            set_thread_res_uid(uid, uid, uid).unwrap();
            work()
        };
        scope.spawn(work).join().unwrap()
    })
}

fn count(events: &[Value], kind: &'static str, net: TestNetns) -> usize {
    events.iter().filter(|event| is_event(kind, net.inode)(event)).count()
}

#[test]
fn a_connection_of_another_user_at_the_self_test_address_is_reported() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let connect = || bound_socket().connect(&self_test_endpoint().into()).unwrap();
    // A connection of root counts as the self-test of another daemon.
    connect();
    as_user(NOBODY, connect);
    let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
    assert_eq!((&closed["uid"], &closed["addr"]), (&NOBODY.into(), &SELF_TEST_ADDRESS.into()), "{closed}");
    let (events, _) = daemon.stop();
    assert_eq!(count(&events, "closed", net), 1);
}

#[test]
fn the_end_of_a_connection_at_the_self_test_address_is_reported_without_its_opener() {
    let net = TestNetns::enter_new();
    for variant in hook_variants() {
        let mut options = variant.clone();
        options.0.extend(["--connect-table", "1"]);
        let mut daemon = TestDaemon::start(&options, &[]);
        let (hidden, flood) = as_user(NOBODY, || {
            let hidden = bound_socket();
            hidden.connect(&self_test_endpoint().into()).unwrap();
            // The user's own flood takes the place of the opener.
            (hidden, unanswered_connects(3 * WAYS))
        });
        daemon.expect(1, is_event("established", net.inode));
        drop(hidden);
        let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
        assert_eq!(closed["addr"], SELF_TEST_ADDRESS, "{variant:?}: {closed}");
        drop(flood);
        daemon.stop();
    }
}

#[test]
fn a_connection_at_the_self_test_address_is_reported_if_its_opener_was_pushed_out_before() {
    let net = TestNetns::enter_new();
    for variant in hook_variants() {
        let mut options = variant.clone();
        options.0.extend(["--connect-table", "1"]);
        let mut daemon = TestDaemon::start(&options, &[]);
        let hidden = bound_socket();
        // The socket's own filter drops its SYN. The kernel sends it again a second later.
        hidden.attach_filter(&[socket2::SockFilter::new(0x06, 0, 0, 0)]).unwrap();
        hidden.set_nonblocking(true).unwrap();
        let flood = as_user(NOBODY, || {
            assert!(hidden.connect(&self_test_endpoint().into()).is_err());
            unanswered_connects(3 * WAYS)
        });
        hidden.detach_filter().unwrap();
        let established = daemon.expect(1, is_event("established", net.inode)).remove(0);
        assert_eq!(established["addr"], SELF_TEST_ADDRESS, "{variant:?}: {established}");
        assert_ne!(established["owner"], "witnessed", "the opener is unknown: {variant:?}: {established}");
        drop((hidden, flood));
        daemon.expect(1, is_event("closed", net.inode));
        daemon.stop();
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_detached_method_is_reported_by_name_and_ends_the_run_with_code_2() {
    let _net = TestNetns::enter_new();
    for variant in hook_variants() {
        let mut daemon = TestDaemon::start(&variant, &["--self-test", "1", "-vv"]);
        let started = daemon.expect(1, |event| event["event"] == "started").remove(0);
        let hooks = started["hooks"].as_array().unwrap().clone();
        let live: Vec<String> =
            hooks.iter().filter_map(|hook| hook["method"].as_str()).map(str::to_owned).collect();
        daemon.stop();
        for method in &live {
            // Without the tracepoints of `bind`, which are perf links, too.
            let options = ["--self-test", "1", "-vv", "--bind-method", "off"];
            let mut daemon = TestDaemon::start(&variant, &options);
            wait_for_self_tests(&daemon, 1, sleep_briefly);
            let links = fd_injection::link_fds(daemon.pid(), method);
            assert_eq!(links.len(), 1, "{variant:?}: of {method}");
            fd_injection::replace_fd_with_stdin(daemon.pid(), links[0]);
            let lost = |event: &Value| event["event"] == "lost" && event["where"] == "hooks";
            let lost = daemon.expect(1, lost).remove(0);
            assert_eq!((&lost["method"], &lost["count"]), (&method.as_str().into(), &1.into()), "{lost}");
            let (code, events, stderr) = daemon.wait_for_exit();
            assert_eq!(code, Some(2), "{stderr}");
            assert!(stderr.contains(&format!("{method} observes no transitions any more")), "{stderr}");
            let stopped = events.last().unwrap();
            assert_eq!((&stopped["event"], &stopped["lost"]["hooks"]), (&"stopped".into(), &1.into()));
        }
    }
}

#[test]
fn doctor_live_verifies_the_methods_it_would_attach() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--states"]);
    let output = Command::new(selfconn()).args(["doctor", "--live", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert_eq!((&report["live"]["passed"], &report["live"]["record"]), (&true.into(), &true.into()));
    let sees: Vec<_> = report["live"]["methods"].as_array().unwrap().iter().collect();
    assert_eq!(sees.len(), report["would_attach"].as_array().unwrap().len());
    assert!(sees.iter().all(|method| method["sees"] == true), "{report}");
    let text = Command::new(selfconn()).args(["doctor", "--live"]).output().unwrap().stdout;
    assert!(String::from_utf8(text).unwrap().contains("observed it"));
    let output = Command::new(selfconn()).args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["live"], Value::Null);
    // The self-test of `doctor` is not reported by a daemon.
    run_self_connection(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    assert!(!events.iter().any(|event| event["addr"] == SELF_TEST_ADDRESS), "{events:#?}");
}

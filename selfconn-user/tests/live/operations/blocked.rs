//! A server that cannot bind its port is reported, with the self-connection that holds the port. Bind
//! failures for other reasons are not reported.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::support::{
    bind_methods::{bind_methods, start},
    client::{NOBODY, become_user, connect_to_self, own_comm, run_self_connection, socket},
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event, is_kernel_at_least, is_name_or_unknown, scaled},
    helper_process::HelperProcess,
    netns::TestNetns,
};

mod decoys;
mod time_wait;

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Starts a server that fails to bind. Returns its pid.
fn fail_to_bind(address: IpAddr, port: u16) -> u32 {
    let mut server = HelperProcess::start(&format!("bind {}", SocketAddr::new(address, port)));
    assert_eq!(server.read_output(), "in use");
    let pid = server.pid();
    server.finish();
    pid
}

fn assert_in_use(address: IpAddr, port: u16) {
    let error = TcpListener::bind(SocketAddr::new(address, port)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn a_server_that_runs_another_program_after_its_failed_bind_has_no_executable() {
    let net = TestNetns::enter_new();
    for method in bind_methods() {
        let mut daemon = start(method, &[]);
        let (_connection, port) = connect_to_self(LOCALHOST);
        daemon.expect(1, is_event("established", net.inode));
        // The server is looked up after its execve().
        daemon.signal(Signal::STOP);
        let mut server =
            HelperProcess::start(&format!("fail to bind and exec {}", SocketAddr::new(LOCALHOST, port)));
        assert_eq!(server.read_output(), "waiting");
        daemon.signal(Signal::CONT);
        let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
        assert_eq!(blocked["pid"], server.pid(), "{blocked}");
        assert!(is_name_or_unknown(&blocked["comm"], "a-server"), "{blocked}");
        assert_eq!(blocked["exe"], Value::Null, "{method}: {blocked}");
        server.finish();
        // A server that still runs the same program has it.
        assert_in_use(LOCALHOST, port);
        let blocked = daemon.expect(2, is_event("blocked", net.inode)).remove(1);
        let this = std::fs::read_link("/proc/self/exe").unwrap();
        assert_eq!(blocked["exe"].as_str(), this.to_str(), "{method}: {blocked}");
        daemon.stop();
    }
}

#[test]
fn a_failed_bind_is_reported_with_the_self_connection_that_holds_the_port() {
    let net = TestNetns::enter_new();
    for method in bind_methods() {
        for (connected, requested) in [
            (LOCALHOST, LOCALHOST),
            (LOCALHOST, Ipv4Addr::UNSPECIFIED.into()),
            (LOCALHOST, Ipv6Addr::UNSPECIFIED.into()),
            (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()),
            (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::UNSPECIFIED.into()),
        ] {
            let mut daemon = start(method, &[]);
            let (connection, port) = connect_to_self(connected);
            let established = daemon.expect(1, is_event("established", net.inode)).remove(0);
            let pid = fail_to_bind(requested, port);
            let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
            assert_eq!(blocked["addr"], requested.to_string(), "{blocked}");
            assert_eq!((&blocked["port"], &blocked["pid"]), (&port.into(), &pid.into()), "{blocked}");
            assert_eq!(
                (&blocked["comm"], &blocked["failures"]),
                (&"a-server".into(), &1.into()),
                "{blocked}"
            );
            let holder = &blocked["holder"];
            assert_eq!(holder["id"], established["id"], "{blocked}");
            assert_eq!(holder["addr"], connected.to_string(), "{blocked}");
            assert_eq!(holder["state"], "ESTABLISHED", "{blocked}");
            assert_eq!(holder["pid"], std::process::id(), "{blocked}");
            assert_eq!(holder["comm"], own_comm(), "{blocked}");
            assert_eq!(holder["holders"][0]["pid"], std::process::id(), "{blocked}");
            assert_eq!(holder["holders"].as_array().map(Vec::len), Some(1), "{blocked}");
            assert_eq!(blocked["opener"]["pid"], std::process::id(), "{blocked}");
            assert!(holder["held_for_ns"].as_u64().unwrap() > 0, "{blocked}");
            assert_eq!(holder["free_at"], Value::Null, "{blocked}");

            // Then the TIME_WAIT entry of the same connection. Another process name counts as another server.
            drop(connection);
            let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
            assert_in_use(requested, port);
            let blocked = daemon.expect(2, is_event("blocked", net.inode)).remove(1);
            assert_eq!((&blocked["pid"], &blocked["comm"]), (&std::process::id().into(), &own_comm().into()));
            let holder = &blocked["holder"];
            assert_eq!(
                (&holder["id"], &holder["state"]),
                (&established["id"], &"TIME_WAIT".into()),
                "{blocked}"
            );
            assert_eq!(
                holder["free_at"].as_str().unwrap()[..23],
                closed["port_blocked_until"].as_str().unwrap()[..23]
            );
            // Nobody holds it any more.
            assert_eq!(
                (&holder["pid"], &holder["holders"]),
                (&Value::Null, &serde_json::json!([])),
                "{blocked}"
            );
            assert_eq!(blocked["opener"]["comm"], own_comm(), "{blocked}");
            daemon.stop();
        }
    }
}

/// Nothing of a self-connection is recorded when its user changes the options of its socket.
#[test]
fn a_failed_bind_is_reported_also_if_the_options_of_the_self_connection_were_changed() {
    let net = TestNetns::enter_new();
    for method in bind_methods() {
        if !is_kernel_at_least((5, 11)) {
            return;
        }
        let mut daemon = start(method, &[]);
        let connect = || {
            become_user(NOBODY);
            let client = socket(LOCALHOST);
            // The kernel compares each socket that has the port, because of the first one's options.
            client.bind(&SocketAddr::new(LOCALHOST, 0).into()).unwrap();
            client.set_reuse_address(true).unwrap();
            client.connect(&client.local_addr().unwrap()).unwrap();
            client
        };
        let client = thread::spawn(connect).join().unwrap();
        let port = client.local_addr().unwrap().as_socket().unwrap().port();
        daemon.expect(1, is_event("established", net.inode));
        client.set_reuse_address(false).unwrap();
        // A server of Rust has SO_REUSEADDR, as nearly all have.
        assert_in_use(Ipv4Addr::UNSPECIFIED.into(), port);
        let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
        assert_eq!(blocked["port"], port, "{blocked}");
        assert_eq!(blocked["holder"]["pid"], std::process::id(), "{blocked}");
        // From now on both share the port.
        client.set_reuse_address(true).unwrap();
        let server = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
        // The next one fails because of that server.
        assert_in_use(LOCALHOST, port);
        thread::sleep(Duration::from_millis(500));
        drop(server);
        let (events, _) = daemon.stop();
        let count = events.iter().filter(|event| is_event("blocked", net.inode)(event)).count();
        assert_eq!(count, 1, "{events:?}");
    }
}

/// The daemon lists the processes of the host before it looks for holders.
#[test]
fn a_failed_bind_at_the_start_of_the_daemon_is_reported_with_its_holder() {
    let net = TestNetns::enter_new();
    let mut idle = HelperProcess::start(&format!("wait with children {}", scaled(1_000)));
    idle.read_output();
    let blocked: Vec<_> = (0..3)
        .map(|_| {
            let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
            let (_connection, port) = connect_to_self(LOCALHOST);
            assert_in_use(LOCALHOST, port);
            let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
            daemon.stop();
            blocked
        })
        .collect();
    idle.finish();
    for blocked in blocked {
        assert_eq!(blocked["holder"]["pid"], std::process::id(), "{blocked}");
        assert_eq!(blocked["holder"]["holders"].as_array().map(Vec::len), Some(1), "{blocked}");
    }
}

#[test]
fn the_holder_is_who_has_the_socket_now_and_the_opener_who_connected() {
    let net = TestNetns::enter_new();
    for method in bind_methods().into_iter().take(1) {
        let mut daemon = start(method, &[]);
        let mut opener = HelperProcess::start("connect and pass to child");
        let child: u32 = opener.read_output().parse().unwrap();
        let established = daemon.expect(1, is_event("established", net.inode)).remove(0);
        let port = u16::try_from(established["port"].as_u64().unwrap()).unwrap();
        assert_in_use(established["addr"].as_str().unwrap().parse().unwrap(), port);
        let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
        let (holder, opened_by) = (&blocked["holder"], &blocked["opener"]);
        assert_eq!((&holder["pid"], &holder["comm"]), (&child.into(), &"a-child".into()), "{blocked}");
        assert_eq!(holder["holders"], serde_json::json!([{ "pid": child, "comm": "a-child" }]), "{blocked}");
        assert_eq!(opened_by["pid"], opener.pid(), "{blocked}");
        assert!(is_name_or_unknown(&opened_by["comm"], "a-parent"), "{blocked}");
        let this = std::fs::read_link("/proc/self/exe").unwrap();
        assert_eq!(holder["exe"].as_str(), this.to_str(), "{blocked}");
        opener.finish();
        daemon.stop();
    }
}

#[test]
fn a_failed_bind_without_a_self_connection_is_not_reported() {
    let net = TestNetns::enter_new();
    for method in bind_methods() {
        let mut daemon = start(method, &[]);
        let (connection, port) = connect_to_self(LOCALHOST);
        daemon.expect(1, is_event("established", net.inode));
        // Another server holds the port.
        let server = TcpListener::bind(SocketAddr::new(LOCALHOST, 0)).unwrap();
        assert_in_use(LOCALHOST, server.local_addr().unwrap().port());
        // UDP ports are independent of TCP ports with the same number.
        let datagrams = UdpSocket::bind(SocketAddr::new(LOCALHOST, port)).unwrap();
        // Nor is a failure the one of the same thread's call before, which asked for the held port and failed for
        // another reason: its socket is bound already.
        let bound = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        bound.bind(&SocketAddr::new(LOCALHOST, 0).into()).unwrap();
        let invalid = bound.bind(&SocketAddr::new(LOCALHOST, port).into()).unwrap_err();
        assert_eq!(invalid.kind(), std::io::ErrorKind::InvalidInput);
        UdpSocket::bind(SocketAddr::new(LOCALHOST, port)).unwrap_err();
        drop((bound, datagrams));
        // Another address, and the same address in another namespace.
        let other = IpAddr::from([127, 0, 0, 2]);
        let elsewhere = TcpListener::bind(SocketAddr::new(other, port)).unwrap();
        assert_in_use(other, port);
        drop(elsewhere);
        thread::spawn(move || {
            let _net = TestNetns::enter_new();
            let server = TcpListener::bind(SocketAddr::new(LOCALHOST, port)).unwrap();
            assert_in_use(LOCALHOST, port);
            drop(server);
        })
        .join()
        .unwrap();
        // When this failure is reported, everything before it has been processed.
        assert_in_use(LOCALHOST, port);
        daemon.expect(1, is_event("blocked", net.inode));
        // A reset leaves no TIME_WAIT entry.
        connection.set_linger(Some(Duration::ZERO)).unwrap();
        drop(connection);
        let server = TcpListener::bind(SocketAddr::new(LOCALHOST, port)).unwrap();
        fail_to_bind(LOCALHOST, port);
        drop(server);
        let (events, _) = daemon.stop();
        let blocked: Vec<_> = events.iter().filter(|event| event["event"] == "blocked").collect();
        assert_eq!(blocked.len(), 1, "{method}: {blocked:#?}");
        assert_eq!((&blocked[0]["port"], &blocked[0]["addr"]), (&port.into(), &"127.0.0.1".into()));
    }
}

#[test]
fn repeated_bind_failures_are_reported_at_once_and_then_with_a_count() {
    let net = TestNetns::enter_new();
    // One method is enough, because the counting does not depend on the method.
    for method in bind_methods().into_iter().take(1) {
        let mut daemon = start(method, &[]);
        let (connection, port) = connect_to_self(LOCALHOST);
        daemon.expect(1, is_event("established", net.inode));
        let (mut tries, until) = (0_u64, Instant::now() + Duration::from_millis(10_500));
        while Instant::now() < until {
            // In bursts, because the programs suppress a part of each burst.
            for _ in 0..10 {
                assert_in_use(LOCALHOST, port);
                tries += 1;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let blocked = daemon.expect(2, is_event("blocked", net.inode));
        let failures =
            [&blocked[0]["failures"], &blocked[1]["failures"]].map(|count| count.as_u64().unwrap());
        assert_eq!(failures[0], 1, "the first failure is reported at once: {}", blocked[0]);
        assert_eq!(blocked[0]["id"], blocked[1]["id"], "the same conflict");
        assert_ne!(blocked[0]["id"], blocked[0]["holder"]["id"]);
        assert!(failures[1] > tries / 2 && failures[1] <= tries, "{failures:?} of {tries}");
        drop(connection);
        let (events, _) = daemon.stop();
        assert_eq!(events.iter().filter(|event| is_event("blocked", net.inode)(event)).count(), 2);
    }
}

#[test]
fn a_time_wait_entry_from_before_the_daemon_is_reported_as_holder() {
    let net = TestNetns::enter_new();
    // The daemon finds namespaces through their processes.
    let mut netns_process = HelperProcess::start("wait");
    netns_process.read_output();
    for method in bind_methods().into_iter().take(1) {
        let port = run_self_connection(LOCALHOST);
        let daemon = start(method, &["-vv"]);
        let until = Instant::now() + DEADLINE;
        while daemon.snapshot_count() == 0 {
            assert!(Instant::now() < until);
            thread::sleep(Duration::from_millis(20));
        }
        let mut daemon = daemon;
        assert_in_use(LOCALHOST, port);
        let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
        let holder = &blocked["holder"];
        assert_eq!((&holder["state"], &holder["id"]), (&"TIME_WAIT".into(), &Value::Null), "{blocked}");
        assert_eq!((&holder["pid"], &holder["held_for_ns"]), (&Value::Null, &Value::Null), "{blocked}");
        assert_eq!(blocked["opener"], Value::Null, "{blocked}");
        assert!(holder["free_at"].is_string(), "{blocked}");
        daemon.stop();
    }
    netns_process.finish();
}

#[test]
fn bind_failure_detection_can_be_turned_off() {
    let (events, _) = TestDaemon::start(&HookVariant(vec![]), &["--bind-method", "off"]).stop();
    assert_eq!(events[0]["binds"], serde_json::json!({ "method": null, "refused": [] }));
}

//! The TIME_WAIT of a self-connection is said to hold a port only as long as it is there: not when the next
//! self-connection has taken it over, and not when it was destroyed.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;
use socket2::Socket;

use super::{LOCALHOST, assert_in_use, fail_to_bind};
use crate::support::{
    bind_methods::{bind_methods, start},
    client::{connect_to_self, connect_until_self, run_self_connection},
    daemon::{DEADLINE, TestDaemon, is_event, selfconn},
    helper_process::HelperProcess,
    netns::TestNetns,
};

/// Connects to this closed port until it connects to itself, also if the port is in TIME_WAIT.
fn connect_to_self_at(target: SocketAddr) -> Socket {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(client) = connect_until_self(target, 1_000) {
            return client;
        }
        assert!(Instant::now() < until, "the TIME_WAIT is not taken over");
    }
}

/// Fails to bind the port of another self-connection. Returns the ports of all `blocked` events, of which this one is
/// the last.
fn blocked_ports(mut daemon: TestDaemon, netns: u64, others: usize) -> Vec<Value> {
    let (connection, port) = connect_to_self(LOCALHOST);
    daemon.expect(1, |event| is_event("established", netns)(event) && event["port"] == port);
    assert_in_use(LOCALHOST, port);
    daemon.expect(1 + others, is_event("blocked", netns));
    connection.set_linger(Some(Duration::ZERO)).unwrap();
    drop(connection);
    let (events, _) = daemon.stop();
    let blocked: Vec<_> = events.into_iter().filter(|event| is_event("blocked", netns)(event)).collect();
    assert_eq!(blocked.last().unwrap()["port"], port, "{blocked:#?}");
    blocked.into_iter().map(|event| event["port"].clone()).collect()
}

#[test]
fn a_time_wait_that_the_next_self_connection_has_taken_over_holds_no_port() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", "40000 40031");
    for (port, method) in (40_002_u16..).step_by(2).zip(bind_methods()) {
        let target = SocketAddr::new(LOCALHOST, port);
        let mut daemon = start(method, &[]);
        drop(connect_to_self_at(target));
        let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
        assert!(closed["port_blocked_until"].is_string(), "{closed}");
        // The twin: while it is there, it holds the port.
        assert_in_use(LOCALHOST, port);
        let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
        assert_eq!(
            (&blocked["holder"]["state"], &blocked["holder"]["id"]),
            (&"TIME_WAIT".into(), &closed["id"])
        );
        let second = connect_to_self_at(target);
        second.set_linger(Some(Duration::ZERO)).unwrap();
        drop(second);
        let closed = daemon.expect(2, is_event("closed", net.inode)).remove(1);
        assert_eq!(
            (&closed["port"], &closed["port_blocked_until"]),
            (&port.into(), &Value::Null),
            "{closed}"
        );
        // A listener keeps this server out. It is another one, so that it is not counted with the first.
        let listener = TcpListener::bind(target).unwrap();
        fail_to_bind(LOCALHOST, port);
        drop(listener);
        assert_eq!(blocked_ports(daemon, net.inode, 1).len(), 2, "{method}");
    }
}

#[test]
fn a_time_wait_that_was_destroyed_holds_no_port() {
    let net = TestNetns::enter_new();
    let only = format!("netns={}", net.inode);
    // The daemon finds namespaces through their processes.
    let mut netns_process = HelperProcess::start("wait");
    netns_process.read_output();
    for method in bind_methods() {
        let mut daemon = start(method, &["--reconcile", "1", "-vv"]);
        let port = run_self_connection(LOCALHOST);
        daemon.expect(1, is_event("closed", net.inode));
        assert_in_use(LOCALHOST, port);
        let blocked = daemon.expect(1, is_event("blocked", net.inode)).remove(0);
        assert_eq!(blocked["holder"]["state"], "TIME_WAIT", "{blocked}");
        let destroy = ["scan", "--json", "--only", &only, "--destroy"];
        let output = Command::new(selfconn()).args(destroy).output().unwrap();
        let rows = String::from_utf8(output.stdout).unwrap();
        if !rows.contains(r#""result":"destroyed""#) {
            // Before Linux 6.1 the kernel cannot.
            assert!(rows.contains(r#""result":"failed""#), "{rows}");
            println!("FACT destroys_time_wait=false");
            daemon.stop();
            break;
        }
        daemon.run_until_snapshots(2, || std::thread::sleep(Duration::from_millis(20)));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        fail_to_bind(LOCALHOST, port);
        drop(listener);
        assert_eq!(blocked_ports(daemon, net.inode, 1).len(), 2, "{method}");
    }
    netns_process.finish();
}

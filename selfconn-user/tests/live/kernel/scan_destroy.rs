//! `scan --destroy`: kernels differ in what they let it destroy.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::fchown,
    process::Command,
};

use serde_json::Value;

use crate::support::{
    client::{assert_aborted, connect_to_self, is_connected, run_self_connection},
    daemon::selfconn,
    netns::TestNetns,
};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Runs `scan` on this namespace only, because it would otherwise destroy the connections of all tests.
/// Returns the exit code and the rows.
fn scan(net: TestNetns, options: &[&str]) -> (Option<i32>, Vec<Value>) {
    let only = format!("netns={}", net.inode);
    let output =
        Command::new(selfconn()).args(["scan", "--json", "--only", &only]).args(options).output().unwrap();
    let rows = String::from_utf8(output.stdout).unwrap();
    let mut rows: Vec<Value> = rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
    assert_eq!(rows.pop().unwrap()["event"], "summary");
    (output.status.code(), rows)
}

#[test]
fn a_listed_connection_is_destroyed_only_on_request() {
    let net = TestNetns::enter_new();
    let (one, port) = connect_to_self(LOCALHOST);
    let (other, other_port) = connect_to_self(LOCALHOST);
    let listener = TcpListener::bind(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)).unwrap();
    let is_port = format!("port={port}");

    let (code, rows) = scan(net, &[]);
    assert_eq!((code, rows.len()), (Some(1), 2), "{rows:?}");
    assert!(rows.iter().all(|row| row["result"].is_null()), "nothing is destroyed: {rows:?}");
    let (code, rows) = scan(net, &["--only", &is_port]);
    assert_eq!((code, rows.len(), &rows[0]["port"]), (Some(1), 1, &port.into()), "{rows:?}");
    assert!(is_connected(&one) && is_connected(&other));

    let (code, rows) = scan(net, &["--only", &is_port, "--destroy"]);
    assert_eq!((code, rows.len()), (Some(0), 1), "none of them is left: {rows:?}");
    assert_eq!((&rows[0]["port"], &rows[0]["result"]), (&port.into(), &"destroyed".into()), "{rows:?}");
    assert_aborted(&one);
    assert!(is_connected(&other));

    let (code, rows) = scan(net, &["--except", &format!("port={other_port}"), "--destroy"]);
    assert_eq!((code, rows.len()), (Some(0), 0));
    assert!(is_connected(&other));
    let (code, rows) = scan(net, &["--destroy"]);
    assert_eq!((code, rows.len(), &rows[0]["port"]), (Some(0), 1, &other_port.into()), "{rows:?}");
    assert_aborted(&other);
    TcpStream::connect(listener.local_addr().unwrap()).unwrap();
}

/// The process has the socket open, and need not be the one that it is of.
#[test]
fn what_is_only_known_of_a_holder_selects_for_a_list_and_not_for_a_destruction() {
    let net = TestNetns::enter_new();
    let (socket, _) = connect_to_self(LOCALHOST);
    let own = format!("exe={}", std::env::current_exe().unwrap().to_str().unwrap());
    // As if that user had made the socket, and had passed it to this process.
    fchown(&socket, Some(65_534), None).unwrap();
    for (options, code, rows) in [
        (&["--only", &*own][..], 1, 1),
        (&["--except", &own], 0, 0),
        (&["--only", &own, "--destroy"], 1, 0),
        (&["--except", &own, "--destroy"], 1, 0),
        (&["--only", "exe=/no/such/program"], 0, 0),
        (&["--only", "exe=/no/such/program", "--destroy"], 0, 0),
    ] {
        let (found_code, found) = scan(net, options);
        assert_eq!((found_code, found.len()), (Some(code), rows), "{options:?}: {found:?}");
        assert!(is_connected(&socket), "{options:?}");
    }
    let (code, rows) = scan(net, &["--only", "uid=65534", "--destroy"]);
    assert_eq!((code, rows.len()), (Some(0), 1), "{rows:?}");
    assert_aborted(&socket);
}

#[test]
fn time_wait_is_destroyed_where_the_kernel_supports_it_and_otherwise_reported() {
    let net = TestNetns::enter_new();
    let port = run_self_connection(LOCALHOST);
    let server = SocketAddr::new(LOCALHOST, port);
    assert!(TcpListener::bind(server).is_err(), "even with SO_REUSEADDR, which std sets");
    let (_, rows) = scan(net, &[]);
    assert_eq!(rows[0]["state"], "TIME_WAIT", "{rows:?}");
    let (code, rows) = scan(net, &["--destroy"]);
    match rows[0]["result"].as_str() {
        Some("destroyed") => {
            assert_eq!((code, scan(net, &[]).1.len()), (Some(0), 0), "{rows:?}");
            assert!(rows[0]["port_blocked_until"].is_null());
            TcpListener::bind(server).unwrap();
        }
        // Before Linux 6.1 the kernel cannot destroy a TIME_WAIT entry.
        Some("failed") => {
            assert_eq!((code, scan(net, &[]).1.len()), (Some(1), 1), "{rows:?}");
            assert!(rows[0]["why"].as_str().unwrap().contains("TIME_WAIT"), "{rows:?}");
        }
        other => panic!("{other:?}: {rows:?}"),
    }
}

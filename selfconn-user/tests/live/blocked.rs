//! A server that can't bind its port is told, with the self-connection that has it; whatever else has it is not.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    client::{connect_to_self, own_comm, talk_to_self},
    daemon::{DEADLINE, Daemon, Variant, of, selfconn},
    net::Net,
    role::Role,
};

const HOME: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The methods that `doctor` says can be attached here. Where there is none, `started` must say why.
fn methods() -> Vec<&'static str> {
    let doctor = Command::new(selfconn()).args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let is_ok = |name: &&str| {
        let mut known = report["binds"].as_array().unwrap().iter();
        known.any(|known| known["method"] == *name && known["verdict"] == "ok")
    };
    let methods: Vec<_> = ["fexit", "perf"].into_iter().filter(is_ok).collect();
    println!("FACT binds methods={methods:?}");
    if methods.is_empty() {
        let (events, _) = Daemon::start(&Variant(vec![]), &[]).stop();
        assert_eq!(events[0]["binds"]["method"], Value::Null);
        let refused = events[0]["binds"]["refused"].as_array().unwrap();
        assert!(
            refused.len() == 2 && refused.iter().all(|refused| refused["why"].is_string()),
            "{refused:?}"
        );
    }
    methods
}

fn start(method: &str, options: &[&str]) -> Daemon {
    let options: Vec<_> = ["--bind-method", method].into_iter().chain(options.iter().copied()).collect();
    let mut daemon = Daemon::start(&Variant(vec![]), &options);
    let started = daemon.expect(1, |event| event["event"] == "started").remove(0);
    assert_eq!(started["binds"]["method"], method, "{started}");
    daemon
}

/// A server that fails; its pid.
fn fail_to_bind(address: IpAddr, port: u16) -> u32 {
    let mut server = Role::start(&format!("bind {}", SocketAddr::new(address, port)));
    assert_eq!(server.says(), "in use");
    let pid = server.pid();
    server.end();
    pid
}

fn in_use(address: IpAddr, port: u16) {
    let error = TcpListener::bind(SocketAddr::new(address, port)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn a_server_that_comes_back_is_told_who_has_its_port() {
    let net = Net::private();
    for method in methods() {
        for (own, wanted) in [
            (HOME, HOME),
            (HOME, Ipv4Addr::UNSPECIFIED.into()),
            (HOME, Ipv6Addr::UNSPECIFIED.into()),
            (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()),
            (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::UNSPECIFIED.into()),
        ] {
            let mut daemon = start(method, &[]);
            let (connection, port) = connect_to_self(own);
            let established = daemon.expect(1, of("established", net.inode)).remove(0);
            let pid = fail_to_bind(wanted, port);
            let blocked = daemon.expect(1, of("blocked", net.inode)).remove(0);
            assert_eq!(blocked["addr"], wanted.to_string(), "{blocked}");
            assert_eq!((&blocked["port"], &blocked["pid"]), (&port.into(), &pid.into()), "{blocked}");
            assert_eq!(
                (&blocked["comm"], &blocked["failures"]),
                (&"a-server".into(), &1.into()),
                "{blocked}"
            );
            let holder = &blocked["holder"];
            assert_eq!(holder["id"], established["id"], "{blocked}");
            assert_eq!(holder["addr"], own.to_string(), "{blocked}");
            assert_eq!(holder["state"], "ESTABLISHED", "{blocked}");
            assert_eq!(holder["pid"], std::process::id(), "{blocked}");
            assert_eq!(holder["comm"], own_comm(), "{blocked}");
            assert!(holder["held_for_ns"].as_u64().unwrap() > 0, "{blocked}");
            assert_eq!(holder["free_at"], Value::Null, "{blocked}");

            // And what is left of it. Another name is another server.
            drop(connection);
            let closed = daemon.expect(1, of("closed", net.inode)).remove(0);
            in_use(wanted, port);
            let blocked = daemon.expect(2, of("blocked", net.inode)).remove(1);
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
            assert_eq!(holder["comm"], own_comm(), "{blocked}");
            daemon.stop();
        }
    }
}

#[test]
fn what_no_self_connection_keeps_from_a_server_is_not_told() {
    let net = Net::private();
    for method in methods() {
        let mut daemon = start(method, &[]);
        let (connection, port) = connect_to_self(HOME);
        daemon.expect(1, of("established", net.inode));
        // Another server has it.
        let server = TcpListener::bind(SocketAddr::new(HOME, 0)).unwrap();
        in_use(HOME, server.local_addr().unwrap().port());
        // UDP has ports of its own, of the same numbers.
        let datagrams = UdpSocket::bind(SocketAddr::new(HOME, port)).unwrap();
        UdpSocket::bind(SocketAddr::new(HOME, port)).unwrap_err();
        drop(datagrams);
        // Another address; and the same one in another namespace.
        let other = IpAddr::from([127, 0, 0, 2]);
        let elsewhere = TcpListener::bind(SocketAddr::new(other, port)).unwrap();
        in_use(other, port);
        drop(elsewhere);
        thread::spawn(move || {
            let _net = Net::private();
            let server = TcpListener::bind(SocketAddr::new(HOME, port)).unwrap();
            in_use(HOME, port);
            drop(server);
        })
        .join()
        .unwrap();
        // After this everything before is told.
        in_use(HOME, port);
        daemon.expect(1, of("blocked", net.inode));
        // A reset leaves nothing behind.
        connection.set_linger(Some(Duration::ZERO)).unwrap();
        drop(connection);
        let server = TcpListener::bind(SocketAddr::new(HOME, port)).unwrap();
        fail_to_bind(HOME, port);
        drop(server);
        let (events, _) = daemon.stop();
        let blocked: Vec<_> = events.iter().filter(|event| event["event"] == "blocked").collect();
        assert_eq!(blocked.len(), 1, "{method}: {blocked:#?}");
        assert_eq!((&blocked[0]["port"], &blocked[0]["addr"]), (&port.into(), &"127.0.0.1".into()));
    }
}

#[test]
fn a_server_that_retries_is_told_at_once_and_then_with_the_count_of_its_failures() {
    let net = Net::private();
    // One method does: what is counted where is the same for all.
    for method in methods().into_iter().take(1) {
        let mut daemon = start(method, &[]);
        let (connection, port) = connect_to_self(HOME);
        daemon.expect(1, of("established", net.inode));
        let (mut tries, until) = (0_u64, Instant::now() + Duration::from_millis(10_500));
        while Instant::now() < until {
            // In bursts, of which the programs keep some back.
            for _ in 0..10 {
                in_use(HOME, port);
                tries += 1;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let blocked = daemon.expect(2, of("blocked", net.inode));
        let failures =
            [&blocked[0]["failures"], &blocked[1]["failures"]].map(|count| count.as_u64().unwrap());
        assert_eq!(failures[0], 1, "the first is told at once: {}", blocked[0]);
        assert!(failures[1] > tries / 2 && failures[1] <= tries, "{failures:?} of {tries}");
        drop(connection);
        let (events, _) = daemon.stop();
        assert_eq!(events.iter().filter(|event| of("blocked", net.inode)(event)).count(), 2);
    }
}

#[test]
fn what_ended_before_the_daemon_began_holds_its_port_too() {
    let net = Net::private();
    // Namespaces are found by their processes.
    let mut inhabitant = Role::start("wait");
    inhabitant.says();
    for method in methods().into_iter().take(1) {
        let port = talk_to_self(HOME);
        let daemon = start(method, &["-vv"]);
        let until = Instant::now() + DEADLINE;
        while daemon.readings() == 0 {
            assert!(Instant::now() < until);
            thread::sleep(Duration::from_millis(20));
        }
        let mut daemon = daemon;
        in_use(HOME, port);
        let blocked = daemon.expect(1, of("blocked", net.inode)).remove(0);
        let holder = &blocked["holder"];
        assert_eq!((&holder["state"], &holder["id"]), (&"TIME_WAIT".into(), &Value::Null), "{blocked}");
        assert_eq!((&holder["pid"], &holder["held_for_ns"]), (&Value::Null, &Value::Null), "{blocked}");
        assert!(holder["free_at"].is_string(), "{blocked}");
        daemon.stop();
    }
    inhabitant.end();
}

#[test]
fn it_can_be_turned_off() {
    let (events, _) = Daemon::start(&Variant(vec![]), &["--bind-method", "off"]).stop();
    assert_eq!(events[0]["binds"], serde_json::json!({ "method": null, "refused": [] }));
}

//! What `--remedy` does to a self-connection, and what it leaves alone.
//!
//! Every daemon here restricts its remedy to the test's own network namespace, because it sees the namespaces
//! of all tests and would destroy their connections, too.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener},
    os::fd::AsRawFd as _,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use socket2::Socket;

use crate::support::{
    client::{
        NOBODY, assert_aborted, assert_opened_by_this_thread, become_user, connect_to_self,
        connect_until_self, is_connected, own_comm, socket,
    },
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event, selfconn},
    helper_process::{HelperProcess, UNPRIVILEGED},
    netns::TestNetns,
    retries::{Missed, PREEMPTED, for_each_variant_retrying},
};

mod capability;
mod forged;
mod race;
mod shutdown;

const PORT_RANGE: &str = "40000 40199";
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Starts a daemon whose remedy is restricted to this namespace.
fn start(net: TestNetns, variant: &HookVariant, options: &[&str]) -> TestDaemon {
    let only = format!("netns={}", net.inode);
    TestDaemon::start(variant, &[&["--remedy-only", &only], options].concat())
}

/// Makes an accidental self-connection. Returns its socket and address.
fn connect_to_self_by_chance(net: TestNetns, port: u16) -> (Socket, SocketAddr) {
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    let target = SocketAddr::new(LOCALHOST, port);
    let client = connect_until_self(target, 20_000).expect("an even port of the range is hit");
    client.set_linger(Some(Duration::ZERO)).unwrap();
    (client, target)
}

fn wait_to_bind(target: SocketAddr) -> TcpListener {
    let until = Instant::now() + DEADLINE / 2;
    loop {
        match TcpListener::bind(target) {
            Ok(listener) => return listener,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_server_can_bind_the_port_while_the_client_still_has_its_socket() {
    for_each_variant_retrying(PREEMPTED, |variant| {
        let net = TestNetns::enter_new();
        let mut daemon = start(net, variant, &["--remedy", "destroy"]);
        let (client, target) = connect_to_self_by_chance(net, 40_100);
        let since = Instant::now();
        let established = daemon.try_expect(1, is_event("established", net.inode))?.remove(0);
        Missed::if_opener_unseen(&established)?;
        // TIME_WAIT would last longer than this wait.
        let listener = wait_to_bind(target);
        println!("{variant:?}: bound {:?} after the connection", since.elapsed());
        assert_aborted(&client);
        let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
        let closed = daemon.try_expect(1, is_event("closed", net.inode))?.remove(0);
        Missed::if_null(&closed, &["how", "closer"])?;
        for event in [&established, &remedied, &closed] {
            assert_opened_by_this_thread(event);
            assert_eq!((&event["id"], &event["port"]), (&established["id"], &40_100.into()), "{event}");
        }
        assert_eq!(remedied["mode"], "destroy", "{remedied}");
        assert_eq!(remedied["result"], "destroyed", "{remedied}");
        assert_eq!(remedied["why"], Value::Null);
        assert_eq!(remedied["port_freed"], true, "{remedied}");
        assert!(remedied["cookie"].is_u64(), "{remedied}");
        assert_eq!(closed["how"], "destroyed", "{variant:?}: {closed}");
        assert_eq!(closed["cookie"], remedied["cookie"], "{closed}");
        assert_eq!(closed["closer"]["pid"], daemon.pid(), "{closed}");
        assert_eq!(closed["port_blocked_until"], Value::Null, "{closed}");
        let order = [&established, &remedied, &closed].map(|event| event["time"].as_str().unwrap());
        assert!(order.is_sorted(), "{order:?}");
        drop((client, listener));
        let (events, _) = daemon.stop();
        assert_eq!(events.iter().filter(|event| is_event("remedied", net.inode)(event)).count(), 1);
        Ok(())
    });
}

#[test]
fn dry_run_and_off_leave_the_connection_and_its_port_alone() {
    let net = TestNetns::enter_new();
    let mut dry = start(net, &HookVariant(vec![]), &["--remedy", "dry-run"]);
    let off = TestDaemon::start(&HookVariant(vec![]), &[]);
    let (client, target) = connect_to_self_by_chance(net, 40_100);
    let remedied = dry.expect(1, is_event("remedied", net.inode)).remove(0);
    assert_eq!(remedied["mode"], "dry-run", "{remedied}");
    assert_eq!(remedied["result"], "would_destroy", "{remedied}");
    assert!(remedied["cookie"].is_u64(), "{remedied}");
    assert!(is_connected(&client));
    assert_eq!(
        TcpListener::bind(target).map(drop).map_err(|error| error.kind()),
        Err(io::ErrorKind::AddrInUse)
    );
    drop(client);
    for daemon in [dry, off] {
        let mut daemon = daemon;
        let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
        assert_eq!(closed["how"], "rst", "{closed}");
        let (events, _) = daemon.stop();
        let is_off = !events.iter().any(|event| is_event("remedied", net.inode)(event));
        let results: Vec<_> = events.iter().filter(|event| is_event("remedied", net.inode)(event)).collect();
        assert!(is_off || results.len() == 1, "{results:?}");
    }
}

/// Each address family, and sockets that are bound to an interface.
#[test]
fn every_kind_of_self_connection_is_destroyed() {
    let net = TestNetns::enter_new();
    net.add_address(Ipv4Addr::new(192, 0, 2, 1));
    let local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);
    net.add_address_v6(local);
    let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "destroy", "--remedy-rate", "100"]);
    let plain = |address: &str| SocketAddr::new(address.parse().unwrap(), 0);
    let rows = [
        (plain("127.0.0.1"), false),
        (plain("192.0.2.1"), false),
        (plain("::1"), false),
        (plain("::ffff:127.0.0.1"), false),
        (SocketAddrV6::new(local, 0, 0, 1).into(), false),
        (plain("127.0.0.1"), true),
        (plain("::1"), true),
    ];
    for (count, (address, to_interface)) in (1..).zip(rows) {
        let client = socket(address.ip());
        if to_interface {
            client.bind_device(Some(b"lo")).unwrap();
        }
        client.bind(&address.into()).unwrap();
        client.connect(&client.local_addr().unwrap()).unwrap();
        let remedied = daemon.expect(count, is_event("remedied", net.inode)).pop().unwrap();
        assert_eq!(remedied["result"], "destroyed", "{address} {to_interface}: {remedied}");
        assert_aborted(&client);
    }
    daemon.stop();
}

/// SO_BINDTODEVICE needs no privilege, in any state. The kernel then finds the socket by its new device only.
#[test]
fn a_self_connection_that_its_user_binds_to_a_device_later_is_destroyed() {
    let net = TestNetns::enter_new();
    let mut daemon = start(
        net,
        &HookVariant(vec![]),
        &["--remedy", "destroy", "--remedy-grace", "1s", "--reconcile", "1"],
    );
    let connect = || {
        become_user(NOBODY);
        let (client, _) = connect_to_self(LOCALHOST);
        client.bind_device(Some(b"lo")).unwrap();
        client
    };
    let client = thread::spawn(connect).join().unwrap();
    let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
    assert_eq!(remedied["result"], "destroyed", "{remedied}");
    assert_aborted(&client);
    let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
    assert_eq!(closed["how"], "destroyed", "{closed}");
    daemon.stop();
}

/// IPV6_ADDRFORM needs no privilege either.
#[test]
fn a_self_connection_that_its_user_makes_one_of_ipv4_later_is_destroyed() {
    let net = TestNetns::enter_new();
    let only = format!("netns={}", net.inode);
    let connect = || {
        become_user(NOBODY);
        let (client, _) = connect_to_self(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into());
        make_ipv4(&client);
        client
    };
    let client = thread::spawn(connect).join().unwrap();
    let scan = Command::new(selfconn()).args(["scan", "--json", "--only", &only]).output().unwrap();
    let rows = String::from_utf8(scan.stdout).unwrap();
    assert!(rows.contains(r#""family":"ipv4""#), "the kernel lists it so: {rows}");
    drop(client);

    let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "destroy", "--remedy-grace", "1s"]);
    let client = thread::spawn(connect).join().unwrap();
    let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
    assert_eq!(
        (&remedied["result"], &remedied["family"]),
        (&"destroyed".into(), &"ipv6".into()),
        "{remedied}"
    );
    assert_aborted(&client);
    let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
    assert_eq!((&closed["how"], &closed["id"]), (&"destroyed".into(), &remedied["id"]), "{closed}");
    daemon.stop();
}

/// Makes a connected IPv6 socket with v4-mapped addresses one of IPv4.
fn make_ipv4(socket: &Socket) {
    let family = libc::AF_INET;
    // SAFETY: the option takes a pointer to an int and its size.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_ADDRFORM,
            (&raw const family).cast(),
            size_of_val(&family) as libc::socklen_t,
        )
    };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
}

#[test]
fn a_port_named_by_the_client_stays_bound_and_is_not_reported_as_freed() {
    let net = TestNetns::enter_new();
    let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "destroy"]);
    let client = socket(LOCALHOST);
    // A free port number, which the client then names.
    let named = {
        let any = socket(LOCALHOST);
        any.bind(&SocketAddr::new(LOCALHOST, 0).into()).unwrap();
        any.local_addr().unwrap()
    };
    client.bind(&named).unwrap();
    client.connect(&named).unwrap();
    let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
    assert_eq!(remedied["result"], "destroyed", "{remedied}");
    assert_ne!(remedied["port_freed"], true, "{remedied}");
    assert_aborted(&client);
    let server = named.as_socket().unwrap();
    assert!(TcpListener::bind(server).is_err(), "the client keeps the port");
    drop(client);
    TcpListener::bind(server).unwrap();
    daemon.stop();
}

#[test]
fn connections_outside_the_remedy_filters_are_left_alone_and_reported() {
    let comm = own_comm();
    let net = TestNetns::enter_new();
    for (options, why) in [
        (["--remedy-except", &format!("comm={comm}")], format!("except comm={comm}")),
        (["--remedy-except", "port=*"], "except port=*".to_owned()),
        (["--remedy-only", "uid=4711"], "only uid=4711".to_owned()),
        (["--remedy-only", "container=*"], "only container=*".to_owned()),
    ] {
        let mut daemon = start(net, &HookVariant(vec![]), &[&["--remedy", "destroy"], &options[..]].concat());
        let (client, _) = connect_to_self(LOCALHOST);
        client.set_linger(Some(Duration::ZERO)).unwrap();
        let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
        assert_eq!(remedied["result"], "excepted", "{remedied}");
        assert!(remedied["why"].as_str().unwrap().starts_with(&why), "{remedied}");
        assert_eq!(remedied["port_freed"], Value::Null);
        assert!(is_connected(&client));
        drop(client);
        let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
        assert_eq!(closed["how"], "rst", "{closed}");
        daemon.stop();
    }
}

#[test]
fn connections_from_before_the_daemon_are_remedied() {
    let net = TestNetns::enter_new();
    // The daemon takes snapshots in the namespaces of processes.
    let mut netns_process = HelperProcess::start("wait");
    netns_process.read_output();
    let (client, port) = connect_to_self(LOCALHOST);
    let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "destroy"]);
    let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
    assert_eq!(
        (&remedied["source"], &remedied["result"]),
        (&"scan".into(), &"destroyed".into()),
        "{remedied}"
    );
    assert_eq!(remedied["port"], port);
    assert_aborted(&client);
    let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
    assert_eq!(closed["how"], "destroyed", "{closed}");
    daemon.stop();
    netns_process.finish();
}

#[test]
fn only_a_connection_that_outlives_the_grace_period_is_destroyed() {
    let net = TestNetns::enter_new();
    let options = ["--remedy", "destroy", "--remedy-grace", "1s"];
    let mut daemon = start(net, &HookVariant(vec![]), &options);
    let (short, _) = connect_to_self(LOCALHOST);
    short.set_linger(Some(Duration::ZERO)).unwrap();
    drop(short);
    let (long, _) = connect_to_self(LOCALHOST);
    let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
    let closed = daemon.expect(2, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    assert_aborted(&long);
    assert_eq!(events.iter().filter(|event| is_event("remedied", net.inode)(event)).count(), 1);
    assert_eq!((&closed[0]["how"], &closed[1]["how"]), (&"rst".into(), &"destroyed".into()));
    assert_eq!(remedied["id"], closed[1]["id"]);
    let lived = closed[1]["duration_ns"].as_u64().unwrap();
    assert!(lived >= 1_000_000_000, "it lived for the grace period: {lived}");
}

/// 150 connections of an unprivileged user stand before the one that keeps a server out.
#[test]
fn the_connections_of_one_user_do_not_delay_the_remedy_of_another() {
    let net = TestNetns::enter_new();
    let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "destroy", "--remedy-rate", "10"]);
    let mut flooder = HelperProcess::start_unprivileged("connect and hold 150", None);
    flooder.read_output();
    daemon.expect(150, is_event("established", net.inode));
    let (victim, port) = connect_to_self(LOCALHOST);
    let began = Instant::now();
    let is_destroyed =
        |event: &Value| is_event("remedied", net.inode)(event) && event["result"] == "destroyed";
    daemon.expect(1, |event| is_destroyed(event) && event["port"] == port);
    let waited = began.elapsed();
    println!("destroyed after {waited:?}");
    assert!(waited < Duration::from_millis(1_500), "{waited:?}");
    assert_aborted(&victim);
    // The flooder's own connections are destroyed in the order in which they are due.
    let ids = |daemon: &TestDaemon, matches: &dyn Fn(&Value) -> bool| -> Vec<Value> {
        let is_flooders = |event: &&Value| matches(event) && event["uid"] == UNPRIVILEGED;
        daemon.received().iter().filter(is_flooders).map(|event| event["id"].clone()).collect()
    };
    daemon.expect(20, is_destroyed);
    let destroyed = ids(&daemon, &is_destroyed);
    let established = ids(&daemon, &is_event("established", net.inode));
    assert_eq!(destroyed[..], established[..destroyed.len()]);
    flooder.finish();
    daemon.stop();
}

#[test]
fn the_rate_limit_delays_some_and_skips_none() {
    let net = TestNetns::enter_new();
    let count = 6;
    let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "destroy", "--remedy-rate", "3"]);
    let clients: Vec<_> = (0..count).map(|_| connect_to_self(LOCALHOST).0).collect();
    let closed = daemon.expect(count, is_event("closed", net.inode));
    let (events, _) = daemon.stop();
    clients.iter().for_each(assert_aborted);
    assert!(closed.iter().all(|event| event["how"] == "destroyed"));
    let times = |result: &'static str| -> Vec<jiff::Timestamp> {
        let is_match = |event: &&Value| is_event("remedied", net.inode)(event) && event["result"] == result;
        events.iter().filter(is_match).map(|event| event["time"].as_str().unwrap().parse().unwrap()).collect()
    };
    assert!(!times("rate_limited").is_empty() && times("rate_limited").len() <= count - 3, "{events:#?}");
    let destroyed = times("destroyed");
    assert_eq!(destroyed.len(), count);
    // Three at once, and then one each third of a second. A request may be executed late, but not early.
    let spread = destroyed[count - 1].duration_since(destroyed[0]).as_millis();
    assert!(spread > 700, "{spread} ms");
}

//! Early warning only where connect() can choose the port: refused connects to a port that somebody in the namespace
//! has bound, at another address or of the other family, are no risk while that lasts.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{
    accounting::number,
    client::socket,
    daemon::{HookVariant, TestDaemon, is_event},
    netns::TestNetns,
    refused_connects::{WIDE_PORT_RANGE, at, connect_refused, enter_wide_range_netns, is_at_risk},
};

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// A port that nobody has; its event comes after the events of everything before it.
const MARKER: u16 = 40_900;

fn has_at_risk(daemon: &TestDaemon, port: u16, net: TestNetns) -> bool {
    daemon.received().iter().any(is_at_risk(port, net))
}

/// Waits until everything so far is reported.
fn flush(daemon: &mut TestDaemon, net: TestNetns) {
    connect_refused(at(MARKER), 20);
    daemon.expect(1, is_at_risk(MARKER, net));
}

/// True if the socket table shows sockets that are bound and idle, as the daemon finds out.
fn shows_idle_sockets() -> bool {
    let btf = std::fs::read("/sys/kernel/btf/vmlinux").unwrap_or_default();
    let name = b"TCP_BOUND_INACTIVE\0";
    btf.windows(name.len()).any(|bytes| bytes == name)
}

/// Connects until the port is reported. Returns the time from `since` to the event.
fn time_until_at_risk(
    daemon: &mut TestDaemon,
    target: SocketAddr,
    net: TestNetns,
    since: jiff::Timestamp,
) -> Duration {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        connect_refused(target, 1);
        let is_reported = is_at_risk(target.port(), net);
        if let Ok(events) = daemon.wait_until(Instant::now() + Duration::from_millis(5), 1, &is_reported) {
            let time: jiff::Timestamp = events[0]["time"].as_str().unwrap().parse().unwrap();
            return Duration::try_from(time.duration_since(since)).unwrap_or_default();
        }
        assert!(Instant::now() < until, "{target} is not reported: {:#?}", daemon.received());
    }
}

#[test]
fn clients_of_localhost_are_no_risk_beside_a_server_of_the_other_family_until_it_is_gone() {
    let net = enter_wide_range_netns();
    let v6 = IpAddr::from(Ipv6Addr::LOCALHOST);
    for (port, server, target) in
        [(40_910, Ipv4Addr::UNSPECIFIED, v6), (40_912, Ipv4Addr::new(127, 0, 0, 9), IpAddr::from(LOCALHOST))]
    {
        let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["-vv"]);
        let server = TcpListener::bind((server, port)).unwrap();
        let target = SocketAddr::new(target, port);
        // Two of these thresholds are crossed, and the kernel never chooses the port.
        let (began, looks) = (Instant::now(), || daemon_looks(&daemon));
        let before = looks();
        let mut connects = 0;
        while began.elapsed() < Duration::from_secs(3) || connects < 300 {
            assert!(TcpStream::connect(target).is_err(), "{target}");
            connects += 1;
        }
        let (took, looks) = (began.elapsed(), looks() - before);
        println!("FACT bound_port connects={connects} seconds={} looks={looks}", took.as_secs());
        // One a second, one for each threshold, and the first.
        assert!(looks <= took.as_secs() as usize + 6, "{looks} in {took:?}");
        flush(&mut daemon, net);
        assert!(!has_at_risk(&daemon, port, net), "{:#?}", daemon.received());
        let since = jiff::Timestamp::now();
        drop(server);
        let delay = time_until_at_risk(&mut daemon, target, net, since);
        println!("FACT bound_port_free reported_after_ms={}", delay.as_millis());
        // Emulated machines are slow.
        assert!(
            delay < Duration::from_millis(900),
            "as if nothing but the next check had shown it: {delay:?}"
        );
        let at_risk = daemon.expect(1, is_at_risk(port, net)).remove(0);
        assert_eq!(at_risk["may_be_bound"], !shows_idle_sockets(), "{at_risk}");
        daemon.stop();
    }
}

#[test]
fn listeners_that_open_and_close_in_a_loop_make_few_reports_and_few_looks() {
    let net = enter_wide_range_netns();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["-vv"]);
    let elsewhere = SocketAddr::from(([127, 0, 0, 9], 40_950));
    let server = TcpListener::bind(elsewhere).unwrap();
    connect_refused(at(40_950), 20);
    flush(&mut daemon, net);
    drop(server);
    let (began, before) = (Instant::now(), daemon_looks(&daemon));
    let mut closes = 0;
    while began.elapsed() < Duration::from_secs(2) || closes < 300 {
        // The kernel may still be closing the one before.
        closes += usize::from(TcpListener::bind(elsewhere).is_ok());
    }
    // The report of the marker comes after these looks.
    connect_refused(at(MARKER), 180);
    daemon.expect(2, is_at_risk(MARKER, net));
    let (took, looks) = (began.elapsed(), daemon_looks(&daemon) - before);
    let (events, _) = daemon.stop();
    let records = number(events.last().unwrap(), "/matched") as usize;
    println!("FACT listener_loop closes={closes} looks={looks} records={records} seconds={}", took.as_secs());
    let at_most = 50 * (took.as_secs() as usize + 1) + 10;
    assert!(looks <= at_most, "{looks} in {took:?}");
    assert!(records <= 2 * at_most + 100, "{records} records of {closes} closes in {took:?}");
}

/// The socket of an accepted connection begins as a copy of its listener, in LISTEN.
#[test]
fn an_accepted_connection_is_not_reported_as_the_end_of_its_listener() {
    let net = enter_wide_range_netns();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let elsewhere = SocketAddr::from(([127, 0, 0, 9], 40_960));
    let server = TcpListener::bind(elsewhere).unwrap();
    connect_refused(at(40_960), 20);
    flush(&mut daemon, net);
    let (began, mut accepted) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(2) || accepted < 300 {
        let client = socket2::Socket::from(TcpStream::connect(elsewhere).unwrap());
        client.set_linger(Some(Duration::ZERO)).unwrap();
        drop((server.accept().unwrap(), client));
        accepted += 1;
    }
    let (events, _) = daemon.stop();
    let records = number(events.last().unwrap(), "/matched");
    println!("FACT accepted connections={accepted} records={records}");
    // The port's threshold, and that of the marker. A self-connection of the refused ones has three.
    assert!(records <= 10, "{records} records of {accepted} accepted connections");
}

/// Number of times that the daemon looked at ports. Needs `-vv`.
fn daemon_looks(daemon: &TestDaemon) -> usize {
    daemon.stderr_so_far().matches("ports at risk: ").count()
}

#[test]
fn a_bound_socket_that_does_nothing_keeps_its_port_from_risk_where_the_kernel_shows_it() {
    let net = enter_wide_range_netns();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let bound = socket(LOCALHOST.into());
    bound.bind(&SocketAddr::from(([127, 0, 0, 9], 40_920)).into()).unwrap();
    connect_refused(at(40_920), 30);
    flush(&mut daemon, net);
    let (events, _) = daemon.stop();
    let at_risk: Vec<&Value> = events.iter().filter(|event| is_at_risk(40_920, net)(event)).collect();
    match shows_idle_sockets() {
        true => assert!(at_risk.is_empty(), "{at_risk:#?}"),
        false => assert_eq!(at_risk[0]["may_be_bound"], true, "{at_risk:#?}"),
    }
}

#[test]
fn a_connection_whose_port_connect_chose_keeps_nobody_from_risk() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let server = TcpListener::bind((LOCALHOST, 0)).unwrap();
    net.set_sysctl("ip_local_port_range", "40930 40930");
    let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    assert_eq!(client.local_addr().unwrap().port(), 40_930);
    net.set_sysctl("ip_local_port_range", WIDE_PORT_RANGE);
    connect_refused(at(40_930), 20);
    let at_risk = daemon.expect(1, is_at_risk(40_930, net)).remove(0);
    assert_eq!(at_risk["may_be_bound"], true, "who chose the port is not seen: {at_risk}");
    // And it can be hit.
    net.set_sysctl("ip_local_port_range", "40930 40930");
    let hit = TcpStream::connect(at(40_930)).unwrap();
    let established = daemon.expect(1, is_event("established", net.inode)).remove(0);
    assert_eq!(established["port"], 40_930, "{established}");
    drop((hit, client));
    daemon.stop();
}

#[test]
fn connections_of_a_server_that_is_gone_keep_its_port_from_risk() {
    let net = enter_wide_range_netns();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let server = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 9), 40_940)).unwrap();
    let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    let (accepted, _) = server.accept().unwrap();
    connect_refused(at(40_940), 30);
    flush(&mut daemon, net);
    drop(server);
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        connect_refused(at(40_940), 1);
        thread::sleep(Duration::from_millis(5));
    }
    connect_refused(at(MARKER), 180);
    daemon.expect(2, is_at_risk(MARKER, net));
    assert!(!has_at_risk(&daemon, 40_940, net), "{:#?}", daemon.received());
    // No TIME_WAIT, which would keep the port, too.
    socket2::SockRef::from(&accepted).set_linger(Some(Duration::ZERO)).unwrap();
    drop((accepted, client));
    let since = jiff::Timestamp::now();
    time_until_at_risk(&mut daemon, at(40_940), net, since);
    daemon.stop();
}

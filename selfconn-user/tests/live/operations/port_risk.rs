//! Early warning: processes that keep connecting to a closed port that `connect()` can choose as source port
//! are reported, before an attempt becomes a self-connection.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::{process::Signal, thread::CapabilitySet};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::support::{
    client::{connect_to_self, connect_until_self, is_connected, socket},
    daemon::{DEADLINE, HookVariant, TestDaemon, doctor, is_event, scaled},
    helper_process::HelperProcess,
    netns::TestNetns,
    privileges::start_as_user,
    refused_connects::{WIDE_PORT_RANGE, at, connect_refused, enter_wide_range_netns, is_at_risk},
    retries::{Missed, PREEMPTED, for_each_variant_retrying},
};

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

#[test]
fn connects_that_cannot_self_connect_are_not_reported() {
    let net = enter_wide_range_netns();
    net.set_sysctl("ip_local_reserved_ports", "40010-40019");
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    // The other parity, a reserved port, and a port outside the range.
    for port in [40_001, 40_010, 20_000] {
        connect_refused(at(port), 30);
    }
    for _ in 0..30 {
        // From another address, and from a port that the program bound.
        TcpStream::connect((Ipv4Addr::new(127, 0, 0, 2), 40_020)).unwrap_err();
        let bound = socket(LOCALHOST.into());
        bound.bind(&at(0).into()).unwrap();
        bound.connect(&at(40_022).into()).unwrap_err();
        // A port with a listener.
        let listener = TcpListener::bind(at(0)).unwrap();
        TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    }
    // No answer until the program gives up: a listener whose queue is full.
    let listener = socket(LOCALHOST.into());
    listener.bind(&at(40_024).into()).unwrap();
    listener.listen(0).unwrap();
    let waiting: Vec<_> = (0..40)
        .map(|_| {
            let client = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
            let _ = client.connect(&at(40_024).into());
            client
        })
        .collect();
    drop(waiting);
    connect_refused(at(40_030), 20);
    daemon.expect(1, is_at_risk(40_030, net));
    let (events, _) = daemon.stop();
    let reported: Vec<_> = events.iter().filter(|event| is_event("at_risk", net.inode)(event)).collect();
    assert_eq!(reported.len(), 1, "{reported:#?}");
}

#[test]
fn connects_from_many_processes_are_one_port_at_risk() {
    let net = enter_wide_range_netns();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let mut last = 0;
    for _ in 0..20 {
        let mut client = HelperProcess::start("connect refused 127.0.0.1:40040");
        client.read_output();
        last = client.pid();
        client.finish();
    }
    let event = daemon.expect(1, is_event("at_risk", net.inode)).remove(0);
    assert_eq!((&event["dialers"], &event["refused"]), (&20.into(), &20.into()), "{event}");
    assert_eq!((&event["pid"], &event["comm"]), (&last.into(), &"a-connector".into()), "{event}");
    daemon.stop();
}

#[test]
fn a_port_that_is_no_longer_reserved_is_at_risk_and_then_hit() {
    const MAX_ATTEMPTS: usize = 20_000;
    const PORT: u16 = 40_100;
    // A connect may hit before the daemon notices the new range. Then the test starts again.
    for _ in 0..10 {
        let net = TestNetns::enter_new();
        net.set_sysctl("ip_local_port_range", "40000 40199");
        net.set_sysctl("ip_local_reserved_ports", "40100");
        let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
        assert!(connect_until_self(at(PORT), 200).is_none(), "a reserved port is not hit");
        // An event about another port shows that this port was not reported.
        connect_until_self(at(40_102), 20);
        daemon.expect(1, |event| is_at_risk(40_102, net)(event) || is_event("established", net.inode)(event));
        let (is_reported, has_hit) = (AtomicBool::new(false), AtomicBool::new(false));
        net.set_sysctl("ip_local_reserved_ports", "\n");
        let event = thread::scope(|scope| {
            scope.spawn(|| {
                let until = Instant::now() + DEADLINE;
                let is_done = || is_reported.load(Ordering::Relaxed) || has_hit.load(Ordering::Relaxed);
                while !is_done() && Instant::now() < until {
                    has_hit.store(connect_until_self(at(PORT), 1).is_some(), Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(10));
                }
            });
            let is_match = |event: &Value| {
                event["port"] == PORT && (event["event"] == "at_risk" || event["event"] == "established")
            };
            let event = daemon.expect(1, |event| event["netns"] == net.inode && is_match(event)).remove(0);
            is_reported.store(true, Ordering::Relaxed);
            event
        });
        if event["event"] == "established" || has_hit.into_inner() {
            continue;
        }
        // All connects count if the daemon noticed the change before the next one.
        assert!(event["refused"].as_u64().unwrap() >= 200, "earlier connects count: {event}");
        assert_eq!(event["expected_dials"], 100, "{event}");
        connect_until_self(at(PORT), MAX_ATTEMPTS).expect("an even port of the range is hit");
        let hit =
            daemon.expect(1, |event| is_event("established", net.inode)(event) && event["port"] == PORT);
        assert_eq!(hit[0]["cause"], "ephemeral");
        daemon.stop();
        return;
    }
    panic!("a connect hit before the port was reported, ten times");
}

/// A user can make a self-connection each minute at a port to which another one connects.
#[test]
fn the_time_wait_of_a_self_connection_withholds_no_warning() {
    const PORT: u16 = 40_100;
    // The TIME_WAIT takes 60 seconds.
    const BEFORE_ITS_END: Duration = Duration::from_secs(45);
    let net = TestNetns::enter_new();
    let hit_until = |until| {
        net.set_sysctl("ip_local_port_range", "40000 40199");
        let hit = std::iter::from_fn(|| (Instant::now() < until).then(|| connect_until_self(at(PORT), 1)));
        let hit = hit.flatten().next().expect("the port is hit");
        net.set_sysctl("ip_local_port_range", WIDE_PORT_RANGE);
        hit
    };
    // Before the daemon starts, so that it counts none of these attempts.
    drop(hit_until(Instant::now() + DEADLINE));
    let closed = Instant::now();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    connect_refused(at(PORT), 20);
    let event = daemon.expect(1, is_at_risk(PORT, net)).remove(0);
    assert!(closed.elapsed() < BEFORE_ITS_END, "{event}");
    assert_eq!(event["may_be_bound"], true, "a TIME_WAIT does not show whether its port was bound: {event}");
    // The warning is right, because connect() takes over the TIME_WAIT.
    drop(hit_until(closed + BEFORE_ITS_END));
    daemon.stop();
}

/// A socket that is bound to a device is no obstacle for one that is not, so any user can make it, and keep it.
#[test]
fn a_self_connection_of_a_device_withholds_no_warning() {
    const PORT: u16 = 40_100;
    const MAX_ATTEMPTS: usize = 20_000;
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", "40000 40199");
    let of_device = connect_until_self(at(PORT), MAX_ATTEMPTS).expect("the port is hit");
    of_device.bind_device(Some(b"lo")).unwrap();
    net.set_sysctl("ip_local_port_range", WIDE_PORT_RANGE);
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    connect_refused(at(PORT), 20);
    let event = daemon.expect(1, is_at_risk(PORT, net)).remove(0);
    assert_eq!(event["may_be_bound"], true, "{event}");
    // The warning is right.
    net.set_sysctl("ip_local_port_range", "40000 40199");
    let hit = connect_until_self(at(PORT), MAX_ATTEMPTS).expect("the port is hit again");
    net.set_sysctl("ip_local_port_range", WIDE_PORT_RANGE);
    assert!(is_connected(&of_device) && is_connected(&hit));
    // A TIME_WAIT there would be taken over before the kernel comes to the other connection.
    hit.set_linger(Some(Duration::ZERO)).unwrap();
    drop(hit);
    // One that is bound to no device has the port alone.
    of_device.bind_device(None).unwrap();
    net.set_sysctl("ip_local_port_range", "40000 40199");
    assert!(connect_until_self(at(PORT), 2_000).is_none(), "the port is taken");
    daemon.stop();
}

#[test]
fn a_risk_is_over_after_a_minute_of_silence_or_when_the_port_is_reserved() {
    let net = enter_wide_range_netns();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let (silent, reserved) = (at(40_050), at(40_052));
    connect_refused(silent, 20);
    connect_refused(reserved, 20);
    let at_risk = daemon.expect(2, is_event("at_risk", net.inode));
    assert_ne!(at_risk[0]["id"], at_risk[1]["id"]);
    net.set_sysctl("ip_local_reserved_ports", "40052");
    // This takes longer than the deadline of `expect`.
    let until = Instant::now() + Duration::from_secs(62);
    while Instant::now() < until {
        connect_refused(reserved, 1);
        thread::sleep(Duration::from_secs(1));
    }
    let over = daemon.expect(2, is_event("at_risk_over", net.inode));
    for event in over {
        let why = if event["port"] == 40_050 { "silence" } else { "unreachable" };
        assert_eq!(event["why"], why, "{event}");
        let begin = at_risk.iter().find(|begin| begin["port"] == event["port"]).unwrap();
        assert_eq!(event["id"], begin["id"], "the same risk");
    }
    // A new risk begins after the old one is over.
    connect_refused(silent, 20);
    let events = daemon.expect(2, is_at_risk(40_050, net));
    assert_eq!(events[1]["refused"], 20, "{}", events[1]);
    assert_ne!(events[0]["id"], events[1]["id"], "another risk");
    daemon.stop();
}

#[test]
fn a_flood_of_refused_connects_hides_no_self_connection() {
    let net = enter_wide_range_netns();
    // Room in the ring buffer for the records of about fifty self-connections and for nothing else, because
    // the daemon is stopped meanwhile.
    const SELF_CONNECTIONS: usize = 50;
    for_each_variant_retrying(PREEMPTED, |variant| {
        let mut daemon = TestDaemon::start(variant, &["--ring-size", "64K"]);
        // A range of the other parity, so that the flood never hits.
        net.set_sysctl("ip_local_port_range", "32769 60999");
        daemon.signal(Signal::STOP);
        let is_over = AtomicBool::new(false);
        let (refused, took) = thread::scope(|scope| {
            let flood = |port| {
                let is_over = &is_over;
                move || {
                    let mut count = 0;
                    while !is_over.load(Ordering::Relaxed) || count < scaled(30_000) {
                        let socket = socket(LOCALHOST.into());
                        count += usize::from(socket.connect(&at(port).into()).is_err());
                    }
                    count
                }
            };
            let began = Instant::now();
            let floods = [scope.spawn(flood(40_060)), scope.spawn(flood(40_062))];
            for _ in 0..SELF_CONNECTIONS {
                let (socket, _) = connect_to_self(Ipv4Addr::new(127, 0, 1, 1).into());
                socket.set_linger(Some(Duration::ZERO)).unwrap();
            }
            is_over.store(true, Ordering::Relaxed);
            let refused = floods.map(|flood| flood.join().unwrap()).iter().sum::<usize>();
            (refused, began.elapsed())
        });
        net.set_sysctl("ip_local_port_range", WIDE_PORT_RANGE);
        daemon.signal(Signal::CONT);
        daemon.try_expect(SELF_CONNECTIONS, is_event("closed", net.inode))?;
        // Every connect was counted exactly once, although two CPUs and two programs did it.
        let reported = daemon.expect(2, is_event("at_risk", net.inode));
        let counted: u64 = reported.iter().map(|event| event["refused"].as_u64().unwrap()).sum();
        if counted < refused as u64 && !variant.is_lossless() {
            return Err(Missed(format!("{counted} of {refused} refused connects were counted")));
        }
        assert_eq!(counted, refused as u64, "{variant:?}: {reported:#?}");
        let (events, _) = daemon.stop();
        println!(
            "FACT refused_flood method={:?} refused={refused} a_second={:.0}",
            variant.0.last(),
            refused as f64 / took.as_secs_f64()
        );
        let established: Vec<_> =
            events.iter().filter(|event| is_event("established", net.inode)(event)).collect();
        assert_eq!(established.len(), SELF_CONNECTIONS, "{variant:?}");
        for event in established {
            Missed::if_opener_unseen(event)?;
            assert_eq!(event["pid"], std::process::id(), "{event}");
        }
        assert_eq!(events.last().unwrap()["lost"]["ring"], 0, "{variant:?}");
        Ok(())
    });
}

#[test]
fn refused_connects_beyond_the_table_size_are_counted() {
    let net = enter_wide_range_netns();
    let daemon = TestDaemon::start(&HookVariant(vec![]), &["--refused-table", "4"]);
    for port in (40_070..40_090).step_by(2) {
        connect_refused(at(port), 3);
    }
    let (events, _) = daemon.stop();
    let lost = &events.last().unwrap()["lost"];
    // Connects of other programs may be included.
    assert!(lost["refused_table"].as_u64().unwrap() >= 6 * 3, "{net:?}: {lost}");
    assert!(events.iter().any(|event| event["event"] == "lost" && event["where"] == "refused_table"));
}

#[test]
fn a_namespace_that_cannot_be_entered_leaves_the_odds_unknown() {
    let _outside = TestNetns::enter_new();
    let (mut daemon, _dir) =
        start_as_user(CapabilitySet::BPF | CapabilitySet::PERFMON, &["--hooks", "tracepoint"]);
    let net = enter_wide_range_netns();
    connect_refused(at(40_092), 20);
    let event = daemon.expect(1, is_event("at_risk", net.inode)).remove(0);
    assert_eq!(event["refused"], 20, "{event}");
    assert_eq!(event["expected_dials"], Value::Null, "{event}");
    assert_eq!(event["eta_seconds"], Value::Null, "{event}");
    assert!(event["range_unknown"].is_string(), "{event}");
    daemon.stop();
}

#[test]
fn a_risk_is_over_when_its_namespace_has_ended() {
    let _net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1", "-vv"]);
    let at_risk = || {
        TestNetns::with_new_in_helper(|net| {
            net.set_sysctl("ip_local_port_range", WIDE_PORT_RANGE);
            connect_refused(at(40_040), 30);
            (net, std::fs::File::open("/proc/thread-self/ns/net").unwrap())
        })
    };
    let (kept, _keeper) = at_risk();
    let (ended, keeper) = at_risk();
    for net in [kept, ended] {
        daemon.expect(1, is_at_risk(40_040, net));
    }
    drop(keeper);
    if doctor()["namespaces"][0]["verdict"] == "ok" {
        let over = daemon.expect(1, is_event("at_risk_over", ended.inode)).remove(0);
        assert_eq!((&over["why"], &over["refused"]), (&"netns_ended".into(), &30.into()), "{over}");
    }
    daemon.run_until_snapshots(2, || thread::sleep(Duration::from_millis(20)));
    let is_over = |event: &&Value| is_event("at_risk_over", kept.inode)(event);
    assert_eq!(daemon.received().iter().filter(is_over).count(), 0, "its namespace exists");
    daemon.stop();
}

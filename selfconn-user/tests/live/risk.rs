//! Early warning: who keeps dialling a closed port that `connect()` can choose is told, before a dial hits itself.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rustix::{process::Signal, thread::CapabilitySet};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::{
    client::{connect_to_self, dial_until_self, own_comm, socket},
    daemon::{DEADLINE, Daemon, Variant, by_thread, for_each_variant, of, scaled, selfconn, steady_variants},
    net::Net,
    role::Role,
};

const HOME: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Wide enough that some hundred dials hardly ever hit, whatever the host's own range is.
const WIDE: &str = "32768 60999";

fn wide() -> Net {
    let net = Net::private();
    net.sysctl("ip_local_port_range", WIDE);
    net
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::new(HOME.into(), port)
}

/// So many dials that are refused. In a wide range one in some hundred runs of this hits itself; it is dialled once
/// more then.
fn dial(target: SocketAddr, count: usize) {
    for _ in 0..count {
        while let Ok(hit) = TcpStream::connect(target) {
            Socket::from(hit).set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
}

fn about(port: u16, net: Net) -> impl Fn(&Value) -> bool {
    move |event| of("at_risk", net.inode)(event) && event["port"] == port
}

#[test]
fn the_twentieth_refused_dial_and_each_tenfold_are_told_by_every_method() {
    let net = wide();
    for variant in steady_variants() {
        for address in [IpAddr::from(HOME), Ipv6Addr::LOCALHOST.into()] {
            let mut daemon = Daemon::start(&variant, &[]);
            let (few, often) = (SocketAddr::new(address, 40_000), SocketAddr::new(address, 40_002));
            dial(few, 19);
            dial(often, 20);
            let dialled = SystemTime::now();
            let event = daemon.expect(1, of("at_risk", net.inode)).remove(0);
            assert_eq!(event["port"], 40_002, "{variant:?}: nineteen are not told: {event}");
            assert_eq!(event["addr"], address.to_string());
            // Each dial once, though two programs see it.
            assert_eq!((&event["refused"], &event["dialers"]), (&20.into(), &1.into()), "{event}");
            assert_eq!(event["pid"], std::process::id(), "{event}");
            assert_eq!(event["comm"], by_thread(&own_comm()), "{event}");
            // Where nobody knows when a dialler started, it isn't looked up.
            let exe = by_thread(std::env::current_exe().unwrap().to_str().unwrap());
            assert_eq!(event["exe"], exe, "{event}");
            assert_eq!(event["expected_dials"], 14_116, "{event}");
            assert_eq!(event["range_unknown"], Value::Null, "{event}");
            let expected = event["window_ns"].as_u64().unwrap() as f64 / 19.0 * 14_116.0 / 1e9;
            let eta = event["eta_seconds"].as_u64().unwrap() as f64;
            assert!((expected..=expected + 1.0).contains(&eta), "{eta} for {expected}: {event}");
            let told: jiff::Timestamp = event["time"].as_str().unwrap().parse().unwrap();
            let late = SystemTime::from(told).duration_since(dialled).unwrap_or_default();
            println!("FACT risk method={:?} told_after_ms={}", variant.0.last(), late.as_millis());

            dial(often, 179);
            // The last words are told after anything that was told of these.
            dial(few, 1);
            daemon.expect(1, about(40_000, net));
            dial(often, 1);
            let events = daemon.expect(2, about(40_002, net));
            assert_eq!(events[1]["refused"], 200, "{}", events[1]);
            let (events, _) = daemon.stop();
            assert_eq!(events.iter().filter(|event| about(40_002, net)(event)).count(), 2);
            assert_eq!(events.last().unwrap()["lost"]["dials"], 0);
        }
    }
}

#[test]
fn dials_that_can_not_hit_themselves_are_not_told() {
    let net = wide();
    net.sysctl("ip_local_reserved_ports", "40010-40019");
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
    // The other parity, reserved, outside.
    for port in [40_001, 40_010, 20_000] {
        dial(at(port), 30);
    }
    for _ in 0..30 {
        // From another address, and from a port of the program's own.
        TcpStream::connect((Ipv4Addr::new(127, 0, 0, 2), 40_020)).unwrap_err();
        let bound = socket(HOME.into());
        bound.bind(&at(0).into()).unwrap();
        bound.connect(&at(40_022).into()).unwrap_err();
        // Somebody listens.
        let listener = TcpListener::bind(at(0)).unwrap();
        TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    }
    // Nobody answers, and the program gives up: a listener whose queue is full.
    let listener = socket(HOME.into());
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
    dial(at(40_030), 20);
    daemon.expect(1, about(40_030, net));
    let (events, _) = daemon.stop();
    let told: Vec<_> = events.iter().filter(|event| of("at_risk", net.inode)(event)).collect();
    assert_eq!(told.len(), 1, "{told:#?}");
}

#[test]
fn a_new_process_for_each_dial_is_one_port_at_risk() {
    let net = wide();
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
    let mut last = 0;
    for _ in 0..20 {
        let mut dialler = Role::start("dial 127.0.0.1:40040");
        dialler.says();
        last = dialler.pid();
        dialler.end();
    }
    let event = daemon.expect(1, of("at_risk", net.inode)).remove(0);
    assert_eq!((&event["dialers"], &event["refused"]), (&20.into(), &20.into()), "{event}");
    assert_eq!((&event["pid"], &event["comm"]), (&last.into(), &"a-dialler".into()), "{event}");
    daemon.stop();
}

#[test]
fn a_port_that_is_released_is_at_risk_and_then_hit() {
    const LIMIT: usize = 20_000;
    const PORT: u16 = 40_100;
    // A dial may hit before the daemon looks; then all begins anew.
    for _ in 0..10 {
        let net = Net::private();
        net.sysctl("ip_local_port_range", "40000 40199");
        net.sysctl("ip_local_reserved_ports", "40100");
        let mut daemon = Daemon::start(&Variant(vec![]), &[]);
        assert!(dial_until_self(at(PORT), 200).is_none(), "a reserved port is not hit");
        // What is told of another port shows that nothing was told of this one.
        dial_until_self(at(40_102), 20);
        daemon.expect(1, |event| about(40_102, net)(event) || of("established", net.inode)(event));
        let (is_told, has_hit) = (AtomicBool::new(false), AtomicBool::new(false));
        net.sysctl("ip_local_reserved_ports", "\n");
        let event = thread::scope(|scope| {
            scope.spawn(|| {
                let until = Instant::now() + DEADLINE;
                let is_done = || is_told.load(Ordering::Relaxed) || has_hit.load(Ordering::Relaxed);
                while !is_done() && Instant::now() < until {
                    has_hit.store(dial_until_self(at(PORT), 1).is_some(), Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(10));
                }
            });
            let is_it = |event: &Value| {
                event["port"] == PORT && (event["event"] == "at_risk" || event["event"] == "established")
            };
            let event = daemon.expect(1, |event| event["netns"] == net.inode && is_it(event)).remove(0);
            is_told.store(true, Ordering::Relaxed);
            event
        });
        if event["event"] == "established" || has_hit.into_inner() {
            continue;
        }
        // All of them, if the daemon looked before the next one.
        assert!(event["refused"].as_u64().unwrap() >= 200, "the dials before count: {event}");
        assert_eq!(event["expected_dials"], 100, "{event}");
        dial_until_self(at(PORT), LIMIT).expect("an even port of the range is hit");
        let hit = daemon.expect(1, |event| of("established", net.inode)(event) && event["port"] == PORT);
        assert_eq!(hit[0]["cause"], "ephemeral");
        daemon.stop();
        return;
    }
    panic!("a dial hit before the port was told, ten times");
}

#[test]
fn a_risk_is_over_after_a_minute_of_silence_or_once_the_port_is_reserved() {
    let net = wide();
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
    let (silent, reserved) = (at(40_050), at(40_052));
    dial(silent, 20);
    dial(reserved, 20);
    daemon.expect(2, of("at_risk", net.inode));
    net.sysctl("ip_local_reserved_ports", "40052");
    // Longer than the deadline of `expect` has to be.
    let until = Instant::now() + Duration::from_secs(62);
    while Instant::now() < until {
        dial(reserved, 1);
        thread::sleep(Duration::from_secs(1));
    }
    let over = daemon.expect(2, of("at_risk_over", net.inode));
    for event in over {
        let why = if event["port"] == 40_050 { "silence" } else { "unreachable" };
        assert_eq!(event["why"], why, "{event}");
    }
    // Another begins where one ended.
    dial(silent, 20);
    let events = daemon.expect(2, about(40_050, net));
    assert_eq!(events[1]["refused"], 20, "{}", events[1]);
    daemon.stop();
}

#[test]
fn a_storm_of_refused_dials_hides_no_self_connection() {
    let net = wide();
    // Room for what some fifty self-connections make, and for nothing else: nobody reads meanwhile.
    const BESIDE: usize = 50;
    for_each_variant(|variant| {
        let mut daemon = Daemon::start(variant, &["--ring-size", "64K"]);
        // Of the other parity, so that the storm never hits.
        net.sysctl("ip_local_port_range", "32769 60999");
        daemon.signal(Signal::STOP);
        let is_over = AtomicBool::new(false);
        let (refused, took) = thread::scope(|scope| {
            let storm = |port| {
                let is_over = &is_over;
                move || {
                    let mut count = 0;
                    while !is_over.load(Ordering::Relaxed) || count < scaled(30_000) {
                        let socket = socket(HOME.into());
                        count += usize::from(socket.connect(&at(port).into()).is_err());
                    }
                    count
                }
            };
            let began = Instant::now();
            let storms = [scope.spawn(storm(40_060)), scope.spawn(storm(40_062))];
            for _ in 0..BESIDE {
                let (socket, _) = connect_to_self(Ipv4Addr::new(127, 0, 1, 1).into());
                socket.set_linger(Some(Duration::ZERO)).unwrap();
            }
            is_over.store(true, Ordering::Relaxed);
            let refused = storms.map(|storm| storm.join().unwrap()).iter().sum::<usize>();
            (refused, began.elapsed())
        });
        net.sysctl("ip_local_port_range", WIDE);
        daemon.signal(Signal::CONT);
        daemon.expect(BESIDE, of("closed", net.inode));
        // Every dial was counted, and once, though two CPUs and two programs did it.
        let told = daemon.expect(2, of("at_risk", net.inode));
        let counted: u64 = told.iter().map(|event| event["refused"].as_u64().unwrap()).sum();
        assert_eq!(counted, refused as u64, "{variant:?}: {told:#?}");
        let (events, _) = daemon.stop();
        println!(
            "FACT storm method={:?} refused={refused} a_second={:.0}",
            variant.0.last(),
            refused as f64 / took.as_secs_f64()
        );
        let established: Vec<_> = events.iter().filter(|event| of("established", net.inode)(event)).collect();
        assert_eq!(established.len(), BESIDE, "{variant:?}");
        for event in established {
            assert_eq!(event["pid"], std::process::id(), "{event}");
        }
        assert_eq!(events.last().unwrap()["lost"]["ring"], 0, "{variant:?}");
    });
}

#[test]
fn dials_without_room_in_the_table_are_counted() {
    let net = wide();
    let daemon = Daemon::start(&Variant(vec![]), &["--refusals", "4"]);
    for port in (40_070..40_090).step_by(2) {
        dial(at(port), 3);
    }
    let (events, _) = daemon.stop();
    let lost = &events.last().unwrap()["lost"];
    // Somebody else's dials may be among them.
    assert!(lost["dials"].as_u64().unwrap() >= 6 * 3, "{net:?}: {lost}");
    assert!(events.iter().any(|event| event["event"] == "lost" && event["where"] == "dials"));
}

#[test]
fn a_namespace_that_can_not_be_entered_leaves_the_odds_unknown() {
    const NOBODY: u32 = 65_534;
    let _outside = Net::private();
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), None).unwrap();
    let program = dir.path().join("selfconn");
    std::fs::copy(selfconn(), &program).unwrap();
    let mut daemon = Daemon::start_by(&Variant(vec![]), &["--hooks", "tracepoint"], |command| {
        use std::os::unix::process::CommandExt as _;
        let mut as_nobody = Command::new(&program);
        as_nobody.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let with = CapabilitySet::BPF | CapabilitySet::PERFMON;
        // SAFETY: system calls only, and none that allocates.
        unsafe { as_nobody.pre_exec(move || crate::privileges::become_user(NOBODY, with)) };
        as_nobody.spawn().unwrap()
    });
    let net = wide();
    dial(at(40_092), 20);
    let event = daemon.expect(1, of("at_risk", net.inode)).remove(0);
    assert_eq!(event["refused"], 20, "{event}");
    assert_eq!(event["expected_dials"], Value::Null, "{event}");
    assert_eq!(event["eta_seconds"], Value::Null, "{event}");
    assert!(event["range_unknown"].is_string(), "{event}");
    daemon.stop();
}

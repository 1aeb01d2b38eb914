//! The guard in operation: exemptions, its life and its end, other network namespaces, a second daemon.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    process::Command,
    sync::mpsc::{Sender, channel},
    thread,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions},
};
use selfconn::system::rtnetlink;
use serde_json::Value;

use super::audit::AuditOutput;
use crate::support::{
    attacker::{Attacker, AttackerKind},
    cgroup::TestCgroup,
    client::{NOBODY, become_user, connect_to_self, socket},
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event, selfconn},
    dedicated::is_dedicated_machine,
    devices::bind_device,
    guard::{count_of, dial, dial_itself, guard_methods, is_refused_within, refusing, wait_until},
    helper_process::HelperProcess,
    netns::TestNetns,
    refused_connects::{at, connect_refused, enter_wide_range_netns, is_at_risk},
};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOOPBACK: u32 = 1;

/// How long it may take after the first connect until a new namespace is guarded. The guard rests many times as long as
/// an attachment takes, and an emulated one takes long.
fn guarded_within() -> Duration {
    Duration::from_secs(if is_dedicated_machine() { 20 } else { 1 })
}

static TEST_PROGRAMS: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/selfconn-test-programs"));

fn is_refused() -> bool {
    !dial_itself(LOCALHOST).is_connected
}

/// Binds this port, and connects to it.
fn is_refused_at(port: u16) -> bool {
    let socket = socket(LOCALHOST);
    socket.set_reuse_address(true).unwrap();
    socket.bind(&std::net::SocketAddr::new(LOCALHOST, port).into()).unwrap();
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    !dial(&socket, (LOCALHOST, port).into()).is_connected
}

#[test]
fn exempt_ports_and_users_connect_to_themselves_and_their_neighbours_do_not() {
    TestNetns::enter_new();
    for method in guard_methods() {
        let daemon = refusing(method, &["--guard-except", "port=41000-41002", "--guard-except", "uid=65534"]);
        for (port, expected) in [(40_999, true), (41_000, false), (41_002, false), (41_003, true)] {
            assert_eq!(is_refused_at(port), expected, "{method}: port {port}");
        }
        let as_user = |uid| {
            thread::spawn(move || {
                become_user(uid);
                is_refused()
            })
            .join()
            .unwrap()
        };
        assert!(!as_user(NOBODY) && as_user(NOBODY - 1), "{method}");
        let (events, _) = daemon.stop();
        assert_eq!(count_of(&events), 3, "{method}");
        let daemon = refusing(method, &["--guard-only", "port=41000", "--guard-only", "uid=0"]);
        assert!(is_refused_at(41_000) && !is_refused_at(41_001), "{method}");
        daemon.stop();
    }
}

#[test]
fn repro_says_that_it_is_refused_and_which_exemption_lets_it_pass() {
    TestNetns::enter_new();
    let repro = |port: &str, mode| {
        Command::new(selfconn()).args(["repro", "127.0.0.1", port, "--mode", mode]).output().unwrap()
    };
    // Inside the range, and of the parity that connect() chooses.
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "42000 42099").unwrap();
    for method in guard_methods() {
        let daemon = refusing(method, &["--guard-except", "port=42010"]);
        for mode in ["bind", "retry"] {
            let refused = repro("42020", mode);
            let stderr = String::from_utf8(refused.stderr).unwrap();
            assert_eq!(refused.status.code(), Some(2), "{method} {mode}: {stderr}");
            assert!(stderr.contains("--guard-except port=42020"), "{method} {mode}: {stderr}");
        }
        let (events, _) = daemon.stop();
        assert_eq!(count_of(&events), 2, "{method}: it does not try again");
    }
    let daemon = refusing(guard_methods()[0], &["--guard-except", "port=42010"]);
    let passed = repro("42010", "retry");
    assert!(passed.status.success(), "{passed:?}");
    daemon.stop();
}

#[test]
fn a_unit_is_exempt_when_it_appears_and_only_if_root_gave_it_its_name() {
    TestNetns::enter_new();
    let dial_in = |group: &TestCgroup, below: &str| {
        let directory = group.path().join(below);
        fs::create_dir_all(&directory).unwrap();
        let mut client = HelperProcess::start(&format!("dial itself in cgroup {}", directory.display()));
        let outcome = client.read_output();
        client.finish();
        outcome
    };
    let daemon = refusing(guard_methods()[0], &["--guard-except", "unit=exempt-*.service"]);
    // The unit is not there at the start of the daemon. Its group is new after each restart.
    for restart in 0..2 {
        let group = match TestCgroup::create("exempt-1.service") {
            Ok(group) => group,
            Err(why) => return println!("skipped: {why}"),
        };
        wait_until(Duration::from_secs(10), "the unit is never exempt", || {
            dial_in(&group, "") == "connected"
        });
        assert_eq!(dial_in(&group, "below"), "connected", "a group of the unit, {restart}");
    }
    let neighbour = TestCgroup::create("neighbour.service").unwrap();
    assert_eq!(dial_in(&neighbour, ""), "refused");
    let delegated = TestCgroup::create("user@65534.service").unwrap();
    delegated.delegate();
    fs::create_dir_all(delegated.path().join("exempt-2.service")).unwrap();
    thread::sleep(Duration::from_millis(2_500));
    assert_eq!(dial_in(&delegated, "exempt-2.service"), "refused", "a name that a user gave");
    daemon.stop();
}

/// What `doctor` says about the guard, as JSON.
fn doctor_check() -> Value {
    let doctor = Command::new(selfconn()).args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == "guard").unwrap().clone()
}

#[test]
fn a_killed_daemon_leaves_no_guard_or_one_that_doctor_shows_and_the_next_start_removes() {
    TestNetns::enter_new();
    let none = doctor_check();
    assert!(none["ok"] == true && none["finding"].as_str().unwrap().starts_with("none"), "{none}");
    for method in guard_methods() {
        let daemon = refusing(method, &[]);
        assert!(is_refused());
        let (found, pid) = (doctor_check(), daemon.pid());
        let finding = found["finding"].as_str().unwrap();
        assert!(found["ok"] == true && finding.contains("on lo") && finding.contains(method), "{found}");
        daemon.signal(rustix::process::Signal::KILL);
        drop(daemon);
        if *method == "tcx" {
            wait_until(Duration::from_secs(5), "the link outlives its daemon", || !is_refused());
            continue;
        }
        // A filter stays, and names its daemon.
        assert!(is_refused());
        let left = rtnetlink::filters(LOOPBACK).unwrap();
        assert_eq!(left.len(), 1, "{left:?}");
        let found = doctor_check();
        let finding = found["finding"].as_str().unwrap();
        assert!(found["ok"] == false && finding.contains(&format!("pid {pid} has ended")), "{found}");
        assert!(found["hint"].as_str().unwrap().contains("tc filter del dev lo egress pref 1"), "{found}");
        let daemon = refusing(method, &[]);
        let now = rtnetlink::filters(LOOPBACK).unwrap();
        assert_eq!(now.len(), 1, "{now:?}");
        assert_ne!(now[0].name, left[0].name, "the left-over filter is removed");
        assert!(is_refused());
        daemon.stop();
        assert!(rtnetlink::filters(LOOPBACK).unwrap().is_empty() && !is_refused());
    }
}

#[test]
fn nothing_of_the_guard_is_left_on_lo_after_its_end() {
    TestNetns::enter_new();
    for method in guard_methods() {
        let daemon = refusing(method, &[]);
        assert!(is_refused());
        daemon.stop();
        wait_until(Duration::from_secs(5), "it still refuses", || !is_refused());
        assert!(rtnetlink::add_clsact(LOOPBACK).unwrap(), "{method}: clsact was left");
        rtnetlink::remove_unused_clsact(LOOPBACK).unwrap();
    }
}

#[test]
fn a_second_daemon_says_that_the_first_one_guards_and_goes_on_when_that_one_ends() {
    let net = TestNetns::enter_new();
    for method in guard_methods() {
        let first = refusing(method, &[]);
        let second = refusing(method, &[]);
        let is_second = |events: &[Value]| events[0]["guard"]["is_second"].clone();
        assert_eq!(is_second(first.received()), false, "{method}");
        assert_eq!(is_second(second.received()), true, "{method}");
        assert!(is_refused());
        first.signal(rustix::process::Signal::TERM);
        let (code, events, _) = first.wait_for_exit();
        assert_eq!((code, count_of(&events)), (Some(0), 1), "{method}");
        wait_until(Duration::from_secs(1), "nobody refuses", is_refused);
        let (events, _) = second.stop();
        let prevented: Vec<_> =
            events.iter().filter(|event| is_event("prevented", net.inode)(event)).collect();
        assert_eq!(count_of(prevented), 1, "{method}: the one after the end of the first");
    }
}

#[test]
fn a_namespace_made_while_the_daemon_runs_is_guarded_at_its_first_connect_and_nothing_keeps_it() {
    let net = TestNetns::enter_new();
    // Only a user that nobody else has, because the daemon guards every namespace of the host.
    const USER: u32 = 31_999;
    for method in guard_methods() {
        let options = ["--guard", "refuse", "--guard-method", method, "--guard-only", "uid=31999"];
        let daemon = TestDaemon::start(&HookVariant(vec![]), &options);
        let (report, reports) = channel();
        let (finish, finished) = channel::<()>();
        let inside = thread::spawn(move || {
            let inner = TestNetns::enter_new_in_helper();
            let file = fs::File::open("/proc/thread-self/ns/net").unwrap();
            become_user(USER);
            // The first one is how the daemon learns of the namespace.
            drop(connect_to_self(LOCALHOST));
            // An attachment by clsact loses packets.
            let is_guarded = || is_refused_within(LOCALHOST, Duration::from_millis(20));
            wait_until(guarded_within(), "the namespace is never guarded", is_guarded);
            report.send((inner.inode, file)).unwrap();
            finished.recv().unwrap();
        });
        let (inner, file) = reports.recv_timeout(DEADLINE).unwrap();
        assert_ne!(inner, net.inode);
        use std::os::fd::AsRawFd as _;
        let name = format!("peer-{method}");
        match net.add_device_with_peer_in(&name, file.as_raw_fd()) {
            Ok(()) => {
                drop(file);
                assert!(net.has_device(&name));
                finish.send(()).unwrap();
                inside.join().unwrap();
                // With the namespace its device ends, and with that the peer here.
                wait_until(Duration::from_secs(5), "the namespace lives on", || !net.has_device(&name));
            }
            Err(error) => {
                println!("FACT no_veth={error}");
                finish.send(()).unwrap();
                inside.join().unwrap();
            }
        }
        let (events, _) = daemon.stop();
        assert!(events.iter().any(is_event("prevented", inner)), "{method}");
    }
}

/// An address that VRF devices have, each in its own routing table.
const VRF_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// Makes a VRF device with [`VRF_ADDRESS`]. False: this kernel has no VRF.
fn add_vrf(net: TestNetns, name: &str, table: u32) -> bool {
    match net.add_vrf(name, table) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            println!("skipped: this kernel has no VRF");
            false
        }
        made => {
            net.add_device_address(made.unwrap(), VRF_ADDRESS);
            true
        }
    }
}

fn is_refused_in(device: &str) -> bool {
    let socket = socket(VRF_ADDRESS);
    bind_device(&socket, device);
    socket.bind(&std::net::SocketAddr::new(VRF_ADDRESS, 0).into()).unwrap();
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    !dial(&socket, socket.local_addr().unwrap().as_socket().unwrap()).is_connected
}

/// The guards on devices of this network namespace.
fn guarded_devices() -> usize {
    selfconn::bpf::found_guards::find().unwrap().len()
}

#[test]
fn a_namespace_with_many_vrf_devices_delays_no_other() {
    const USER: u32 = 31_999;
    const DEVICES: u32 = 12;
    let crowded = TestNetns::enter_new();
    for number in 1..=DEVICES {
        if !add_vrf(crowded, &format!("vrf{number}"), 100 + number) {
            return;
        }
    }
    // A thread leads nobody to its namespace, a process does.
    let inside = HelperProcess::start("wait");
    for method in guard_methods() {
        let guarded_first = thread::scope(|scope| {
            // The daemon is in another namespace.
            let beside = scope.spawn(|| {
                TestNetns::enter_new_in_helper();
                let options = ["--guard", "refuse", "--guard-method", method, "--guard-only", "uid=31999"];
                TestDaemon::start(&HookVariant(vec![]), &options)
            });
            let daemon = beside.join().unwrap();
            let some = || guarded_devices() > 0;
            wait_until(Duration::from_secs(60), "the crowded namespace is never reached", some);
            let victim = scope.spawn(|| {
                TestNetns::enter_new_in_helper();
                become_user(USER);
                drop(connect_to_self(LOCALHOST));
                wait_until(Duration::from_secs(30), "the namespace is never guarded", is_refused);
            });
            victim.join().unwrap();
            let guarded_first = guarded_devices();
            let began = Instant::now();
            let all = || guarded_devices() == DEVICES as usize + 1;
            wait_until(Duration::from_secs(300), "some devices are never guarded", all);
            println!("FACT other_devices_guarded_after_s={} method={method}", began.elapsed().as_secs());
            daemon.stop();
            guarded_first
        });
        println!("FACT devices_guarded_before_victim={guarded_first} method={method}");
        assert!(guarded_first < DEVICES as usize, "{method}: {guarded_first} devices came before the victim");
        let none = || guarded_devices() == 0;
        wait_until(Duration::from_secs(5), "a guard is left on a device", none);
    }
    inside.finish();
}

#[test]
fn a_vrf_device_is_guarded_and_one_made_later_after_the_next_walk() {
    for method in guard_methods() {
        let net = TestNetns::enter_new();
        if !add_vrf(net, "before", 100) {
            return;
        }
        assert!(!is_refused_in("before"), "{method}: without a daemon");
        let daemon = refusing(method, &[]);
        assert!(is_refused_in("before"), "{method}");
        assert!(add_vrf(net, "later", 101));
        wait_until(Duration::from_secs(60), "the new device is never guarded", || is_refused_in("later"));
        assert!(is_refused_in("before"), "{method}: as before");
        let (events, _) = daemon.stop();
        let prevented = events.iter().filter(|event| is_event("prevented", net.inode)(event));
        assert!(count_of(prevented) >= 3, "{method}");
        for device in ["before", "later"] {
            wait_until(Duration::from_secs(5), "it is refused after the end", || !is_refused_in(device));
        }
    }
}

/// Runs beside the guard of all network namespaces: how long a change of the network configuration takes here.
fn change_durations(net: TestNetns, count: u8) -> Vec<Duration> {
    let change = |host| {
        let began = Instant::now();
        net.add_address(Ipv4Addr::new(192, 0, 2, host));
        let took = began.elapsed();
        // Attachments and changes take turns.
        thread::sleep(Duration::from_millis(20));
        took
    };
    (1..=count).map(change).collect()
}

#[test]
fn two_thousand_namespaces_of_a_user_delay_nobody() {
    const USER: u32 = 31_999;
    const NAMESPACES: usize = 2_000;
    let net = TestNetns::enter_new();
    let options = ["--guard", "refuse", "--guard-only", "uid=31999"];
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &options);
    // Each of them is entered, and has its first connect while the daemon runs.
    let task = format!("namespaces with threads {NAMESPACES}");
    let mut attacker = Attacker::start(AttackerKind::MappedUids, &task).unwrap();
    attacker.wait();
    // Their events are before the others' in the pipe, whose reader is slow.
    daemon.expect(NAMESPACES, |event| event["event"] == "established" && event["netns"] != net.inode);
    for round in 0..5 {
        // Another user's self-connection is reported at once.
        let began = Instant::now();
        let (connection, port) = connect_to_self(LOCALHOST);
        daemon.expect(1, |event| is_event("established", net.inode)(event) && event["port"] == port);
        let took = began.elapsed();
        println!("FACT event_after_ms={}", took.as_millis());
        assert!(took < Duration::from_millis(250), "round {round}: {took:?}");
        drop(connection);
        // Its new namespace is guarded within a second of the first connect there.
        let took = thread::spawn(|| {
            TestNetns::enter_new_in_helper();
            become_user(USER);
            drop(connect_to_self(LOCALHOST));
            let began = Instant::now();
            // An attachment by clsact loses packets.
            let is_guarded = || is_refused_within(LOCALHOST, Duration::from_millis(20));
            wait_until(guarded_within(), "the namespace is never guarded", is_guarded);
            began.elapsed()
        });
        println!("FACT guarded_after_ms={}", took.join().unwrap().as_millis());
    }
    let mut durations = change_durations(net, 50);
    durations.sort_unstable();
    println!("FACT change_ms median={} maximum={}", durations[25].as_millis(), durations[49].as_millis());
    assert!(durations[44] < Duration::from_millis(50), "{durations:?}");
    let (events, _) = daemon.stop();
    let is_beyond = |event: &Value| {
        event["event"] == "unguarded" && event["why"].as_str().unwrap().contains("has too many")
    };
    assert!(events.iter().any(is_beyond), "the user's namespaces are not bounded");
    drop(attacker);
}

/// The number of devices to which this process has attached the guard by a link.
fn link_count(pid: u32) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    // One may be closed meanwhile.
    let texts = descriptors.filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok());
    texts.filter(|text| text.lines().any(|line| line == "link_type:\ttcx")).count()
}

#[test]
fn a_hundred_namespaces_of_a_user_do_not_delay_the_end_of_a_run() {
    const NAMESPACES: usize = 100;
    if !guard_methods().contains(&"tcx") {
        return println!("skipped: this kernel has no TCX, and filters must be removed");
    }
    TestNetns::enter_new();
    let options = ["--guard", "refuse", "--guard-method", "tcx", "--guard-only", "uid=31999"];
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &options);
    let pid = daemon.pid();
    let mut attacker =
        Attacker::start(AttackerKind::MappedUids, &format!("namespaces with threads {NAMESPACES}")).unwrap();
    attacker.wait();
    wait_until(3 * DEADLINE, "the namespaces are not guarded", || link_count(pid) > NAMESPACES);
    println!("FACT links={}", link_count(pid));
    let began = Instant::now();
    daemon.signal(rustix::process::Signal::TERM);
    daemon.expect(1, |event| event["event"] == "stopped");
    let stopped = began.elapsed();
    println!("FACT stopped_after_ms={}", stopped.as_millis());
    let (code, _, stderr) = daemon.wait_for_exit();
    println!("FACT process_ended_after_ms={}", began.elapsed().as_millis());
    assert_eq!((code, stderr.contains("the guard")), (Some(0), false), "{stderr}");
    assert!(stopped < Duration::from_secs(1), "{stopped:?}");
    drop(attacker);
}

#[test]
fn every_connect_that_is_refused_until_the_end_is_in_an_event() {
    for method in guard_methods() {
        TestNetns::enter_new();
        let daemon = refusing(method, &[]);
        let client = thread::spawn(|| {
            let mut refused = 0;
            while is_refused() {
                refused += 1;
            }
            refused
        });
        thread::sleep(Duration::from_millis(300));
        let (events, _) = daemon.stop();
        let refused: u64 = client.join().unwrap();
        println!("FACT refused_until_the_end={refused} method={method}");
        assert!(refused > 0, "{method}");
        assert_eq!(count_of(&events), refused, "{method}");
    }
}

/// Sends datagrams to itself until the namespace of this thread is guarded. Returns how many were lost. `begun`: the
/// first one has arrived.
fn lost_until_guarded(begun: &Sender<()>) -> usize {
    let echo = UdpSocket::bind((LOCALHOST, 0)).unwrap();
    echo.connect(echo.local_addr().unwrap()).unwrap();
    let receive = |patience| {
        echo.set_read_timeout(Some(patience)).unwrap();
        echo.recv(&mut [0; 1]).is_ok()
    };
    let until = Instant::now() + DEADLINE;
    let (mut sent, mut received) = (0_usize, 0);
    loop {
        echo.send(&[0]).unwrap();
        sent += 1;
        received += usize::from(receive(Duration::from_millis(1)));
        if sent == 1 {
            begun.send(()).unwrap();
        }
        // Now and then, because each dial before that makes a self-connection.
        if sent.is_multiple_of(64) && is_refused_within(LOCALHOST, Duration::from_millis(1)) {
            break;
        }
        assert!(Instant::now() < until, "the namespace is never guarded");
    }
    // What is late is not lost.
    while received < sent && receive(Duration::from_millis(200)) {
        received += 1;
    }
    sent - received
}

#[test]
fn an_attachment_by_tcx_loses_no_packet() {
    for method in guard_methods() {
        let _net = TestNetns::enter_new();
        for _ in 0..5 {
            let (begun, has_begun) = channel();
            let sender = thread::spawn(move || lost_until_guarded(&begun));
            has_begun.recv_timeout(DEADLINE).unwrap();
            let daemon = refusing(method, &[]);
            let lost = sender.join().unwrap();
            println!("FACT lost_datagrams={lost} method={method}");
            assert!(lost == 0 || *method != "tcx", "{lost}");
            daemon.stop();
        }
    }
}

#[test]
fn a_guard_that_is_taken_off_is_reported() {
    let net = TestNetns::enter_new();
    // A link can't be taken off from outside without its number; a filter can.
    let mut daemon = refusing("clsact", &[]);
    for filter in rtnetlink::filters(LOOPBACK).unwrap() {
        rtnetlink::remove_filter(LOOPBACK, &filter).unwrap();
    }
    assert!(!is_refused());
    let unguarded = daemon.expect(1, is_event("unguarded", net.inode)).remove(0);
    assert_eq!(unguarded["why"], "the program was taken off");
    daemon.stop();
}

#[test]
fn a_program_that_runs_first_and_ends_the_chain_is_reported() {
    let net = TestNetns::enter_new();
    let mut foreign = Ebpf::load(TEST_PROGRAMS).unwrap();
    let program: &mut SchedClassifier = foreign.program_mut("ends_the_chain").unwrap().try_into().unwrap();
    program.load().unwrap();
    for method in guard_methods() {
        let mut daemon = refusing(method, &[]);
        assert!(is_refused());
        if *method == "tcx" {
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            program.attach_with_options("lo", TcAttachType::Egress, first).unwrap();
        } else {
            // Of two filters of the same priority, the newer one runs first.
            let fd = program.fd().unwrap().as_fd();
            rtnetlink::add_filter(LOOPBACK, fd, "ends_the_chain", 1).unwrap();
        }
        assert!(!is_refused(), "{method}");
        let unguarded = daemon.expect(1, is_event("unguarded", net.inode)).remove(0);
        assert_eq!(
            unguarded["why"], "the program ends_the_chain runs first, and may end the chain",
            "{method}"
        );
        if *method == "tcx" {
            program.unload().unwrap();
            program.load().unwrap();
        } else {
            let filters = rtnetlink::filters(LOOPBACK).unwrap();
            let foreign = filters.iter().find(|filter| filter.name == "ends_the_chain").unwrap();
            rtnetlink::remove_filter(LOOPBACK, foreign).unwrap();
        }
        assert!(is_refused(), "{method}: the guard is there again");
        daemon.stop();
    }
}

#[test]
fn at_risk_and_audit_say_what_a_guard_does() {
    let net = enter_wide_range_netns();
    let audited = || {
        let audit = AuditOutput::run(&["--netns", "self", "--port", "40000"]);
        assert_eq!((&audit.rows[0]["risk"], audit.code), (&"high".into(), Some(1)), "{audit:?}");
        audit.rows[0]["guard"].clone()
    };
    for method in guard_methods() {
        for mode in ["off", "dry-run", "refuse"] {
            let options = ["--guard", mode, "--guard-own-netns", "--guard-method", method];
            let options = if mode == "off" { &[][..] } else { &options };
            let mut daemon = TestDaemon::start(&HookVariant(vec![]), options);
            assert_eq!(audited(), mode, "{method}");
            let text = Command::new(selfconn()).args(["audit", "--netns", "self"]).output().unwrap().stdout;
            assert_eq!(
                String::from_utf8_lossy(&text).contains("\n  guard  re"),
                mode != "off",
                "{method}, {mode}"
            );
            connect_refused(at(40_000), 20);
            let at_risk = daemon.expect(1, is_at_risk(40_000, net)).remove(0);
            assert_eq!(at_risk["guard"], mode, "{method}: {at_risk}");
            daemon.stop();
            assert_eq!(audited(), "off", "{method}, {mode}: after its end");
        }
    }
    // Without the privilege it is unknown.
    let mut unprivileged = Command::new(selfconn());
    unprivileged
        .args(["audit", "--netns", "self", "--port", "40000"])
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/");
    let audit = AuditOutput::from_command(&mut unprivileged);
    assert_eq!(audit.rows[0]["guard"], Value::Null, "{audit:?}");
}

#[test]
fn rules_that_cannot_be_are_errors_at_the_start() {
    for (rule, expected) in [
        ("comm=java", "unknown key comm"),
        ("port=65536", "port 65536 is not a number from 1 to 65535"),
        ("port=0", "port 0 is not"),
        ("uid=root", "uid root is not"),
    ] {
        let output = Command::new(selfconn())
            .args(["run", "--guard", "refuse", "--guard-except", rule])
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{rule}: {stderr}");
        assert!(stderr.contains(expected), "{rule}: {stderr}");
    }
}

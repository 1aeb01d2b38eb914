//! Nobody's share is everybody's: what one owner fills takes nothing from others. Each attack is made by uid 65534, by
//! 65,536 uids of a user namespace in hundreds of network namespaces (but for those on the remedy and the crowded port,
//! which are in one), and by the root of a container that changes its uid at will. Each has a twin of the same kind
//! within its share, which loses nothing.

use std::{
    net::{IpAddr, Ipv4Addr},
    thread,
    time::{Duration, Instant},
};

use selfconn_ebpf::WAYS;
use serde_json::Value;

use crate::support::{
    attacker::{Attacker, AttackerKind, POD_UID, set_real_uid},
    client::{assert_opened_by_this_thread, connect_to_self},
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event, scaled},
    dedicated::time_limit,
    helper_process::{HelperProcess, UNPRIVILEGED},
    netns::TestNetns,
    refused_connects::{at, connect_refused, enter_wide_range_netns, is_at_risk},
};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Calls `attack` for each kind of attacker that this host can have.
fn for_each_attacker(task: &str, mut attack: impl FnMut(AttackerKind, Attacker)) {
    for kind in AttackerKind::ALL {
        if let Some(attacker) = Attacker::start(kind, task) {
            attack(kind, attacker);
        }
    }
}

fn start(options: &[&str]) -> TestDaemon {
    TestDaemon::start(&HookVariant(vec![]), options)
}

/// What the run counts as lost in the end.
fn lost(events: &[Value], cause: &str) -> u64 {
    let stopped = events.last().unwrap();
    let count = if cause == "opener_table" { &stopped["not_remembered"] } else { &stopped["lost"][cause] };
    count.as_u64().unwrap_or_else(|| panic!("{cause}: {stopped}"))
}

#[test]
fn connects_that_never_end_take_no_names_from_others() {
    // Enough for some to meet an insertion of the attacker on another CPU.
    let connects = scaled(300);
    let net = TestNetns::enter_new();
    for_each_attacker(&format!("unanswered {}", scaled(2_000).max(3 * WAYS)), |kind, mut attacker| {
        let mut daemon = start(&["--connect-table", "1"]);
        let began = Instant::now();
        let before = connect_to_self(LOCALHOST);
        attacker.go_on();
        // During the attack.
        let mut during = vec![before];
        for _ in 0..connects {
            let (socket, _) = connect_to_self(LOCALHOST);
            socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
        attacker.wait();
        attacker.wait();
        println!("FACT {kind:?} attacked for {:?}", began.elapsed());
        during.push(connect_to_self(LOCALHOST));
        attacker.go_on();
        attacker.wait();
        drop(during);
        for kind_of_event in ["established", "closed"] {
            for event in &daemon.expect(connects + 2, is_event(kind_of_event, net.inode)) {
                assert_opened_by_this_thread(event);
            }
        }
        let (events, _) = daemon.stop();
        assert!(lost(&events, "opener_table") > 0, "{kind:?}: the attack's own loss is counted");
    });
}

#[test]
fn connects_that_never_end_within_a_share_lose_nothing() {
    let net = TestNetns::enter_new();
    for_each_attacker("unanswered 4", |kind, mut attacker| {
        attacker.wait();
        let mut daemon = start(&["--connect-table", "8"]);
        attacker.go_on();
        attacker.wait();
        drop(connect_to_self(LOCALHOST));
        assert_opened_by_this_thread(&daemon.expect(1, is_event("closed", net.inode))[0]);
        let (events, _) = daemon.stop();
        assert_eq!(lost(&events, "opener_table"), 0, "{kind:?}");
    });
}

#[test]
fn refused_connects_to_many_ports_take_no_warning_from_others() {
    let net = enter_wide_range_netns();
    for_each_attacker("refused from 44000 200", |kind, attacker| {
        let lost = warn_during_attack(net, vec![attacker]);
        assert!(lost > 0, "{kind:?}: the attack's own loss is counted");
    });
    // Two containers, the sessions of a user, and a system container at once, each at ports of its own.
    let kinds = [
        AttackerKind::ContainerRoot,
        AttackerKind::ContainerRoot,
        AttackerKind::Sessions,
        AttackerKind::SystemContainerRoot,
    ];
    let attackers = (44_000..)
        .step_by(1_000)
        .zip(kinds)
        .filter_map(|(first, kind)| Attacker::start(kind, &format!("refused from {first} 200")));
    warn_during_attack(net, attackers.collect());
}

#[test]
fn refused_connects_of_pods_take_no_warning_from_others_with_their_uid() {
    let net = enter_wide_range_netns();
    let attackers: Vec<_> = [44_000, 45_000, 46_000]
        .into_iter()
        .filter_map(|first| Attacker::start(AttackerKind::Pod, &format!("refused from {first} 200")))
        .collect();
    if attackers.is_empty() {
        return;
    }
    set_real_uid(POD_UID);
    let lost = warn_during_attack(net, attackers);
    set_real_uid(0);
    assert!(lost > 0, "the attack's own loss is counted");
}

/// Fails if a port of this process has no warning after these attacks. Returns how many refused connects are lost.
fn warn_during_attack(net: TestNetns, mut attackers: Vec<Attacker>) -> u64 {
    let mut daemon = start(&["--refused-table", "64"]);
    for attacker in &mut attackers {
        attacker.wait();
        attacker.go_on();
        attacker.wait();
    }
    connect_refused(at(40_000), 400);
    let warned = daemon.expect(1, is_at_risk(40_000, net)).remove(0);
    assert_eq!(warned["pid"], std::process::id(), "{warned}");
    let (events, _) = daemon.stop();
    lost(&events, "refused_table")
}

#[test]
fn refused_connects_within_a_share_lose_nothing() {
    let net = enter_wide_range_netns();
    for_each_attacker("refused from 44000 6", |kind, mut attacker| {
        let mut daemon = start(&["--refused-table", "64"]);
        attacker.wait();
        attacker.go_on();
        attacker.wait();
        connect_refused(at(40_000), 40);
        daemon.expect(1, is_at_risk(40_000, net));
        let (events, _) = daemon.stop();
        assert_eq!(lost(&events, "refused_table"), 0, "{kind:?}");
    });
}

/// A server that fails to bind the port of a self-connection of this process. Returns the event, and how long it took.
fn fail_to_bind(daemon: &mut TestDaemon, net: TestNetns) -> (Value, Duration) {
    let (_connection, port) = connect_to_self(LOCALHOST);
    let mut server = HelperProcess::start(&format!("bind 127.0.0.1:{port}"));
    assert_eq!(server.read_output(), "in use");
    let began = Instant::now();
    let is_this = |event: &Value| is_event("blocked", net.inode)(event) && event["pid"] == server.pid();
    let blocked = daemon.expect(1, is_this).remove(0);
    assert_eq!((&blocked["port"], &blocked["holder"]["pid"]), (&port.into(), &std::process::id().into()));
    server.finish();
    (blocked, began.elapsed())
}

#[test]
fn failed_binds_of_one_owner_hide_no_failed_bind_of_another() {
    let net = TestNetns::enter_new();
    for_each_attacker(&format!("binds {}", scaled(30_000)), |kind, mut attacker| {
        let mut daemon = start(&[]);
        if daemon.expect(1, |event| event["event"] == "started")[0]["binds"]["method"].is_null() {
            return;
        }
        attacker.wait();
        attacker.go_on();
        let (_, took) = fail_to_bind(&mut daemon, net);
        println!("FACT {kind:?} blocked after {took:?}");
        attacker.wait();
        fail_to_bind(&mut daemon, net);
        let (events, _) = daemon.stop();
        assert!(lost(&events, "binds") > 0, "{kind:?}: the attack's own loss is counted");
    });
}

/// No program of ours reports them, whoever has the port, and however many there are.
#[test]
fn failed_binds_at_ports_that_no_self_connection_holds_cost_nothing() {
    let net = TestNetns::enter_new();
    for_each_attacker(&format!("binds at a server's port {}", scaled(30_000)), |kind, mut attacker| {
        let mut daemon = start(&[]);
        if daemon.expect(1, |event| event["event"] == "started")[0]["binds"]["method"].is_null() {
            return;
        }
        // Ports are held meanwhile, but others.
        let (_connection, _) = connect_to_self(LOCALHOST);
        daemon.expect(1, is_event("established", net.inode));
        attacker.wait();
        attacker.go_on();
        attacker.wait();
        fail_to_bind(&mut daemon, net);
        let (events, _) = daemon.stop();
        assert_eq!(lost(&events, "binds"), 0, "{kind:?}");
        let blocked = events.iter().filter(|event| event["event"] == "blocked").count();
        assert_eq!(blocked, 1, "{kind:?}");
    });
}

#[test]
fn failed_binds_under_many_names_are_suppressed_and_hide_no_failed_bind_of_another() {
    const BINDS: u64 = 70;
    let net = TestNetns::enter_new();
    // A burst of ten events, and a reserve of as many.
    let mut daemon = start(&["--log-rate", "1"]);
    if daemon.expect(1, |event| event["event"] == "started")[0]["binds"]["method"].is_null() {
        return;
    }
    let (_connection, port) = connect_to_self(LOCALHOST);
    let began = Instant::now();
    let attack = format!("fail to bind renamed {BINDS} 127.0.0.1:{port}");
    let mut attacker = HelperProcess::start_unprivileged(&attack, None);
    assert_eq!(attacker.read_output(), "in use");
    attacker.finish();
    let seconds = began.elapsed().as_secs();
    fail_to_bind(&mut daemon, net);
    let (events, _) = daemon.stop();
    let suppressed = lost(&events, "suppressed");
    let is_attack = |event: &&Value| is_event("blocked", net.inode)(event) && event["uid"] == UNPRIVILEGED;
    let written = events.iter().filter(is_attack).count() as u64;
    println!("FACT of {BINDS} failed binds {written} are in events, {suppressed} suppressed");
    assert_eq!(written + suppressed, BINDS);
    assert!(written <= 20 + 2 * (seconds + 1), "{written}: the burst, the reserve, and the rates of both");
    let is_report = |event: &&Value| event["event"] == "lost" && event["where"] == "suppressed";
    let reports: Vec<_> = events.iter().filter(is_report).collect();
    let count = |event: &&Value| event["count"].as_u64().unwrap();
    assert_eq!(reports.iter().map(count).sum::<u64>(), suppressed);
    for report in reports {
        assert_eq!((&report["uid"], &report["first_port"]), (&UNPRIVILEGED.into(), &port.into()), "{report}");
    }
}

/// Each failed bind may be because of any of thousands of self-connections, each of another user.
#[test]
fn failed_binds_at_a_port_of_thousands_of_connections_delay_nothing_of_others() {
    let net = TestNetns::enter_new();
    let Some(mut attacker) =
        Attacker::start(AttackerKind::ContainerRoot, &format!("binds at a crowded port {}", scaled(12_000)))
    else {
        return;
    };
    attacker.wait();
    let mut daemon = start(&["--ring-size", "8M"]);
    if daemon.expect(1, |event| event["event"] == "started")[0]["binds"]["method"].is_null() {
        return;
    }
    attacker.go_on();
    attacker.wait();
    thread::sleep(Duration::from_secs(5));
    let (_, took) = fail_to_bind(&mut daemon, net);
    let began = Instant::now();
    let (events, _) = daemon.stop();
    println!("FACT crowded port: blocked after {took:?}, ended after {:?}", began.elapsed());
    // The server and this test, too, wait for a CPU beside the attacker's processes.
    assert!(took < time_limit(Duration::from_secs(2), DEADLINE), "{took:?}");
    assert_eq!(lost(&events, "ring"), 0, "failed binds of others are lost with those of the attacker");
}

#[test]
fn connections_of_one_owner_do_not_delay_the_remedy_of_another() {
    for_each_attacker_in_new_namespace("connections 150", |kind, net, mut attacker| {
        let only = format!("netns={}", net.inode);
        let options = ["--remedy", "destroy", "--remedy-rate", "10", "--remedy-only", &only];
        attacker.wait();
        let mut daemon = start(&options);
        // Those from before the start are found in the socket table.
        attacker.go_on();
        attacker.wait();
        daemon.expect(150, is_event("established", net.inode));
        let (_victim, port) = connect_to_self(LOCALHOST);
        let began = Instant::now();
        let is_victim = |event: &Value| {
            is_event("remedied", net.inode)(event) && event["port"] == port && event["uid"] == 0
        };
        daemon.expect(1, |event| is_victim(event) && event["result"] == "destroyed");
        println!("FACT {kind:?} destroyed after {:?}", began.elapsed());
        // In the order of the connections it would be 15 seconds.
        assert!(began.elapsed() < Duration::from_secs(5), "{kind:?}: {:?}", began.elapsed());
        daemon.stop();
    });
}

/// As [`for_each_attacker`], each in a network namespace of its own.
fn for_each_attacker_in_new_namespace(task: &str, mut attack: impl FnMut(AttackerKind, TestNetns, Attacker)) {
    for kind in AttackerKind::ALL {
        let net = TestNetns::enter_new();
        if let Some(attacker) = Attacker::start(kind, task) {
            attack(kind, net, attacker);
        }
    }
}

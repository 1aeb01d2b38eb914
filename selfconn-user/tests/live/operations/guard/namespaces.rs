//! The guard in other network namespaces, also in thousands of one user.

use std::{
    fs,
    net::Ipv4Addr,
    sync::mpsc::channel,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::LOCALHOST;
use crate::support::{
    attacker::{Attacker, AttackerKind},
    client::{become_user, connect_to_self},
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event},
    dedicated::{decisive, time_limit},
    guard::{guard_methods, is_refused_within, wait_until},
    netns::TestNetns,
};

/// How long it may take after the first connect until a new namespace is guarded. The guard rests many times as long as
/// an attachment takes, and an emulated one takes long.
fn guarded_within() -> Duration {
    time_limit(Duration::from_secs(1), Duration::from_secs(20))
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
                let ended_within = time_limit(Duration::from_secs(1), Duration::from_secs(5));
                wait_until(ended_within, "the namespace lives on", || !net.has_device(&name));
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
    let mut events_after = Vec::new();
    for _ in 0..5 {
        // Another user's self-connection is reported at once.
        let began = Instant::now();
        let (connection, port) = connect_to_self(LOCALHOST);
        daemon.expect(1, |event| is_event("established", net.inode)(event) && event["port"] == port);
        let took = began.elapsed();
        println!("FACT event_after_ms={}", took.as_millis());
        events_after.push(took);
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
    assert!(decisive(events_after.clone()) < Duration::from_millis(250), "{events_after:?}");
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

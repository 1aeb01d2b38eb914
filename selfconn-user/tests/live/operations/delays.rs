//! What another process, a service manager or a flood cannot do to the daemon: delay other connections' events,
//! SIGTERM or the watchdog. The hostile processes run as uid 65534. `flood` has the flood of records.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::net::UnixDatagram,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use serde_json::Value;

use crate::support::{
    client::{assert_aborted, run_self_connection, socket},
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event, is_kernel_at_least, reads_descriptors, selfconn},
    dedicated::is_emulated,
    helper_process::HelperProcess,
    mount_namespace::{mount_proc_with_hidepid, spawn_in_new_mount_namespace},
    netns::TestNetns,
    nobody::{FirstThread, NOBODY, Nobody},
    watchdog::Watchdog,
};

mod flood;

/// Other connections' events come within this time.
const EVENT_LIMIT: Duration = Duration::from_millis(250);

/// The daemon ends within this time after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// Makes a self-connection of this process. Returns its `closed` event, which must come in time.
fn expect_event_in_time(daemon: &mut TestDaemon, netns: u64) -> Value {
    let before = daemon.received().iter().filter(|event| is_event("closed", netns)(event)).count();
    let port = run_self_connection(Ipv4Addr::LOCALHOST.into());
    let began = Instant::now();
    let until = began + EVENT_LIMIT;
    let closed = daemon.wait_until(until, before + 1, is_event("closed", netns)).unwrap().pop().unwrap();
    println!("FACT event_after_us={}", began.elapsed().as_micros());
    assert_eq!((&closed["port"], &closed["pid"]), (&port.into(), &std::process::id().into()), "{closed}");
    closed
}

/// As [`stop_in_time`], of a daemon that has fed its watchdog until then.
fn stop_fed_in_time(daemon: TestDaemon, watchdog: Watchdog) -> Vec<Value> {
    watchdog.assert_fed();
    stop_in_time(daemon)
}

/// Ends the daemon by SIGTERM. Returns its events.
fn stop_in_time(daemon: TestDaemon) -> Vec<Value> {
    let began = Instant::now();
    let (events, _) = daemon.stop();
    println!("FACT stop_after_ms={}", began.elapsed().as_millis());
    assert!(began.elapsed() < STOP_LIMIT, "{:?}", began.elapsed());
    events
}

/// The `established` event of a hung process, which has everything but its arguments.
fn expect_hung_process(daemon: &mut TestDaemon, netns: u64, pid: u32) {
    let is_hung = |event: &Value| is_event("established", netns)(event) && event["pid"] == pid;
    let established = daemon.expect(1, is_hung).pop().unwrap();
    assert_eq!(established["cmdline"], Value::Null, "{established}");
    for known in ["exe", "comm", "cgroup"] {
        assert!(established[known].is_string(), "{known}: {established}");
    }
    if established["source"] == "live" {
        assert_eq!(established["uid"], NOBODY, "{established}");
    }
}

#[test]
fn a_process_whose_command_line_cannot_be_read_delays_nobody() {
    let net = TestNetns::enter_new();
    let (mut daemon, watchdog) = Watchdog::start_daemon(&[]);
    let Some(mut hung) = Nobody::hung() else { return };
    hung.wait();
    let closed = expect_event_in_time(&mut daemon, net.inode);
    assert!(closed["cmdline"].is_array(), "other owners' processes are read: {closed}");
    expect_hung_process(&mut daemon, net.inode, hung.pid());
    let is_lost = |event: &Value| event["event"] == "lost" && event["where"] == "lookups";
    let lost = daemon.expect(1, is_lost).pop().unwrap();
    assert_eq!((&lost["kind"], &lost["count"]), (&"fact".into(), &1.into()), "{lost}");

    // A new daemon finds it in the socket table.
    let (mut second, watchdog_of_second) = Watchdog::start_daemon(&[]);
    expect_hung_process(&mut second, net.inode, hung.pid());
    expect_event_in_time(&mut second, net.inode);
    stop_fed_in_time(second, watchdog_of_second);
    let stopped = stop_fed_in_time(daemon, watchdog).pop().unwrap();
    assert_eq!((&stopped["event"], &stopped["open"]), (&"stopped".into(), &1.into()), "{stopped}");

    for arguments in [&["scan", "--json"][..], &["scan"], &["audit"], &["doctor"]] {
        let began = Instant::now();
        let output = Command::new(selfconn()).args(arguments).output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(20), "{arguments:?}: {:?}", began.elapsed());
        if arguments[0] == "scan" {
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert!(stderr.contains("not seen: command lines of processes (1): "), "{stderr}");
        }
        if arguments == ["scan", "--json"] {
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(text.contains(&format!("\"pid\":{}", hung.pid())), "{text}");
        }
    }
}

/// All that one process does waits for the look-up of that process, and then comes at once: more than stdout's queue
/// has room for.
#[test]
fn events_that_waited_for_a_look_up_are_not_lost_on_stdout() {
    const CONNECTIONS: usize = 1_300;
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--states", "--ring-size", "32M"]);
    let Some(mut hung) = Nobody::hung_making(CONNECTIONS) else { return };
    hung.wait();
    let closed = daemon.expect(CONNECTIONS, is_event("closed", net.inode));
    assert!(closed.iter().all(|event| event["pid"] == hung.pid()), "{closed:#?}");
    let events = stop_in_time(daemon);
    let is_late = |event: &&Value| is_event("established", net.inode)(event) && event["cmdline"].is_null();
    println!("FACT late={}", events.iter().filter(is_late).count());
    let is_lost = |event: &&Value| event["event"] == "lost" && event["where"] == "stdout";
    assert_eq!(events.iter().find(is_lost), None);
    let states = events.iter().filter(|event| is_event("state", net.inode)(event)).count();
    assert_eq!(states, CONNECTIONS * 4);
}

#[test]
fn ten_hung_processes_of_one_user_take_nothing_from_another() {
    let net = TestNetns::enter_new();
    let (mut daemon, watchdog) = Watchdog::start_daemon(&[]);
    let mut hung: Vec<_> = (0..10).map_while(|_| Nobody::hung()).collect();
    hung.iter_mut().for_each(Nobody::wait);
    if hung.is_empty() {
        return;
    }
    for _ in 0..3 {
        let closed = expect_event_in_time(&mut daemon, net.inode);
        assert!(closed["cmdline"].is_array(), "{closed}");
    }
    for process in &hung {
        expect_hung_process(&mut daemon, net.inode, process.pid());
    }
    let stuck = |task: fs::DirEntry| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let state = fs::read_to_string(task.path().join("stat")).ok()?;
        (name.starts_with("cmdline") && state.contains(") D ")).then_some(())
    };
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap().flatten();
    assert_eq!(tasks.filter_map(stuck).count(), 1, "one stuck thread for one user");
    stop_fed_in_time(daemon, watchdog);
}

/// A pass over the descriptors of all processes would take longer than anybody may wait.
#[test]
fn descriptors_that_many_processes_share_delay_nobody() {
    let net = TestNetns::enter_new();
    if is_emulated() {
        return println!("skipped: in an emulator it takes too long to list 2,000 processes");
    }
    if !reads_descriptors() || !is_kernel_at_least((6, 1)) {
        return;
    }
    let mut crowd = Nobody::sharing_descriptors();
    crowd.wait();
    for proc_of_daemon in [ProcOfDaemon::Whole, ProcOfDaemon::ForItsReader, ProcOfDaemon::Hidden] {
        // A pass comes to the highest pid last. Now and then the kernel begins again with low ones.
        let mut holder = HelperProcess::start("connect");
        while holder.pid() < crowd.pid() {
            holder.kill();
            crowd = Nobody::sharing_descriptors();
            crowd.wait();
            holder = HelperProcess::start("connect");
        }
        behind_crowd(&net, holder, proc_of_daemon, PassOverAll::TakesLong);
    }
}

/// A pass over the descriptors of all processes would stay in one read(2) for seconds, and so would one over that
/// process: the kernel goes through the table for each thread, and finds nothing for which it would return.
#[test]
fn a_large_table_of_many_threads_delays_nobody() {
    let net = TestNetns::enter_new();
    if is_emulated() {
        return println!("skipped: not tried in an emulator");
    }
    if !reads_descriptors() || !is_kernel_at_least((6, 1)) {
        return;
    }
    for first_thread in [FirstThread::HasEnded, FirstThread::HasAnotherTable] {
        println!("FACT first_thread={first_thread:?}");
        let mut threads = Nobody::sharing_large_table(first_thread);
        threads.wait();
        behind_crowd(&net, HelperProcess::start("connect"), ProcOfDaemon::Whole, PassOverAll::IsNotMade);
        behind_crowd(
            &net,
            HelperProcess::start("connect"),
            ProcOfDaemon::ForItsReader,
            PassOverAll::IsNotMade,
        );
    }
}

/// Visiting processes one by one is for hosts with hostile users.
#[test]
fn a_pass_over_all_descriptors_is_made_where_no_table_is_large() {
    let _net = TestNetns::enter_new();
    if !reads_descriptors() {
        return;
    }
    let daemon = TestDaemon::start(&HookVariant(vec![]), &["-vv", "--reconcile", "1"]);
    daemon.run_until_snapshots(3, || thread::sleep(Duration::from_millis(20)));
    let (_, stderr) = daemon.stop();
    assert!(stderr.matches(PASS_LINE).count() >= 3, "{stderr}");
    for other in [NO_PASS_LINE, "to its end: false"] {
        assert!(!stderr.contains(other), "{stderr}");
    }
}

/// What the daemon says with `-vv` of a pass over the descriptors of all processes, and if it makes none.
const PASS_LINE: &str = "a pass over the descriptors of all processes: ";
const NO_PASS_LINE: &str = "no pass over the descriptors of all processes: ";

/// What becomes of a pass over the descriptors of all processes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum PassOverAll {
    TakesLong,
    IsNotMade,
}

/// Which processes the daemon can list.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ProcOfDaemon {
    Whole,
    /// With `hidepid`: the thread that takes snapshots has CAP_SYS_PTRACE and sees all, the one for `blocked` has no
    /// capability and sees none.
    ForItsReader,
    /// With `hidepid` and without CAP_SYS_PTRACE: nobody sees any.
    Hidden,
}

/// A self-connection from before the daemon, of a process that a pass comes to last, and its `blocked`.
fn behind_crowd(
    net: &TestNetns,
    mut holder_process: HelperProcess,
    proc_of_daemon: ProcOfDaemon,
    pass: PassOverAll,
) {
    const MAX_PASS: Duration = Duration::from_secs(5);
    let port: u16 = holder_process.read_output().parse().unwrap();
    let began = Instant::now();
    let spawn = |command: &mut Command| match proc_of_daemon {
        ProcOfDaemon::Whole => command.spawn().unwrap(),
        ProcOfDaemon::ForItsReader => spawn_in_new_mount_namespace(command, mount_proc_with_hidepid),
        ProcOfDaemon::Hidden => spawn_in_new_mount_namespace(command, || {
            mount_proc_with_hidepid()?;
            Ok(remove_capability_from_bounding_set(CapabilitySet::SYS_PTRACE)?)
        }),
    };
    let only = format!("port={REMEDIED_PORT}");
    let options = ["-vv", "--reconcile", "1", "--remedy", "destroy", "--remedy-only", &only];
    let (mut daemon, watchdog) = Watchdog::start_daemon_with(&options, spawn);
    expect_event_in_time(&mut daemon, net.inode);
    // The remedy does not wait for the reading of the table either.
    expect_remedy_in_time(&mut daemon, net.inode);
    let is_held = |event: &Value| is_event("established", net.inode)(event) && event["port"] == port;
    let until = began + MAX_PASS + Duration::from_secs(4);
    let found = daemon.wait_until(until, 1, is_held).unwrap().pop().unwrap();
    println!("FACT found_after_ms={} {proc_of_daemon:?}", began.elapsed().as_millis());
    match pass {
        PassOverAll::TakesLong => assert!(began.elapsed() > MAX_PASS, "the pass was not long: {found}"),
        PassOverAll::IsNotMade => {
            let stderr = daemon.stderr_so_far();
            assert!(stderr.contains(NO_PASS_LINE) && !stderr.contains(PASS_LINE), "{stderr}");
        }
    }
    // A process that could not be looked at may be the holder: unknown, not nobody.
    let holder = match proc_of_daemon {
        ProcOfDaemon::Hidden => Value::Null,
        _ => holder_process.pid().into(),
    };
    assert_eq!((&found["source"], &found["pid"]), (&"scan".into(), &holder), "{found}");
    for _ in 0..3 {
        expect_event_in_time(&mut daemon, net.inode);
    }
    assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err());
    let until = Instant::now() + Duration::from_secs(2);
    let blocked = daemon.wait_until(until, 1, is_event("blocked", net.inode)).unwrap().pop().unwrap();
    assert_eq!(blocked["holder"]["pid"], holder, "{blocked}");
    assert_eq!(blocked["holder"]["holders"].is_null(), holder.is_null(), "{blocked}");
    holder_process.finish();
    stop_fed_in_time(daemon, watchdog);
}

/// No other self-connection here has this port: it is below the range of ports that the kernel chooses.
const REMEDIED_PORT: u16 = 7_201;

/// Makes a self-connection at that port, which must be destroyed in time.
fn expect_remedy_in_time(daemon: &mut TestDaemon, netns: u64) {
    let client = socket(Ipv4Addr::LOCALHOST.into());
    client.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, REMEDIED_PORT)).into()).unwrap();
    client.connect(&client.local_addr().unwrap()).unwrap();
    let until = Instant::now() + EVENT_LIMIT;
    // The others are `excepted` at once.
    let is_this = |event: &Value| is_event("remedied", netns)(event) && event["port"] == REMEDIED_PORT;
    let remedied = daemon.wait_until(until, 1, is_this).unwrap().pop().unwrap();
    assert_eq!(remedied["result"], "destroyed", "{remedied}");
    assert_aborted(&client);
}

#[test]
fn a_service_manager_that_does_not_read_delays_nobody() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let other = UnixDatagram::unbound().unwrap();
    other.connect(&path).unwrap();
    other.set_nonblocking(true).unwrap();
    let fill = || while other.send(b"X").is_ok() {};
    fill();
    let mut daemon = TestDaemon::start_with(&HookVariant(vec![]), &[], |command| {
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000").spawn().unwrap()
    });
    for _ in 0..4 {
        expect_event_in_time(&mut daemon, net.inode);
        thread::sleep(Duration::from_millis(100));
    }
    // It gets the messages when it reads.
    manager.set_read_timeout(Some(DEADLINE)).unwrap();
    let receive = || {
        let mut message = [0; 256];
        let length = manager.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    while !receive().starts_with("READY=1") {}
    while receive() != "WATCHDOG=1" {}
    fill();
    stop_in_time(daemon);
}

#[test]
fn two_thousand_connections_found_at_the_start_lose_no_event() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("events.jsonl");
    // Each event has some 9 KB, because its process has 2,000 arguments.
    let mut crowd = HelperProcess::start_unprivileged_with("connect and hold 2000", None, &vec!["x"; 2_000]);
    crowd.read_output();
    let (mut daemon, watchdog) =
        Watchdog::start_daemon(&["--log", log.to_str().unwrap(), "--cmdline", "full"]);
    expect_event_in_time(&mut daemon, net.inode);
    let found = daemon.expect(2_000, |event| event["source"] == "scan" && event["pid"] == crowd.pid());
    assert!(found[0]["cmdline"].as_array().unwrap().len() > 1_000, "{}", found[0]);
    let events = stop_fed_in_time(daemon, watchdog);
    let lost: Vec<_> = events.iter().filter(|event| event["event"] == "lost").collect();
    assert!(lost.is_empty(), "{lost:?}");
    let written = fs::read_to_string(&log).unwrap().lines().count();
    assert_eq!(written, events.len(), "the log has them all");
    crowd.finish();
}

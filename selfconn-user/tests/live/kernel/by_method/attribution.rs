//! The opener, the holders and the closer of a connection: each is right or null.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
};

use serde_json::Value;
use socket2::Socket;

use crate::support::{
    client::{self, connect_to_self, own_comm},
    daemon::{HookVariant, TestDaemon, comm_by_thread, is_event, is_name_or_unknown},
    helper_process::{self, HelperProcess},
    netns::TestNetns,
    pid_namespace::spawn_in_new_pid_namespace,
    retries::{Missed, PREEMPTED, for_each_variant_retrying, until_looked_up},
};

fn expect_established(daemon: &mut TestDaemon, net: TestNetns) -> Value {
    daemon.expect(1, is_event("established", net.inode)).pop().unwrap()
}

fn expect_closed(daemon: &mut TestDaemon, net: TestNetns) -> Value {
    daemon.expect(1, is_event("closed", net.inode)).pop().unwrap()
}

/// The event of the opening of the only self-connection. A program saw the opener.
fn try_established(daemon: &mut TestDaemon, net: TestNetns) -> Result<Value, Missed> {
    let opened = daemon.try_expect(1, is_event("established", net.inode))?.pop().unwrap();
    Missed::if_opener_unseen(&opened)?;
    Ok(opened)
}

/// The event of the end of the only self-connection. Programs saw the opener and the closer.
fn try_closed(daemon: &mut TestDaemon, net: TestNetns) -> Result<Value, Missed> {
    let closed = daemon.try_expect(1, is_event("closed", net.inode))?.pop().unwrap();
    Missed::if_opener_unseen(&closed)?;
    Missed::if_null(&closed, &["how", "closer"])?;
    Ok(closed)
}

#[test]
fn the_openers_program_and_cgroup_are_reported_in_both_events() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::shared(&HookVariant(vec![]), &[]);
    until_looked_up(|| {
        let mut client = HelperProcess::start("connect");
        client.read_output();
        let pid = client.pid();
        let is_its = |kind| move |event: &Value| is_event(kind, net.inode)(event) && event["pid"] == pid;
        let opened = daemon.expect(1, is_its("established")).remove(0);
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        client.finish();
        let closed = daemon.expect(1, is_its("closed")).remove(0);
        assert_eq!(closed["closer"]["pid"], pid, "{closed}");
        for event in [&opened, &closed] {
            assert!(is_name_or_unknown(&event["comm"], "a-client"), "{event}");
            if ["comm", "exe", "cmdline"].iter().any(|fact| event[fact].is_null()) {
                return Ok(false);
            }
            assert_eq!(event["exe"], exe.to_str().unwrap());
            assert_eq!(event["cmdline"][1], "--exact", "{event}");
            let path = event["cgroup"].as_str().unwrap_or("");
            assert!(cgroup.lines().any(|line| line.ends_with(path)), "{path} in {cgroup}");
        }
        Ok(true)
    })
    .unwrap();
    daemon.stop();
}

#[test]
fn an_opener_that_dies_at_once_is_named() {
    let net = TestNetns::enter_new();
    for_each_variant_retrying(PREEMPTED, |variant| {
        let mut daemon = TestDaemon::shared(variant, &[]);
        let client = HelperProcess::start("connect and kill itself");
        let pid = client.pid();
        client.finish();
        let opened = try_established(&mut daemon, net)?;
        assert_eq!(opened["pid"], pid, "{variant:?}: {opened}");
        assert!(is_name_or_unknown(&opened["comm"], "short-lived"), "{variant:?}: {opened}");
        // The fields that could still be read are right; the others are null.
        assert!(opened["cmdline"].is_null() || opened["cmdline"][1] == "--exact", "{opened}");
        let closed = try_closed(&mut daemon, net)?;
        assert_eq!(closed["how"], "fin", "{closed}");
        assert_eq!(closed["closer"]["pid"], pid, "{variant:?}: {closed}");
        daemon.stop();
        Ok(())
    });
}

#[test]
fn a_sigkilled_process_is_reported_as_closer_with_fin() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::shared(&HookVariant(vec![]), &[]);
    let mut client = HelperProcess::start("connect");
    let (pid, port) = (client.pid(), client.read_output());
    client.kill();
    let closed = expect_closed(&mut daemon, net);
    assert_eq!((&closed["how"], &closed["pid"]), (&"fin".into(), &pid.into()), "{closed}");
    assert_eq!(closed["port"].to_string(), port);
    assert_eq!(closed["closer"]["pid"], pid, "{closed}");
    assert!(closed["port_blocked_until"].is_string(), "{closed}");
    daemon.stop();
}

#[test]
fn an_inherited_socket_is_opened_by_the_parent_and_closed_by_the_child() {
    let net = TestNetns::enter_new();
    for_each_variant_retrying(PREEMPTED, |variant| {
        let mut daemon = TestDaemon::shared(variant, &[]);
        let mut parent = HelperProcess::start("connect and pass to child");
        let pid = parent.pid();
        let child: u32 = parent.read_output().parse().unwrap();
        parent.finish();
        let closed = try_closed(&mut daemon, net)?;
        assert_eq!((&closed["pid"], &closed["comm"]), (&pid.into(), &"a-parent".into()), "{closed}");
        assert_eq!(closed["closer"]["pid"], child, "{variant:?}: {closed}");
        assert_eq!(closed["closer"]["comm"], comm_by_thread("a-child"), "{variant:?}: {closed}");
        daemon.stop();
        Ok(())
    });
}

#[test]
fn a_socket_passed_to_another_process_has_the_right_opener_holder_and_closer() {
    let net = TestNetns::enter_new();
    // A snapshot finds namespaces through their processes, and only a thread is in this one.
    let mut netns_process = HelperProcess::start("wait");
    netns_process.read_output();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1", "-vv"]);
    let (ours, theirs) = Socket::pair(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    let mut receiver = HelperProcess::start_with_fd("receive and hold", &theirs);
    let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let opened = expect_established(&mut daemon, net);
    helper_process::send_fd(&socket, &ours);
    assert_eq!(receiver.read_output(), "received");
    drop(socket);
    // One snapshot may be under way; the second starts after this.
    daemon.run_until_snapshots(2, || std::thread::sleep(std::time::Duration::from_millis(20)));
    let pid = receiver.pid();
    receiver.finish();
    let closed = expect_closed(&mut daemon, net);
    for event in [&opened, &closed] {
        assert_eq!(event["pid"], std::process::id(), "the opener does not change: {event}");
        assert_eq!(event["comm"], own_comm(), "{event}");
    }
    assert_eq!(closed["holders"], serde_json::json!([{ "pid": pid, "comm": "a-receiver" }]), "{closed}");
    let comm = comm_by_thread("a-receiver");
    assert_eq!(closed["closer"], serde_json::json!({ "pid": pid, "comm": comm }), "{closed}");
    daemon.stop();
    netns_process.finish();
}

fn names_the_pid_namespace_limit(limits: &Value) -> bool {
    limits.to_string().contains("not in the initial pid namespace")
}

#[test]
fn outside_the_initial_pid_namespace_no_process_is_looked_up_and_started_reports_it() {
    let net = TestNetns::enter_new();
    for is_outside in [true, false] {
        until_looked_up(|| {
            let spawn = |command: &mut Command| match is_outside {
                true => spawn_in_new_pid_namespace(command),
                false => command.spawn().unwrap(),
            };
            let mut daemon = TestDaemon::start_with(&HookVariant(vec![]), &[], spawn);
            let mut client = HelperProcess::start("connect");
            client.read_output();
            expect_established(&mut daemon, net);
            let pid = client.pid();
            client.finish();
            expect_closed(&mut daemon, net);
            let (events, _) = daemon.stop();
            let started = events.iter().find(|event| event["event"] == "started").unwrap();
            assert_eq!(names_the_pid_namespace_limit(&started["limits"]), is_outside, "{started}");
            let mut has_programs = true;
            for event in events.iter().filter(|event| event["netns"] == net.inode) {
                // The fields recorded by the kernel are right from any pid namespace.
                assert_eq!(event["pid"], pid, "{event}");
                assert!(is_name_or_unknown(&event["comm"], "a-client"), "{event}");
                for fact in ["exe", "cmdline", "cgroup", "unit", "container", "holders"] {
                    assert!(!is_outside || event[fact].is_null(), "{fact} in {event}");
                }
                has_programs &= event["exe"].is_string() && event["comm"].is_string();
            }
            Ok(is_outside || has_programs)
        })
        .unwrap();
    }
}

#[test]
fn doctor_reports_that_it_is_outside_the_initial_pid_namespace() {
    let mut doctor = Command::new(crate::support::daemon::selfconn());
    let doctor = spawn_in_new_pid_namespace(doctor.args(["doctor", "--json"]).stdout(Stdio::piped()));
    let output = doctor.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(names_the_pid_namespace_limit(&report["limits"]), "{report}");
}

#[test]
fn a_thread_that_renames_itself_does_not_rename_its_process() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::shared(&HookVariant(vec![]), &[]);
    until_looked_up(|| {
        let mut client = HelperProcess::start("rename threads");
        client.read_output();
        let is_its =
            |event: &Value| is_event("established", net.inode)(event) && event["pid"] == client.pid();
        let opened = daemon.expect(1, is_its).remove(0);
        assert!(is_name_or_unknown(&opened["comm"], "a-leader"), "{opened}");
        assert_eq!(opened["thread_comm"], "renamed\u{1b}[31m", "JSON keeps every byte: {opened}");
        client.finish();
        Ok(opened["comm"].is_string())
    })
    .unwrap();
    daemon.stop();
}

#[test]
fn a_reset_names_the_closer_and_never_a_bystander() {
    let net = TestNetns::enter_new();
    net.enable_rps();
    for_each_variant_retrying(PREEMPTED, |variant| {
        let mut daemon = TestDaemon::shared(variant, &[]);
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(socket);
        let closed = try_closed(&mut daemon, net)?;
        let closer = &closed["closer"];
        assert_eq!(closer["pid"], std::process::id(), "{variant:?}: {closed}");
        assert_eq!(closer["comm"], comm_by_thread(&own_comm()), "{variant:?}: {closed}");
        daemon.stop();
        Ok(())
    });
}

/// Makes a self-connection through io_uring, inline in the caller or on a worker thread of the kernel.
fn connect_by_io_uring(flags: io_uring::squeue::Flags) -> Option<Socket> {
    let mut ring = match io_uring::IoUring::new(2) {
        Ok(ring) => ring,
        Err(error) => {
            println!("skipped: io_uring is not available: {error}");
            return None;
        }
    };
    let socket = client::socket(Ipv4Addr::LOCALHOST.into());
    socket.bind(&SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0).into()).unwrap();
    let own = socket.local_addr().unwrap();
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let connect = io_uring::opcode::Connect::new(fd, own.as_ptr().cast(), own.len()).build().flags(flags);
    // SAFETY: the socket and the address outlive the wait below, after which the kernel no longer uses them.
    unsafe { ring.submission().push(&connect) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    assert_eq!(ring.completion().next().unwrap().result(), 0);
    Some(socket)
}

#[test]
fn an_io_uring_connect_is_attributed_to_the_requesting_process() {
    use io_uring::squeue::Flags;
    let net = TestNetns::enter_new();
    for_each_variant_retrying(PREEMPTED, |variant| {
        for flags in [Flags::empty(), Flags::ASYNC] {
            let mut daemon = TestDaemon::shared(variant, &[]);
            let Some(socket) = connect_by_io_uring(flags) else { return Ok(()) };
            drop(socket);
            let closed = try_closed(&mut daemon, net)?;
            assert_eq!(closed["pid"], std::process::id(), "{variant:?}: {closed}");
            assert_eq!(closed["comm"], own_comm(), "{variant:?}: {closed}");
            let is_worker = closed["thread_comm"].as_str().unwrap().starts_with("iou-wrk-");
            assert_eq!(is_worker, flags == Flags::ASYNC, "{variant:?}: {closed}");
            daemon.stop();
        }
        Ok(())
    });
}

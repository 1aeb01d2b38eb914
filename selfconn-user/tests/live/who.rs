//! Who opened, who holds, who closed: three facts, and each right or null.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd as _,
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use socket2::Socket;

use crate::{
    client::{self, connect_to_self, own_comm},
    daemon::{Daemon, Variant, by_thread, for_each_variant, is_or_unknown, of},
    net::Net,
    role::{self, Role},
};

fn established(daemon: &mut Daemon, net: Net) -> Value {
    daemon.expect(1, of("established", net.inode)).pop().unwrap()
}

fn closed(daemon: &mut Daemon, net: Net) -> Value {
    daemon.expect(1, of("closed", net.inode)).pop().unwrap()
}

#[test]
fn the_openers_program_and_place_are_told_and_stay_told() {
    let net = Net::private();
    let mut daemon = Daemon::shared(&Variant(vec![]), &[]);
    let mut client = Role::start("connect");
    client.says();
    let opened = established(&mut daemon, net);
    let pid = client.pid();
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    client.end();
    let closed = closed(&mut daemon, net);
    for event in [&opened, &closed] {
        assert_eq!(event["pid"], pid);
        assert_eq!(event["comm"], "a-client");
        assert_eq!(event["exe"], exe.to_str().unwrap());
        assert_eq!(event["cmdline"][1], "--exact", "{event}");
        let path = event["cgroup"].as_str().unwrap_or("");
        assert!(cgroup.lines().any(|line| line.ends_with(path)), "{path} in {cgroup}");
    }
    assert_eq!(closed["closer"]["pid"], pid, "{closed}");
    daemon.stop();
}

#[test]
fn who_dies_at_once_was_seen_by_the_kernel() {
    let net = Net::private();
    for_each_variant(|variant| {
        let mut daemon = Daemon::shared(variant, &[]);
        let client = Role::start("connect and die");
        let pid = client.pid();
        client.end();
        let opened = established(&mut daemon, net);
        assert_eq!(opened["pid"], pid, "{variant:?}: {opened}");
        assert!(is_or_unknown(&opened["comm"], "short-lived"), "{variant:?}: {opened}");
        // What could still be read of it is right, the rest is null.
        assert!(opened["cmdline"].is_null() || opened["cmdline"][1] == "--exact", "{opened}");
        let closed = closed(&mut daemon, net);
        assert_eq!(closed["how"], "fin", "{closed}");
        assert_eq!(closed["closer"]["pid"], pid, "{variant:?}: {closed}");
        daemon.stop();
    });
}

#[test]
fn sigkill_is_an_orderly_end_by_the_killed() {
    let net = Net::private();
    let mut daemon = Daemon::shared(&Variant(vec![]), &[]);
    let mut client = Role::start("connect");
    let (pid, port) = (client.pid(), client.says());
    client.kill();
    let closed = closed(&mut daemon, net);
    assert_eq!((&closed["how"], &closed["pid"]), (&"fin".into(), &pid.into()), "{closed}");
    assert_eq!(closed["port"].to_string(), port);
    assert_eq!(closed["closer"]["pid"], pid, "{closed}");
    assert!(closed["port_blocked_until"].is_string(), "{closed}");
    daemon.stop();
}

#[test]
fn exec_after_connect_keeps_the_name_that_connected() {
    let net = Net::private();
    let mut daemon = Daemon::shared(&Variant(vec![]), &[]);
    let mut client = Role::start("connect and exec");
    let pid = client.pid();
    client.says();
    assert_eq!(client.says(), "waiting", "the same process runs something else");
    client.end();
    let closed = closed(&mut daemon, net);
    assert_eq!(closed["pid"], pid);
    assert!(is_or_unknown(&closed["comm"], "before-exec"), "{closed}");
    assert_eq!(closed["closer"]["pid"], pid, "{closed}");
    assert_ne!(closed["closer"]["comm"], "before-exec", "it had another name by then: {closed}");
    daemon.stop();
}

#[test]
fn a_socket_handed_down_is_opened_by_the_parent_and_closed_by_the_child() {
    let net = Net::private();
    for_each_variant(|variant| {
        let mut daemon = Daemon::shared(variant, &[]);
        let mut parent = Role::start("connect and hand down");
        let pid = parent.pid();
        let child: u32 = parent.says().parse().unwrap();
        parent.end();
        let closed = closed(&mut daemon, net);
        assert_eq!((&closed["pid"], &closed["comm"]), (&pid.into(), &"a-parent".into()), "{closed}");
        assert_eq!(closed["closer"]["pid"], child, "{variant:?}: {closed}");
        assert_eq!(closed["closer"]["comm"], by_thread("a-child"), "{variant:?}: {closed}");
        daemon.stop();
    });
}

#[test]
fn a_socket_passed_to_a_stranger_is_opened_held_and_closed_by_who_did_it() {
    let net = Net::private();
    // A reading finds namespaces by their processes, and this one is a thread's.
    let mut inhabitant = Role::start("wait");
    inhabitant.says();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--reconcile", "1", "-vv"]);
    let (ours, theirs) = Socket::pair(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    let mut receiver = Role::start_with("receive and hold", &theirs);
    let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let opened = established(&mut daemon, net);
    role::pass(&socket, &ours);
    assert_eq!(receiver.says(), "received");
    drop(socket);
    // One reading may be under way; the second began after this.
    daemon.while_reading(2, || std::thread::sleep(std::time::Duration::from_millis(20)));
    let pid = receiver.pid();
    receiver.end();
    let closed = closed(&mut daemon, net);
    for event in [&opened, &closed] {
        assert_eq!(event["pid"], std::process::id(), "the opener stays who it was: {event}");
        assert_eq!(event["comm"], own_comm(), "{event}");
    }
    assert_eq!(closed["holders"], serde_json::json!([{ "pid": pid, "comm": "a-receiver" }]), "{closed}");
    let comm = by_thread("a-receiver");
    assert_eq!(closed["closer"], serde_json::json!({ "pid": pid, "comm": comm }), "{closed}");
    daemon.stop();
    inhabitant.end();
}

/// Starts a process as the first of a new pid namespace.
fn in_its_own_pid_namespace(command: &mut Command) -> Child {
    // A thread that has done this can't start threads any more.
    let spawn = || {
        // SAFETY: it takes no descriptor away from anybody.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID) }.unwrap();
        command.spawn().unwrap()
    };
    std::thread::scope(|scope| scope.spawn(spawn).join().unwrap())
}

fn says_that_it_is_outside(limits: &Value) -> bool {
    limits.to_string().contains("not in the initial pid namespace")
}

#[test]
fn outside_the_initial_pid_namespace_nothing_is_looked_up_and_that_is_said() {
    let net = Net::private();
    for is_outside in [true, false] {
        let spawn = |command: &mut Command| match is_outside {
            true => in_its_own_pid_namespace(command),
            false => command.spawn().unwrap(),
        };
        let mut daemon = Daemon::start_by(&Variant(vec![]), &[], spawn);
        let mut client = Role::start("connect");
        client.says();
        established(&mut daemon, net);
        let pid = client.pid();
        client.end();
        closed(&mut daemon, net);
        let (events, _) = daemon.stop();
        let started = events.iter().find(|event| event["event"] == "started").unwrap();
        assert_eq!(says_that_it_is_outside(&started["limits"]), is_outside, "{started}");
        for event in events.iter().filter(|event| event["netns"] == net.inode) {
            // What the kernel saw is right from everywhere.
            let comm = if is_outside { by_thread("a-client") } else { "a-client".into() };
            assert_eq!((&event["pid"], &event["comm"]), (&pid.into(), &comm), "{event}");
            for fact in ["exe", "cmdline", "cgroup", "unit", "container", "holders"] {
                assert!(!is_outside || event[fact].is_null(), "{fact} in {event}");
            }
            assert_eq!(event["exe"].is_null(), is_outside, "{event}");
        }
    }
}

#[test]
fn doctor_outside_the_initial_pid_namespace_says_so() {
    let mut doctor = Command::new(crate::daemon::selfconn());
    let doctor = in_its_own_pid_namespace(doctor.args(["doctor", "--json"]).stdout(Stdio::piped()));
    let output = doctor.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(says_that_it_is_outside(&report["limits"]), "{report}");
}

#[test]
fn a_thread_that_renames_itself_does_not_rename_its_process() {
    let net = Net::private();
    let mut daemon = Daemon::shared(&Variant(vec![]), &[]);
    let mut client = Role::start("rename threads");
    client.says();
    let opened = established(&mut daemon, net);
    assert_eq!(opened["comm"], "a-leader", "{opened}");
    assert_eq!(opened["thread_comm"], "renamed\u{1b}[31m", "JSON keeps every byte: {opened}");
    client.end();
    daemon.stop();
}

#[test]
fn a_reset_by_the_closer_names_it_and_a_bystander_is_never_named() {
    let net = Net::private();
    net.steer();
    for_each_variant(|variant| {
        let mut daemon = Daemon::shared(variant, &[]);
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(socket);
        let closed = closed(&mut daemon, net);
        let closer = &closed["closer"];
        assert_eq!(closer["pid"], std::process::id(), "{variant:?}: {closed}");
        assert_eq!(closer["comm"], by_thread(&own_comm()), "{variant:?}: {closed}");
        daemon.stop();
    });
}

/// Connects to itself through io_uring: inline in the caller, or on a worker thread of the kernel's.
fn connect_by_io_uring(flags: io_uring::squeue::Flags) -> Option<Socket> {
    let mut ring = match io_uring::IoUring::new(2) {
        Ok(ring) => ring,
        Err(error) => {
            println!("this kernel has no io_uring for us: {error}");
            return None;
        }
    };
    let socket = client::socket(Ipv4Addr::LOCALHOST.into());
    socket.bind(&SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0).into()).unwrap();
    let own = socket.local_addr().unwrap();
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let connect = io_uring::opcode::Connect::new(fd, own.as_ptr().cast(), own.len()).build().flags(flags);
    // SAFETY: the socket and the address outlive the wait below, after which the kernel is done with both.
    unsafe { ring.submission().push(&connect) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    assert_eq!(ring.completion().next().unwrap().result(), 0);
    Some(socket)
}

#[test]
fn io_uring_connects_for_the_process_that_asked() {
    use io_uring::squeue::Flags;
    let net = Net::private();
    for_each_variant(|variant| {
        for flags in [Flags::empty(), Flags::ASYNC] {
            let mut daemon = Daemon::shared(variant, &[]);
            let Some(socket) = connect_by_io_uring(flags) else { return };
            drop(socket);
            let closed = closed(&mut daemon, net);
            assert_eq!(closed["pid"], std::process::id(), "{variant:?}: {closed}");
            assert_eq!(closed["comm"], own_comm(), "{variant:?}: {closed}");
            let is_worker = closed["thread_comm"].as_str().unwrap().starts_with("iou-wrk-");
            assert_eq!(is_worker, flags == Flags::ASYNC, "{variant:?}: {closed}");
            daemon.stop();
        }
    });
}

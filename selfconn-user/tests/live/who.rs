//! Who opened, who holds, who closed: three facts, and each right or null.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd as _,
};

use serde_json::Value;
use socket2::Socket;

use crate::{
    client::{self, connect_to_self, own_comm},
    daemon::{Daemon, Variant, of, variants},
    net::Net,
    role::Role,
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
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
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
    for variant in variants() {
        let mut daemon = Daemon::start(&variant, &[]);
        let client = Role::start("connect and die");
        let pid = client.pid();
        client.end();
        let opened = established(&mut daemon, net);
        assert_eq!(opened["pid"], pid, "{variant:?}: {opened}");
        assert_eq!(opened["comm"], "short-lived", "{variant:?}: {opened}");
        // What could still be read of it is right, the rest is null.
        assert!(opened["cmdline"].is_null() || opened["cmdline"][1] == "--exact", "{opened}");
        let closed = closed(&mut daemon, net);
        assert_eq!(closed["how"], "fin", "{closed}");
        assert_eq!(closed["closer"]["pid"], pid, "{variant:?}: {closed}");
        daemon.stop();
    }
}

#[test]
fn sigkill_is_an_orderly_end_by_the_killed() {
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
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
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
    let mut client = Role::start("connect and exec");
    let pid = client.pid();
    client.says();
    assert_eq!(client.says(), "waiting", "the same process runs something else");
    client.end();
    let closed = closed(&mut daemon, net);
    assert_eq!(closed["pid"], pid);
    assert_eq!(closed["comm"], "before-exec", "{closed}");
    assert_eq!(closed["closer"]["pid"], pid, "{closed}");
    assert_ne!(closed["closer"]["comm"], "before-exec", "it had another name by then: {closed}");
    daemon.stop();
}

#[test]
fn a_socket_handed_down_is_opened_by_the_parent_and_closed_by_the_child() {
    let net = Net::private();
    for variant in variants() {
        let mut daemon = Daemon::start(&variant, &[]);
        let mut parent = Role::start("connect and hand down");
        let pid = parent.pid();
        let child: u32 = parent.says().parse().unwrap();
        parent.end();
        let closed = closed(&mut daemon, net);
        assert_eq!((&closed["pid"], &closed["comm"]), (&pid.into(), &"a-parent".into()), "{closed}");
        assert_eq!(closed["closer"]["pid"], child, "{variant:?}: {closed}");
        assert_eq!(closed["closer"]["comm"], "a-child", "{variant:?}: {closed}");
        daemon.stop();
    }
}

#[test]
fn a_thread_that_renames_itself_does_not_rename_its_process() {
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
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
    for variant in variants() {
        let mut daemon = Daemon::start(&variant, &[]);
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(socket);
        let closed = closed(&mut daemon, net);
        let closer = &closed["closer"];
        assert_eq!(closer["pid"], std::process::id(), "{variant:?}: {closed}");
        assert_eq!(closer["comm"], own_comm(), "{variant:?}: {closed}");
        daemon.stop();
    }
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
    for variant in variants() {
        for flags in [Flags::empty(), Flags::ASYNC] {
            let mut daemon = Daemon::start(&variant, &[]);
            let Some(socket) = connect_by_io_uring(flags) else { return };
            drop(socket);
            let closed = closed(&mut daemon, net);
            assert_eq!(closed["pid"], std::process::id(), "{variant:?}: {closed}");
            assert_eq!(closed["comm"], own_comm(), "{variant:?}: {closed}");
            let is_worker = closed["thread_comm"].as_str().unwrap().starts_with("iou-wrk-");
            assert_eq!(is_worker, flags == Flags::ASYNC, "{variant:?}: {closed}");
            daemon.stop();
        }
    }
}

//! Sockets that no program has open: the kernel's own (an NFS mount connects to the port that it tries to reach), and
//! one whose only descriptor is on its way through a Unix socket. Neither is destroyed unless somebody asks for it.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::support::{
    client::{connect_to_self, is_connected},
    daemon::{HookVariant, TestDaemon, is_event, is_kernel_at_least},
    helper_process::{self, HelperProcess},
    netns::TestNetns,
    retries::{PREEMPTED, for_each_variant_retrying},
    scan_output::ScanOutput,
};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// True if this kernel can mount NFS. Debian's kernels must.
fn has_nfs() -> bool {
    let has = std::fs::read_to_string("/proc/filesystems").unwrap().lines().any(|line| line == "nodev\tnfs");
    println!("FACT nfs={has}");
    assert!(has || std::env::var_os("SELFCONN_KERNEL").is_none(), "no NFS in a machine of `cargo xtask vm`");
    has
}

#[test]
fn a_connection_of_an_nfs_mount_is_named_as_the_kernels_and_not_destroyed() {
    if !has_nfs() {
        return;
    }
    // 5.10.262 crashes: it takes its own call for one of the server, and dereferences the null pointer of a
    // service that an NFSv3 mount does not have (`xprt_complete_bc_request`, net/sunrpc/backchannel_rqst.c).
    if !is_kernel_at_least((6, 1)) {
        return println!(
            "skipped: this kernel crashes when the connection of an NFS mount is connected to itself"
        );
    }
    for_each_variant_retrying(PREEMPTED, |variant| {
        let net = TestNetns::enter_new();
        let only = format!("netns={}", net.inode);
        let mut daemon = TestDaemon::start(variant, &["--remedy", "destroy", "--remedy-only", &only]);
        // The only port that connect() can choose is the server's.
        net.set_sysctl("ip_local_port_range", "40000 40000");
        let mut mount = HelperProcess::start("mount NFS");
        mount.read_output();
        let established = daemon.try_expect(1, is_event("established", net.inode))?.remove(0);
        let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
        mount.kill();
        for event in [&established, &remedied] {
            assert_eq!(event["kernel_socket"], true, "{variant:?}: {event}");
            assert_eq!(event["port"], 40_000, "{event}");
            assert!(event["exe"].is_null() && event["cmdline"].is_null(), "{event}");
        }
        if !established["comm"].is_null() {
            assert!(established["comm"].as_str().unwrap().starts_with("kworker"), "{established}");
        }
        assert_eq!(remedied["result"], "excepted", "{remedied}");
        assert!(remedied["why"].as_str().unwrap().starts_with("the kernel itself"), "{remedied}");
        let (events, _) = daemon.stop();
        let closed: Vec<&Value> =
            events.iter().filter(|event| is_event("closed", net.inode)(event)).collect();
        assert!(closed.iter().all(|event| event["how"] != "destroyed"), "{closed:?}");
        Ok(())
    });
}

/// A self-connection whose only descriptor is in a Unix socket. Returns the receiving end, which keeps it.
fn in_flight() -> (Socket, Socket, u16) {
    let (socket, port) = connect_to_self(LOCALHOST);
    let (ours, theirs) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
    helper_process::send_fd(&socket, &ours);
    drop(socket);
    (ours, theirs, port)
}

#[test]
fn a_socket_that_no_process_is_known_to_have_open_is_not_destroyed() {
    let net = TestNetns::enter_new();
    let (_ours, theirs, port) = in_flight();
    // The negative twin: a process has this one open.
    let (held, held_port) = connect_to_self(LOCALHOST);
    let only = format!("netns={}", net.inode);

    let scan = ScanOutput::run(&["--destroy", "--only", &only, "--only", &format!("port={port}")]);
    let row = scan.only_row_in(net);
    assert_eq!((scan.code, &row["result"]), (Some(1), &"failed".into()), "{row}");
    assert!(row["why"].as_str().unwrap().contains("the kernel itself may use it"), "{row}");
    assert!(row["kernel_socket"].is_null(), "{row}");

    let mut daemon =
        TestDaemon::start(&HookVariant(vec![]), &["--remedy", "destroy", "--remedy-only", &only]);
    let remedied = daemon.expect(2, is_event("remedied", net.inode));
    for event in &remedied {
        let expected = if event["port"] == held_port { "destroyed" } else { "failed" };
        assert_eq!(event["result"], expected, "{event}");
        let kernel_socket = if event["port"] == held_port { Value::from(false) } else { Value::Null };
        assert_eq!(event["kernel_socket"], kernel_socket, "{event}");
    }
    assert!(!is_connected(&held));
    assert!(is_connected(&helper_process::receive_fd(&theirs).into()), "it is untouched");
    daemon.stop();
}

#[test]
fn a_live_socket_in_flight_is_known_to_be_a_programs() {
    let net = TestNetns::enter_new();
    let only = format!("netns={}", net.inode);
    let options = ["--remedy", "destroy", "--remedy-grace", "300ms", "--remedy-only", &only];
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &options);
    let (_ours, theirs, _) = in_flight();
    let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
    assert_eq!((&remedied["kernel_socket"], &remedied["result"]), (&false.into(), &"destroyed".into()));
    assert!(!is_connected(&helper_process::receive_fd(&theirs).into()));
    daemon.stop();
}

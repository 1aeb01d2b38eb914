//! `scan`: which existing self-connections it finds, in which namespaces and states, with which holders, and
//! which connections it must not list.

use std::{
    collections::HashSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use jiff::Timestamp;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use selfconn::sockets::{self, SnapshotOptions};
use selfconn_ebpf::{Endpoint, state};
use serde_json::{Value, json};
use socket2::{SockFilter, Socket};

use super::descriptors::open_descriptor_iter;
use crate::support::{
    client::{connect_to_self, socket},
    daemon::{DEADLINE, selfconn},
    helper_process::HelperProcess,
    netns::TestNetns,
    scan_output::{METHODS, ScanOutput},
    socket_crowd::{CROWD_COMM, CrowdSockets, SocketCrowd},
};

fn assert_found(address: &str, shown: &str, family: &str) {
    let net = TestNetns::enter_new();
    let client = SocketCrowd::start(CrowdSockets::SelfConnections(1, address.parse().unwrap()));
    let pid = client.pid();
    for options in METHODS {
        let scan = ScanOutput::run(options);
        assert_eq!(scan.code, Some(1), "{scan:?}");
        let row = scan.only_row_in(net);
        for (field, expected) in [
            ("addr", json!(shown)),
            ("port", client.report["port"].clone()),
            ("family", json!(family)),
            ("state", json!("ESTABLISHED")),
            ("source", json!("scan")),
            ("owner", json!("holder")),
            ("pid", json!(pid)),
            ("comm", json!(CROWD_COMM)),
            ("exe", json!(fs::read_link("/proc/self/exe").unwrap())),
            ("uid", json!(0)),
            ("holders", json!([{"pid": pid, "comm": CROWD_COMM}])),
            ("cookie", if options.is_empty() { client.report["cookie"].clone() } else { Value::Null }),
        ] {
            assert_eq!(row[field], expected, "{field} in {row}");
        }
        for unknown in
            ["cause", "isn", "peer_isn", "tid", "thread_comm", "port_blocked_until", "ifindex", "device"]
        {
            assert_eq!(row[unknown], Value::Null, "{unknown} in {row}");
        }
        assert!(row["id"].as_str().unwrap().starts_with("scan-"), "{row}");
        assert_eq!(scan.unexpected_stderr(), [""; 0]);
    }
    drop(client);
    assert_eq!(ScanOutput::run(&[]).rows_in(net), [&Value::Null; 0]);
}

#[test]
fn an_ipv4_connection_is_found_with_its_holder() {
    assert_found("127.0.0.1", "127.0.0.1", "ipv4");
}

#[test]
fn an_ipv6_connection_is_found_with_its_holder() {
    assert_found("::1", "::1", "ipv6");
}

#[test]
fn a_v4_mapped_connection_is_found_as_ipv4_on_an_ipv6_socket() {
    assert_found("::ffff:127.0.0.1", "127.0.0.1", "ipv6");
}

#[test]
fn a_link_local_connection_is_found_with_its_interface() {
    let net = TestNetns::enter_new();
    let address = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);
    net.add_address_v6(address);
    let socket = socket(address.into());
    socket.bind(&SocketAddrV6::new(address, 0, 0, 1).into()).unwrap();
    let own = socket.local_addr().unwrap();
    socket.connect(&own).unwrap();
    let scan = ScanOutput::run(&[]);
    let row = scan.only_row_in(net);
    let expected = (&json!("fe80::9"), &json!(1), &json!("lo"));
    assert_eq!((&row["addr"], &row["ifindex"], &row["device"]), expected, "{row}");
}

#[test]
fn a_time_wait_entry_is_found_with_its_expiry_and_no_process() {
    for address in ["127.0.0.1", "::1"] {
        let net = TestNetns::enter_new();
        let client = SocketCrowd::start(CrowdSockets::TimeWait(address.parse().unwrap()));
        for options in METHODS {
            let scan = ScanOutput::run(options);
            let row = scan.only_row_in(net);
            assert_eq!((&row["state"], &row["port"]), (&json!("TIME_WAIT"), &client.report["port"]), "{row}");
            for unknown in ["pid", "comm", "owner", "uid", "exe"] {
                assert_eq!(row[unknown], Value::Null, "{unknown} in {row}");
            }
            assert_eq!(row["holders"], json!([]));
            let until: Timestamp = row["port_blocked_until"].as_str().unwrap().parse().unwrap();
            let left = until.duration_since(Timestamp::now()).as_secs_f64();
            assert!((0.1..=60.0).contains(&left), "{left} s left: {row}");
        }
        let text = Command::new(selfconn()).arg("scan").output().unwrap().stdout;
        let text = String::from_utf8(text).unwrap();
        let line = text.lines().find(|line| line.contains(&format!("netns {}", net.inode))).unwrap();
        assert!(line.starts_with("TIME_WAIT ") && line.contains("no process; holds the port for "), "{line}");
        assert!(text.lines().last().unwrap().contains(" network namespace"), "{text}");
    }
}

#[test]
fn an_ordinary_connection_with_equal_ports_is_not_found() {
    let net = TestNetns::enter_new();
    let other = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    net.add_address_v6(other);
    let mapped = |last| IpAddr::from(Ipv4Addr::new(127, 0, 0, last).to_ipv6_mapped());
    let v4 = |last| IpAddr::from([127, 0, 0, last]);
    let equal_ports = |from: IpAddr, to: IpAddr| {
        let listener = TcpListener::bind(SocketAddr::new(to, 0)).unwrap();
        let server = listener.local_addr().unwrap();
        let client = socket(from);
        client.bind(&SocketAddr::new(from, server.port()).into()).unwrap();
        client.connect(&server.into()).unwrap();
        let accepted = listener.accept().unwrap();
        (listener, client, accepted)
    };
    let ordinary = |address: IpAddr| {
        let listener = TcpListener::bind(SocketAddr::new(address, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap();
        (listener, client, accepted)
    };
    let unbound = socket(v4(1));
    unbound.listen(1).unwrap();
    let _held = (
        unbound,
        [(v4(1), v4(2)), (mapped(1), mapped(2)), (Ipv6Addr::LOCALHOST.into(), other.into())]
            .map(|(from, to)| equal_ports(from, to)),
        [v4(1), mapped(1), Ipv6Addr::LOCALHOST.into()].map(ordinary),
    );
    // And an ordinary connection in TIME_WAIT.
    drop(ordinary(v4(3)));
    let (_self, port) = connect_to_self(v4(1));
    for options in METHODS {
        assert_eq!(ScanOutput::run(options).only_row_in(net)["port"], port);
    }
}

#[test]
fn a_shared_socket_lists_all_its_holders() {
    let net = TestNetns::enter_new();
    let parent = SocketCrowd::start(CrowdSockets::Shared);
    let scan = ScanOutput::run(&["--holders"]);
    let holders = scan.only_row_in(net)["holders"].as_array().unwrap();
    let pids: HashSet<_> = holders.iter().map(|holder| holder["pid"].as_u64().unwrap()).collect();
    assert_eq!(
        pids,
        HashSet::from([parent.pid().into(), parent.report["child"].as_u64().unwrap()]),
        "{holders:?}"
    );
}

#[test]
fn an_inherited_socket_lists_its_current_holder() {
    let net = TestNetns::enter_new();
    let mut parent = HelperProcess::start("connect and pass to child");
    let child: u32 = parent.read_output().parse().unwrap();
    let until = Instant::now() + DEADLINE;
    loop {
        let scan = ScanOutput::run(&["--holders"]);
        let row = scan.only_row_in(net);
        assert_eq!(row["pid"], child, "{row}");
        // The child has the socket before it sets its name.
        if row["comm"] == "a-child" {
            assert_eq!(row["holders"], json!([{"pid": child, "comm": "a-child"}]));
            break;
        }
        assert!(Instant::now() < until, "{row}");
    }
    parent.finish();
}

/// A namespace bound to a file, as `ip netns add` does it.
struct MountedNamespace(PathBuf);

impl MountedNamespace {
    fn bind_current(at: &Path) -> Self {
        fs::write(at, "").unwrap();
        mount_bind("/proc/thread-self/ns/net", at).unwrap();
        Self(at.to_owned())
    }
}

impl Drop for MountedNamespace {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_mounted_namespace_without_processes_is_scanned_once() {
    let folder = tempfile::tempdir().unwrap();
    let left = TestNetns::enter_new();
    let (_socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let first = MountedNamespace::bind_current(&folder.path().join("a namespace"));
    let second = MountedNamespace::bind_current(&folder.path().join("the same"));
    TestNetns::enter_new();
    for options in METHODS {
        assert_eq!(ScanOutput::run(options).only_row_in(left)["port"], port);
    }
    let snapshot = sockets::snapshot(SnapshotOptions::default(), &[]).unwrap();
    assert_eq!(
        snapshot.entries.iter().filter(|found| u64::from(found.endpoint.netns) == left.inode).count(),
        1
    );
    drop((first, second));
    let scan = ScanOutput::run(&["--procfs"]);
    assert_eq!(scan.rows_in(left).len(), 0, "without the iterators only the socket leads to the namespace");
}

#[test]
fn a_process_that_exits_during_the_scan_is_not_an_error() {
    let net = TestNetns::enter_new();
    let (_socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    for _ in 0..20 {
        let mut children: Vec<_> = (0..5)
            .map(|_| {
                let mut command = Command::new(selfconn());
                command.arg("--version").stdout(Stdio::null());
                // SAFETY: unshare is safe to call between fork and exec, and it closes no descriptor.
                unsafe {
                    command.pre_exec(|| {
                        rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET)?;
                        Ok(())
                    });
                }
                command.spawn().unwrap()
            })
            .collect();
        let scan = ScanOutput::run(&[]);
        assert_eq!(scan.only_row_in(net)["port"], port);
        assert_eq!(scan.unexpected_stderr(), [""; 0]);
        for child in &mut children {
            child.wait().unwrap();
        }
    }
}

/// `selfconn scan` as an ordinary user. It runs a copy, because other users may not be able to read the build
/// folder.
fn without_privileges() -> (tempfile::TempDir, Command) {
    let folder = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let copy = folder.path().join("selfconn");
    fs::copy(selfconn(), &copy).unwrap();
    let mut command = Command::new(copy);
    command.arg("scan").uid(65_534).gid(65_534).current_dir("/");
    (folder, command)
}

#[test]
fn without_root_the_callers_namespace_is_scanned_and_the_rest_is_reported_as_not_seen() {
    let net = TestNetns::enter_new();
    // No other test is visible in this namespace.
    let (_folder, mut command) = without_privileges();
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "nothing found in 1 network namespace\n");

    let (_socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let (_folder, mut command) = without_privileges();
    let scan = ScanOutput::from_command(&mut command);
    assert_eq!(scan.code, Some(1));
    let row = scan.only_row_in(net);
    assert_eq!((&row["port"], &row["uid"]), (&json!(port), &json!(0)), "{row}");
    for unknown in ["pid", "comm", "owner", "holders"] {
        assert_eq!(row[unknown], Value::Null, "{unknown} in {row}");
    }
    for part in [
        "selfconn: not seen: network namespaces of processes (",
        "selfconn: not seen: open files of processes (",
        "root",
    ] {
        assert!(scan.stderr.contains(part), "{part} is not in {}", scan.stderr);
    }
}

/// Drops all packets that this socket receives, so that a client that connects to it stays in SYN_SENT.
fn drop_received_packets(socket: &Socket) {
    const RETURN: u16 = 6;
    socket.attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)]).unwrap();
}

fn start_connect(socket: Socket, to: SocketAddr) -> Socket {
    socket.set_nonblocking(true).unwrap();
    assert!(socket.connect(&to.into()).is_err());
    socket
}

#[test]
fn connects_in_flight_are_listed_when_requested() {
    let net = TestNetns::enter_new();
    let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
    let any_port = |address| SocketAddr::new(address, 0).into();
    let unanswered_connect = |to: IpAddr| {
        let server = socket(to);
        server.bind(&any_port(to)).unwrap();
        server.listen(1).unwrap();
        drop_received_packets(&server);
        let address = server.local_addr().unwrap().as_socket().unwrap();
        (start_connect(socket(to), address), server, address.port())
    };
    let (_v4, _v4_server, v4_port) = unanswered_connect(localhost);
    let (_v6, _v6_server, v6_port) = unanswered_connect(Ipv6Addr::LOCALHOST.into());
    // From another source address.
    let (_other, _other_server, _) = unanswered_connect(Ipv4Addr::new(127, 0, 0, 2).into());
    // A connect to itself whose packets are dropped.
    let itself = socket(localhost);
    itself.bind(&any_port(localhost)).unwrap();
    drop_received_packets(&itself);
    let own = itself.local_addr().unwrap().as_socket().unwrap();
    let _itself = start_connect(itself, own);
    let iter = open_descriptor_iter();
    for (procfs_only, descriptors) in
        [(false, None), (true, None), (false, iter.as_ref()), (true, iter.as_ref())]
    {
        let options =
            SnapshotOptions { attempts: true, procfs_only, descriptors, ..SnapshotOptions::default() };
        let snapshot = sockets::snapshot(options, &[]).unwrap();
        let netns = u32::try_from(net.inode).unwrap();
        let found: Vec<_> = snapshot.entries.iter().filter(|found| found.endpoint.netns == netns).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].endpoint.port, found[0].state), (own.port(), state::SYN_SENT));
        let attempts = snapshot.attempts.iter().filter(|attempt| attempt.netns == netns).copied();
        let attempts: HashSet<_> = attempts.map(|attempt| Endpoint { netns_cookie: 0, ..attempt }).collect();
        let v6 = Ipv6Addr::LOCALHOST.into();
        let expected = HashSet::from([
            Endpoint::new(netns, localhost, v4_port, false),
            Endpoint::new(netns, v6, v6_port, true),
            Endpoint::new(netns, localhost, own.port(), false),
        ]);
        assert_eq!(attempts, expected);
        let not_asked = sockets::snapshot(SnapshotOptions { attempts: false, ..options }, &[]).unwrap();
        assert_eq!(not_asked.attempts, []);
        assert_eq!(not_asked.entries.iter().filter(|found| found.endpoint.netns == netns).count(), 1);
    }
}

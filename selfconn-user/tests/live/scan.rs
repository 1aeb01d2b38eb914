//! What exists already is found: in which namespaces, in which states, with which holders, and what is not ours.

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
use selfconn::sockets::{self, Dial, Options};
use selfconn_ebpf::state;
use serde_json::{Value, json};
use socket2::{SockFilter, Socket};

use self::crowd::{COMM, Crowd, Holds};
use crate::{
    client::{connect_to_self, socket},
    daemon::{DEADLINE, selfconn},
    net::Net,
    role::Role,
};

mod crowd;
mod many;

/// Both ways to read the kernel's table.
const METHODS: [&[&str]; 2] = [&[], &["--procfs"]];

/// What `selfconn scan --json` said.
#[derive(Debug)]
struct Scan {
    code: Option<i32>,
    rows: Vec<Value>,
    stderr: String,
}

impl Scan {
    fn run(options: &[&str]) -> Self {
        Self::of(Command::new(selfconn()).arg("scan").args(options))
    }

    fn of(command: &mut Command) -> Self {
        let output = command.arg("--json").output().unwrap();
        let row = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        Self {
            code: output.status.code(),
            rows: String::from_utf8(output.stdout).unwrap().lines().map(row).collect(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The rows of one namespace. Other tests work beside this one.
    fn of_net(&self, net: Net) -> Vec<&Value> {
        self.rows.iter().filter(|row| row["netns"] == net.inode).collect()
    }

    /// What it said on stderr, but for processes that even root may not look into where it lacks CAP_SYS_PTRACE.
    fn complaints(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| !line.contains("CAP_SYS_PTRACE")).collect()
    }

    #[track_caller]
    fn only(&self, net: Net) -> &Value {
        let rows = self.of_net(net);
        assert_eq!(rows.len(), 1, "{self:#?}");
        rows[0]
    }
}

fn is_found(address: &str, shown: &str, family: &str) {
    let net = Net::private();
    let client = Crowd::start(Holds::Selves(1, address.parse().unwrap()));
    let pid = client.pid();
    for options in METHODS {
        let scan = Scan::run(options);
        assert_eq!(scan.code, Some(1), "{scan:?}");
        let row = scan.only(net);
        for (field, expected) in [
            ("addr", json!(shown)),
            ("port", client.said["port"].clone()),
            ("family", json!(family)),
            ("state", json!("ESTABLISHED")),
            ("source", json!("scan")),
            ("owner", json!("holder")),
            ("pid", json!(pid)),
            ("comm", json!(COMM)),
            ("exe", json!(fs::read_link("/proc/self/exe").unwrap())),
            ("uid", json!(0)),
            ("holders", json!([{"pid": pid, "comm": COMM}])),
            ("cookie", if options.is_empty() { client.said["cookie"].clone() } else { Value::Null }),
        ] {
            assert_eq!(row[field], expected, "{field} in {row}");
        }
        for unknown in ["cause", "isn", "peer_isn", "tid", "thread_comm", "port_blocked_until", "ifindex"] {
            assert_eq!(row[unknown], Value::Null, "{unknown} in {row}");
        }
        assert!(row["id"].as_str().unwrap().starts_with("scan-"), "{row}");
        assert_eq!(scan.complaints(), [""; 0]);
    }
    drop(client);
    assert_eq!(Scan::run(&[]).of_net(net), [&Value::Null; 0]);
}

#[test]
fn an_ipv4_connection_is_found_with_its_holder() {
    is_found("127.0.0.1", "127.0.0.1", "ipv4");
}

#[test]
fn an_ipv6_connection_is_found_with_its_holder() {
    is_found("::1", "::1", "ipv6");
}

#[test]
fn a_mapped_connection_is_found_as_ipv4_on_an_ipv6_socket() {
    is_found("::ffff:127.0.0.1", "127.0.0.1", "ipv6");
}

#[test]
fn a_link_local_connection_is_found_with_its_interface() {
    let net = Net::private();
    let address = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);
    net.add_address_v6(address);
    let socket = socket(address.into());
    socket.bind(&SocketAddrV6::new(address, 0, 0, 1).into()).unwrap();
    let own = socket.local_addr().unwrap();
    socket.connect(&own).unwrap();
    let scan = Scan::run(&[]);
    let row = scan.only(net);
    assert_eq!((&row["addr"], &row["ifindex"]), (&json!("fe80::9"), &json!(1)), "{row}");
}

#[test]
fn what_time_wait_holds_is_found_with_its_time_and_nobody() {
    for address in ["127.0.0.1", "::1"] {
        let net = Net::private();
        let client = Crowd::start(Holds::TimeWait(address.parse().unwrap()));
        for options in METHODS {
            let scan = Scan::run(options);
            let row = scan.only(net);
            assert_eq!((&row["state"], &row["port"]), (&json!("TIME_WAIT"), &client.said["port"]), "{row}");
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
fn what_only_looks_like_one_is_not_found() {
    let net = Net::private();
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
    // And an ordinary one in TIME_WAIT.
    drop(ordinary(v4(3)));
    let (_self, port) = connect_to_self(v4(1));
    for options in METHODS {
        assert_eq!(Scan::run(options).only(net)["port"], port);
    }
}

#[test]
fn a_socket_that_others_hold_names_its_holders() {
    let net = Net::private();
    let parent = Crowd::start(Holds::Shared);
    let scan = Scan::run(&["--holders"]);
    let holders = scan.only(net)["holders"].as_array().unwrap();
    let pids: HashSet<_> = holders.iter().map(|holder| holder["pid"].as_u64().unwrap()).collect();
    assert_eq!(
        pids,
        HashSet::from([parent.pid().into(), parent.said["child"].as_u64().unwrap()]),
        "{holders:?}"
    );
}

#[test]
fn a_socket_that_was_handed_down_names_who_has_it_now() {
    let net = Net::private();
    let mut parent = Role::start("connect and hand down");
    let child: u32 = parent.says().parse().unwrap();
    let until = Instant::now() + DEADLINE;
    loop {
        let scan = Scan::run(&["--holders"]);
        let row = scan.only(net);
        assert_eq!(row["pid"], child, "{row}");
        // The child has the socket before it has its name.
        if row["comm"] == "a-child" {
            assert_eq!(row["holders"], json!([{"pid": child, "comm": "a-child"}]));
            break;
        }
        assert!(Instant::now() < until, "{row}");
    }
    parent.end();
}

/// A namespace bound to a file, as `ip netns add` does it.
struct Mounted(PathBuf);

impl Mounted {
    fn own_namespace(at: &Path) -> Self {
        fs::write(at, "").unwrap();
        mount_bind("/proc/thread-self/ns/net", at).unwrap();
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_namespace_that_is_mounted_and_has_no_process_is_visited_once() {
    let folder = tempfile::tempdir().unwrap();
    let left = Net::private();
    let (_socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let first = Mounted::own_namespace(&folder.path().join("a namespace"));
    let second = Mounted::own_namespace(&folder.path().join("the same"));
    Net::private();
    for options in METHODS {
        assert_eq!(Scan::run(options).only(left)["port"], port);
    }
    let survey = sockets::survey(Options::default(), &[]).unwrap();
    assert_eq!(survey.found.iter().filter(|found| u64::from(found.netns) == left.inode).count(), 1);
    drop((first, second));
    assert_eq!(Scan::run(&[]).of_net(left).len(), 0, "nothing leads there any more");
}

#[test]
fn what_vanishes_meanwhile_is_no_error() {
    let net = Net::private();
    let (_socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    for _ in 0..20 {
        let mut children: Vec<_> = (0..5)
            .map(|_| {
                let mut command = Command::new(selfconn());
                command.arg("--version").stdout(Stdio::null());
                // SAFETY: unshare is safe to call between fork and exec, and takes no descriptor away.
                unsafe {
                    command.pre_exec(|| {
                        rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET)?;
                        Ok(())
                    });
                }
                command.spawn().unwrap()
            })
            .collect();
        let scan = Scan::run(&[]);
        assert_eq!(scan.only(net)["port"], port);
        assert_eq!(scan.complaints(), [""; 0]);
        for child in &mut children {
            child.wait().unwrap();
        }
    }
}

/// `selfconn scan` as an ordinary user. From a copy, for the build's folder may be closed to others.
fn without_privileges() -> (tempfile::TempDir, Command) {
    let folder = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let copy = folder.path().join("selfconn");
    fs::copy(selfconn(), &copy).unwrap();
    let mut command = Command::new(copy);
    command.arg("scan").uid(65_534).gid(65_534).current_dir("/");
    (folder, command)
}

#[test]
fn without_root_the_own_namespace_is_seen_and_what_is_not_is_said() {
    let net = Net::private();
    // It is alone in a namespace that no other test can be seen in.
    let (_folder, mut command) = without_privileges();
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "nothing found in 1 network namespace\n");

    let (_socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let (_folder, mut command) = without_privileges();
    let scan = Scan::of(&mut command);
    assert_eq!(scan.code, Some(1));
    let row = scan.only(net);
    assert_eq!((&row["port"], &row["uid"]), (&json!(port), &json!(0)), "{row}");
    for unknown in ["pid", "comm", "owner", "holders"] {
        assert_eq!(row[unknown], Value::Null, "{unknown} in {row}");
    }
    for says in [
        "selfconn: not seen: network namespaces of processes (",
        "selfconn: not seen: open files of processes (",
        "root",
    ] {
        assert!(scan.stderr.contains(says), "{says} is not in {}", scan.stderr);
    }
}

/// Drops whatever comes in, so that whoever dials this socket stays in SYN_SENT.
fn deafen(socket: &Socket) {
    const RETURN: u16 = 6;
    socket.attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)]).unwrap();
}

fn dial(socket: Socket, to: SocketAddr) -> Socket {
    socket.set_nonblocking(true).unwrap();
    assert!(socket.connect(&to.into()).is_err());
    socket
}

#[test]
fn dials_in_flight_are_listed_where_they_are_wanted() {
    let net = Net::private();
    let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
    let any_port = |address| SocketAddr::new(address, 0).into();
    let dial_of_nobody = |to: IpAddr| {
        let server = socket(to);
        server.bind(&any_port(to)).unwrap();
        server.listen(1).unwrap();
        deafen(&server);
        let address = server.local_addr().unwrap().as_socket().unwrap();
        (dial(socket(to), address), server, address.port())
    };
    let (_v4, _v4_server, v4_port) = dial_of_nobody(localhost);
    let (_v6, _v6_server, v6_port) = dial_of_nobody(Ipv6Addr::LOCALHOST.into());
    // From another address.
    let (_other, _other_server, _) = dial_of_nobody(Ipv4Addr::new(127, 0, 0, 2).into());
    // Itself, and deaf to itself.
    let itself = socket(localhost);
    itself.bind(&any_port(localhost)).unwrap();
    deafen(&itself);
    let own = itself.local_addr().unwrap().as_socket().unwrap();
    let _itself = dial(itself, own);
    for procfs_only in [false, true] {
        let survey = sockets::survey(Options { dials: true, procfs_only }, &[]).unwrap();
        let netns = u32::try_from(net.inode).unwrap();
        let found: Vec<_> = survey.found.iter().filter(|found| found.netns == netns).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].port, found[0].state), (own.port(), state::SYN_SENT));
        let dials: HashSet<_> = survey.dials.iter().filter(|dial| dial.netns == netns).copied().collect();
        let v6 = Ipv6Addr::LOCALHOST.into();
        let expected = HashSet::from([
            Dial { netns, addr: localhost, dport: v4_port, is_ipv6: false },
            Dial { netns, addr: v6, dport: v6_port, is_ipv6: true },
            Dial { netns, addr: localhost, dport: own.port(), is_ipv6: false },
        ]);
        assert_eq!(dials, expected);
        let not_asked = sockets::survey(Options { dials: false, procfs_only }, &[]).unwrap();
        assert_eq!(not_asked.dials, []);
        assert_eq!(not_asked.found.iter().filter(|found| found.netns == netns).count(), 1);
    }
}

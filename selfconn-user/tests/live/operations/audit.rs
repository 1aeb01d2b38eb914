//! Compares what `audit` says about a port with what real clients hit.

use std::{
    fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    process::{Command, Stdio},
    sync::mpsc::channel,
    thread,
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};
use serde_json::{Value, json};
use socket2::Socket;

use crate::support::{
    client::{connect_until_self, own_comm, socket},
    daemon::{scaled, selfconn},
    helper_process::HelperProcess,
    netns::TestNetns,
    schema::parse_line,
};

const PORT_RANGE: &str = "40000 40199";
pub(super) const RESERVED_PORTS_KEY: &str = "net.ipv4.ip_local_reserved_ports";
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A port that is not hit in this many attempts counts as unreachable. Each of the hundred even ports of the
/// range would be hit with a probability of 1 - 10^-13.
const UNREACHABLE_ATTEMPTS: usize = 3_000;

/// The output of `selfconn audit --json`.
#[derive(Debug)]
pub(super) struct AuditOutput {
    pub(super) code: Option<i32>,
    pub(super) rows: Vec<Value>,
    pub(super) summary: Value,
}

impl AuditOutput {
    pub(super) fn run(options: &[&str]) -> Self {
        Self::from_command(Command::new(selfconn()).arg("audit").args(options))
    }

    pub(super) fn from_command(command: &mut Command) -> Self {
        let output = command.arg("--json").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let mut rows: Vec<Value> = text.lines().map(|line| parse_line("audit", line)).collect();
        let summary = rows.pop().unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)));
        assert_eq!(summary["event"], "summary");
        let at_risk = rows.iter().filter(|row| row["risk"] != "none").count();
        let counted = summary["high"].as_u64().unwrap() + summary["low"].as_u64().unwrap();
        assert_eq!(counted, at_risk as u64, "{summary}");
        assert_eq!(output.status.code(), Some(i32::from(at_risk != 0)), "{text}");
        Self { code: output.status.code(), rows, summary }
    }

    #[track_caller]
    fn row(&self, addr: Option<IpAddr>, port: u16) -> &Value {
        let addr = addr.map_or(Value::Null, |addr| addr.to_string().into());
        let is_match = |row: &&Value| row["addr"] == addr && row["port"] == port;
        let rows: Vec<_> = self.rows.iter().filter(is_match).collect();
        assert_eq!(rows.len(), 1, "{addr}:{port}: {self:#?}");
        rows[0]
    }
}

/// Connects to itself after a bind to port 0, as some clients do.
fn bind_and_connect_until_self(target: SocketAddr, limit: usize) -> Option<Socket> {
    (0..limit).find_map(|_| {
        let socket = socket(target.ip());
        socket.bind(&SocketAddr::new(target.ip(), 0).into()).unwrap();
        socket.connect(&target.into()).ok().map(|()| socket)
    })
}

/// Closes by a reset, because TIME_WAIT would block the port for the next client.
fn reset(socket: Socket) {
    assert_eq!(socket.local_addr().unwrap(), socket.peer_addr().unwrap(), "another socket accepted");
    socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(socket);
}

#[test]
fn risk_levels_match_what_clients_hit() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    net.set_sysctl("ip_local_reserved_ports", "40020-40060,40104-40105");
    let mut services = tempfile::NamedTempFile::new().unwrap();
    let addresses = [LOCALHOST, Ipv6Addr::LOCALHOST.into()];
    let ports = [40_100, 40_062, 40_101, 40_061, 40_104, 40_105, 39_998, 40_200];
    for (addr, port) in addresses.iter().flat_map(|addr| ports.map(|port| (addr, port))) {
        writeln!(services, "{port} {addr}").unwrap();
    }
    let audit = AuditOutput::run(&["--netns", "self", "--services", services.path().to_str().unwrap()]);
    assert_eq!(audit.rows.len(), addresses.len() * ports.len(), "{audit:#?}");
    assert_eq!(audit.code, Some(1));
    let unreachable_attempts = scaled(UNREACHABLE_ATTEMPTS);
    for row in &audit.rows {
        assert_eq!((&row["listener"], &row["netns"]), (&Value::Null, &json!(net.inode)), "{row}");
        let target = SocketAddr::new(
            row["addr"].as_str().unwrap().parse().unwrap(),
            row["port"].as_u64().unwrap() as u16,
        );
        let limit = || 20 * row["expected_dials"].as_u64().unwrap() as usize;
        let (by_connect, by_bind) = match row["risk"].as_str().unwrap() {
            "high" => (connect_until_self(target, limit()), None),
            "low" => (
                connect_until_self(target, unreachable_attempts),
                bind_and_connect_until_self(target, limit()),
            ),
            "none" => (
                connect_until_self(target, unreachable_attempts),
                bind_and_connect_until_self(target, unreachable_attempts),
            ),
            other => panic!("{other}"),
        };
        let hit = (by_connect.is_some(), by_bind.is_some());
        let expected = match target.port() {
            40_100 | 40_062 => ("high", (true, false)),
            40_101 | 40_061 => ("low", (false, true)),
            _ => ("none", (false, false)),
        };
        assert_eq!((row["risk"].as_str().unwrap(), hit), expected, "{row}");
        by_connect.into_iter().chain(by_bind).for_each(reset);
    }
}

/// For two ports of a range with a hundred even ports, of which twenty just below the first port are
/// reserved: checks that the measured hit rate matches the odds that audit states. Returns the expected
/// number of connects for each port.
#[track_caller]
fn expected_connects_behind_reserved_and_elsewhere(net: TestNetns) -> [usize; 2] {
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    net.set_sysctl("ip_local_reserved_ports", "40020-40058");
    let audit = AuditOutput::run(&["--netns", "self", "--port", "40060", "--port", "40150"]);
    let attempts = scaled(40_000);
    [40_060, 40_150].map(|port| {
        let expected = audit.row(None, port)["expected_dials"].as_u64().unwrap() as usize;
        let target = SocketAddr::new(LOCALHOST, port);
        let hits = (0..attempts).filter_map(|_| connect_until_self(target, 1)).map(reset).count();
        let predicted = attempts / expected;
        assert!(
            (predicted / 2..=predicted * 2).contains(&hits),
            "{port}: {hits} hits in {attempts} connects, predicted 1 in {expected}"
        );
        expected
    })
}

#[test]
fn a_port_behind_reserved_ports_is_hit_as_often_as_predicted() {
    let [behind, elsewhere] = expected_connects_behind_reserved_and_elsewhere(TestNetns::enter_new());
    assert!(behind * 3 < elsewhere, "{behind} {elsewhere}");
}

#[test]
fn with_a_step_width_all_ports_are_equally_likely() {
    let net = TestNetns::enter_new();
    // Only few kernels have this setting.
    if fs::exists("/proc/sys/net/ipv4/ip_local_port_step_width").unwrap() {
        net.set_sysctl("ip_local_port_step_width", "200");
        let [behind, elsewhere] = expected_connects_behind_reserved_and_elsewhere(net);
        assert_eq!(behind, elsewhere);
    }
}

#[test]
fn a_listening_port_is_at_risk_once_its_listener_is_gone() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    let any = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 40_110)).unwrap();
    let one = TcpListener::bind((LOCALHOST, 40_112)).unwrap();
    let _outside = TcpListener::bind((LOCALHOST, 8_080)).unwrap();
    for options in [&["--netns", "self"][..], &["--netns", "self", "--procfs"]] {
        let audit = AuditOutput::run(options);
        assert_eq!(audit.rows.len(), 3, "{audit:#?}");
        for (addr, port, risk) in [
            (Ipv4Addr::UNSPECIFIED.into(), 40_110, "high"),
            (LOCALHOST, 40_112, "high"),
            (LOCALHOST, 8_080, "none"),
        ] {
            let row = audit.row(Some(addr), port);
            assert_eq!(row["risk"], risk, "{row}");
            assert_eq!(row["listener"]["pid"], std::process::id(), "{row}");
            assert_eq!(row["listener"]["comm"], own_comm(), "{row}");
        }
        let why = audit.row(Some(Ipv4Addr::UNSPECIFIED.into()), 40_110)["why"].as_str().unwrap();
        assert!(
            why.contains("while nobody listens") && why.contains("another address of this host"),
            "{why}"
        );
    }
    let targets = [SocketAddr::new(LOCALHOST, 40_110), SocketAddr::new(LOCALHOST, 40_112)];
    for target in targets {
        // The listener accepts each connect.
        let socket = socket(target.ip());
        socket.connect(&target.into()).unwrap();
        assert_ne!(socket.local_addr().unwrap(), socket.peer_addr().unwrap());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
    drop((any, one));
    for target in targets {
        reset(connect_until_self(target, 20 * 100).expect("the port is hit once its listener is gone"));
    }
}

#[test]
fn an_address_that_is_no_default_source_is_hit_only_by_a_client_that_binds_it() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    let addr: IpAddr = Ipv4Addr::new(127, 0, 0, 53).into();
    let listener = TcpListener::bind((addr, 40_120)).unwrap();
    let audit = AuditOutput::run(&["--netns", "self"]);
    let row = audit.row(Some(addr), 40_120);
    assert_eq!(row["risk"], "low", "{row}");
    assert!(row["why"].as_str().unwrap().contains("source address 127.0.0.1"), "{row}");
    drop(listener);
    let target = SocketAddr::new(addr, 40_120);
    assert!(connect_until_self(target, scaled(UNREACHABLE_ATTEMPTS)).is_none());
    let limit = 20 * row["expected_dials"].as_u64().unwrap() as usize;
    let hit = (0..limit).find_map(|_| {
        let socket = socket(addr);
        bind_no_port(&socket);
        socket.bind(&SocketAddr::new(addr, 0).into()).unwrap();
        socket.connect(&target.into()).ok().map(|()| socket)
    });
    reset(hit.expect("a client that binds the address is hit"));
}

/// Leaves the choice of the port to `connect()`, even after `bind()`.
fn bind_no_port(socket: &Socket) {
    let on: libc::c_int = 1;
    // SAFETY: this option takes an int, which outlives the call.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
}

/// True if this host has a program. A test VM has none.
pub(super) fn has_program(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}

/// The output of `audit --sysctl` for the calling thread's namespace.
fn sysctl_file() -> String {
    let output = Command::new(selfconn()).args(["audit", "--sysctl"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    String::from_utf8(output.stdout).unwrap()
}

/// The only setting in a sysctl file.
#[track_caller]
fn setting(sysctl_file: &str) -> &str {
    let settings: Vec<_> = sysctl_file.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(settings.len(), 1, "{sysctl_file}");
    settings[0].strip_prefix(RESERVED_PORTS_KEY).and_then(|rest| rest.strip_prefix(" = ")).unwrap()
}

#[test]
fn the_printed_sysctl_file_removes_all_risks() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    net.set_sysctl("ip_local_reserved_ports", "8080,40104");
    let listeners: Vec<_> =
        [40_102, 40_103, 40_110].map(|port| TcpListener::bind((LOCALHOST, port)).unwrap()).into();
    assert_eq!(AuditOutput::run(&["--netns", "self"]).code, Some(1));
    let file = sysctl_file();
    assert_eq!(setting(&file), "8080,40102-40104,40110");
    if has_program("sysctl") {
        let mut sysctl = Command::new("sysctl")
            .args(["-p", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        sysctl.stdin.take().unwrap().write_all(file.as_bytes()).unwrap();
        assert!(sysctl.wait().unwrap().success());
    } else {
        net.set_sysctl("ip_local_reserved_ports", setting(&file));
    }
    let after = AuditOutput::run(&["--netns", "self"]);
    assert_eq!((after.code, after.rows.len()), (Some(0), 3), "{after:#?}");
    assert_eq!(setting(&sysctl_file()), setting(&file), "reserved ports stay reserved");
    drop(listeners);
    for port in [40_102, 40_103, 40_110] {
        let target = SocketAddr::new(LOCALHOST, port);
        assert!(connect_until_self(target, scaled(UNREACHABLE_ATTEMPTS)).is_none(), "{port}");
        assert!(bind_and_connect_until_self(target, scaled(UNREACHABLE_ATTEMPTS)).is_none(), "{port}");
    }
}

#[test]
fn another_namespace_is_audited_and_its_fix_works_from_outside() {
    let caller_netns = TestNetns::enter_new();
    let (to_main, from_thread) = channel();
    let (to_thread, from_main) = channel::<()>();
    // A panic drops the channels, so that the thread ends.
    thread::scope(move |scope| {
        scope.spawn(move || {
            let net = TestNetns::enter_new();
            net.set_sysctl("ip_local_port_range", PORT_RANGE);
            let listener = TcpListener::bind((LOCALHOST, 40_102)).unwrap();
            let process = HelperProcess::start("wait");
            to_main.send((net, process.pid())).unwrap();
            let fixed = from_main.recv().is_ok();
            if !has_program("nsenter") || !has_program("sysctl") {
                // Apply the setting directly where the programs of the fix are missing.
                net.set_sysctl("ip_local_reserved_ports", "40102");
                to_main.send((net, process.pid())).unwrap();
                let _ = from_main.recv();
            }
            drop(listener);
            process.finish();
            assert!(fixed);
        });
        let (net, pid) = from_thread.recv().unwrap();
        let path = format!("/proc/{pid}/ns/net");
        let all = AuditOutput::run(&[]);
        let is_there = |audit: &AuditOutput| audit.rows.iter().any(|row| row["netns"] == net.inode);
        assert!(is_there(&all), "{all:#?}");
        assert!(!is_there(&AuditOutput::run(&["--netns", "self"])));
        assert_eq!(
            AuditOutput::run(&["--netns", "self"]).summary["namespaces"][0]["netns"],
            caller_netns.inode
        );
        let one = AuditOutput::run(&["--netns", &path]);
        let inode = net.inode;
        let fix = format!(
            "nsenter --net={path} sh -c '[ $(stat -Lc %i /proc/self/ns/net) = {inode} ] || {{ echo The path does not \
             lead to network namespace {inode} any more, so nothing is written. >&2; exit 1; }}; \
             sysctl -w {RESERVED_PORTS_KEY}=40102'"
        );
        assert_eq!(
            one.summary["namespaces"],
            json!([{"netns": net.inode, "path": path, "range": "40000-40199", "reserved": "", "fix": fix,
            "fix_lasting": null, "fix_note": null, "disagreements": []}])
        );
        if has_program("nsenter") && has_program("sysctl") {
            assert!(Command::new("sh").args(["-c", &fix]).stdout(Stdio::null()).status().unwrap().success());
        } else {
            to_thread.send(()).unwrap();
            from_thread.recv().unwrap();
        }
        assert_eq!(AuditOutput::run(&["--netns", &path]).code, Some(0));
        to_thread.send(()).unwrap();
    });
}

#[test]
fn settings_that_the_next_boot_changes_are_reported_for_the_namespace_of_pid_1() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_reserved_ports", "8080");
    // SAFETY: only the flag FILES could take descriptors away from other threads, and it is not set.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS | UnshareFlags::NEWPID) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    fs::create_dir_all("/etc").unwrap();
    mount("tmpfs", "/etc", "tmpfs", MountFlags::empty(), None).unwrap();
    fs::create_dir("/etc/sysctl.d").unwrap();
    fs::write("/etc/sysctl.d/50-test.conf", format!("{RESERVED_PORTS_KEY} = 4711\n")).unwrap();
    let mut command = Command::new(selfconn());
    command.args(["audit", "--netns", "self"]);
    // The process is the first of the new pid namespace, and /proc must show that namespace.
    // SAFETY: mount is a system call, and it allocates nothing for paths as short as these.
    unsafe {
        command.pre_exec(|| Ok(mount("proc", "/proc", "proc", MountFlags::empty(), None)?));
    }
    let audit = AuditOutput::from_command(&mut command);
    let disagreements = json!([{"key": RESERVED_PORTS_KEY, "file": "/etc/sysctl.d/50-test.conf", "at_boot": "4711", "running": "8080"}]);
    let other = audit.summary["namespaces"][0]["disagreements"].as_array().unwrap();
    // A host may set the port range in a folder other than /etc.
    let of_reserved: Vec<_> = other.iter().filter(|other| other["key"] == RESERVED_PORTS_KEY).collect();
    assert_eq!(json!(of_reserved), disagreements, "{audit:#?}");
}

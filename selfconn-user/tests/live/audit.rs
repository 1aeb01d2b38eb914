//! What `audit` says of a port against what real clients come by.

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

use crate::{
    client::{dial_until_self, own_comm, socket},
    daemon::{scaled, selfconn},
    net::Net,
    role::Role,
};

const RANGE: &str = "40000 40199";
const RESERVED: &str = "net.ipv4.ip_local_reserved_ports";
const LO: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A port that no client comes by in so many dials isn't come by. Of the range's hundred even ports each would be hit
/// with a probability of 1 - 10^-13.
const NEVER: usize = 3_000;

/// What `selfconn audit --json` said.
#[derive(Debug)]
struct Audit {
    code: Option<i32>,
    rows: Vec<Value>,
    summary: Value,
}

impl Audit {
    fn run(options: &[&str]) -> Self {
        Self::of(Command::new(selfconn()).arg("audit").args(options))
    }

    fn of(command: &mut Command) -> Self {
        let output = command.arg("--json").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let mut rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
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
        let is_it = |row: &&Value| row["addr"] == addr && row["port"] == port;
        let rows: Vec<_> = self.rows.iter().filter(is_it).collect();
        assert_eq!(rows.len(), 1, "{addr}:{port}: {self:#?}");
        rows[0]
    }
}

/// Dials after binding port 0, as some clients do.
fn bind_and_dial_until_self(target: SocketAddr, limit: usize) -> Option<Socket> {
    (0..limit).find_map(|_| {
        let socket = socket(target.ip());
        socket.bind(&SocketAddr::new(target.ip(), 0).into()).unwrap();
        socket.connect(&target.into()).ok().map(|()| socket)
    })
}

/// Leaves no TIME_WAIT, which would keep the port from the next client.
fn reset(socket: Socket) {
    assert_eq!(socket.local_addr().unwrap(), socket.peer_addr().unwrap(), "somebody else answered");
    socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(socket);
}

#[test]
fn grades_are_what_clients_then_find() {
    let net = Net::private();
    net.sysctl("ip_local_port_range", RANGE);
    net.sysctl("ip_local_reserved_ports", "40020-40060,40104-40105");
    let mut services = tempfile::NamedTempFile::new().unwrap();
    let addresses = [LO, Ipv6Addr::LOCALHOST.into()];
    let ports = [40_100, 40_062, 40_101, 40_061, 40_104, 40_105, 39_998, 40_200];
    for (addr, port) in addresses.iter().flat_map(|addr| ports.map(|port| (addr, port))) {
        writeln!(services, "{port} {addr}").unwrap();
    }
    let audit = Audit::run(&["--netns", "self", "--services", services.path().to_str().unwrap()]);
    assert_eq!(audit.rows.len(), addresses.len() * ports.len(), "{audit:#?}");
    assert_eq!(audit.code, Some(1));
    let never = scaled(NEVER);
    for row in &audit.rows {
        assert_eq!((&row["listener"], &row["netns"]), (&Value::Null, &json!(net.inode)), "{row}");
        let target = SocketAddr::new(
            row["addr"].as_str().unwrap().parse().unwrap(),
            row["port"].as_u64().unwrap() as u16,
        );
        let limit = || 20 * row["expected_dials"].as_u64().unwrap() as usize;
        let (by_connect, by_bind) = match row["risk"].as_str().unwrap() {
            "high" => (dial_until_self(target, limit()), None),
            "low" => (dial_until_self(target, never), bind_and_dial_until_self(target, limit())),
            "none" => (dial_until_self(target, never), bind_and_dial_until_self(target, never)),
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

/// Two ports of a range of a hundred even ones, of which twenty just below the first are reserved: how many dials a hit
/// of each takes, as audit says and as is found.
#[track_caller]
fn dials_behind_reserved_and_elsewhere(net: Net) -> [usize; 2] {
    net.sysctl("ip_local_port_range", RANGE);
    net.sysctl("ip_local_reserved_ports", "40020-40058");
    let audit = Audit::run(&["--netns", "self", "--port", "40060", "--port", "40150"]);
    let dials = scaled(40_000);
    [40_060, 40_150].map(|port| {
        let expected = audit.row(None, port)["expected_dials"].as_u64().unwrap() as usize;
        let target = SocketAddr::new(LO, port);
        let hits = (0..dials).filter_map(|_| dial_until_self(target, 1)).map(reset).count();
        let said = dials / expected;
        assert!(
            (said / 2..=said * 2).contains(&hits),
            "{port}: {hits} hits in {dials} dials, 1 in {expected} said"
        );
        expected
    })
}

#[test]
fn a_port_behind_reserved_ones_is_hit_as_much_more_often_as_is_said() {
    let [behind, elsewhere] = dials_behind_reserved_and_elsewhere(Net::private());
    assert!(behind * 3 < elsewhere, "{behind} {elsewhere}");
}

#[test]
fn with_a_step_width_all_ports_are_hit_alike() {
    let net = Net::private();
    // Few kernels have it.
    if fs::exists("/proc/sys/net/ipv4/ip_local_port_step_width").unwrap() {
        net.sysctl("ip_local_port_step_width", "200");
        let [behind, elsewhere] = dials_behind_reserved_and_elsewhere(net);
        assert_eq!(behind, elsewhere);
    }
}

#[test]
fn a_listener_is_at_risk_as_soon_as_it_is_down() {
    let net = Net::private();
    net.sysctl("ip_local_port_range", RANGE);
    let any = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 40_110)).unwrap();
    let one = TcpListener::bind((LO, 40_112)).unwrap();
    let _outside = TcpListener::bind((LO, 8_080)).unwrap();
    for options in [&["--netns", "self"][..], &["--netns", "self", "--procfs"]] {
        let audit = Audit::run(options);
        assert_eq!(audit.rows.len(), 3, "{audit:#?}");
        for (addr, port, risk) in
            [(Ipv4Addr::UNSPECIFIED.into(), 40_110, "high"), (LO, 40_112, "high"), (LO, 8_080, "none")]
        {
            let row = audit.row(Some(addr), port);
            assert_eq!(row["risk"], risk, "{row}");
            assert_eq!(row["listener"]["pid"], std::process::id(), "{row}");
            assert_eq!(row["listener"]["comm"], own_comm(), "{row}");
            assert_eq!(row["fix"].is_null(), risk == "none", "{row}");
        }
        let why = audit.row(Some(Ipv4Addr::UNSPECIFIED.into()), 40_110)["why"].as_str().unwrap();
        assert!(why.contains("once nobody listens") && why.contains("another address of this host"), "{why}");
    }
    let targets = [SocketAddr::new(LO, 40_110), SocketAddr::new(LO, 40_112)];
    for target in targets {
        // Each dial is answered, by the listener.
        let socket = socket(target.ip());
        socket.connect(&target.into()).unwrap();
        assert_ne!(socket.local_addr().unwrap(), socket.peer_addr().unwrap());
        socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }
    drop((any, one));
    for target in targets {
        reset(dial_until_self(target, 20 * 100).expect("the port is hit once its listener is gone"));
    }
}

#[test]
fn an_address_from_which_no_dial_leaves_is_hit_only_by_a_client_that_binds_it() {
    let net = Net::private();
    net.sysctl("ip_local_port_range", RANGE);
    let addr: IpAddr = Ipv4Addr::new(127, 0, 0, 53).into();
    let listener = TcpListener::bind((addr, 40_120)).unwrap();
    let audit = Audit::run(&["--netns", "self"]);
    let row = audit.row(Some(addr), 40_120);
    assert_eq!(row["risk"], "low", "{row}");
    assert!(row["why"].as_str().unwrap().contains("leaves from 127.0.0.1"), "{row}");
    drop(listener);
    let target = SocketAddr::new(addr, 40_120);
    assert!(dial_until_self(target, scaled(NEVER)).is_none());
    let limit = 20 * row["expected_dials"].as_u64().unwrap() as usize;
    let hit = (0..limit).find_map(|_| {
        let socket = socket(addr);
        bind_no_port(&socket);
        socket.bind(&SocketAddr::new(addr, 0).into()).unwrap();
        socket.connect(&target.into()).ok().map(|()| socket)
    });
    reset(hit.expect("a client that binds the address is hit"));
}

/// Leaves the choice of the port to `connect()`, also after `bind()`.
fn bind_no_port(socket: &Socket) {
    let on: libc::c_int = 1;
    // SAFETY: this option takes an int, which lives longer than the call.
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

/// Whether this host has a program; a VM has none.
fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}

/// What `audit --sysctl` prints for the calling thread's namespace.
fn sysctl_d() -> String {
    let output = Command::new(selfconn()).args(["audit", "--sysctl"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    String::from_utf8(output.stdout).unwrap()
}

/// Its only setting.
#[track_caller]
fn setting(sysctl_d: &str) -> &str {
    let settings: Vec<_> = sysctl_d.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(settings.len(), 1, "{sysctl_d}");
    settings[0].strip_prefix(RESERVED).and_then(|rest| rest.strip_prefix(" = ")).unwrap()
}

#[test]
fn with_the_printed_file_nothing_is_at_risk_any_more() {
    let net = Net::private();
    net.sysctl("ip_local_port_range", RANGE);
    net.sysctl("ip_local_reserved_ports", "8080,40104");
    let listeners: Vec<_> =
        [40_102, 40_103, 40_110].map(|port| TcpListener::bind((LO, port)).unwrap()).into();
    assert_eq!(Audit::run(&["--netns", "self"]).code, Some(1));
    let file = sysctl_d();
    assert_eq!(setting(&file), "8080,40102-40104,40110");
    if has("sysctl") {
        let mut sysctl = Command::new("sysctl")
            .args(["-p", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        sysctl.stdin.take().unwrap().write_all(file.as_bytes()).unwrap();
        assert!(sysctl.wait().unwrap().success());
    } else {
        net.sysctl("ip_local_reserved_ports", setting(&file));
    }
    let after = Audit::run(&["--netns", "self"]);
    assert_eq!((after.code, after.rows.len()), (Some(0), 3), "{after:#?}");
    assert_eq!(setting(&sysctl_d()), setting(&file), "what is reserved stays");
    drop(listeners);
    for port in [40_102, 40_103, 40_110] {
        let target = SocketAddr::new(LO, port);
        assert!(dial_until_self(target, scaled(NEVER)).is_none(), "{port}");
        assert!(bind_and_dial_until_self(target, scaled(NEVER)).is_none(), "{port}");
    }
}

#[test]
fn another_namespace_is_found_and_its_fix_works_from_outside() {
    let own = Net::private();
    let (told, tell) = channel();
    let (end, ended) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let net = Net::private();
            net.sysctl("ip_local_port_range", RANGE);
            let listener = TcpListener::bind((LO, 40_102)).unwrap();
            let process = Role::start("wait");
            told.send((net, process.pid())).unwrap();
            let fixed = ended.recv().is_ok();
            if !has("nsenter") || !has("sysctl") {
                // As the fix would do it, where there are no programs to.
                net.sysctl("ip_local_reserved_ports", "40102");
                told.send((net, process.pid())).unwrap();
                let _ = ended.recv();
            }
            drop(listener);
            process.end();
            assert!(fixed);
        });
        let (net, pid) = tell.recv().unwrap();
        let path = format!("/proc/{pid}/ns/net");
        let all = Audit::run(&[]);
        let is_there = |audit: &Audit| audit.rows.iter().any(|row| row["netns"] == net.inode);
        assert!(is_there(&all), "{all:#?}");
        assert!(!is_there(&Audit::run(&["--netns", "self"])));
        assert_eq!(Audit::run(&["--netns", "self"]).summary["namespaces"][0]["netns"], own.inode);
        let one = Audit::run(&["--netns", &path]);
        assert_eq!(
            one.summary["namespaces"],
            json!([{"netns": net.inode, "path": path, "range": "40000-40199",
            "reserved": "", "disagreements": []}])
        );
        let fix = one.row(Some(LO), 40_102)["fix"].as_str().unwrap();
        assert_eq!(fix, format!("nsenter --net={path} sysctl -w {RESERVED}=40102"));
        if has("nsenter") && has("sysctl") {
            assert!(Command::new("sh").args(["-c", fix]).stdout(Stdio::null()).status().unwrap().success());
        } else {
            end.send(()).unwrap();
            tell.recv().unwrap();
        }
        assert_eq!(Audit::run(&["--netns", &path]).code, Some(0));
        end.send(()).unwrap();
    });
}

#[test]
fn what_the_next_boot_changes_is_told_for_the_namespace_of_the_first_process() {
    let net = Net::private();
    net.sysctl("ip_local_reserved_ports", "8080");
    // SAFETY: only FILES, which is not among the flags, can take descriptors away from other threads.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS | UnshareFlags::NEWPID) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    fs::create_dir_all("/etc").unwrap();
    mount("tmpfs", "/etc", "tmpfs", MountFlags::empty(), None).unwrap();
    fs::create_dir("/etc/sysctl.d").unwrap();
    fs::write("/etc/sysctl.d/50-test.conf", format!("{RESERVED} = 4711\n")).unwrap();
    let mut command = Command::new(selfconn());
    command.args(["audit", "--netns", "self"]);
    // The first process of the new pid namespace, with a /proc that says so.
    // SAFETY: mount is a system call, and allocates nothing for paths as short as these.
    unsafe {
        command.pre_exec(|| Ok(mount("proc", "/proc", "proc", MountFlags::empty(), None)?));
    }
    let audit = Audit::of(&mut command);
    let disagreements = json!([{"key": RESERVED, "file": "/etc/sysctl.d/50-test.conf", "at_boot": "4711", "running": "8080"}]);
    let other = audit.summary["namespaces"][0]["disagreements"].as_array().unwrap();
    // A host may set the range in a folder other than /etc.
    let of_reserved: Vec<_> = other.iter().filter(|other| other["key"] == RESERVED).collect();
    assert_eq!(json!(of_reserved), disagreements, "{audit:#?}");
}

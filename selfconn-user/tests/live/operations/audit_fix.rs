//! Runs the fixes that `audit` prints as they are printed, and reads back what they set.

use std::{
    collections::BTreeSet,
    fs,
    io::{ErrorKind, Write as _},
    net::{Ipv4Addr, TcpListener},
    ops::RangeInclusive,
    os::{
        fd::AsRawFd as _,
        unix::{fs::symlink, process::CommandExt as _},
    },
    process::{Command, Output, Stdio},
    thread,
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};
use serde_json::Value;
use socket2::Socket;

use super::audit::{AuditOutput, RESERVED_PORTS_KEY, has_program};
use crate::support::{cgroup::TestCgroup, daemon::selfconn, helper_process::HelperProcess, netns::TestNetns};

const PORT_RANGE: &str = "30000 60999";

/// The ports of a list of the sysctl.
fn ports_of(list: &str) -> BTreeSet<u16> {
    let spans = list.trim().split(',').filter(|span| !span.is_empty());
    let ports = |span: &str| {
        let (first, last) = span.split_once('-').unwrap_or((span, span));
        let ports: RangeInclusive<u16> = first.parse().unwrap()..=last.parse().unwrap();
        ports
    };
    spans.flat_map(ports).collect()
}

/// The reserved ports of the calling thread's namespace. The kernel shows them to one read.
fn reserved() -> BTreeSet<u16> {
    let mut text = vec![0; 1 << 19];
    let mut file = fs::File::open("/proc/thread-self/net/../../../sys/net/ipv4/ip_local_reserved_ports")
        .or_else(|_| fs::File::open("/proc/sys/net/ipv4/ip_local_reserved_ports"))
        .unwrap();
    let length = std::io::Read::read(&mut file, &mut text).unwrap();
    ports_of(str::from_utf8(&text[..length]).unwrap())
}

/// A file for `--services`.
fn services(lines: impl Iterator<Item = String>) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    lines.for_each(|line| writeln!(file, "{line}").unwrap());
    file
}

/// Feeds a command to a shell, as a person would.
fn run_in_shell(command: &str) {
    let mut shell = Command::new("sh").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    writeln!(shell.stdin.take().unwrap(), "{command}").unwrap();
    assert!(shell.wait().unwrap().success(), "{command}");
}

fn fix_of(audit: &AuditOutput) -> &str {
    audit.summary["namespaces"][0]["fix"].as_str().unwrap()
}

/// A thousand single ports that are no neighbours are a list of 6 KB, and a write takes 4,092 bytes.
fn long_list() -> impl Iterator<Item = u16> {
    (40_000..).step_by(4).take(1_000)
}

#[test]
fn the_command_reserves_every_port_whatever_their_number() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    net.set_sysctl("ip_local_reserved_ports", "8080");
    let long = services(long_list().map(|port| port.to_string()));
    let rows: [(&[&str], BTreeSet<u16>); 3] = [
        (&["--port", "40001"], [8080, 40_001].into()),
        // The node ports of Kubernetes: those outside the range need no reservation.
        (&["--port", "29000-32767", "--port", "40001-40003"], {
            [8080, 40_001, 40_002, 40_003].into_iter().chain(30_000..=32_767).collect()
        }),
        (&["--services", long.path().to_str().unwrap()], [8080].into_iter().chain(long_list()).collect()),
    ];
    for (options, expected) in rows {
        net.set_sysctl("ip_local_reserved_ports", "8080");
        let options = [&["--netns", "self"], options].concat();
        let before = AuditOutput::run(&options);
        assert_eq!(before.code, Some(1));
        let fix = fix_of(&before);
        if has_program("sysctl") && has_program("dd") {
            run_in_shell(fix);
        } else {
            // As dd does: the rest of a list is written on the same descriptor.
            let list = fix.rsplit_once('=').map(|(_, list)| list).filter(|_| fix.starts_with("sysctl"));
            let list = list.or_else(|| fix.strip_prefix("echo ")?.split(' ').next()).unwrap();
            net.set_sysctl("ip_local_reserved_ports", list);
        }
        assert_eq!(reserved(), expected, "{fix}");
        let after = AuditOutput::run(&options);
        assert_eq!((after.code, after.summary["namespaces"][0]["fix"].is_null()), (Some(0), true));
    }
}

/// A user can end the process that leads to his namespace, and get its pid again in another namespace.
#[test]
fn nothing_is_written_if_the_path_leads_to_another_namespace_by_then() {
    let _net = TestNetns::enter_new();
    if !["nsenter", "sysctl", "dd"].into_iter().all(has_program) {
        return println!("skipped: nsenter, sysctl or dd is not installed");
    }
    let start = || {
        TestNetns::with_new_in_helper(|net| {
            net.set_sysctl("ip_local_port_range", PORT_RANGE);
            net.set_sysctl("ip_local_reserved_ports", "8080");
            (net, HelperProcess::start("wait"))
        })
    };
    let reserved_of = |process: &HelperProcess| {
        let pid = process.pid();
        thread::spawn(move || {
            TestNetns::enter_of_process(pid);
            reserved()
        })
        .join()
        .unwrap()
    };
    let ((audited, process), (_, other)) = (start(), start());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net");
    let lead_to = |process: &HelperProcess| {
        let _ = fs::remove_file(&path);
        symlink(format!("/proc/{}/ns/net", process.pid()), &path).unwrap();
    };
    let long = services(long_list().map(|port| port.to_string()));
    for (options, expected) in [
        (["--port", "40001"], [8080, 40_001].into_iter().collect::<BTreeSet<u16>>()),
        (
            ["--services", long.path().to_str().unwrap()],
            [8080, 40_001].into_iter().chain(long_list()).collect(),
        ),
    ] {
        lead_to(&process);
        let audit = AuditOutput::run(&[&["--netns", path.to_str().unwrap()], &options[..]].concat());
        let fix = fix_of(&audit);
        let before = reserved_of(&process);
        lead_to(&other);
        let output = Command::new("sh").args(["-c", fix]).output().unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{output:?}");
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            format!(
                "The path does not lead to network namespace {} any more, so nothing is written.\n",
                audited.inode
            )
        );
        assert_eq!((reserved_of(&other), reserved_of(&process)), ([8080].into(), before));
        // The negative twin.
        lead_to(&process);
        run_in_shell(fix);
        assert_eq!((reserved_of(&other), reserved_of(&process)), ([8080].into(), expected));
    }
    process.finish();
    other.finish();
}

/// The negative twin: what a program sets that writes once.
#[test]
fn one_write_leaves_out_ports_and_audit_still_reports_them() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    let long = services(long_list().map(|port| port.to_string()));
    let list = long_list().map(|port| port.to_string()).collect::<Vec<_>>().join(",");
    let mut file =
        fs::File::options().write(true).open("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap();
    let written = std::io::Write::write(&mut file, list.as_bytes()).unwrap();
    if written == list.len() {
        return println!("skipped: a page of this machine takes the whole list");
    }
    assert_eq!(reserved(), ports_of(&list[..written]));
    let audit = AuditOutput::run(&["--netns", "self", "--services", long.path().to_str().unwrap()]);
    assert_eq!(audit.summary["high"], 1_000 - reserved().len(), "{}", audit.summary);
}

fn sysctl_file(services: &str) -> Output {
    Command::new(selfconn()).args(["audit", "--sysctl", "--services", services]).output().unwrap()
}

#[test]
fn a_sysctl_file_sets_what_it_says_and_says_what_it_leaves_out() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    let long = services(long_list().map(|port| port.to_string()));
    let path = long.path().to_str().unwrap();
    let output = sysctl_file(path);
    let (file, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("318 of 1,000 ports do not fit in one write of 4,092 bytes"), "{stderr}");
    let settings: Vec<_> = file.lines().filter(|line| !line.starts_with('#')).collect();
    let setting = settings[0].strip_prefix(&format!("{RESERVED_PORTS_KEY} = ")).unwrap();
    assert_eq!(settings.len(), 1, "{file}");
    if has_program("sysctl") {
        let mut sysctl =
            Command::new("sysctl").args(["-q", "-p", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        sysctl.stdin.take().unwrap().write_all(file.as_bytes()).unwrap();
        assert!(sysctl.wait().unwrap().success());
    } else {
        net.set_sysctl("ip_local_reserved_ports", setting);
    }
    assert_eq!(reserved(), ports_of(setting));
    // What it leaves out is in a comment, and the command in another sets all.
    let comment =
        |line: &str| file.lines().skip_while(|at| !at.starts_with(line)).nth(1).unwrap()[2..].to_owned();
    let left_out = ports_of(&comment("# Not set below"));
    let both: BTreeSet<_> = reserved().union(&left_out).copied().collect();
    assert_eq!((both, left_out.len()), (long_list().collect(), 318));
    if has_program("dd") {
        run_in_shell(&comment("# This sets all ports"));
        assert_eq!(reserved(), long_list().collect());
        assert_eq!(AuditOutput::run(&["--netns", "self", "--services", path]).code, Some(0));
    }
    // The negative twin: neighbours are a range, which fits.
    net.set_sysctl("ip_local_reserved_ports", "\n");
    let short = services(["40000-41999".to_owned()].into_iter());
    let output = sysctl_file(short.path().to_str().unwrap());
    let (file, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
    assert_eq!((output.status.code(), stderr.contains("do not fit")), (Some(0), false), "{file} {stderr}");
    assert!(file.ends_with(&format!("\n{RESERVED_PORTS_KEY} = 40000-41999\n")), "{file}");
}

#[test]
fn the_command_that_keeps_the_setting_names_the_same_ports() {
    // Only the namespace of process 1 is set by a file.
    if let Err(error) = fs::File::open("/proc/1/ns/net") {
        return println!("skipped: /proc/1/ns/net: {error}");
    }
    let net = TestNetns::enter_of_process(1);
    let audit = AuditOutput::run(&["--netns", "self", "--port", "40002"]);
    let namespace = &audit.summary["namespaces"][0];
    assert_eq!(namespace["netns"], net.inode);
    let keep = namespace["fix_lasting"].as_str().unwrap();
    let command = keep.strip_suffix(" > /etc/sysctl.d/90-selfconn.conf").unwrap();
    assert!(command.contains(" --port 40002"), "{keep}");
    let options = command.strip_prefix("selfconn ").unwrap();
    let output = Command::new(selfconn()).args(options.split(' ')).output().unwrap();
    let file = String::from_utf8(output.stdout).unwrap();
    let set = file.lines().last().unwrap().rsplit_once(" = ").unwrap().1;
    assert!(ports_of(set).contains(&40_002), "{file}");
}

const ID: &str = "7eb263389e5eea068ad3d0c208ea4dd02ba86fa0b2ebd44f63adc391351fba6d";

/// The control group of a pod's container, as kubelet makes it with the systemd driver.
fn pod_cgroup(pod: u8) -> Result<TestCgroup, String> {
    TestCgroup::create(&format!(
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod2b7f2ae1_66c6_4a1b_9e3c_0a0b0c0d0e0{pod}.slice/\
         cri-containerd-{ID}.scope"
    ))
}

fn move_to(cgroup: &TestCgroup, process: &HelperProcess) {
    fs::write(cgroup.path().join("cgroup.procs"), process.pid().to_string()).unwrap();
}

/// A process that listens on this port, in the namespace of the calling thread.
fn listen(port: u16) -> HelperProcess {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let mut holder = HelperProcess::start_with_fd("hold", &Socket::from(listener));
    assert_eq!(holder.read_output(), "held");
    holder
}

/// `audit` of a namespace, run in the container of another pod as the shipped DaemonSet runs it: it sees the
/// host's processes, and control groups from its own on.
fn audit_in_pod(cgroup: &TestCgroup, netns: &str) -> AuditOutput {
    let procs = cgroup.procs();
    let procs = procs.as_raw_fd();
    let mut command = Command::new(selfconn());
    command.args(["audit", "--netns", netns]);
    // SAFETY: write, unshare and mount are system calls, and they allocate nothing for paths as short as these;
    // the file outlives the spawn. The flag FILES is not set.
    unsafe {
        command.pre_exec(move || {
            if libc::write(procs, c"0".as_ptr().cast(), 1) != 1 {
                return Err(std::io::Error::last_os_error());
            }
            unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWCGROUP)?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
            // The same file system is refused on its own mount point.
            let _ = unmount("/sys/fs/cgroup", UnmountFlags::DETACH);
            Ok(mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MountFlags::empty(), None)?)
        });
    }
    AuditOutput::from_command(&mut command)
}

/// True if this process may inspect every process. Otherwise one of them can be in any network namespace, and no
/// namespace is known to be of one pod.
fn may_inspect_all_processes() -> bool {
    let is_denied = |pid: String| {
        let outcome = fs::metadata(format!("/proc/{pid}/ns/net"));
        outcome.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    };
    let names = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    !names.filter(|name| name.parse::<u32>().is_ok()).any(is_denied)
}

fn lasting(audit: &AuditOutput) -> &Value {
    &audit.summary["namespaces"][0]["fix_lasting"]
}

#[test]
fn a_pods_security_context_is_printed_on_the_host_and_inside_a_pod() {
    let _net = TestNetns::enter_new();
    let groups = [pod_cgroup(1), pod_cgroup(2), pod_cgroup(3)].into_iter().collect::<Result<Vec<_>, _>>();
    let groups = match groups {
        Ok(groups) => groups,
        Err(why) => return println!("skipped: {why}"),
    };
    let start = |ports: [u16; 2]| {
        TestNetns::with_new_in_helper(|net| {
            net.set_sysctl("ip_local_port_range", PORT_RANGE);
            ports.map(listen)
        })
    };
    let run = |path: &str| [AuditOutput::run(&["--netns", path]), audit_in_pod(&groups[2], path)];
    let path = |process: &HelperProcess| format!("/proc/{}/ns/net", process.pid());

    let of_one_pod = start([40_102, 40_104]);
    of_one_pod.iter().for_each(|process| move_to(&groups[0], process));
    let expected_fix =
        "securityContext: {sysctls: [{name: net.ipv4.ip_local_reserved_ports, value: \"40102,40104\"}]}";
    let is_known = may_inspect_all_processes();
    for audit in run(&path(&of_one_pod[0])) {
        let unseen = audit.summary["unseen"].to_string();
        assert_eq!(unseen.contains("whether a network namespace is of one pod"), !is_known, "{unseen}");
        let expected = if is_known { expected_fix.into() } else { Value::Null };
        assert_eq!(lasting(&audit), &expected, "{audit:?}");
    }
    // What the kubelet sets by it removes the risk.
    let value = expected_fix.split('"').nth(1).unwrap();
    let pid = of_one_pod[0].pid();
    thread::spawn(move || {
        TestNetns::enter_of_process(pid).set_sysctl("ip_local_reserved_ports", value);
        assert_eq!(reserved(), [40_102, 40_104].into());
    })
    .join()
    .unwrap();
    for audit in run(&path(&of_one_pod[0])) {
        assert_eq!(audit.code, Some(0), "{audit:?}");
    }

    // The negative twins: processes of two pods, and of a pod and of none, share the network of a node.
    let of_two_pods = start([40_102, 40_104]);
    move_to(&groups[0], &of_two_pods[0]);
    move_to(&groups[1], &of_two_pods[1]);
    let of_pod_and_node = start([40_102, 40_104]);
    move_to(&groups[0], &of_pod_and_node[0]);
    for processes in [&of_two_pods, &of_pod_and_node] {
        for audit in run(&path(&processes[0])) {
            assert_eq!((lasting(&audit), audit.code), (&Value::Null, Some(1)), "{audit:?}");
        }
    }
    for process in of_one_pod.into_iter().chain(of_two_pods).chain(of_pod_and_node) {
        process.finish();
    }
}

#[test]
fn a_pod_in_the_hosts_network_does_not_get_a_security_context() {
    let group = match pod_cgroup(1) {
        Ok(group) => group,
        Err(why) => return println!("skipped: {why}"),
    };
    // On a host, the namespace of process 1; where that may not be inspected, the one of the test's processes.
    let (path, is_init) = match fs::File::open("/proc/1/ns/net") {
        Ok(_) => ("/proc/1/ns/net", true),
        Err(_) => ("/proc/self/ns/net", false),
    };
    if is_init {
        TestNetns::enter_of_process(1);
    }
    let process = listen(0);
    move_to(&group, &process);
    for audit in [AuditOutput::run(&["--netns", path]), audit_in_pod(&group, path)] {
        let is_listening = |row: &Value| row["listener"]["pid"] == process.pid() && row["risk"] != "none";
        assert!(audit.rows.iter().any(is_listening), "{audit:?}");
        match is_init {
            true => assert!(lasting(&audit).as_str().unwrap().starts_with("selfconn audit "), "{audit:?}"),
            false => assert_eq!(lasting(&audit), &Value::Null, "{audit:?}"),
        }
    }
    process.finish();
}

//! Faults: the daemon is killed at any moment, cannot see processes, has no free descriptors, or takes
//! snapshots while namespaces are created and removed. What it reports must stay correct, and what it cannot
//! know must be null.
//!
//! Tests that set the clock or take CPUs offline run only where `SELFCONN_OWN_MACHINE` says that the machine
//! is dedicated to them.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount},
    process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit},
    thread::{UnshareFlags, unshare_unsafe},
};
use serde_json::Value;

use crate::support::{
    client::{assert_opened_by_this_thread, connect_to_self},
    daemon::{DEADLINE, HookVariant, TestDaemon, is_event, scaled, selfconn},
    dedicated::is_dedicated_machine,
    helper_process::HelperProcess,
    mount_namespace::{mount_proc_with_hidepid, run_in_mount_namespace_of, spawn_in_new_mount_namespace},
    netns::TestNetns,
};

/// The programs and maps that a process has open, as `(is_program, id)`.
fn bpf_objects(pid: u32) -> Vec<(bool, u32)> {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let id =
        |text: &str, key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
    let object = |text: String| {
        let program = id(&text, "prog_id:").map(|id| (true, id));
        program.or_else(|| id(&text, "map_id:").map(|id| (false, id)))
    };
    infos.filter_map(|info| object(fs::read_to_string(info.path()).ok()?)).collect()
}

fn is_loaded((is_program, wanted): (bool, u32)) -> bool {
    if is_program {
        aya::programs::loaded_programs().flatten().any(|program| program.id() == wanted)
    } else {
        aya::maps::loaded_maps().flatten().any(|map| map.id() == wanted)
    }
}

#[test]
fn a_killed_daemon_leaves_nothing_in_the_kernel() {
    let net = TestNetns::enter_new();
    let mut seen = 0;
    // The kill comes at different moments: while the daemon reads BTF, loads, attaches, or watches. On an
    // emulated kernel each of these phases takes longer.
    let (moments, span_ms) = (scaled(30).max(6), 300 * 30 / scaled(30));
    for moment in 0..moments {
        let mut command = Command::new(selfconn());
        let command = command.args(["run", "--json"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        thread::sleep(Duration::from_millis((span_ms * moment / moments) as u64));
        let pid = Pid::from_child(&child);
        rustix::process::kill_process(pid, Signal::STOP).unwrap();
        let objects = bpf_objects(child.id());
        seen += objects.len();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        child.wait().unwrap();
        // The kernel frees them after an RCU grace period.
        let until = Instant::now() + DEADLINE;
        while objects.iter().any(|object| is_loaded(*object)) {
            assert!(Instant::now() < until, "{objects:?} of a killed process");
            thread::sleep(Duration::from_millis(5));
        }
    }
    assert!(seen > 0, "no program or map was ever loaded");
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    drop(connect_to_self(Ipv4Addr::LOCALHOST.into()));
    daemon.expect(1, is_event("closed", net.inode));
    daemon.stop();
}

#[test]
fn without_procfs_kernel_fields_are_reported_and_the_rest_is_null() {
    let net = TestNetns::enter_new();
    let spawn = |command: &mut Command| spawn_in_new_mount_namespace(command, || Ok(()));
    let mut daemon = TestDaemon::start_with(&HookVariant(vec![]), &["--reconcile", "1", "-vv"], spawn);
    let pid = daemon.pid();
    // A new process each time, because the facts of a process are cached for a moment.
    let mut reported = 0;
    let mut connect = |daemon: &mut TestDaemon| {
        let mut client = HelperProcess::start("connect");
        client.read_output();
        reported += 1;
        let event = daemon.expect(reported, is_event("established", net.inode)).pop().unwrap();
        assert_eq!((&event["pid"], &event["comm"]), (&client.pid().into(), &"a-client".into()), "{event}");
        (client, event)
    };
    let (first, seen) = connect(&mut daemon);
    assert!(seen["exe"].is_string() && seen["cmdline"].is_array(), "{seen}");

    run_in_mount_namespace_of(pid, || mount("none", "/proc", "tmpfs", MountFlags::empty(), None).unwrap());
    let (second, hidden) = connect(&mut daemon);
    for fact in ["exe", "cmdline", "cgroup", "unit", "container"] {
        assert!(hidden[fact].is_null(), "{fact} in {hidden}");
    }
    // Snapshots of the socket table find only the namespace of the daemon, and close no connection in the
    // others.
    daemon.run_until_snapshots(3, || thread::sleep(Duration::from_millis(20)));
    assert_eq!(daemon.expect(0, is_event("closed", net.inode)).len(), 0);
    second.finish();
    daemon.expect(1, is_event("closed", net.inode));

    run_in_mount_namespace_of(pid, || unmount("/proc", UnmountFlags::DETACH).unwrap());
    let (third, seen) = connect(&mut daemon);
    assert!(seen["exe"].is_string() && seen["cmdline"].is_array(), "{seen}");
    third.finish();
    first.finish();
    daemon.expect(3, is_event("closed", net.inode));
    daemon.stop();
}

#[test]
fn a_procfs_with_hidepid_hides_process_details() {
    let net = TestNetns::enter_new();
    for is_hidden in [false, true] {
        let spawn = |command: &mut Command| {
            spawn_in_new_mount_namespace(command, move || {
                if is_hidden {
                    mount_proc_with_hidepid()?;
                }
                // A process with CAP_SYS_PTRACE sees everything in spite of hidepid.
                rustix::thread::remove_capability_from_bounding_set(
                    rustix::thread::CapabilitySet::SYS_PTRACE,
                )?;
                Ok(())
            })
        };
        let mut daemon = TestDaemon::start_with(&HookVariant(vec![]), &[], spawn);
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        let established = daemon.expect(1, is_event("established", net.inode)).pop().unwrap();
        assert_opened_by_this_thread(&established);
        assert_eq!(established["cgroup"].is_null(), is_hidden, "{established}");
        // Without CAP_SYS_PTRACE nothing proves that the process still runs the program that connected.
        assert!(established["cmdline"].is_null(), "{established}");
        drop(socket);
        daemon.expect(1, is_event("closed", net.inode));
        daemon.stop();
    }
}

#[test]
fn without_free_descriptors_the_daemon_continues_and_closes_no_open_connection() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1", "-vv"]);
    let (open_socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, is_event("established", net.inode));
    daemon.run_until_snapshots(1, || thread::sleep(Duration::from_millis(20)));
    let pid = Pid::from_raw(daemon.pid().cast_signed());
    // It already has more descriptors than that, so it can open nothing.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let before = prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), maximum }).unwrap();
    daemon.run_until_snapshots(3, || thread::sleep(Duration::from_millis(20)));
    let mut client = HelperProcess::start("connect");
    client.read_output();
    let reported = daemon.expect(2, is_event("established", net.inode)).pop().unwrap();
    assert_eq!(
        (&reported["pid"], &reported["comm"]),
        (&client.pid().into(), &"a-client".into()),
        "{reported}"
    );
    assert!(reported["cmdline"].is_null(), "{reported}");
    client.finish();
    daemon.expect(1, is_event("closed", net.inode));
    prlimit(pid, Resource::Nofile, before).unwrap();
    daemon.run_until_snapshots(2, || thread::sleep(Duration::from_millis(20)));
    drop(open_socket);
    daemon.expect(2, is_event("closed", net.inode));
    let (events, stderr) = daemon.stop();
    assert_eq!(events.iter().filter(|event| is_event("closed", net.inode)(event)).count(), 2);
    assert!(stderr.contains("Too many open files"), "{stderr}");
}

/// A network namespace bound to a file, with a self-connection in it.
struct IsolatedSelfConnection {
    net: TestNetns,
    at: std::path::PathBuf,
    _socket: socket2::Socket,
}

impl IsolatedSelfConnection {
    fn create(at: &Path) -> Self {
        let net = TestNetns::enter_new();
        fs::write(at, "").unwrap();
        mount_bind("/proc/thread-self/ns/net", at).unwrap();
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        // No TIME_WAIT, because the removal of a namespace would have to wait for it.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        Self { net, at: at.to_owned(), _socket: socket }
    }
}

impl Drop for IsolatedSelfConnection {
    fn drop(&mut self) {
        unmount(&self.at, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn namespaces_removed_during_a_snapshot_cause_no_wrong_events() {
    // SAFETY: it closes no descriptor.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1", "-vv"]);
    let batch = scaled(200);
    let rounds = scaled(50).max(3);
    for round in 0..rounds {
        let connections: Vec<_> = (0..batch)
            .map(|number| IsolatedSelfConnection::create(&folder.path().join(number.to_string())))
            .collect();
        let inodes: Vec<u64> = connections.iter().map(|connection| connection.net.inode).collect();
        let scan = Command::new(selfconn()).args(["scan", "--json"]).output().unwrap();
        let lines: Vec<Value> = scan
            .stdout
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect();
        for inode in &inodes {
            let found = lines.iter().filter(|line| line["netns"] == *inode).count();
            assert_eq!(found, 1, "in namespace {inode}");
        }
        // The namespaces are removed while snapshots and a scan are under way.
        let mut scan =
            Command::new(selfconn()).args(["scan", "--json"]).stdout(Stdio::null()).spawn().unwrap();
        drop(connections);
        assert!(scan.wait().unwrap().code().is_some_and(|code| code < 2));
        let is_of = |kind: &'static str| {
            let inodes = inodes.clone();
            move |event: &Value| {
                event["event"] == kind && event["netns"].as_u64().is_some_and(|inode| inodes.contains(&inode))
            }
        };
        // The kernel reuses the inode numbers of namespaces.
        daemon.expect(batch, is_of("closed"));
        let opened = daemon.expect(batch, is_of("established"));
        assert!(opened.len() >= batch, "round {round}");
    }
    let (events, _) = daemon.stop();
    let ids = |kind: &str| {
        let mut ids: Vec<String> = events
            .iter()
            .filter(|event| event["event"] == kind && event["pid"] == std::process::id())
            .map(|event| event["id"].to_string())
            .collect();
        ids.sort_unstable();
        ids
    };
    let made = batch * rounds;
    assert_eq!(ids("established").len(), made);
    assert_eq!(ids("established"), ids("closed"), "one `closed` for each `established`");
    assert_eq!(events.last().unwrap()["lost"]["missed"], 0, "{:?}", events.last());
}

#[test]
fn setting_the_wall_clock_changes_times_but_not_durations() {
    use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
    if !is_dedicated_machine() {
        return;
    }
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--reconcile", "1"]);
    let mut reported = 0;
    for hours in [0, 5, -9, 4] {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        reported += 1;
        daemon.expect(reported, is_event("established", net.inode));
        let now = clock_gettime(ClockId::Realtime);
        clock_settime(ClockId::Realtime, Timespec { tv_sec: now.tv_sec + hours * 3_600, ..now }).unwrap();
        let began = jiff::Timestamp::now();
        drop(socket);
        let closed = daemon.expect(reported, is_event("closed", net.inode)).pop().unwrap();
        let time: jiff::Timestamp = closed["time"].as_str().unwrap().parse().unwrap();
        let apart = time.duration_since(began).as_secs_f64().abs();
        assert!(apart < 30.0, "{apart} s from the clock as it is now: {closed}");
        let duration = closed["duration_ns"].as_u64().unwrap();
        assert!(duration < DEADLINE.as_nanos() as u64, "{closed}");
    }
    daemon.stop();
}

#[test]
fn taking_a_cpu_offline_loses_no_event() {
    const CPU: &str = "/sys/devices/system/cpu/cpu1/online";
    if !is_dedicated_machine() || !Path::new(CPU).exists() {
        return;
    }
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &[]);
    let mut made = 0;
    for online in ["0", "1", "0", "1"] {
        fs::write(CPU, online).unwrap();
        for _ in 0..scaled(1_000) {
            let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
        made += scaled(1_000);
        daemon.expect(made, is_event("closed", net.inode));
    }
    let (events, _) = daemon.stop();
    assert_eq!(events.iter().filter(|event| is_event("established", net.inode)(event)).count(), made);
}

#[test]
fn a_ring_buffer_too_large_for_the_kernel_is_a_one_line_error_with_a_hint() {
    if !is_dedicated_machine() {
        return;
    }
    // Twice the memory of such a machine.
    let output = Command::new(selfconn()).args(["run", "--ring-size", "1G"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    for word in ["ring buffer", "1 GiB", "--ring-size"] {
        assert!(stderr.contains(word), "{word} in {stderr}");
    }
}

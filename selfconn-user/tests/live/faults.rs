//! Bad days: the daemon is killed at any moment, can't see processes, has no descriptors left, reads a table of
//! namespaces that come and go. What is told stays true, and what can't be known is null.
//!
//! Tests that set a machine's clock or take its CPUs away run only where `SELFCONN_OWN_MACHINE` says that the machine
//! is there for them.

use std::{
    fs,
    net::Ipv4Addr,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount},
    process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};
use serde_json::Value;

use crate::{
    client::{assert_opened_here, connect_to_self},
    daemon::{DEADLINE, Daemon, Variant, of, scaled, selfconn},
    net::Net,
    role::Role,
};

/// The programs and maps that a process has open, as `(is a program, id)`.
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
fn killed_at_any_moment_it_leaves_nothing_in_the_kernel() {
    let net = Net::private();
    let mut seen = 0;
    // A moment is what this is about: while it reads BTF, loads, attaches, or watches. An emulated kernel takes longer
    // over each.
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
        // The kernel frees them after a grace period.
        let until = Instant::now() + DEADLINE;
        while objects.iter().any(|object| is_loaded(*object)) {
            assert!(Instant::now() < until, "{objects:?} of a process that is gone");
            thread::sleep(Duration::from_millis(5));
        }
    }
    assert!(seen > 0, "it never came as far as loading anything");
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
    drop(connect_to_self(Ipv4Addr::LOCALHOST.into()));
    daemon.expect(1, of("closed", net.inode));
    daemon.stop();
}

/// Starts the daemon in a mount namespace of its own, after `prepare` there.
fn in_its_own_mount_namespace(
    command: &mut Command,
    prepare: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
) -> Child {
    // SAFETY: unshare, mount and prctl are safe to call between fork and exec, and take no descriptor away.
    unsafe {
        command.pre_exec(move || {
            unshare_unsafe(UnshareFlags::NEWNS)?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
            prepare()
        });
    }
    command.spawn().unwrap()
}

/// Does `work` in the mount namespace of a process.
fn in_the_mount_namespace_of(pid: u32, work: impl FnOnce() + Send) {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
    let enter = || {
        // SAFETY: it takes no descriptor away; a thread that shares its root with others can't enter.
        unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
        work();
    };
    thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn without_proc_what_the_kernel_saw_is_told_and_the_rest_is_null() {
    let net = Net::private();
    let spawn = |command: &mut Command| in_its_own_mount_namespace(command, || Ok(()));
    let mut daemon = Daemon::start_by(&Variant(vec![]), &["--reconcile", "1", "-vv"], spawn);
    let pid = daemon.pid();
    // A process each, for what was read of one is kept for a moment.
    let mut told = 0;
    let mut connect = |daemon: &mut Daemon| {
        let mut client = Role::start("connect");
        client.says();
        told += 1;
        let event = daemon.expect(told, of("established", net.inode)).pop().unwrap();
        assert_eq!((&event["pid"], &event["comm"]), (&client.pid().into(), &"a-client".into()), "{event}");
        (client, event)
    };
    let (first, seen) = connect(&mut daemon);
    assert!(seen["exe"].is_string() && seen["cmdline"].is_array(), "{seen}");

    in_the_mount_namespace_of(pid, || mount("none", "/proc", "tmpfs", MountFlags::empty(), None).unwrap());
    let (second, hidden) = connect(&mut daemon);
    for fact in ["exe", "cmdline", "cgroup", "unit", "container"] {
        assert!(hidden[fact].is_null(), "{fact} in {hidden}");
    }
    // Readings of the socket table find no namespace but the daemon's, and close nothing in the others.
    daemon.while_reading(3, || thread::sleep(Duration::from_millis(20)));
    assert_eq!(daemon.expect(0, of("closed", net.inode)).len(), 0);
    second.end();
    daemon.expect(1, of("closed", net.inode));

    in_the_mount_namespace_of(pid, || unmount("/proc", UnmountFlags::DETACH).unwrap());
    let (third, seen) = connect(&mut daemon);
    assert!(seen["exe"].is_string() && seen["cmdline"].is_array(), "{seen}");
    third.end();
    first.end();
    daemon.expect(3, of("closed", net.inode));
    daemon.stop();
}

#[test]
fn a_proc_that_hides_processes_hides_what_they_run() {
    let net = Net::private();
    for is_hidden in [false, true] {
        let spawn = |command: &mut Command| {
            in_its_own_mount_namespace(command, move || {
                if is_hidden {
                    mount("proc", "/proc", "proc", MountFlags::empty(), Some(c"hidepid=ptraceable"))?;
                }
                // Who has it sees everything all the same.
                rustix::thread::remove_capability_from_bounding_set(
                    rustix::thread::CapabilitySet::SYS_PTRACE,
                )?;
                Ok(())
            })
        };
        let mut daemon = Daemon::start_by(&Variant(vec![]), &[], spawn);
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        let established = daemon.expect(1, of("established", net.inode)).pop().unwrap();
        assert_opened_here(&established);
        assert_eq!(established["cmdline"].is_null(), is_hidden, "{established}");
        drop(socket);
        daemon.expect(1, of("closed", net.inode));
        daemon.stop();
    }
}

#[test]
fn without_descriptors_it_goes_on_and_closes_nothing_that_is_open() {
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--reconcile", "1", "-vv"]);
    let (kept, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    daemon.expect(1, of("established", net.inode));
    daemon.while_reading(1, || thread::sleep(Duration::from_millis(20)));
    let pid = Pid::from_raw(daemon.pid().cast_signed());
    // It has more than that already, so nothing can be opened any more.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let before = prlimit(pid, Resource::Nofile, Rlimit { current: Some(3), maximum }).unwrap();
    daemon.while_reading(3, || thread::sleep(Duration::from_millis(20)));
    let mut stranger = Role::start("connect");
    stranger.says();
    let told = daemon.expect(2, of("established", net.inode)).pop().unwrap();
    assert_eq!((&told["pid"], &told["comm"]), (&stranger.pid().into(), &"a-client".into()), "{told}");
    assert!(told["cmdline"].is_null(), "{told}");
    stranger.end();
    daemon.expect(1, of("closed", net.inode));
    prlimit(pid, Resource::Nofile, before).unwrap();
    daemon.while_reading(2, || thread::sleep(Duration::from_millis(20)));
    drop(kept);
    daemon.expect(2, of("closed", net.inode));
    let (events, said) = daemon.stop();
    assert_eq!(events.iter().filter(|event| of("closed", net.inode)(event)).count(), 2);
    assert!(said.contains("Too many open files"), "{said}");
}

/// A network namespace on a file, with a socket in it that is connected to itself.
struct Island {
    net: Net,
    at: std::path::PathBuf,
    _socket: socket2::Socket,
}

impl Island {
    fn rise(at: &Path) -> Self {
        let net = Net::private();
        fs::write(at, "").unwrap();
        mount_bind("/proc/thread-self/ns/net", at).unwrap();
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        // No TIME_WAIT, which a namespace that is taken down would have to wait for.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        Self { net, at: at.to_owned(), _socket: socket }
    }
}

impl Drop for Island {
    fn drop(&mut self) {
        unmount(&self.at, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn namespaces_that_come_and_go_while_they_are_read_confuse_nobody() {
    // SAFETY: it takes no descriptor away from anybody.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--reconcile", "1", "-vv"]);
    let batch = scaled(200);
    let rounds = scaled(50).max(3);
    for round in 0..rounds {
        let islands: Vec<_> =
            (0..batch).map(|number| Island::rise(&folder.path().join(number.to_string()))).collect();
        let inodes: Vec<u64> = islands.iter().map(|island| island.net.inode).collect();
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
        // They go while readings and a scan are under way.
        let mut scan =
            Command::new(selfconn()).args(["scan", "--json"]).stdout(Stdio::null()).spawn().unwrap();
        drop(islands);
        assert!(scan.wait().unwrap().code().is_some_and(|code| code < 2));
        let is_of = |kind: &'static str| {
            let inodes = inodes.clone();
            move |event: &Value| {
                event["event"] == kind && event["netns"].as_u64().is_some_and(|inode| inodes.contains(&inode))
            }
        };
        // The kernel gives a namespace's number out again.
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
    assert_eq!(ids("established"), ids("closed"), "one close for each open");
    assert_eq!(events.last().unwrap()["lost"]["missed"], 0, "{:?}", events.last());
}

/// Whether this machine's clock and CPUs may be played with.
fn owns_the_machine() -> bool {
    let owns = std::env::var_os("SELFCONN_OWN_MACHINE").is_some();
    if !owns {
        println!(
            "not here: this machine is not there for this test alone; `cargo xtask vm` has such machines"
        );
    }
    owns
}

#[test]
fn a_wall_clock_that_is_set_changes_times_and_no_durations() {
    use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
    if !owns_the_machine() {
        return;
    }
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &["--reconcile", "1"]);
    let mut told = 0;
    for hours in [0, 5, -9, 4] {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        told += 1;
        daemon.expect(told, of("established", net.inode));
        let now = clock_gettime(ClockId::Realtime);
        clock_settime(ClockId::Realtime, Timespec { tv_sec: now.tv_sec + hours * 3_600, ..now }).unwrap();
        let began = jiff::Timestamp::now();
        drop(socket);
        let closed = daemon.expect(told, of("closed", net.inode)).pop().unwrap();
        let time: jiff::Timestamp = closed["time"].as_str().unwrap().parse().unwrap();
        let apart = time.duration_since(began).as_secs_f64().abs();
        assert!(apart < 30.0, "{apart} s from the clock as it is now: {closed}");
        let duration = closed["duration_ns"].as_u64().unwrap();
        assert!(duration < DEADLINE.as_nanos() as u64, "{closed}");
    }
    daemon.stop();
}

#[test]
fn a_cpu_that_goes_and_comes_back_takes_no_event_with_it() {
    const CPU: &str = "/sys/devices/system/cpu/cpu1/online";
    if !owns_the_machine() || !Path::new(CPU).exists() {
        return;
    }
    let net = Net::private();
    let mut daemon = Daemon::start(&Variant(vec![]), &[]);
    let mut made = 0;
    for online in ["0", "1", "0", "1"] {
        fs::write(CPU, online).unwrap();
        for _ in 0..scaled(1_000) {
            let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
        made += scaled(1_000);
        daemon.expect(made, of("closed", net.inode));
    }
    let (events, _) = daemon.stop();
    assert_eq!(events.iter().filter(|event| of("established", net.inode)(event)).count(), made);
}

#[test]
fn a_ring_that_the_kernel_has_no_room_for_is_one_line_with_the_cure() {
    if !owns_the_machine() {
        return;
    }
    // Twice as much as such a machine has.
    let output = Command::new(selfconn()).args(["run", "--ring-size", "1G"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    for word in ["ring buffer", "1 GiB", "--ring-size"] {
        assert!(said.contains(word), "{word} in {said}");
    }
}

//! The real systemd-journald, alone in a mount namespace, and what `journalctl` and `selfconn tail` read from
//! it.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    os::unix::{
        fs::{MetadataExt as _, symlink},
        net::UnixDatagram,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    process::{Pid, Signal, kill_process},
    thread::{UnshareFlags, unshare_unsafe},
};
use selfconn::output::journald::{message_id, send};
use serde_json::Value;

use crate::support::{
    client::run_self_connection,
    daemon::{DEADLINE, selfconn},
    netns::TestNetns,
};

const JOURNAL_DIR: &str = "/run/log/journal";

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// journald with a /run of its own, which only this thread and its child processes can see.
struct Journald(Child);

impl Journald {
    fn start() -> Self {
        // SAFETY: only the flag FILES could take descriptors away from other threads, and it is not set.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
        fs::create_dir_all(JOURNAL_DIR).unwrap();
        fs::create_dir_all("/run/systemd/journal").unwrap();
        let mut command = Command::new("/lib/systemd/systemd-journald");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("journald: `cargo xtask test` installs it");
        wait_until("journald listens", || Path::new("/run/systemd/journal/socket").exists());
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// The journal entries that match.
    fn entries(&self, matches: &str) -> Vec<Value> {
        let output = Command::new("journalctl")
            .args(["--directory", JOURNAL_DIR, "--output=json", "--all", matches])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Journald {
    /// The number of journal entries that match.
    fn count(&self, matches: &str) -> usize {
        let arguments = ["--directory", JOURNAL_DIR, "--output=cat", "--quiet", matches];
        let output = Command::new("journalctl").args(arguments).output().unwrap();
        output.stdout.iter().filter(|byte| **byte == b'\n').count()
    }
}

impl Drop for Journald {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A control group as systemd makes it for a service, in each hierarchy by which journald can know the unit of a
/// client.
struct ServiceGroup(Vec<PathBuf>);

impl ServiceGroup {
    fn create(unit: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let is_systemds = |fields: &[&str]| fields[2] == "cgroup2" || fields[3].contains("name=systemd");
        let points = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let groups: Vec<_> = points
            .filter(|fields| is_systemds(fields))
            .map(|fields| Path::new(fields[1]).join("system.slice").join(unit))
            .filter(|group| fs::create_dir_all(group).is_ok())
            .collect();
        assert!(!groups.is_empty(), "no hierarchy of control groups can be written");
        Self(groups)
    }

    fn add(&self, child: &Child) {
        for group in &self.0 {
            fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
    }
}

impl Drop for ServiceGroup {
    fn drop(&mut self) {
        for group in &self.0 {
            let until = Instant::now() + DEADLINE;
            while fs::remove_dir(group).is_err() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            // Only where nothing else is in it.
            let _ = group.parent().map(fs::remove_dir);
        }
    }
}

/// Starts the daemon as systemd does: JOURNAL_STREAM says that its stdout is the journal.
fn start(folder: &Path, options: &[&str]) -> Child {
    let stdout = File::create(folder.join("stdout")).unwrap();
    let metadata = stdout.metadata().unwrap();
    let mut command = Command::new(selfconn());
    command.arg("run").args(options).stdin(Stdio::null()).stdout(stdout);
    command.stderr(File::create(folder.join("stderr")).unwrap());
    command.env("JOURNAL_STREAM", format!("{}:{}", metadata.dev(), metadata.ino())).spawn().unwrap()
}

fn terminate(child: &mut Child) {
    kill_process(Pid::from_child(child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn events_are_journal_entries_with_fields_and_stdout_is_empty() {
    let net = TestNetns::enter_new();
    let journald = Journald::start();
    let folder = tempfile::tempdir().unwrap();
    let mut child = start(folder.path(), &[]);
    wait_until("started", || !journald.entries("SELFCONN_EVENT=started").is_empty());
    // A name that would become a journal field of its own if it were not escaped.
    fs::write("/proc/thread-self/comm", "a\nPRIORITY=0").unwrap();
    let port = run_self_connection(Ipv4Addr::LOCALHOST.into());
    let closed_there = format!("SELFCONN_NETNS={}", net.inode);
    let is_closed = |entry: &Value| entry["SELFCONN_EVENT"] == "closed";
    wait_until("closed", || journald.entries(&closed_there).iter().any(is_closed));
    terminate(&mut child);
    wait_until("stopped", || !journald.entries("SELFCONN_EVENT=stopped").is_empty());
    assert_eq!(fs::read(folder.path().join("stdout")).unwrap(), b"");

    let entry = journald.entries(&closed_there).into_iter().find(is_closed).unwrap();
    assert_eq!(entry["SELFCONN_PORT"], port.to_string(), "{entry}");
    assert_eq!(entry["SELFCONN_PID"], std::process::id().to_string());
    assert_eq!(entry["SYSLOG_IDENTIFIER"], "selfconn");
    assert_eq!(entry["PRIORITY"], "5");
    assert_eq!(entry["MESSAGE_ID"], message_id("closed"));
    assert_eq!(entry["_TRANSPORT"], "journal");
    assert!(entry["MESSAGE"].as_str().unwrap().contains(&format!("127.0.0.1:{port} ")), "{entry}");
    assert!(entry.get("SELFCONN_IFINDEX").is_none(), "null fields are omitted");
    let event: Value = serde_json::from_str(entry["SELFCONN_JSON"].as_str().unwrap()).unwrap();
    for key in ["severity", "seq", "schema", "host", "machine_id", "boot_id", "run"] {
        let text = event[key].as_str().map_or_else(|| event[key].to_string(), str::to_owned);
        assert_eq!(entry[&format!("SELFCONN_{}", key.to_uppercase())], text, "{event}");
    }
    assert_eq!(event["severity"], "info", "of priority 5");
    assert_eq!(entry["_BOOT_ID"], event["boot_id"], "as the journal writes it");
    assert_eq!(event["thread_comm"], "a\nPRIORITY=0", "{event}");
    // journalctl prints a value with a line break as a list of bytes.
    let bytes = |value: &Value| match value {
        Value::String(text) => text.clone().into_bytes(),
        list => list.as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8).collect(),
    };
    assert_eq!(bytes(&entry["SELFCONN_THREAD_COMM"]), b"a\nPRIORITY=0");

    let tail = |options: &[&str]| {
        let mut command = Command::new(selfconn());
        command.args(["tail", "--journal", "--journal-dir", JOURNAL_DIR]).args(options);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let port = port.to_string();
    let shown = tail(&["--port", &port, "--pid", &std::process::id().to_string()]);
    assert_eq!(shown.lines().count(), 1, "one line a connection: {shown}");
    assert!(shown.contains("closed") && shown.contains(&format!("127.0.0.1:{port}")), "{shown}");
    let line =
        tail(&["--json", "--port", &port, "--event", "closed", "--pid", &std::process::id().to_string()]);
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), event);
}

#[test]
fn a_stopped_journal_blocks_nothing_and_gets_every_entry_later() {
    let net = TestNetns::enter_new();
    let journald = Journald::start();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let mut child = start(folder.path(), &["--log", log.to_str().unwrap()]);
    wait_until("started", || !journald.entries("SELFCONN_EVENT=started").is_empty());
    journald.signal(Signal::STOP);
    // The socket of journald queues about ten datagrams.
    for _ in 0..60 {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
    }
    let ours = format!("\"netns\":{},", net.inode);
    let count = |text: &str| text.lines().filter(|line| line.contains(&ours)).count();
    wait_until("the log continues", || fs::read_to_string(&log).is_ok_and(|text| count(&text) == 120));
    journald.signal(Signal::CONT);
    let there = format!("SELFCONN_NETNS={}", net.inode);
    wait_until("the journal has all entries", || journald.entries(&there).len() == 120);
    terminate(&mut child);
    let text = fs::read_to_string(&log).unwrap();
    let stopped: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((&stopped["lost"]["journal"], &stopped["lost"]["log"]), (&0.into(), &0.into()), "{stopped}");
}

/// Runs a daemon as the service `unit`, which makes two events for each of some connections. Returns how many of them
/// the journal has. systemd tells journald the limits of a unit by these links (`unit_export_log_ratelimit_interval`,
/// src/core/unit.c at v252).
fn entries_of_a_burst(unit: &str, connections: usize, interval_us: &str, burst: &str) -> usize {
    let net = TestNetns::enter_new();
    let journald = Journald::start();
    fs::create_dir_all("/run/systemd/units").unwrap();
    for (limit, value) in [("interval", interval_us), ("burst", burst)] {
        symlink(value, format!("/run/systemd/units/log-rate-limit-{limit}:{unit}")).unwrap();
    }
    let group = ServiceGroup::create(unit);
    let folder = tempfile::tempdir().unwrap();
    let mut child = start(folder.path(), &["--log-rate", "1000000"]);
    group.add(&child);
    wait_until("started", || !journald.entries("SELFCONN_EVENT=started").is_empty());
    let there = format!("SELFCONN_NETNS={}", net.inode);
    for made in 1..=connections {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
        // The daemon keeps 4 MiB for a journal that is slower than this loop. This test is not about that.
        if made % 400 == 0 && interval_us == "0" {
            wait_until("the journal keeps up", || journald.count(&there) == 2 * made);
        }
    }
    terminate(&mut child);
    let mut count = usize::MAX;
    wait_until("the journal is quiet", || {
        std::thread::sleep(Duration::from_millis(300));
        let before = std::mem::replace(&mut count, journald.count(&there));
        count == before
    });
    count
}

#[test]
fn twenty_thousand_events_arrive_because_the_unit_takes_the_journals_limit_away() {
    let unit = include_str!("../../../packaging/systemd/selfconn.service");
    let interval = unit.lines().find_map(|line| line.strip_prefix("LogRateLimitIntervalSec="));
    assert_eq!(interval, Some("0"), "no limit");
    let name = format!("selfconn-test-{}.service", std::process::id());
    assert_eq!(entries_of_a_burst(&name, 10_000, "0", "10000"), 20_000);
    // With a limit the journal drops the rest, so the one above had an effect.
    let limited = entries_of_a_burst(&name, 2_000, "30000000", "100");
    assert!((1..2_000).contains(&limited), "{limited} of 4,000");
}

#[test]
fn an_entry_too_large_for_a_datagram_arrives_whole() {
    let _net = TestNetns::enter_new();
    let journald = Journald::start();
    let large = "x".repeat(500 << 10);
    let entry = format!("MESSAGE=large\nSYSLOG_IDENTIFIER=selfconn\nSELFCONN_JSON={large}\n");
    let socket = UnixDatagram::unbound().unwrap();
    send(&socket, entry.as_bytes()).unwrap();
    wait_until("the entry arrives", || !journald.entries("MESSAGE=large").is_empty());
    assert_eq!(journald.entries("MESSAGE=large")[0]["SELFCONN_JSON"], large);
}

#[test]
fn json_on_request_goes_to_stdout_instead_of_the_journal() {
    let _net = TestNetns::enter_new();
    let journald = Journald::start();
    let folder = tempfile::tempdir().unwrap();
    let mut child = start(folder.path(), &["--json"]);
    let stdout = folder.path().join("stdout");
    wait_until("started", || fs::read_to_string(&stdout).is_ok_and(|text| text.contains("started")));
    terminate(&mut child);
    assert!(journald.entries("SYSLOG_IDENTIFIER=selfconn").is_empty());
}

//! The real logrotate with the shipped configuration snippet, while self-connections are made at full speed.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{
    client::run_self_connection,
    daemon::{DEADLINE, selfconn},
    netns::TestNetns,
};

const SNIPPET: &str = include_str!("../../../packaging/logrotate/selfconn");
const LOG_PATH: &str = "/var/log/selfconn/events.jsonl";
const SIGNAL_COMMAND: &str = "systemctl kill --signal=HUP selfconn.service 2>/dev/null || true";

/// Fewer than the 14 old files that the snippet keeps, so that no file is removed.
const ROTATIONS: usize = 12;

struct EndLoad<'a>(&'a AtomicBool);

impl Drop for EndLoad<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The daemon, which ends also if a rotation fails.
struct RunningDaemon(Child);

impl Drop for RunningDaemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Rotation {
    folder: tempfile::TempDir,
    config: String,
}

impl Rotation {
    fn new(config: impl FnOnce(&str) -> String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("events.jsonl");
        assert!(SNIPPET.contains(LOG_PATH) && SNIPPET.contains(SIGNAL_COMMAND));
        let config = config(&SNIPPET.replace(LOG_PATH, log.to_str().unwrap()));
        Self { folder, config }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("events.jsonl")
    }

    /// Rotates once, immediately.
    fn rotate(&self, pid: u32) {
        let (config, state) = (self.folder.path().join("config"), self.folder.path().join("state"));
        fs::write(&config, self.config.replace(SIGNAL_COMMAND, &format!("kill -HUP {pid}"))).unwrap();
        let output = Command::new("logrotate")
            .args(["--force", "--state"])
            .args([state, config])
            .output()
            .expect("logrotate: `cargo xtask test` installs it");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    }

    /// The text of every file of the log, uncompressed, oldest first.
    fn files(&self) -> Vec<String> {
        let mut numbered: Vec<(usize, PathBuf)> = Vec::new();
        for entry in fs::read_dir(self.folder.path()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let Some(rest) = name.strip_prefix("events.jsonl") else { continue };
            let number = rest.trim_start_matches('.').trim_end_matches(".gz");
            numbered.push((if number.is_empty() { 0 } else { number.parse().expect(name) }, path));
        }
        numbered.sort();
        numbered.into_iter().rev().map(|(_, path)| read(&path)).collect()
    }
}

fn read(path: &Path) -> String {
    if path.extension().is_some_and(|extension| extension == "gz") {
        let output = Command::new("gzip").args(["--decompress", "--stdout"]).arg(path).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    } else {
        fs::read_to_string(path).unwrap()
    }
}

/// Parses the lines and checks that each is complete.
fn parse(text: &str) -> Vec<Value> {
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// Rotates while self-connections are made. Returns the `stopped` event. Nothing reads stdout, because no
/// reader keeps up with this load. All events are of one owner, and how many depends on the machine, so that
/// their rate must have no bound.
fn rotate_under_load(rotation: &Rotation) -> Value {
    let _net = TestNetns::enter_new();
    let log = rotation.log();
    let mut command = Command::new(selfconn());
    command.args(["run", "--quiet", "--states", "--log-rate", "4294967295", "--log"]).arg(&log);
    command.stdin(Stdio::null());
    let mut daemon = RunningDaemon(command.spawn().unwrap());
    let is_over = AtomicBool::new(false);
    // Also if a rotation fails, because the scope waits for the thread.
    let end_load = EndLoad(&is_over);
    let len = || log.metadata().map_or(0, |metadata| metadata.len());
    thread::scope(|scope| {
        let end_load = end_load;
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                run_self_connection(Ipv4Addr::LOCALHOST.into());
            }
        });
        let until = Instant::now() + DEADLINE;
        for _ in 0..ROTATIONS {
            let before = len();
            // Under load means that the log grows.
            while len() < before + (100 << 10) {
                assert!(Instant::now() < until, "the log does not grow");
                thread::yield_now();
            }
            rotation.rotate(daemon.0.id());
        }
        drop(end_load);
    });
    kill_process(Pid::from_child(&daemon.0), Signal::TERM).unwrap();
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
    let stopped = parse(&rotation.files().pop().unwrap()).pop().unwrap();
    assert_eq!(stopped["event"], "stopped");
    assert_eq!(stopped["made"], stopped["written"], "{stopped}");
    assert_eq!(stopped["lost"]["log"], 0, "{stopped}");
    stopped
}

/// Every event that was made is in exactly one of the files, and the events of a connection are in order.
fn assert_complete(rotation: &Rotation, stopped: &Value) {
    let in_files: Vec<_> = rotation.files().iter().flat_map(|file| parse(file)).collect();
    assert_eq!(in_files.len(), stopped["made"], "{stopped}");
    let mut reported = HashSet::new();
    let mut open = HashMap::new();
    for event in &in_files {
        let id = event["id"].as_str().unwrap_or("");
        let what = (id, event["event"].as_str(), event["to"].as_str(), event["time"].as_str());
        assert!(reported.insert(what), "duplicate: {event}");
        match event["event"].as_str() {
            Some("established") => assert!(open.insert(id, ()).is_none(), "{event}"),
            Some("closed") => assert!(open.remove(id).is_some(), "{event}"),
            _ => {}
        }
    }
    assert_eq!(open.len(), stopped["open"]);
}

#[test]
fn the_shipped_rotation_loses_and_splits_no_line() {
    let rotation = Rotation::new(ToOwned::to_owned);
    let stopped = rotate_under_load(&rotation);
    let files = rotation.files();
    assert_eq!(files.len(), ROTATIONS + 1);
    assert!(files.iter().filter(|file| !file.is_empty()).count() >= ROTATIONS, "each file has some lines");
    assert_complete(&rotation, &stopped);
}

#[test]
fn a_rotation_without_a_signal_loses_no_line() {
    let rotation = Rotation::new(|config| config.replace(SIGNAL_COMMAND, "true"));
    let stopped = rotate_under_load(&rotation);
    assert_complete(&rotation, &stopped);
}

#[test]
fn after_copytruncate_the_log_continues_at_offset_zero_in_whole_lines() {
    let rotation =
        Rotation::new(|config| config.replace("nocreate", "copytruncate").replace("delaycompress", ""));
    let stopped = rotate_under_load(&rotation);
    let last = rotation.files().pop().unwrap();
    assert!(!last.contains('\0'), "a hole before the first line");
    assert_eq!(parse(&last).last(), Some(&stopped));
}

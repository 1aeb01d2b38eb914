//! The guest's system, asked by its own programs.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::plan::VOICE;

/// The service.
pub(crate) const UNIT: &str = "selfconn.service";

/// The event log, by the unit.
pub(crate) const LOG: &str = "/var/log/selfconn/events.jsonl";

/// Emulation is slow, and the machine it runs on may be busy.
const PATIENCE: Duration = Duration::from_secs(90);

/// Runs a program that must succeed; yields what it says.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {program}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}: {said}{errors}", arguments.join(" "), output.status);
    }
    Ok(said)
}

/// Waits until this is there.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let began = Instant::now();
    loop {
        if let Some(there) = look()? {
            return Ok(there);
        }
        ensure!(began.elapsed() < PATIENCE, "{what}: not within {} s", PATIENCE.as_secs());
        thread::sleep(Duration::from_millis(100));
    }
}

/// A property of the service.
pub(crate) fn property(name: &str) -> Result<String> {
    Ok(run("systemctl", &["show", "--value", "--property", name, UNIT])?.trim().to_owned())
}

/// Waits for the service to be active with another process than this one.
pub(crate) fn active_other_than(old: &str) -> Result<String> {
    until("the service is active with a new process", || {
        let (state, pid) = (property("ActiveState")?, property("MainPID")?);
        ensure!(state != "failed", "the service failed: {}", property("Result")?);
        Ok((state == "active" && pid != old && pid != "0").then_some(pid))
    })
}

/// Makes a self-connection, and yields its port.
pub(crate) fn connect_to_itself() -> Result<u64> {
    let told = run("selfconn", &["repro", "--json"])?;
    let mut ports =
        told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["port"].as_u64());
    ports.next_back().with_context(|| format!("repro told no port: {told}"))
}

/// The events in a log file. Each line must be one.
pub(crate) fn events(log: &str) -> Result<Vec<Value>> {
    let text = fs::read_to_string(log).with_context(|| format!("read {log}"))?;
    ensure!(text.is_empty() || text.ends_with('\n'), "{log} ends in a torn line");
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("{log}: {line}"))).collect()
}

/// Waits for an event of this kind and port.
pub(crate) fn logged(log: &str, event: &str, port: u64) -> Result<Value> {
    until(&format!("{log} has {event} of port {port}"), || {
        let mut events = events(log)?.into_iter();
        Ok(events.find(|logged| logged["event"] == event && logged["port"] == port))
    })
}

/// Every file of the system, but for what is no file system's and what programs other than the package's note down.
pub(crate) fn files() -> Result<BTreeSet<PathBuf>> {
    const LEFT_OUT: [&str; 8] =
        ["/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/lib/dpkg", "/var/cache/ldconfig"];
    let (mut files, mut directories) = (BTreeSet::new(), vec![PathBuf::from("/")]);
    while let Some(directory) = directories.pop() {
        let entries = match fs::read_dir(&directory) {
            // Something of the system's came and went.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.with_context(|| format!("list {}", directory.display()))?,
        };
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            if LEFT_OUT.iter().any(|left_out| path == Path::new(left_out)) {
                continue;
            }
            if entry.file_type()?.is_dir() {
                directories.push(path.clone());
            }
            files.insert(path);
        }
    }
    Ok(files)
}

/// What somebody who looks for the fault would ask first.
pub(crate) fn tell_state() {
    for (program, arguments) in [
        ("systemctl", &["status", "--no-pager", "--full", UNIT][..]),
        ("journalctl", &["--no-pager", "--lines=40", "--unit", UNIT]),
        ("systemctl", &["--no-pager", "--failed"]),
    ] {
        println!("{VOICE}{program} {}", arguments.join(" "));
        match Command::new(program).args(arguments).output() {
            Ok(output) => print!("{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => println!("{VOICE}{program}: {error}"),
        }
    }
}

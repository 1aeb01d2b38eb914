//! The life of the package. A step's detail is what the host's reader may want to know.

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::system::{
    LOG, UNIT, active_other_than, connect_to_itself, events, files, logged, property, run, until,
};

/// The package, and the one that follows it.
pub(crate) const FIRST: &str = "/packages/first.deb";
const SECOND: &str = "/packages/second.deb";

/// The most that `systemd-analyze security` may say: 10 is a service without any protection.
const MOST_EXPOSED: f64 = 2.5;

/// What a step leaves for later ones.
#[derive(Debug, Default)]
pub(crate) struct Life {
    /// The files of the system before.
    before: BTreeSet<PathBuf>,
    pid: String,
    port: u64,
}

/// A step: what it found, or why it failed.
pub(crate) type Step = fn(&mut Life) -> Result<String>;

/// In the order of a life.
pub(crate) const STEPS: [(&str, Step); 15] = [
    ("the system is up", is_up),
    ("installed", install),
    ("active when the hooks are live", is_active),
    ("a self-connection is in the log", log_has_it),
    ("and in the journal", journal_has_it),
    ("capabilities are given up", gives_up_capabilities),
    ("not much is exposed", is_hardened),
    ("rotated by logrotate", rotate),
    ("back after SIGKILL", is_killed),
    ("upgraded", upgrade),
    ("what the package holds is as it was", is_verified),
    ("stopped in order", stop),
    ("disabled, it stays so over an installation", stays_disabled),
    ("removed", remove),
    ("purged, and nothing is left", purge),
];

fn is_up(life: &mut Life) -> Result<String> {
    // Not a failure of ours if some unit of the system doesn't like a machine that is all memory.
    let state = until("systemd is done with starting", || {
        let state = run("sh", &["-c", "systemctl is-system-running || true"])?.trim().to_owned();
        Ok((state != "starting" && state != "initializing").then_some(state))
    })?;
    life.before = files()?;
    let version = run("systemctl", &["--version"])?;
    Ok(format!("{state}, {}", version.lines().next().unwrap_or_default()))
}

fn install(_: &mut Life) -> Result<String> {
    run("dpkg", &["--install", FIRST])?;
    ensure!(run("systemctl", &["is-enabled", UNIT])?.trim() == "enabled", "the service is not enabled");
    let version = run("selfconn", &["--version"])?;
    Ok(version.trim().to_owned())
}

fn is_active(life: &mut Life) -> Result<String> {
    life.pid = active_other_than("0")?;
    ensure!(property("Type")? == "notify", "systemd is not told when the hooks are live");
    // The log's first line is written when they are, and READY=1 is said after that.
    ensure!(
        events(LOG)?.first().is_some_and(|event| event["event"] == "started"),
        "active before it started"
    );
    let micros = |name: &str| Ok::<u64, anyhow::Error>(property(name)?.parse()?);
    let took = micros("ActiveEnterTimestampMonotonic")? - micros("InactiveExitTimestampMonotonic")?;
    let status = fs::read_to_string(format!("/proc/{}/status", life.pid)).context("read its status")?;
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("?").trim();
    Ok(format!("{} ms from the start to READY=1, {rss} resident", took / 1000))
}

fn log_has_it(life: &mut Life) -> Result<String> {
    life.port = connect_to_itself()?;
    let event = logged(LOG, "established", life.port)?;
    ensure!(event["comm"] == "selfconn" && event["owner"] == "witnessed", "opened by nobody: {event}");
    logged(LOG, "closed", life.port)?;
    Ok(format!("port {}, opened by {} [{}]", life.port, event["comm"], event["pid"]))
}

fn journal_has_it(life: &mut Life) -> Result<String> {
    let port = life.port.to_string();
    let entry = until("the journal has it", || {
        let told = run("journalctl", &["--no-pager", "--unit", UNIT, "--output", "json"])?;
        let mut entries = told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(entries.find(|entry| entry["SELFCONN_PORT"] == port.as_str()))
    })?;
    let text = |field: &str| entry[field].as_str().unwrap_or_default().to_owned();
    ensure!(text("MESSAGE_ID").len() == 32, "an entry without a MESSAGE_ID: {entry}");
    ensure!(!text("MESSAGE").starts_with('{'), "the message is not for people: {entry}");
    Ok(text("MESSAGE"))
}

fn gives_up_capabilities(life: &mut Life) -> Result<String> {
    const BPF_AND_PERFMON: u64 = 1 << 39 | 1 << 38;
    let status = fs::read_to_string(format!("/proc/{}/status", life.pid)).context("read its status")?;
    let mut held = Vec::new();
    for set in ["CapPrm", "CapEff"] {
        let bits = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(":\t"));
        let bits = bits.and_then(|bits| u64::from_str_radix(bits, 16).ok()).context("no such set")?;
        ensure!(bits & BPF_AND_PERFMON == 0, "{set} still has CAP_BPF or CAP_PERFMON: {bits:#x}");
        held.push(format!("{set} {bits:#x}"));
    }
    Ok(held.join(", "))
}

fn is_hardened(_: &mut Life) -> Result<String> {
    let told = run("systemd-analyze", &["security", "--no-pager", UNIT])?;
    let overall = told.lines().rfind(|line| line.contains("Overall exposure level"));
    let overall = overall.context("systemd-analyze has no opinion")?;
    let level = overall.split_whitespace().find_map(|word| word.parse::<f64>().ok());
    let level = level.with_context(|| format!("no number in {overall}"))?;
    ensure!(level <= MOST_EXPOSED, "{told}");
    Ok(format!("exposure level {level}"))
}

fn rotate(life: &mut Life) -> Result<String> {
    let rotated = format!("{LOG}.1");
    run("logrotate", &["--force", "/etc/logrotate.d/selfconn"])?;
    ensure!(fs::exists(&rotated)?, "there is no {rotated}");
    let port = connect_to_itself()?;
    logged(LOG, "closed", port)?;
    let old = events(&rotated)?;
    ensure!(old.iter().any(|event| event["port"] == life.port), "{rotated} lost what was in it");
    ensure!(!old.iter().any(|event| event["port"] == port), "the log went on in {rotated}");
    ensure!(property("MainPID")? == life.pid, "the rotation ended the daemon");
    life.port = port;
    Ok(format!("{} lines before, {} after", old.len(), events(LOG)?.len()))
}

fn is_killed(life: &mut Life) -> Result<String> {
    run("systemctl", &["kill", "--signal=KILL", UNIT])?;
    life.pid = active_other_than(&life.pid)?;
    ensure!(property("NRestarts")? == "1", "restarted {} times", property("NRestarts")?);
    let port = connect_to_itself()?;
    logged(LOG, "closed", port)?;
    Ok(format!("as [{}]", life.pid))
}

fn upgrade(life: &mut Life) -> Result<String> {
    run("dpkg", &["--install", SECOND])?;
    life.pid = active_other_than(&life.pid)?;
    let version = run("dpkg-query", &["--show", "--showformat", "${Version}", "selfconn"])?;
    ensure!(version.ends_with("-2"), "the version is {version}");
    let port = connect_to_itself()?;
    logged(LOG, "closed", port)?;
    Ok(format!("to {version}, as [{}]", life.pid))
}

fn is_verified(_: &mut Life) -> Result<String> {
    let differs = run("dpkg", &["--verify", "selfconn"])?;
    // The guest's system leaves documents out.
    let differs: Vec<_> = differs.lines().filter(|line| !line.starts_with("missing")).collect();
    ensure!(differs.is_empty(), "{}", differs.join("\n"));
    Ok("by dpkg --verify".to_owned())
}

fn stop(_: &mut Life) -> Result<String> {
    run("systemctl", &["stop", UNIT])?;
    ensure!(property("Result")? == "success", "stopped with {}", property("Result")?);
    let last = events(LOG)?.into_iter().next_back().context("an empty log")?;
    ensure!(last["event"] == "stopped", "the last event is {last}");
    Ok(last.to_string())
}

fn stays_disabled(_: &mut Life) -> Result<String> {
    run("systemctl", &["disable", UNIT])?;
    run("dpkg", &["--install", SECOND])?;
    let enabled = run("sh", &["-c", "systemctl is-enabled selfconn.service || true"])?;
    ensure!(enabled.trim() == "disabled", "it is {enabled}");
    let state = property("ActiveState")?;
    ensure!(state == "inactive", "it is {state}, and nobody asked for that");
    run("systemctl", &["enable", "--now", UNIT])?;
    active_other_than("0")?;
    Ok("and enabled again".to_owned())
}

fn remove(_: &mut Life) -> Result<String> {
    run("dpkg", &["--remove", "selfconn"])?;
    ensure!(!fs::exists("/usr/bin/selfconn")?, "the binary is still there");
    ensure!(fs::exists(LOG)? && fs::exists("/etc/logrotate.d/selfconn")?, "a removal is no purge");
    let state = property("ActiveState")?;
    ensure!(state == "inactive", "the service is {state}");
    Ok("log and configuration are kept".to_owned())
}

fn purge(life: &mut Life) -> Result<String> {
    run("dpkg", &["--purge", "selfconn"])?;
    let after = files()?;
    // What the system itself notes down as time goes by.
    const SYSTEMS: [&str; 3] = ["/var/log/", "/var/lib/systemd/", "/var/lib/logrotate/"];
    let left: Vec<_> = after
        .difference(&life.before)
        .map(|path| path.display().to_string())
        .filter(|path| path.contains("selfconn") || !SYSTEMS.iter().any(|systems| path.starts_with(systems)))
        .collect();
    ensure!(left.is_empty(), "left behind: {}", left.join(", "));
    let gone: Vec<_> = life.before.difference(&after).collect();
    ensure!(gone.is_empty(), "taken along: {gone:?}");
    Ok(format!("{} files, as before", after.len()))
}

//! `cargo xtask suites`: runs test suites in Python, Node and Rust under `selfconn exec`. Each has four cases that fail
//! if a connect hits its own port. First the self-connections must be reported, each with its program and port; then
//! the guard must let every case pass. A neighbour connects to itself all the while, and must not be reported. Then the
//! tests with servers of the distribution run, whose ports self-connections have.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    daemon, environment, packages,
    run::{say, seconds_since},
    workspace::Workspace,
};

/// The interpreters, a server, and the tools that make a network namespace.
const PROGRAMS: [(&str, &str); 6] = [
    ("/usr/bin/python3", "python3"),
    ("/usr/bin/node", "nodejs"),
    ("/usr/bin/ruby", "ruby"),
    ("/usr/bin/redis-check-rdb", "redis-tools"),
    ("ip", "iproute2"),
    ("unshare", "util-linux"),
];

/// `connect()` chooses 42000, 42002, … first. The cases use even ports.
const SCRIPT: &str =
    "ip link set lo up && echo 42000 42099 >/proc/sys/net/ipv4/ip_local_port_range && exec \"$@\"";

/// The ports of the cases, without that of the port that was given back.
const PORTS: [u64; 3] = [42_010, 42_020, 42_040];

struct Suite {
    language: &'static str,
    command: Vec<PathBuf>,
    /// Name of the process that runs the cases.
    comm: &'static str,
}

/// Runs the suites. It is an error if a report is not as it must be.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    packages::must_be_root("loading programs and making namespaces needs root", "suites")?;
    packages::install_programs(&PROGRAMS)?;
    daemon::build(workspace)?;
    let binary = workspace.target.join("release/selfconn");
    let directory = workspace.target.join("suites");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    for suite in suites(workspace, &directory)? {
        let start = std::time::Instant::now();
        let (failed, events) = exec(&binary, &suite, &directory, &[])?;
        check_found(&suite, failed, &events)
            .with_context(|| format!("{} without a guard", suite.language))?;
        let (failed, guarded) = exec(&binary, &suite, &directory, &["--guard", "refuse"])?;
        let count = guarded.iter().filter(|event| event["event"] == "established").count();
        ensure!(
            !failed && count == 0,
            "{} with the guard: {count} self-connections, failed: {failed}",
            suite.language
        );
        let prevented: u64 = guarded.iter().filter_map(|event| event["count"].as_u64()).sum();
        ensure!(prevented > 0, "{}: the guard had nothing to do", suite.language);
        let found = events.iter().filter(|event| event["event"] == "established").count();
        say(format!(
            "{}: {found} self-connections of four cases reported; with the guard {prevented} prevented, and all cases pass, {}",
            suite.language,
            seconds_since(start)
        ));
    }
    let mut servers = environment::cargo();
    servers.args([
        "test",
        "--package",
        "selfconn-user",
        "--test",
        "programs",
        "--",
        "--ignored",
        "servers::",
    ]);
    ensure!(
        servers.current_dir(&workspace.root).status().context("start cargo")?.success(),
        "the servers: failed"
    );
    Ok(())
}

fn suites(workspace: &Workspace, directory: &Path) -> Result<Vec<Suite>> {
    let sources = workspace.root.join("selfconn-user/tests/suites");
    let rust = directory.join("rust-suite");
    let mut rustc = environment::plain("rustc");
    rustc.args(["--test", "--edition", "2024", "-o"]).arg(&rust).arg(sources.join("suite.rs"));
    ensure!(rustc.status().context("start rustc")?.success(), "rustc failed");
    let suite = |language, command: &[&Path], comm| Suite {
        language,
        command: command.iter().map(|word| word.to_path_buf()).collect(),
        comm,
    };
    Ok(vec![
        suite("Python", &[Path::new("/usr/bin/python3"), &sources.join("suite.py")], "python3"),
        suite("Node", &[Path::new("/usr/bin/node"), Path::new("--test"), &sources.join("suite.mjs")], "node"),
        // One case after another: in so small a range the client of one may have the port of another's server.
        suite("Rust", &[&rust, Path::new("--test-threads=1")], "rust-suite"),
    ])
}

/// Runs a suite in a network namespace of its own, beside a neighbour. Returns whether it failed, and the report.
fn exec(binary: &Path, suite: &Suite, directory: &Path, options: &[&str]) -> Result<(bool, Vec<Value>)> {
    let report = directory.join("report.jsonl");
    // Each connection takes another port, because TIME_WAIT holds the last one.
    let neighbour = "port=43000; while :; do \"$SELFCONN\" repro 127.0.0.1 $port >/dev/null 2>&1; \
                     port=$((port+1)); done";
    let script = format!("({neighbour}) & neighbour=$!; trap 'kill $neighbour' EXIT; \"$@\"");
    let mut unshare = Command::new("unshare");
    unshare.args(["--net", "--", "sh", "-c", SCRIPT, "sh", "sh", "-c", &script, "sh"]).arg(binary);
    unshare.args(["exec", "--json", "--report"]).arg(&report).args(options).arg("--").args(&suite.command);
    unshare.env("SELFCONN", binary).stdin(Stdio::null());
    let output = unshare.output().context("start unshare")?;
    let text = fs::read_to_string(&report)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr).trim()))?;
    let events = text.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("the report")?;
    Ok((!output.status.success(), events))
}

/// Checks that the four cases, and nobody else's, were reported.
fn check_found(suite: &Suite, failed: bool, events: &[Value]) -> Result<()> {
    ensure!(failed, "the suite passed, though its connects hit themselves");
    let named = |name: &'static str| events.iter().filter(move |event| event["event"] == name);
    for port in PORTS {
        ensure!(named("established").any(|event| event["port"] == port), "nothing at port {port}");
    }
    let is_given_back = |event: &&Value| event["port"].as_u64().is_some_and(|port| !PORTS.contains(&port));
    ensure!(
        named("established").any(|event| is_given_back(&event)),
        "nothing at the port that was given back"
    );
    for event in named("established") {
        let has_name = event["comm"].as_str() == Some(suite.comm)
            || event["exe"].as_str().is_some_and(|exe| exe.rsplit('/').next() == Some(suite.comm));
        ensure!(has_name, "a stranger: {event}");
        ensure!(event["cause"] == "ephemeral", "a wrong cause: {event}");
    }
    ensure!(
        named("blocked").any(|event| event["port"] == 42_020),
        "the server that could not bind 42020 is not reported"
    );
    Ok(())
}

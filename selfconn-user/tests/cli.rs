//! The command line of the real binary: exit codes, one-line errors with their cure, and what needs no kernel of its
//! own.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

use std::{
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

fn selfconn() -> Command {
    let binary = std::env::var_os("SELFCONN_BIN");
    Command::new(binary.map_or_else(|| env!("CARGO_BIN_EXE_selfconn").into(), PathBuf::from))
}

/// As an ordinary user. From a copy, for the build's folder may be closed to others.
fn without_privileges() -> (tempfile::TempDir, Command) {
    use std::{fs, os::unix::fs::PermissionsExt as _};
    let folder = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let copy = folder.path().join("selfconn");
    fs::copy(selfconn().get_program(), &copy).unwrap();
    let mut command = Command::new(copy);
    command.uid(65_534).gid(65_534).current_dir("/");
    (folder, command)
}

#[track_caller]
fn fails_in_one_line(output: &Output, says: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("selfconn: "), "{stderr}");
    for says in says {
        assert!(stderr.contains(says), "{says} is not in: {stderr}");
    }
}

#[test]
fn a_log_that_cannot_be_written_is_an_error_before_anything_is_attached() {
    let output = selfconn().args(["run", "--log", "/proc/no/such/file"]).output().unwrap();
    fails_in_one_line(&output, &["cannot write the event log /proc/no/such/file", "No such file"]);
    assert!(output.stdout.is_empty(), "no event was made");
    let folder = tempfile::tempdir().unwrap();
    let output = selfconn().arg("run").arg("--log").arg(folder.path()).output().unwrap();
    fails_in_one_line(&output, &["cannot write the event log", "Is a directory"]);
}

#[test]
fn without_privileges_the_missing_capability_is_named() {
    let (_folder, mut command) = without_privileges();
    let output = command.arg("run").output().unwrap();
    fails_in_one_line(&output, &["CAP_BPF", "root"]);
    assert!(output.stdout.is_empty());
}

#[test]
fn a_forced_method_that_this_kernel_lacks_is_an_error_with_its_reason() {
    let report = doctor();
    let methods = report["hooks"].as_array().unwrap().iter().flat_map(|hook| {
        hook["methods"].as_array().unwrap().iter().map(|method| (hook["hook"].clone(), method.clone()))
    });
    for (hook, method) in methods.filter(|(_, method)| method["verdict"] != "ok") {
        let name = method["method"].as_str().unwrap();
        let option = if hook == "tcp_set_state" { "--function-method" } else { "--tracepoint-method" };
        let output = selfconn().args(["run", option, name]).output().unwrap();
        fails_in_one_line(&output, &[name, "cannot be attached", method["verdict"].as_str().unwrap()]);
    }
}

fn doctor() -> Value {
    let output = selfconn().args(["doctor", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn doctor_tells_what_run_then_does() {
    let report = doctor();
    assert_eq!(report["fit"], true);
    let mut run = selfconn().args(["run", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(run.stdout.take().unwrap()), &mut line).unwrap();
    let pid = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    // The pipe is closed: a broken pipe is not an error either.
    assert_eq!(run.wait().unwrap().code(), Some(0));
    let started: Value = serde_json::from_str(&line).unwrap();
    let live: Vec<_> =
        started["hooks"].as_array().unwrap().iter().filter_map(|hook| hook["method"].as_str()).collect();
    assert_eq!(report["would_attach"], serde_json::json!(live));
}

#[test]
fn doctor_without_privileges_says_not_fit_and_why() {
    let (_folder, mut command) = without_privileges();
    let output = command.arg("doctor").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for says in ["missing: CAP_BPF, CAP_PERFMON", "denied", "Not fit to run"] {
        assert!(text.contains(says), "{says} is not in: {text}");
    }
}

//! The command line of `selfconn audit`: errors of one line, and what an ordinary user gets.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::PathBuf,
    process::{Command, Output},
};

use serde_json::Value;

fn binary() -> PathBuf {
    std::env::var_os("SELFCONN_BIN").map_or_else(|| env!("CARGO_BIN_EXE_selfconn").into(), PathBuf::from)
}

fn audit(options: &[&str]) -> Output {
    Command::new(binary()).arg("audit").args(options).output().unwrap()
}

#[track_caller]
fn fails_in_one_line(options: &[&str], says: &[&str]) {
    let output = audit(options);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{options:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{options:?}: {stderr}");
    assert!(stderr.starts_with("selfconn: "), "{stderr}");
    for says in says {
        assert!(stderr.contains(says), "{options:?}: {says} is not in: {stderr}");
    }
    assert!(output.stdout.is_empty(), "{options:?}");
}

#[test]
fn what_is_no_port_is_an_error_that_quotes_it() {
    fails_in_one_line(&["--port", "0"], &["\"0\" is not a port"]);
    fails_in_one_line(&["--port", "65536"], &["\"65536\" is not a port", "1 to 65535"]);
    fails_in_one_line(&["--port", "80", "--port", "http"], &["\"http\" is not a port"]);
}

#[test]
fn a_services_file_that_cannot_be_read_is_an_error() {
    fails_in_one_line(
        &["--services", "/proc/no/such/file"],
        &["the services file /proc/no/such/file", "No such file"],
    );
    fails_in_one_line(&["--services", "/"], &["the services file /", "Is a directory"]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("services");
    fs::write(&path, "80\n443 here\n").unwrap();
    fails_in_one_line(&["--services", path.to_str().unwrap()], &["line 2", "\"here\" is not an address"]);
}

#[test]
fn a_path_of_no_network_namespace_is_an_error() {
    for (path, why) in [
        ("/proc/no/such", "No such file"),
        ("/proc/self/stat", "not a network namespace"),
        ("/", "not a network"),
    ] {
        fails_in_one_line(&["--netns", path], &["cannot look at the network namespace", path, why]);
    }
    // A namespace, of another kind.
    fails_in_one_line(&["--netns", "/proc/self/ns/uts"], &["/proc/self/ns/uts"]);
    fails_in_one_line(&["--sysctl", "--netns", "all"], &["--sysctl", "one network namespace", "self"]);
}

#[test]
fn an_ordinary_user_gets_its_own_namespace_and_hears_what_is_missing() {
    // From a copy, for the build's folder may be closed to others.
    let folder = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let copy = folder.path().join("selfconn");
    fs::copy(binary(), &copy).unwrap();
    let mut command = Command::new(copy);
    let output = command.args(["audit", "--json"]).uid(65_534).gid(65_534).current_dir("/").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 1)), "{stderr}");
    assert!(stderr.contains("not seen: network namespaces of processes"), "{stderr}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    let summary: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(summary["event"], "summary");
    assert_eq!(summary["namespaces"].as_array().unwrap().len(), 1);
    assert!(!summary["unseen"].as_array().unwrap().is_empty());
}

#[test]
fn help_has_an_example_and_leads_to_the_ways_out() {
    let output = audit(&["--help"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    assert!(text.contains("Example") && text.contains("docs/remedies.md"), "{text}");
}

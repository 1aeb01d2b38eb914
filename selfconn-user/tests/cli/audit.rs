//! Runs `selfconn audit`: one-line errors, and the output for an unprivileged user.

use std::{fs, process::Output};

use serde_json::Value;

use crate::support::{assert_one_line_error, selfconn, unprivileged_selfconn};

fn audit(options: &[&str]) -> Output {
    selfconn().arg("audit").args(options).output().unwrap()
}

#[track_caller]
fn assert_rejected(options: &[&str], expected: &[&str]) {
    let output = audit(options);
    assert_one_line_error(&output, expected);
    assert!(output.stdout.is_empty(), "{options:?}");
}

#[test]
fn an_invalid_port_is_an_error_that_quotes_it() {
    assert_rejected(&["--port", "0"], &["\"0\" is not a port number"]);
    assert_rejected(&["--port", "65536"], &["\"65536\" is not a port number", "1 to 65535"]);
    assert_rejected(&["--port", "80", "--port", "http"], &["\"http\" is not a port number"]);
}

#[test]
fn a_services_file_that_cannot_be_read_is_an_error() {
    assert_rejected(
        &["--services", "/proc/no/such/file"],
        &["the services file /proc/no/such/file", "No such file"],
    );
    assert_rejected(&["--services", "/"], &["the services file /", "Is a directory"]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("services");
    fs::write(&path, "80\n443 here\n").unwrap();
    assert_rejected(&["--services", path.to_str().unwrap()], &["line 2", "\"here\" is not an IP address"]);
}

#[test]
fn a_path_that_is_not_a_network_namespace_is_an_error() {
    for (path, reason) in [
        ("/proc/no/such", "No such file"),
        ("/proc/self/stat", "not a network namespace"),
        ("/", "not a network"),
    ] {
        assert_rejected(&["--netns", path], &["cannot inspect the network namespace", path, reason]);
    }
    // A namespace of another type.
    assert_rejected(&["--netns", "/proc/self/ns/uts"], &["/proc/self/ns/uts"]);
    assert_rejected(&["--sysctl", "--netns", "all"], &["--sysctl", "one network namespace", "self"]);
}

#[test]
fn an_unprivileged_user_sees_its_own_namespace_and_a_list_of_what_is_missing() {
    let (_directory, mut command) = unprivileged_selfconn();
    let output = command.args(["audit", "--json"]).output().unwrap();
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
fn help_has_an_example_and_names_the_page_about_fixes() {
    let output = audit(&["--help"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    assert!(text.contains("Example") && text.contains("docs/remedies.md"), "{text}");
}

//! `selfconn run` and `doctor`: errors before anything is attached, missing privileges, and agreement of both.

use std::process::Stdio;

use serde_json::Value;

use crate::support::{assert_one_line_error, selfconn, unprivileged_selfconn};

#[test]
fn a_log_that_cannot_be_written_is_an_error_before_anything_is_attached() {
    let output = selfconn().args(["run", "--log", "/proc/no/such/file"]).output().unwrap();
    assert_one_line_error(&output, &["cannot write the event log /proc/no/such/file", "No such file"]);
    assert!(output.stdout.is_empty(), "no event was written");
    let directory = tempfile::tempdir().unwrap();
    let output = selfconn().arg("run").arg("--log").arg(directory.path()).output().unwrap();
    assert_one_line_error(&output, &["cannot write the event log", "Is a directory"]);
}

#[test]
fn a_host_name_that_no_host_has_is_an_error() {
    for name in ["", "a b", "a\"b", &"x".repeat(254)] {
        let output = selfconn().args(["run", "--host-name", name]).output().unwrap();
        assert_one_line_error(&output, &["--host-name"]);
    }
}

#[test]
fn a_node_name_that_no_host_has_is_ignored_with_a_warning() {
    for (name, is_ignored) in [("a b", true), ("node-7", false), ("", false)] {
        let output =
            selfconn().args(["run", "--log", "/proc/no/such/file"]).env("NODE_NAME", name).output().unwrap();
        let messages = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            messages.contains("NODE_NAME is ignored: not 1 to 253"),
            is_ignored,
            "{name:?}: {messages}"
        );
    }
}

#[test]
fn the_error_without_privileges_names_the_missing_capability() {
    let (_directory, mut command) = unprivileged_selfconn();
    let output = command.arg("run").output().unwrap();
    assert_one_line_error(&output, &["CAP_BPF", "root"]);
    assert!(output.stdout.is_empty());
}

#[test]
fn a_forced_method_that_this_kernel_lacks_is_an_error_with_a_reason() {
    let report = doctor();
    let methods = report["hooks"].as_array().unwrap().iter().flat_map(|hook| {
        hook["methods"].as_array().unwrap().iter().map(|method| (hook["hook"].clone(), method.clone()))
    });
    for (hook, method) in methods.filter(|(_, method)| method["verdict"] != "ok") {
        let name = method["method"].as_str().unwrap();
        let option = if hook == "tcp_set_state" { "--function-method" } else { "--tracepoint-method" };
        let output = selfconn().args(["run", option, name]).output().unwrap();
        assert_one_line_error(&output, &[name, "cannot be attached", method["verdict"].as_str().unwrap()]);
    }
}

fn doctor() -> Value {
    let output = selfconn().args(["doctor", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn doctor_reports_the_methods_that_run_attaches() {
    let report = doctor();
    assert_eq!(report["fit"], true);
    let mut run = selfconn().args(["run", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(run.stdout.take().unwrap()), &mut line).unwrap();
    let pid = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    // The pipe is closed. A broken pipe is not an error either.
    assert_eq!(run.wait().unwrap().code(), Some(0));
    let started: Value = serde_json::from_str(&line).unwrap();
    let attached: Vec<_> =
        started["hooks"].as_array().unwrap().iter().filter_map(|hook| hook["method"].as_str()).collect();
    assert_eq!(report["would_attach"], serde_json::json!(attached));
}

#[test]
fn doctor_without_privileges_reports_not_fit_and_the_reason() {
    let (_directory, mut command) = unprivileged_selfconn();
    let output = command.arg("doctor").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for expected in ["missing: CAP_BPF, CAP_PERFMON", "denied", "Not fit to run"] {
        assert!(text.contains(expected), "{expected} is not in: {text}");
    }
}

#[test]
fn a_time_has_an_upper_bound_and_the_error_names_it() {
    let absurd =
        ["18446744073709551615", "18446744073709551615s", "1e30", "1e30d", "99999999d", "-1s", "1/3", "nan"];
    for (command, option, bound) in [
        (&["run", "--remedy", "dry-run"][..], "--remedy-grace", "at most 30d"),
        (&["repro"], "--hold", "at most 30d"),
        (&["tail", "/dev/null"], "--since", "at most 36500d"),
    ] {
        for value in absurd {
            let output = selfconn().args(command).arg(format!("{option}={value}")).output().unwrap();
            assert_one_line_error(&output, &[option, value, bound]);
        }
    }
    for option in ["--reconcile", "--self-test"] {
        let output = selfconn().args(["run", option, "18446744073709551615"]).output().unwrap();
        assert_one_line_error(&output, &[option, "1..=86400"]);
        for value in ["1e30", "0.5", "-1", "0", "86401"] {
            let output = selfconn().arg("run").arg(format!("{option}={value}")).output().unwrap();
            assert_one_line_error(&output, &[option, value]);
        }
    }
}

/// The arguments of the manifests, followed by --help, which ends the run before it begins.
#[test]
fn the_arguments_of_the_kubernetes_manifests_are_understood() {
    let manifests = [
        include_str!("../../../packaging/kubernetes/daemonset.yaml"),
        include_str!("../../../packaging/kubernetes/guard/patch.yaml"),
    ];
    for manifest in manifests {
        let line = manifest.lines().find_map(|line| line.trim().strip_prefix("args: ")).unwrap();
        let args: Vec<String> = serde_json::from_str(line).unwrap();
        let output = selfconn().args(&args).arg("--help").output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        let wrong = args.iter().map(|arg| if arg == "--metrics" { "--metric" } else { arg });
        let output = selfconn().args(wrong).arg("--help").output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}

//! Without CAP_NET_ADMIN nothing can be destroyed, and that is reported at the start.

use std::{
    os::unix::process::CommandExt as _,
    process::{Command, Output},
};

use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use serde_json::Value;

use crate::support::{daemon::selfconn, netns::TestNetns};

/// `selfconn` as root without one capability.
fn selfconn_without(capability: CapabilitySet) -> Command {
    let mut command = Command::new(selfconn());
    // SAFETY: only a prctl, which is safe to call between fork and exec.
    unsafe {
        command.pre_exec(move || Ok(remove_capability_from_bounding_set(capability)?));
    }
    command
}

fn single_stderr_line(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

#[test]
fn without_cap_net_admin_destroy_is_an_error_at_start() {
    TestNetns::enter_new();
    for arguments in [&["run", "--remedy", "destroy"][..], &["scan", "--destroy"]] {
        let output = selfconn_without(CapabilitySet::NET_ADMIN).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let stderr = single_stderr_line(&output);
        assert!(stderr.contains("CAP_NET_ADMIN") && stderr.contains("destroy"), "{stderr}");
        assert_eq!(output.stdout, b"", "nothing was started");
    }
}

#[test]
fn without_cap_net_admin_dry_run_and_doctor_report_it() {
    TestNetns::enter_new();
    let output = selfconn_without(CapabilitySet::NET_ADMIN).args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let remedy = |report: &Value| {
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == "remedy").unwrap().clone()
    };
    let check = remedy(&report);
    assert_eq!(check["ok"], false, "{check}");
    assert!(check["finding"].as_str().unwrap().contains("CAP_NET_ADMIN"), "{check}");
    assert_eq!(report["fit"], true, "the hooks don't need it: {report}");

    let output = Command::new(selfconn()).args(["doctor", "--json"]).output().unwrap();
    let check = remedy(&serde_json::from_slice(&output.stdout).unwrap());
    assert_eq!(check["ok"], true, "{check}");

    let mut command = selfconn_without(CapabilitySet::NET_ADMIN);
    let mut child = command
        .args(["run", "--json", "--remedy", "dry-run"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut started = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut started).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .unwrap();
    assert!(child.wait().unwrap().success());
    let started: Value = serde_json::from_str(&started).unwrap();
    assert!(started["limits"].to_string().contains("CAP_NET_ADMIN"), "{started}");
}

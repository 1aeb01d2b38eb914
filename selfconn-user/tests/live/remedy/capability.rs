//! Without CAP_NET_ADMIN nothing can be destroyed, and that is said at the start.

use std::{
    os::unix::process::CommandExt as _,
    process::{Command, Output},
};

use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use serde_json::Value;

use crate::{daemon::selfconn, net::Net};

/// As root, but for this.
fn without(capability: CapabilitySet) -> Command {
    let mut command = Command::new(selfconn());
    // SAFETY: a prctl, which is safe to call between fork and exec.
    unsafe {
        command.pre_exec(move || Ok(remove_capability_from_bounding_set(capability)?));
    }
    command
}

fn one_line(output: &Output) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

#[test]
fn without_the_capability_destroying_is_an_error_at_the_start() {
    Net::private();
    for arguments in [&["run", "--remedy", "destroy"][..], &["scan", "--destroy"]] {
        let output = without(CapabilitySet::NET_ADMIN).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let said = one_line(&output);
        assert!(said.contains("CAP_NET_ADMIN") && said.contains("destroy"), "{said}");
        assert_eq!(output.stdout, b"", "nothing was started");
    }
}

#[test]
fn without_the_capability_a_dry_run_and_doctor_say_so() {
    Net::private();
    let output = without(CapabilitySet::NET_ADMIN).args(["doctor", "--json"]).output().unwrap();
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

    // A broken pipe ends it.
    let mut command = without(CapabilitySet::NET_ADMIN);
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

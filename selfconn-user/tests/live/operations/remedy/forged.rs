//! What a process says about itself, and rules of the remedy that ask for it.

use std::{
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::fs::{PermissionsExt as _, fchown},
};

use super::{LOCALHOST, start};
use crate::support::{
    client::{connect_to_self, is_connected},
    daemon::{HookVariant, TestDaemon, is_event},
    helper_process::{HelperProcess, UNPRIVILEGED},
    netns::TestNetns,
    nobody::Nobody,
    scan_output::ScanOutput,
};

#[test]
fn a_forged_exe_matches_no_rule() {
    let net = TestNetns::enter_new();
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let trusted = folder.path().join("trusted");
    fs::write(&trusted, "another file").unwrap();
    let trusted = trusted.to_str().unwrap();
    let own = std::env::current_exe().unwrap();
    let own = own.to_str().unwrap();
    let rule = |path: &str| format!("exe={path}");
    for (option, path, result) in [
        ("--remedy-only", trusted, "excepted"),
        ("--remedy-except", trusted, "excepted"),
        ("--remedy-except", "/no/such/program", "would_destroy"),
    ] {
        let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "dry-run", option, &rule(path)]);
        let mut forger = Nobody::at_path(trusted.as_ref());
        forger.wait();
        let is_forgers = |event: &serde_json::Value| {
            is_event("remedied", net.inode)(event) && event["pid"] == forger.pid()
        };
        let remedied = daemon.expect(1, is_forgers).remove(0);
        assert_eq!((&remedied["exe"], &remedied["result"]), (&trusted.into(), &result.into()), "{remedied}");
        if result == "excepted" {
            assert!(remedied["why"].as_str().unwrap().ends_with("exe is unknown"), "{remedied}");
        }
        daemon.stop();
    }
    // The negative twin: the file that the host has at this path.
    for (option, result) in [("--remedy-only", "would_destroy"), ("--remedy-except", "excepted")] {
        let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "dry-run", option, &rule(own)]);
        let _held = connect_to_self(LOCALHOST);
        let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
        assert_eq!((&remedied["exe"], &remedied["result"]), (&own.into(), &result.into()), "{remedied}");
        if result == "excepted" {
            assert_eq!(remedied["why"], format!("except exe={own}"), "{remedied}");
        }
        daemon.stop();
    }
}

/// The connection is from before the daemon. When the daemon finds it, connects to its port are in progress.
#[test]
fn who_connects_to_the_port_of_a_connection_does_not_become_its_opener() {
    let net = TestNetns::enter_new();
    // A client without cookies.
    net.set_sysctl("tcp_fastopen", "5");
    let (socket, port) = connect_to_self(LOCALHOST);
    let task = format!("keep connecting {}", SocketAddr::new(LOCALHOST, port));
    let mut client = HelperProcess::start_unprivileged(&task, None);
    assert_eq!(client.read_output(), "connecting");
    for _ in 0..5 {
        for (option, rule) in [("--remedy-except", "uid=0"), ("--remedy-only", "uid=65534")] {
            let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "destroy", option, rule]);
            let is_found = |event: &serde_json::Value| {
                is_event("established", net.inode)(event) && event["port"] == port
            };
            let found = daemon.expect(1, is_found).remove(0);
            assert_eq!(
                (&found["source"], &found["pid"], &found["uid"], &found["owner"]),
                (&"scan".into(), &std::process::id().into(), &0.into(), &"holder".into()),
                "{found}"
            );
            let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
            assert_eq!(remedied["result"], "excepted", "{remedied}");
            daemon.stop();
        }
    }
    assert!(is_connected(&socket));
    client.finish();
}

/// The connection is from before the daemon, so only the process that has the socket open is known.
#[test]
fn a_process_that_holds_the_socket_of_another_user_matches_no_rule_and_counts_as_unknown() {
    let net = TestNetns::enter_new();
    // A snapshot finds namespaces through their processes.
    let mut netns_process = HelperProcess::start("wait");
    netns_process.read_output();
    let own = std::env::current_exe().unwrap();
    let exe = format!("exe={}", own.to_str().unwrap());
    let (socket, _) = connect_to_self(LOCALHOST);
    for (socket_user, option, rule, result, is_certain) in [
        (0, "--remedy-only", &*exe, "would_destroy", true),
        (0, "--remedy-except", &exe, "excepted", true),
        (UNPRIVILEGED, "--remedy-only", &exe, "failed", false),
        (UNPRIVILEGED, "--remedy-except", &exe, "failed", false),
        (UNPRIVILEGED, "--remedy-only", "exe=/no/such/program", "excepted", true),
        (UNPRIVILEGED, "--remedy-except", "exe=/no/such/program", "would_destroy", true),
        (UNPRIVILEGED, "--remedy-only", "uid=65534", "would_destroy", true),
    ] {
        // As if that user had made the socket, and had passed it to this process.
        fchown(&socket, Some(socket_user), None).unwrap();
        let mut daemon = start(net, &HookVariant(vec![]), &["--remedy", "dry-run", option, rule]);
        let remedied = daemon.expect(1, is_event("remedied", net.inode)).remove(0);
        assert_eq!(
            (&remedied["owner"], &remedied["pid"], &remedied["uid"]),
            (&"holder".into(), &std::process::id().into(), &socket_user.into()),
            "{remedied}"
        );
        assert_eq!(remedied["result"], result, "{option} {rule}: {remedied}");
        let is_uncertain = remedied["why"].as_str().is_some_and(|why| why.contains("exe is not certain"));
        assert_eq!(is_uncertain, !is_certain, "{option} {rule}: {remedied}");
        daemon.stop();
    }
    drop(socket);
    netns_process.finish();
}

#[test]
fn an_exception_that_every_process_can_claim_is_warned_about_at_start() {
    let net = TestNetns::enter_new();
    let netns = format!("netns={}", net.inode);
    for (rule, is_warned) in [
        ("comm=java", true),
        ("thread_comm=a", true),
        ("cmdline=java*", true),
        ("uid=0", false),
        ("exe=/a", false),
    ] {
        let options = ["--remedy", "dry-run", "--remedy-only", &netns, "--remedy-except", rule];
        let (_, stderr) = TestDaemon::start(&HookVariant(vec![]), &options).stop();
        let warning = format!("--remedy-except {rule}: every process chooses this itself");
        assert_eq!(stderr.contains(&warning), is_warned, "{rule}: {stderr}");
        let options = ["--remedy", "dry-run", "--remedy-only", &netns, "--remedy-only", rule];
        let (_, stderr) = TestDaemon::start(&HookVariant(vec![]), &options).stop();
        assert!(!stderr.contains("every process chooses"), "{rule}: {stderr}");
        // A list destroys nothing.
        let list = ["--only", &netns, "--except", rule];
        let ScanOutput { stderr, .. } = ScanOutput::run(&[&list[..], &["--destroy"]].concat());
        let warning = format!("--except {rule}: every process chooses this itself");
        assert_eq!(stderr.contains(&warning), is_warned, "{rule}: {stderr}");
        let ScanOutput { stderr, .. } = ScanOutput::run(&list);
        assert!(!stderr.contains("every process chooses"), "{rule}: {stderr}");
    }
}

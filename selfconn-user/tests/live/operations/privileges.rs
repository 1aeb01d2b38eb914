//! The capabilities of the daemon once its hooks are live, as the kernel shows them for each thread.

use std::{
    net::Ipv4Addr,
    os::unix::fs::chown,
    time::{Duration, Instant},
};

use rustix::thread::{CapabilitySet, capabilities};
use selfconn::daemon::MAX_THREADS;

use crate::support::{
    client::{connect_to_self, run_self_connection},
    daemon::{
        DEADLINE, HookVariant, TestDaemon, hook_variants, is_event, method_verdicts, reads_descriptors,
    },
    helper_process::HelperProcess,
    netns::TestNetns,
    privileges::{ThreadCapabilities, start_as_user, thread_capabilities},
};

/// Waits until the daemon with this `--remedy` has dropped its capabilities, right after `started`. Returns its
/// threads.
fn wait_for_dropped_capabilities(pid: u32, remedy: &str) -> Vec<ThreadCapabilities> {
    let until = Instant::now() + DEADLINE;
    loop {
        let threads = thread_capabilities(pid);
        let is_narrow = |thread: &ThreadCapabilities| match thread.name.as_str() {
            "reader" => !thread.permitted.contains(CapabilitySet::DAC_OVERRIDE),
            // They start with the capabilities of all threads.
            name @ ("ranges" | "remedy" | "guard") => {
                thread.permitted.difference(expected_capabilities(name, remedy)).is_empty()
            }
            "stdout" | "stderr" | "metrics" | "selfconn" => {
                !thread.permitted.contains(CapabilitySet::SYS_PTRACE)
            }
            _ => !thread.permitted.contains(CapabilitySet::SYS_ADMIN),
        };
        if threads.len() > 2 && threads.iter().all(is_narrow) {
            return threads;
        }
        assert!(Instant::now() < until, "{threads:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The capabilities that a thread with this name may keep in a daemon with this `--remedy`. The threads that enter
/// network namespaces keep more than the others.
fn expected_capabilities(name: &str, remedy: &str) -> CapabilitySet {
    match name {
        // It lists the open files of other users' processes only if the kernel has no iterator for that.
        "reader" if reads_descriptors() => CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_PTRACE,
        "reader" => CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH,
        "holders" if !reads_descriptors() => CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH,
        // These threads only write data that they are given.
        "stdout" | "stderr" | "metrics" => CapabilitySet::empty(),
        "remedy" if remedy == "destroy" => {
            CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_PTRACE | CapabilitySet::NET_ADMIN
        }
        "ranges" | "remedy" => CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_PTRACE,
        // It asks what is attached, in every mode.
        "guard" => CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_PTRACE | CapabilitySet::NET_ADMIN,
        name if name == "tables" || name.starts_with("facts-") || name.starts_with("cmdline-") => {
            CapabilitySet::SYS_PTRACE
        }
        // The loop reads nothing of another process.
        _ => CapabilitySet::empty(),
    }
}

#[test]
fn no_thread_keeps_the_capabilities_for_attaching() {
    let net = TestNetns::enter_new();
    let had = capabilities(None).unwrap().permitted;
    assert!(had.contains(CapabilitySet::BPF | CapabilitySet::PERFMON), "{had:?}");
    let mut cases: Vec<_> = hook_variants().into_iter().map(|variant| (variant, "off", "off")).collect();
    // With a guard, whose thread needs CAP_NET_ADMIN, the remedy's must not have it for that.
    for (remedy, guard) in [("dry-run", "dry-run"), ("dry-run", "refuse"), ("destroy", "refuse")] {
        cases.push((HookVariant(vec![]), remedy, guard));
    }
    for (variant, remedy, guard) in cases {
        // Neither the remedy nor the guard touches the self-connection of this test.
        let rules = ["--remedy-only", "uid=31999", "--guard-only", "uid=31999", "--guard-own-netns"];
        let modes = ["--remedy", remedy, "--guard", guard];
        let options = [&["-v", "--metrics", "127.0.0.1:0"][..], &modes, &rules].concat();
        let mut daemon = TestDaemon::start(&variant, &options);
        let threads = wait_for_dropped_capabilities(daemon.pid(), remedy);
        let of_modes = [("remedy", remedy), ("guard", guard)];
        let of_modes = of_modes.iter().filter(|(_, mode)| *mode != "off").map(|(name, _)| *name);
        let always = ["reader", "holders", "ranges", "facts-1", "cmdline-1", "stdout", "stderr", "metrics"];
        for name in always.into_iter().chain(of_modes) {
            assert!(threads.iter().any(|thread| thread.name == name), "{name}: {threads:?}");
        }
        // With each of the four threads that enter a namespace now and then, it has a thread more.
        let is_steady = |thread: &&ThreadCapabilities| {
            !["namespace", "namespaces", "guard-netns"].contains(&thread.name.as_str())
        };
        let steady = threads.iter().filter(is_steady).count();
        assert!(steady + 4 <= MAX_THREADS, "{steady}: {threads:?}");
        // Without these capabilities the daemon still reports self-connections and their processes.
        let port = run_self_connection(Ipv4Addr::LOCALHOST.into());
        let closed = daemon.expect(1, is_event("closed", net.inode)).remove(0);
        assert_eq!(closed["port"], port, "{closed}");
        assert_eq!(closed["exe"], std::env::current_exe().unwrap().to_str().unwrap(), "{closed}");
        let (_, stderr) = daemon.stop();
        // The daemon reports kernels on which the counters of the programs can be read only with CAP_BPF.
        let keeps_bpf = stderr.contains("CAP_BPF is kept");
        println!("FACT keeps_cap_bpf={keeps_bpf}");
        for thread in threads {
            let mut keeps = expected_capabilities(&thread.name, remedy) & had;
            let makes_passes = ["reader", "holders"].contains(&thread.name.as_str()) && reads_descriptors();
            if keeps_bpf && (thread.name == "selfconn" || makes_passes) {
                keeps |= CapabilitySet::BPF;
            }
            assert_eq!(thread.permitted, keeps, "{variant:?}, {modes:?}: {thread:?}");
            assert_eq!(thread.effective, keeps, "{variant:?}, {modes:?}: {thread:?}");
            for given_up in [thread.inheritable, thread.ambient, thread.bounding] {
                assert!(given_up.is_empty(), "{variant:?}: {thread:?}");
            }
            assert!(thread.no_new_privs, "{thread:?}");
        }
    }
}

#[test]
fn the_counters_can_be_read_after_capabilities_are_dropped() {
    let net = TestNetns::enter_new();
    let mut daemon = TestDaemon::start(&HookVariant(vec![]), &["--ring-size", "4K"]);
    wait_for_dropped_capabilities(daemon.pid(), "off");
    // One page holds about twenty records.
    daemon.signal(rustix::process::Signal::STOP);
    for _ in 0..50 {
        run_self_connection(Ipv4Addr::LOCALHOST.into());
    }
    daemon.signal(rustix::process::Signal::CONT);
    daemon.expect(1, is_event("established", net.inode));
    let lost = daemon.expect(1, |event| event["event"] == "lost" && event["where"] == "ring").remove(0);
    assert!(lost["count"].as_u64().unwrap() > 0, "{lost}");
    let (_, stderr) = daemon.stop();
    assert!(!stderr.contains("can't be read"), "{stderr}");
}

#[test]
fn cap_dac_override_is_kept_only_for_a_log_that_needs_it() {
    let _net = TestNetns::enter_new();
    if !capabilities(None).unwrap().permitted.contains(CapabilitySet::DAC_OVERRIDE) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (owner, keeps) in [(0, CapabilitySet::empty()), (65_534, CapabilitySet::DAC_OVERRIDE)] {
        chown(dir.path(), Some(owner), None).unwrap();
        let log = dir.path().join("events.jsonl");
        let daemon = TestDaemon::start(&HookVariant(vec![]), &["--log", log.to_str().unwrap()]);
        let threads = wait_for_dropped_capabilities(daemon.pid(), "off");
        let own = threads.iter().find(|thread| thread.name == "selfconn").unwrap();
        assert_eq!(own.permitted & CapabilitySet::DAC_OVERRIDE, keeps, "owner {owner}: {own:?}");
        daemon.stop();
    }
}

#[test]
fn a_user_with_two_capabilities_ends_up_with_none() {
    let _net = TestNetns::enter_new();
    let (daemon, _dir) = start_as_user(
        CapabilitySet::BPF | CapabilitySet::PERFMON,
        &["--hooks", "tracepoint", "--tracepoint-method", "tp_btf", "-v"],
    );
    let until = Instant::now() + DEADLINE;
    let mut seen = thread_capabilities(daemon.pid());
    while seen.iter().any(|thread| thread.permitted.contains(CapabilitySet::PERFMON)) {
        assert!(Instant::now() < until, "{seen:?}");
        std::thread::sleep(Duration::from_millis(5));
        seen = thread_capabilities(daemon.pid());
    }
    let (_, stderr) = daemon.stop();
    let keeps = if stderr.contains("CAP_BPF is kept") { CapabilitySet::BPF } else { CapabilitySet::empty() };
    for thread in seen {
        let has = thread.permitted | thread.effective | thread.ambient | thread.inheritable;
        assert!(has.difference(keeps).is_empty(), "{thread:?}");
        assert!(thread.no_new_privs, "{thread:?}");
    }
}

#[test]
fn the_service_user_with_the_drop_in_for_tracefs_sees_what_root_sees() {
    let net = TestNetns::enter_new();
    let has = CapabilitySet::BPF
        | CapabilitySet::PERFMON
        | CapabilitySet::SYS_ADMIN
        | CapabilitySet::SYS_PTRACE
        | CapabilitySet::DAC_READ_SEARCH;
    // A self-connection from before the daemon, held by root, in a namespace that must be entered.
    let mut holder = HelperProcess::start("wait");
    holder.read_output();
    let (held, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let mut as_root = TestDaemon::start(&HookVariant(vec![]), &[]);
    let started = as_root.expect(1, |event| event["event"] == "started").remove(0);
    as_root.stop();
    let (mut daemon, _dir) = start_as_user(has, &[]);
    let methods = |started: &serde_json::Value| {
        let hooks = started["hooks"].as_array().unwrap();
        hooks.iter().map(|hook| hook["method"].to_string()).collect::<Vec<_>>()
    };
    let own = daemon.expect(1, |event| event["event"] == "started").remove(0);
    assert_eq!(methods(&own), methods(&started), "{own}");
    let found = daemon.expect(1, is_event("established", net.inode)).remove(0);
    assert_eq!((&found["source"], &found["owner"]), (&"scan".into(), &"holder".into()), "{found}");
    assert_eq!(found["pid"], std::process::id(), "{found}");
    run_self_connection(Ipv4Addr::LOCALHOST.into());
    let live = daemon.expect(1, is_event("closed", net.inode)).remove(0);
    assert_eq!(live["exe"], std::env::current_exe().unwrap().to_str().unwrap(), "{live}");
    daemon.stop();
    drop(held);
    holder.finish();
}

#[test]
fn a_service_user_who_may_not_read_tracefs_is_shown_why_perf_is_missing() {
    let _net = TestNetns::enter_new();
    // Those of the unit.
    let has = CapabilitySet::BPF
        | CapabilitySet::PERFMON
        | CapabilitySet::SYS_ADMIN
        | CapabilitySet::NET_ADMIN
        | CapabilitySet::SYS_PTRACE;
    let (mut daemon, _dir) = start_as_user(has, &[]);
    let started = daemon.expect(1, |event| event["event"] == "started").remove(0);
    let hooks = started["hooks"].as_array().unwrap().iter();
    let refused: Vec<_> = hooks.flat_map(|hook| hook["refused"].as_array().unwrap()).collect();
    let perf = refused.iter().find(|refused| refused["method"] == "perf");
    let is_mounted = std::path::Path::new("/sys/kernel/tracing/events").is_dir();
    let perf_is_ok =
        method_verdicts().iter().any(|(method, verdict, _)| (*method, *verdict) == ("perf", "ok"));
    // Under lockdown=confidentiality perf is refused for another reason; on other kernels a better pair may do.
    if let Some(perf) = perf.filter(|_| is_mounted && perf_is_ok) {
        assert!(perf["why"].as_str().unwrap().contains("CAP_DAC_READ_SEARCH"), "{started}");
    }
    daemon.stop();
}

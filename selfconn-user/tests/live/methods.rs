//! Which methods a kernel has, why it hasn't the others, and that what is forced is what runs. What must be there is
//! known of Debian's kernels only (`SELFCONN_KERNEL` is set for them); everywhere, what is said must agree.

use std::process::Command;

use crate::daemon::{Daemon, Variant, doctor, forced, selfconn, variants, verdicts};

/// Method and verdict, as the lockdown has it. From 5.10 to 7.x there is no difference between kernels: the programs
/// that read the socket by plain loads need no helper that a lockdown takes away.
fn expected(lockdown: &str) -> [(&'static str, &'static str); 4] {
    let reads_memory = if lockdown == "confidentiality" { "refused" } else { "ok" };
    [("tp_btf", "ok"), ("perf", reads_memory), ("fentry", "ok"), ("kprobe", reads_memory)]
}

/// `integrity` in `none [integrity] confidentiality`; `none` where the kernel has no lockdown.
fn lockdown() -> String {
    let text = std::fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    text.split(['[', ']']).nth(1).unwrap_or("none").to_owned()
}

#[test]
fn a_kernel_has_the_methods_it_must_have_and_refuses_the_others_by_its_policy() {
    let Ok(kernel) = std::env::var("SELFCONN_KERNEL") else {
        println!("not one of the kernels of which it is known what they must have");
        return;
    };
    // A kernel that was booted with a lockdown and knows none would make all that follows a test of something else.
    assert_eq!(lockdown(), std::env::var("SELFCONN_LOCKDOWN").unwrap(), "{kernel}");
    let found: Vec<_> = verdicts().into_iter().map(|(method, verdict, _)| (method, verdict)).collect();
    assert_eq!(found, expected(&lockdown()), "{kernel}: {}", doctor());
    for (method, verdict, why) in verdicts() {
        let names_the_policy = why.contains("lockdown=confidentiality");
        assert_eq!(names_the_policy, verdict == "refused", "{kernel}: {method}: {why:?}");
    }
    // The pair: never one guard, and both hooks.
    let pair = if lockdown() == "confidentiality" { ["tp_btf", "fentry"] } else { ["tp_btf", "kprobe"] };
    assert_eq!(doctor()["would_attach"], serde_json::json!(pair), "{kernel}");
}

#[test]
fn started_says_what_is_live_and_why_the_rest_is_not() {
    let (events, _) = Daemon::start(&Variant(vec![]), &[]).stop();
    let hooks = events[0]["hooks"].as_array().unwrap();
    let live: Vec<_> = hooks.iter().filter_map(|hook| hook["method"].as_str()).collect();
    assert_eq!(serde_json::json!(live), doctor()["would_attach"], "{}", events[0]);
    for (method, verdict, why) in verdicts().into_iter().filter(|(_, verdict, _)| *verdict != "ok") {
        // Only what was tried is told: all methods of a hook that none is live of, and of the others what came first.
        let refused = hooks.iter().flat_map(|hook| hook["refused"].as_array().unwrap());
        let told: Vec<_> = refused.filter(|refused| refused["method"] == method).collect();
        let is_hook_dead = hooks.iter().any(|hook| hook["method"].is_null());
        assert!(told.len() == 1 || told.is_empty() && !is_hook_dead, "{method}: {}", events[0]);
        for refused in told {
            let said = refused["why"].as_str().unwrap();
            assert!(said.starts_with(verdict) && said.contains(why), "{method}: {said:?}, doctor: {why:?}");
        }
    }
}

#[test]
fn a_forced_method_is_the_only_one_that_is_live() {
    for variant in variants().into_iter().filter(|variant| !variant.0.is_empty()) {
        let daemon = Daemon::shared(&variant, &[]);
        let hooks = daemon.seen()[0]["hooks"].as_array().unwrap();
        let live: Vec<_> = hooks.iter().filter_map(|hook| hook["method"].as_str()).collect();
        assert_eq!(live, [*variant.0.last().unwrap()], "{hooks:?}");
        daemon.stop();
    }
}

/// A verifier takes milliseconds for so many. A few hundred thousand took that of 5.10 minutes: what it keeps of each path
/// it compares with all others.
const VERIFIED: u64 = 14_000;

#[test]
fn the_verifier_goes_through_few_paths() {
    let mut counts = Vec::new();
    for variant in variants() {
        let daemon = Daemon::shared(&variant, &[]);
        let fds = std::fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid())).unwrap();
        let texts = fds.map(|fd| std::fs::read_to_string(fd.unwrap().path()).unwrap_or_default());
        // Told since v5.16 (`bpf_prog_show_fdinfo`, kernel/bpf/syscall.c).
        let verified = |text: String| {
            text.lines().find_map(|line| line.strip_prefix("verified_insns:")?.trim().parse::<u64>().ok())
        };
        let most = texts.filter_map(verified).max();
        daemon.stop();
        let Some(most) = most else { return println!("this kernel does not tell") };
        println!("FACT verified.{}={most}", variant.0.last().unwrap_or(&"default"));
        counts.push(most);
    }
    // The smallest of the methods' programs has more than a thousand.
    assert!(counts.iter().all(|most| (1_000..VERIFIED).contains(most)), "{counts:?}");
}

#[test]
fn forcing_what_this_kernel_refuses_is_an_error_with_the_reason() {
    for (method, verdict, why) in verdicts().into_iter().filter(|(_, verdict, _)| *verdict != "ok") {
        let output = Command::new(selfconn()).args(["run", "--json"]).args(forced(method)).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{method}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{method}: {stderr}");
        for part in [method, verdict, why] {
            assert!(stderr.contains(part), "{part:?} in {stderr}");
        }
        assert!(output.stdout.is_empty(), "{method} has started nothing");
    }
}

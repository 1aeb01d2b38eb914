//! The attach methods of a kernel: which are available, why the others are not, and that a forced method is
//! the one that runs. The expected methods are known only for the kernels of Debian, for which
//! `SELFCONN_KERNEL` is set. On every kernel the reports must agree with each other.

use std::{os::unix::process::CommandExt as _, process::Command};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};
use serde_json::{Value, json};

use crate::support::daemon::{
    HookVariant, TestDaemon, bind_verdicts, doctor, hook_variants, is_real_time, method_verdicts,
    options_forcing, selfconn,
};

/// The expected verdict of each method of the hooks.
fn expected_verdicts(kernel: &str, lockdown: &str) -> [(&'static str, &'static str); 4] {
    let (reads_memory, fentry) = (reads_memory(lockdown), on_functions(kernel));
    // The patches, until they became a part of the kernel, put a field before those of each tracepoint
    // (`common_preempt_lazy_count` in Debian's linux-image-6.1-rt). The fields are read only where the policy allows
    // the method.
    let has_other_fields = is_real_time() && version_of(kernel) < (6, 12);
    let perf = if has_other_fields && reads_memory == "ok" { "unsupported" } else { reads_memory };
    [("tp_btf", "ok"), ("perf", perf), ("fentry", fentry), ("kprobe", reads_memory)]
}

/// The expected verdict of each method for failed binds. The real-time patches do not move the fields of system calls,
/// because their additional field fits into the padding before them.
fn expected_bind_verdicts(kernel: &str, lockdown: &str) -> [(&'static str, &'static str); 2] {
    [("fexit", on_functions(kernel)), ("perf", reads_memory(lockdown))]
}

/// The expected verdict of methods whose programs call `bpf_probe_read_kernel`. The other programs read by plain loads
/// and need no helper that a lockdown forbids.
fn reads_memory(lockdown: &str) -> &'static str {
    if lockdown == "confidentiality" { "refused" } else { "ok" }
}

/// The expected verdict of programs on functions, which came to arm64 with 6.4.
fn on_functions(kernel: &str) -> &'static str {
    if cfg!(target_arch = "aarch64") && version_of(kernel) < (6, 4) { "unsupported" } else { "ok" }
}

/// The first two numbers of a version.
fn version_of(kernel: &str) -> (u32, u32) {
    let mut numbers = kernel.split('.').map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// The active lockdown, for example `integrity` in `none [integrity] confidentiality`; `none` on a kernel
/// without lockdown.
fn lockdown() -> String {
    let text = std::fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    text.split(['[', ']']).nth(1).unwrap_or("none").to_owned()
}

#[test]
fn a_kernel_has_the_expected_methods_and_refuses_the_others_by_policy() {
    let Ok(kernel) = std::env::var("SELFCONN_KERNEL") else {
        println!("skipped: the expected methods of this kernel are not known");
        return;
    };
    // If the kernel ignored the requested lockdown, the rest would test something else.
    assert_eq!(lockdown(), std::env::var("SELFCONN_LOCKDOWN").unwrap(), "{kernel}");
    let found = |verdicts: &[(&'static str, &'static str, &'static str)]| {
        verdicts.iter().map(|(method, verdict, _)| (*method, *verdict)).collect::<Vec<_>>()
    };
    let (hooks, binds) = (method_verdicts(), bind_verdicts());
    assert_eq!(found(&hooks), expected_verdicts(&kernel, &lockdown()), "{kernel}: {}", doctor());
    assert_eq!(found(&binds), expected_bind_verdicts(&kernel, &lockdown()), "{kernel}: {}", doctor());
    for (method, verdict, why) in hooks.into_iter().chain(binds) {
        let names_the_policy = why.contains("lockdown=confidentiality");
        assert!(!why.contains("524"), "{kernel}: {method}: {why:?}");
        if (method, verdict) == ("perf", "unsupported") {
            assert!(why.contains("real-time patches"), "{kernel}: {method}: {why:?}");
        }
        assert_eq!(names_the_policy, verdict == "refused", "{kernel}: {method}: {why:?}");
    }
    // The pair never shares one recursion guard, and it uses both hooks. A single method is one limit more.
    let has = |method| expected_verdicts(&kernel, &lockdown()).contains(&(method, "ok"));
    let second = ["kprobe", "fentry"].into_iter().find(|method| has(method));
    let pair: Vec<_> = ["tp_btf"].into_iter().chain(second).collect();
    assert_eq!(doctor()["would_attach"], json!(pair), "{kernel}");
    assert_eq!(names_single_method(&doctor()["limits"]), pair.len() == 1, "{kernel}: {}", doctor());
}

/// True if a limit says that failed binds are not observed.
fn names_unobserved_binds(limits: &Value) -> bool {
    limits.to_string().contains("failed binds are not observed, so `blocked` is not reported")
}

#[test]
fn that_no_method_observes_failed_binds_is_a_limit_unless_the_user_wanted_none() {
    let has_method = bind_verdicts().iter().any(|(_, verdict, _)| *verdict == "ok");
    assert_eq!(names_unobserved_binds(&doctor()["limits"]), !has_method, "{}", doctor());
    for (options, is_named) in [
        ([].as_slice(), !has_method),
        (&["--bind-method", "off"], false),
        // Both methods read offsets from the BTF.
        (&["--without-btf"], true),
        (&["--without-btf", "--bind-method", "off"], false),
    ] {
        let perf = method_verdicts().into_iter().find(|(method, ..)| *method == "perf").unwrap();
        if options.contains(&"--without-btf") && perf.1 != "ok" {
            println!("skipped: without BTF only perf works, and it is {}: {}", perf.1, perf.2);
            continue;
        }
        let (events, _) = TestDaemon::start(&HookVariant(vec![]), options).stop();
        assert_eq!(names_unobserved_binds(&events[0]["limits"]), is_named, "{options:?}: {}", events[0]);
        assert_eq!(
            events[0]["binds"]["method"].is_null(),
            is_named || options.contains(&"off"),
            "{}",
            events[0]
        );
    }
}

fn names_single_method(limits: &Value) -> bool {
    limits.to_string().contains(" is attached, so no other method sees a transition that comes while ")
}

/// The output of `doctor --json` where a tmpfs covers each of these directories.
fn doctor_with_masked(directories: &'static [&'static str]) -> Value {
    let mut command = Command::new(selfconn());
    command.args(["doctor", "--json"]);
    let mask = move || {
        // SAFETY: no other thread shares this process's descriptors and root after fork.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        for directory in directories {
            mount("tmpfs", *directory, "tmpfs", MountFlags::empty(), None)?;
        }
        Ok(())
    };
    // SAFETY: system calls only, between fork and exec.
    unsafe { command.pre_exec(mask) };
    serde_json::from_slice(&command.output().unwrap().stdout).unwrap()
}

#[test]
fn what_a_mount_hides_is_called_masked_and_what_the_kernel_lacks_is_not() {
    let check = |doctor: &Value, name: &str| {
        doctor["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap().clone()
    };
    let open = doctor();
    let finding = check(open, "btf");
    assert!(!finding["finding"].as_str().unwrap().contains("masked"), "{finding}");
    // A kernel without BTF has no such directory.
    if std::path::Path::new("/sys/kernel/btf").exists() {
        let masked = check(&doctor_with_masked(&["/sys/kernel/btf"]), "btf");
        assert!(masked["finding"].as_str().unwrap().contains("masked: "), "{masked}");
        assert!(masked["hint"].as_str().unwrap().starts_with("unmount"), "{masked}");
    }
    let method = |doctor: &Value, name: &str| {
        let mut methods =
            doctor["hooks"].as_array().unwrap().iter().flat_map(|hook| hook["methods"].as_array().unwrap());
        methods.find(|method| method["method"] == name).unwrap().clone()
    };
    // The method is missing for the same reason, or was before.
    let masked = method(&doctor_with_masked(&["/sys/bus"]), "kprobe");
    assert!(masked["why"].as_str().unwrap().contains("masked: "), "{masked}");
    assert!(masked["hint"].as_str().unwrap().starts_with("unmount"), "{masked}");
    assert!(!method(open, "kprobe")["why"].to_string().contains("masked"), "{open}");
    assert!(!check(open, "tracefs")["finding"].as_str().unwrap().contains("masked"), "{open}");
    // Without the directory there is no place for a private mount.
    let masked = check(&doctor_with_masked(&["/sys/kernel"]), "tracefs");
    assert!(masked["finding"].as_str().unwrap().starts_with("masked: "), "{masked}");
    assert!(masked["hint"].as_str().unwrap().starts_with("unmount"), "{masked}");
    assert_eq!(masked["ok"], false, "{masked}");
    // What the policy refuses is refused also where the policy can't be read.
    if lockdown() == "confidentiality" {
        let perf = method(&doctor_with_masked(&["/sys/kernel/security"]), "perf");
        assert_eq!(perf["verdict"], "refused", "{perf}");
        assert!(perf["why"].as_str().unwrap().contains("lockdown"), "{perf}");
        let tracefs = check(open, "tracefs");
        assert_eq!(tracefs["finding"], "mounted, but empty: lockdown disables tracing", "{tracefs}");
    }
}

/// The two places of tracefs. A kernel without one of them has no such directory.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug"];

#[test]
fn a_covered_tracefs_is_called_masked_and_hinders_no_method() {
    if !TRACEFS.iter().all(|directory| std::path::Path::new(directory).exists()) {
        return println!("skipped: this kernel lacks one of {TRACEFS:?}");
    }
    println!("FACT tracefs={:?}", selfconn::bpf::tracefs::find());
    let masked = doctor_with_masked(&TRACEFS);
    let tracefs =
        masked["checks"].as_array().unwrap().iter().find(|check| check["name"] == "tracefs").unwrap();
    let finding = tracefs["finding"].as_str().unwrap();
    let covered = "masked: something that is not of the kernel is mounted on /sys/kernel/tracing here";
    assert!(finding.starts_with(covered), "{tracefs}");
    // With CAP_SYS_ADMIN selfconn mounts it over what covers it, for itself.
    assert!(finding.ends_with("; selfconn mounts it privately while it attaches"), "{tracefs}");
    assert_eq!(masked["hooks"], doctor()["hooks"]);
    assert_eq!(masked["binds"], doctor()["binds"]);
}

#[test]
fn started_lists_the_live_methods_and_why_the_others_are_not() {
    let (events, _) = TestDaemon::start(&HookVariant(vec![]), &[]).stop();
    let hooks = events[0]["hooks"].as_array().unwrap();
    let live: Vec<_> = hooks.iter().filter_map(|hook| hook["method"].as_str()).collect();
    assert_eq!(json!(live), doctor()["would_attach"], "{}", events[0]);
    assert_eq!(names_single_method(&events[0]["limits"]), live.len() == 1, "{}", events[0]);
    for (method, verdict, why) in method_verdicts().into_iter().filter(|(_, verdict, _)| *verdict != "ok") {
        // Only methods that were tried are listed: all methods of a hook without a live method, and for a
        // live hook those before the live one.
        let refused = hooks.iter().flat_map(|hook| hook["refused"].as_array().unwrap());
        let reported: Vec<_> = refused.filter(|refused| refused["method"] == method).collect();
        let is_hook_dead = hooks.iter().any(|hook| hook["method"].is_null());
        assert!(reported.len() == 1 || reported.is_empty() && !is_hook_dead, "{method}: {}", events[0]);
        for refused in reported {
            let reason = refused["why"].as_str().unwrap();
            assert!(
                reason.starts_with(verdict) && reason.contains(why),
                "{method}: {reason:?}, doctor: {why:?}"
            );
        }
    }
}

#[test]
fn a_forced_method_is_the_only_live_method() {
    for variant in hook_variants().into_iter().filter(|variant| !variant.0.is_empty()) {
        let daemon = TestDaemon::shared(&variant, &[]);
        let hooks = daemon.received()[0]["hooks"].as_array().unwrap();
        let live: Vec<_> = hooks.iter().filter_map(|hook| hook["method"].as_str()).collect();
        assert_eq!(live, [*variant.0.last().unwrap()], "{hooks:?}");
        let limits = &daemon.received()[0]["limits"];
        assert!(names_single_method(limits) && limits.to_string().contains(live[0]), "{limits}");
        daemon.stop();
    }
}

/// Maximum number of instructions that the verifier may process per program, which takes milliseconds. A few
/// hundred thousand took the verifier of 5.10 minutes, because it compares the saved states of each path with
/// all others.
const MAX_VERIFIED_INSNS: u64 = 80_000;

#[test]
fn the_verifier_processes_few_instructions() {
    let mut counts = Vec::new();
    for variant in hook_variants() {
        let daemon = TestDaemon::shared(&variant, &[]);
        let fds = std::fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid())).unwrap();
        let texts = fds.map(|fd| std::fs::read_to_string(fd.unwrap().path()).unwrap_or_default());
        // Reported since v5.16 (`bpf_prog_show_fdinfo`, kernel/bpf/syscall.c).
        let verified = |text: String| {
            text.lines().find_map(|line| line.strip_prefix("verified_insns:")?.trim().parse::<u64>().ok())
        };
        let most = texts.filter_map(verified).max();
        daemon.stop();
        let Some(most) = most else { return println!("skipped: this kernel does not report the count") };
        println!("FACT verified.{}={most}", variant.0.last().unwrap_or(&"default"));
        counts.push(most);
    }
    // The smallest program of the methods has more than a thousand instructions.
    assert!(counts.iter().all(|most| (1_000..MAX_VERIFIED_INSNS).contains(most)), "{counts:?}");
}

#[test]
fn forcing_an_unavailable_method_is_an_error_with_the_reason() {
    for (method, verdict, why) in method_verdicts().into_iter().filter(|(_, verdict, _)| *verdict != "ok") {
        let output =
            Command::new(selfconn()).args(["run", "--json"]).args(options_forcing(method)).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{method}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{method}: {stderr}");
        for part in [method, verdict, why] {
            assert!(stderr.contains(part), "{part:?} in {stderr}");
        }
        assert!(output.stdout.is_empty(), "{method}: no output on stdout");
    }
}

#[test]
fn a_bind_method_that_was_named_is_live_or_an_error_with_the_reason() {
    let doctor = doctor();
    let methods = doctor["binds"].as_array().unwrap();
    assert_eq!(methods.len(), 2, "{doctor}");
    for report in methods {
        let method = report["method"].as_str().unwrap();
        if report["verdict"] == "ok" {
            let (events, _) = TestDaemon::start(&HookVariant(vec![]), &["--bind-method", method]).stop();
            assert_eq!(events[0]["binds"]["method"], method, "{}", events[0]);
            continue;
        }
        let output =
            Command::new(selfconn()).args(["run", "--json", "--bind-method", method]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{method}: {stderr}");
        for part in [method, report["verdict"].as_str().unwrap(), report["why"].as_str().unwrap()] {
            assert!(stderr.contains(part), "{part:?} in {stderr}");
        }
        assert!(output.stdout.is_empty(), "{method}: no output on stdout");
    }
}

#[test]
fn the_object_and_its_architecture_are_shown() {
    let (events, _) = TestDaemon::start(&HookVariant(vec![]), &[]).stop();
    let version = Command::new(selfconn()).arg("--version").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let object = events[0]["object"].as_str().unwrap();
    assert!(version.contains(&format!("eBPF object {object} for x86_64 and aarch64)")), "{version}");
    assert_eq!(events[0]["object_architectures"], json!(["x86_64", "aarch64"]));
    assert_eq!(events[0]["machine"], doctor()["machine"]);
    assert!(["x86_64", "aarch64"].contains(&events[0]["machine"].as_str().unwrap()), "{}", events[0]);
    let check = doctor()["checks"].as_array().unwrap()[0].clone();
    assert_eq!((&check["name"], &check["ok"]), (&"object".into(), &true.into()), "{check}");
    assert!(check["finding"].as_str().unwrap().starts_with(object), "{check}");
}

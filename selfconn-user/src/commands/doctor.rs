//! `selfconn doctor`: reports what this kernel offers, what `run` would attach and why, what is missing, and
//! a hint for each problem.
//!
//! Each method is attached for a moment, because only the kernel knows what it refuses.

use std::{env::consts::ARCH, fmt::Write as _, process::ExitCode};

use anyhow::{Context as _, Result};
use rustix::{fs::Access, thread::CapabilitySet};
use schemars::JsonSchema;
use selfconn_ebpf::names;
use serde::Serialize;

use crate::{
    bpf::{
        attach::{Hook, Method, RequestedHooks, choose},
        bind_method::{BindChoice, BindMethod},
        bind_programs, descriptors,
        features::KernelFeatures,
        found_guards::{self, FoundFilter, FoundGuard},
        namespaces, programs,
        refusal::Refusal,
        tracefs::{self, Tracefs},
    },
    event::text::escape,
    sockets,
    system::{capabilities, cgroup, logger, sysfs},
};

use live::LiveMethod;
use live::LiveTest;
use memory::MemoryReport;

mod live;
mod memory;

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn doctor              exit code 0: fit to run, 1: not
  selfconn doctor --live       also test it with a real self-connection
  selfconn doctor --json | jq .would_attach";

#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Attach the hooks, make a self-connection, and check that each method observes it
    #[arg(long)]
    live: bool,
}

/// The report, in the form of `--json`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct DoctorReport {
    version: &'static str,
    kernel: String,
    machine: String,
    checks: Vec<DoctorCheck>,
    hooks: Vec<HookReport>,
    would_attach: Vec<&'static str>,
    /// The methods to observe failed binds. The first one that is `ok` would be attached.
    binds: Vec<MethodReport>,
    /// How the descriptors of all processes would be read. If not `ok`, holders are looked up in `/proc`.
    descriptors: Vec<MethodReport>,
    /// How the network namespaces would be listed.
    namespaces: Vec<MethodReport>,
    limits: Vec<String>,
    /// What the daemon keeps at most.
    memory: MemoryReport,
    /// Result of `--live`. Null without that option.
    live: Option<LiveTest>,
    fit: bool,
}

#[derive(Debug, Serialize, JsonSchema)]
struct DoctorCheck {
    name: &'static str,
    ok: bool,
    finding: String,
    hint: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct HookReport {
    hook: &'static str,
    methods: Vec<MethodReport>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct MethodReport {
    method: &'static str,
    /// `ok`, `unsupported`, `refused`, `denied` or `broken`.
    verdict: &'static str,
    why: Option<String>,
    hint: Option<&'static str>,
    would_attach: bool,
}

/// Collects the report and prints it.
///
/// # Errors
/// If /proc cannot be read or stdout cannot be written.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    logger::init(0, false);
    let features = KernelFeatures::probe(false)?;
    let mut report = collect(&features);
    if args.live && report.fit {
        let live = live::test(&features).context("cannot test the hooks")?;
        report.fit = live.passed;
        report.live = Some(live);
    }
    let out = if args.json {
        let mut line = serde_json::to_vec(&report)?;
        line.push(b'\n');
        line
    } else {
        text(&report).into_bytes()
    };
    super::print(&out)?;
    Ok(if report.fit { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn collect(features: &KernelFeatures) -> DoctorReport {
    let probed = programs::probe_methods(features);
    let (outcomes, ring) = match probed {
        Ok(outcomes) => (outcomes, Ok(())),
        Err(error) => {
            let why = format!("{error:#}");
            let refused =
                |method| (method, features.check_method(method).and(Err(Refusal::Refused(why.clone()))));
            (Method::ALL.into_iter().map(refused).collect(), Err(why.clone()))
        }
    };
    let outcome = |method: Method| {
        let known = outcomes.iter().find(|(known, _)| *known == method);
        known.map_or(Err(Refusal::NotRequested), |(_, outcome)| outcome.clone())
    };
    let choice = choose(RequestedHooks::default(), outcome);
    let would_attach = |method| choice.live.iter().any(|(live, ())| *live == method);
    let hooks = Hook::ALL
        .into_iter()
        .map(|hook| HookReport {
            hook: hook.name(),
            methods: hook
                .candidates()
                .iter()
                .map(|method| {
                    let mut report = method_report(method.name(), outcome(*method), would_attach(*method));
                    let is_masked = report.verdict == "unsupported" && features.is_masked(*method);
                    report.hint = report.hint.or(is_masked.then_some(sysfs::MASKED_HINT));
                    report
                })
                .collect(),
        })
        .collect();
    let bind_outcomes = bind_programs::probe_methods(features);
    let binds = BindChoice::of(&bind_outcomes);
    DoctorReport {
        version: env!("CARGO_PKG_VERSION"),
        kernel: features.release.clone(),
        machine: features.machine.clone(),
        checks: checks(features, ring),
        hooks,
        would_attach: choice.live.iter().map(|(method, ())| method.name()).collect(),
        binds: bind_reports(bind_outcomes, binds.live),
        descriptors: vec![iterator_report(descriptors::NAME, descriptors::probe(features))],
        namespaces: vec![iterator_report(namespaces::NAME, namespaces::probe(features))],
        limits: features.limits().into_iter().chain(choice.limit()).chain(binds.limit()).collect(),
        memory: MemoryReport::new(),
        live: None,
        fit: !choice.live.is_empty(),
    }
}

fn bind_reports(
    outcomes: Vec<(BindMethod, Result<(), Refusal>)>,
    live: Option<BindMethod>,
) -> Vec<MethodReport> {
    let report =
        |(method, outcome): (BindMethod, _)| method_report(method.name(), outcome, live == Some(method));
    outcomes.into_iter().map(report).collect()
}

fn iterator_report(name: &'static str, outcome: Result<(), Refusal>) -> MethodReport {
    let is_ok = outcome.is_ok();
    method_report(name, outcome, is_ok)
}

fn method_report(method: &'static str, outcome: Result<(), Refusal>, would_attach: bool) -> MethodReport {
    let refusal = outcome.err();
    let hint = match &refusal {
        Some(Refusal::Refused(_)) => {
            Some("blocked by a policy of this host; no action needed if another method is attached")
        }
        Some(Refusal::Denied(_)) => Some("run as root, or with CAP_BPF and CAP_PERFMON in the ambient set"),
        Some(Refusal::Broken(_)) => Some("please report this: it is a bug in selfconn"),
        Some(Refusal::Unsupported(_) | Refusal::NotRequested) | None => None,
    };
    MethodReport {
        method,
        verdict: match &refusal {
            None => "ok",
            Some(Refusal::NotRequested) => "unsupported",
            Some(refusal) => refusal.kind(),
        },
        why: refusal.as_ref().and_then(Refusal::reason).map(str::to_owned),
        hint,
        would_attach,
    }
}

fn checks(features: &KernelFeatures, ring: Result<(), String>) -> Vec<DoctorCheck> {
    let check = |name, finding: Result<String, String>, hint: Option<&str>| DoctorCheck {
        name,
        ok: finding.is_ok(),
        hint: finding.as_ref().err().and(hint).map(str::to_owned),
        finding: finding.unwrap_or_else(|problem| problem),
    };
    let either = |ok: bool, finding: &str, problem: &str| {
        if ok { Ok(finding.to_owned()) } else { Err(problem.to_owned()) }
    };
    let btf = match (&features.btf, &features.offsets_missing) {
        (Ok(bytes), None) => Ok(format!("{} KiB, every offset found", bytes.len() / 1024)),
        (Ok(_), Some(why)) | (Err(why), _) => Err(why.clone()),
    };
    let get_btf = match features.is_btf_masked() {
        true => sysfs::MASKED_HINT,
        false => "use a kernel with CONFIG_DEBUG_INFO_BTF=y",
    };
    let btf_hint = format!("{get_btf}; without BTF, only perf works");
    let tracefs_hint = match features.tracefs {
        Tracefs::Absent => tracefs::is_masked().then_some(sysfs::MASKED_HINT),
        Tracefs::Empty => None,
        _ => Some("mount -t tracefs tracefs /sys/kernel/tracing"),
    };
    let tracefs = match features.tracefs {
        Tracefs::At(at) => Ok(format!("mounted on {at}")),
        Tracefs::Denied => Err("only root may read it, and CAP_DAC_READ_SEARCH".to_owned()),
        Tracefs::NotMounted => {
            let why = tracefs::why_missing("not mounted");
            if features.capabilities.contains(CapabilitySet::SYS_ADMIN) {
                Ok(format!("{why}; selfconn mounts it privately while it attaches"))
            } else {
                Err(why)
            }
        }
        Tracefs::Empty => Err(tracefs::EMPTY.to_owned()),
        Tracefs::Absent => Err(tracefs::why_missing("not in this kernel")),
    };
    let lockdown = features.lockdown.as_deref().unwrap_or("unknown (no /sys/kernel/security/lockdown)");
    let missing = capabilities::names(features.missing_capabilities()).join(", ");
    let remedy = sockets::can_destroy().and_then(|()| sockets::can_enter());
    let (guard, guard_hint) = guard_finding(found_guards::find().map_err(|error| error.to_string()));
    vec![
        check("object", object_finding(ARCH), Some("the other methods work on every architecture")),
        check("btf", btf, Some(&btf_hint)),
        check("tracefs", tracefs, tracefs_hint),
        check("lockdown", Ok(lockdown.to_owned()), None),
        check(
            "probe_read",
            either(
                features.probe_read,
                "bpf_probe_read_kernel may be called",
                "bpf_probe_read_kernel may not be called",
            ),
            Some("tp_btf and fentry do not need it"),
        ),
        check(
            "capabilities",
            either(missing.is_empty(), "CAP_BPF and CAP_PERFMON are present", &format!("missing: {missing}")),
            Some("run as root, or with these in the ambient set"),
        ),
        check(
            "ring_buffer",
            ring.map(|()| "can be created".to_owned()),
            Some("needs Linux 5.8 or newer and the capabilities above"),
        ),
        check(
            "remedy",
            remedy.map(|()| "sockets can be destroyed".to_owned()),
            Some("only --remedy and scan --destroy need it"),
        ),
        check("guard", guard, guard_hint.as_deref()),
        check(
            "exec",
            exec_group(),
            Some("without one, selfconn exec goes by the ancestors of each process, and has no --guard"),
        ),
        check(
            "pid_namespace",
            either(
                features.is_initial_pid_ns,
                "the initial one",
                "not the initial one: process names cannot be looked up",
            ),
            Some("run on the host, or with the host's pid namespace (hostPID, --pid=host)"),
        ),
    ]
}

/// The object, and the architectures for which it has kprobes. An error if this architecture is not among them.
fn object_finding(arch: &str) -> Result<String, String> {
    let architectures: Vec<_> = names::KPROBES.iter().map(|(arch, ..)| *arch).collect();
    let object = format!("{}, kprobes for {}", env!("SELFCONN_OBJECT"), architectures.join(" and "));
    match names::kprobe(arch, true) {
        Some(_) => Ok(object),
        None => Err(format!("{object}, none for {arch}")),
    }
}

/// Where `selfconn exec` would make a control group.
fn exec_group() -> Result<String, String> {
    let directory = cgroup::own_group().map_err(|error| error.to_string())?.directory;
    let parent = directory.display();
    match rustix::fs::access(&directory, Access::WRITE_OK) {
        Ok(()) => Ok(format!("a control group can be made in {parent}")),
        Err(error) => Err(format!("no control group can be made in {parent}: {error}")),
    }
}

/// What guards are in this network namespace, and what helps if one is left over.
fn guard_finding(found: Result<Vec<FoundGuard>, String>) -> (Result<String, String>, Option<String>) {
    let found = match found {
        Ok(found) => found,
        Err(why) => return (Err(format!("cannot be looked for: {why}")), None),
    };
    let left_over = found.iter().find_map(|guard| {
        guard.filter.as_ref().filter(|filter| filter.is_left_over).map(|filter| (guard, filter))
    });
    if let Some((FoundGuard { device, refuses, .. }, FoundFilter { pid, priority, .. })) = left_over {
        let verb = if *refuses { "refuses" } else { "looks for" };
        let problem = format!(
            "the daemon with pid {pid} has ended, and its filter on {device} still {verb} connects to themselves"
        );
        let hint = format!(
            "the next `selfconn run --guard` removes it; or run: tc filter del dev {device} egress pref {priority}"
        );
        return (Err(problem), Some(hint));
    }
    let text = |FoundGuard { device, refuses, filter }: &FoundGuard| {
        let mode = if *refuses { "refuses" } else { "dry run" };
        match filter {
            None => format!("on {device} (tcx, {mode})"),
            Some(FoundFilter { pid, .. }) => format!("on {device} (clsact, of pid {pid}, {mode})"),
        }
    };
    let finding = match &found[..] {
        [] => "none in this network namespace".to_owned(),
        found => found.iter().map(text).collect::<Vec<_>>().join(", "),
    };
    (Ok(finding), None)
}

fn text(report: &DoctorReport) -> String {
    let mut out =
        format!("selfconn {} on kernel {} ({})\n\n", report.version, escape(&report.kernel), report.machine);
    let mut row = |mark: &str, name: &str, finding: &str, hint: Option<&str>| {
        let _ = writeln!(out, "  {mark:<4} {name:<22} {}", escape(finding));
        if let Some(hint) = hint {
            let _ = writeln!(out, "       {:<22} hint: {}", "", escape(hint));
        }
    };
    for check in &report.checks {
        row(if check.ok { "ok" } else { "--" }, check.name, &check.finding, check.hint.as_deref());
    }
    let hooks = report.hooks.iter().map(|hook| (hook.hook, &hook.methods));
    let others = [
        ("failed binds", &report.binds),
        ("descriptors", &report.descriptors),
        ("network namespaces", &report.namespaces),
    ];
    for (name, methods) in hooks.chain(others) {
        let _ = writeln!(out, "\n  {name}");
        for method in methods {
            let mark = if method.would_attach { "*" } else { " " };
            let why = method.why.as_deref().map(|why| format!(": {}", escape(why))).unwrap_or_default();
            let _ = writeln!(out, "  {mark:<4} {:<22} {}{why}", method.method, method.verdict);
            if let Some(hint) = method.hint {
                let _ = writeln!(out, "       {:<22} hint: {hint}", "");
            }
        }
    }
    out.push_str(&report.memory.text());
    for limit in &report.limits {
        let _ = writeln!(out, "\n  limit: {limit}");
    }
    if let Some(live) = &report.live {
        let _ = writeln!(out, "\n  a self-connection was made");
        for LiveMethod { method, sees } in &live.methods {
            let _ = writeln!(
                out,
                "  {:<4} {method:<22} {}",
                if *sees { "ok" } else { "--" },
                match sees {
                    true => "observed it",
                    false => "did not observe it",
                }
            );
        }
        let (mark, arrived) = if live.record { ("ok", "arrived") } else { ("--", "did not arrive") };
        let _ = writeln!(out, "  {mark:<4} {:<22} {arrived} through the ring buffer", "its record");
    }
    let _ = if report.live.as_ref().is_some_and(|live| !live.passed) {
        writeln!(out, "\nNot fit to run: a self-connection was not observed.")
    } else if report.fit {
        writeln!(
            out,
            "\nFit to run: `selfconn run` would attach {} (marked *).",
            report.would_attach.join(" and ")
        )
    } else {
        writeln!(out, "\nNot fit to run: no hook can be attached.")
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_has_no_kprobe_for_an_unknown_architecture() {
        for arch in ["x86_64", "aarch64"] {
            assert!(object_finding(arch).unwrap().ends_with(", kprobes for x86_64 and aarch64"), "{arch}");
        }
        let problem = object_finding("riscv64").unwrap_err();
        assert!(problem.ends_with(", kprobes for x86_64 and aarch64, none for riscv64"), "{problem}");
    }
}

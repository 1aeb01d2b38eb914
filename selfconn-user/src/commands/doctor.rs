//! `selfconn doctor`: what this kernel offers, what would be attached and why, what is missing and the cure.
//!
//! Each method is really attached for a moment: only the kernel knows what it refuses.

use std::{fmt::Write as _, process::ExitCode};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::{
    kernel::{
        attach::{Hook, Method, Refusal, Wanted, choose},
        host::{CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, Host},
        tracefs::Tracefs,
        tracer::{
            self,
            binds::{self, BindMethod},
        },
    },
    logger,
    sink::text::escape,
    sockets,
};

mod live;

use live::{Live, Sees};

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn doctor              exit code 0: fit to run, 1: not
  selfconn doctor --live       and prove it by a self-connection of its own
  selfconn doctor --json | jq .would_attach";

/// Options of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One JSON object
    #[arg(long)]
    json: bool,
    /// Attach the hooks, make a self-connection, and see whether each method sees it
    #[arg(long)]
    live: bool,
}

/// What was found, as `--json` has it.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    kernel: String,
    machine: String,
    checks: Vec<Check>,
    hooks: Vec<HookReport>,
    would_attach: Vec<&'static str>,
    /// How failed binds could be seen; the first that is `ok` would be attached.
    binds: Vec<MethodReport>,
    limits: Vec<String>,
    /// With `--live`: what each method saw; else null.
    live: Option<Live>,
    fit: bool,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    finding: String,
    cure: Option<String>,
}

#[derive(Debug, Serialize)]
struct HookReport {
    hook: &'static str,
    methods: Vec<MethodReport>,
}

#[derive(Debug, Serialize)]
struct MethodReport {
    method: &'static str,
    /// `ok`, `unsupported`, `refused`, `denied` or `broken`.
    verdict: &'static str,
    why: Option<String>,
    cure: Option<&'static str>,
    would_attach: bool,
}

/// Looks, tries, and tells.
///
/// # Errors
/// When /proc can't be read or stdout not written.
pub fn run(args: &Args) -> Result<ExitCode> {
    logger::init(0, false);
    let host = Host::look(false)?;
    let mut report = examine(&host);
    if args.live && report.fit {
        let live = live::test(&host).context("the hooks can't be tested")?;
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

fn examine(host: &Host) -> Report {
    let rehearsal = tracer::rehearse(host);
    let (outcomes, ring) = match rehearsal {
        Ok(outcomes) => (outcomes, Ok(())),
        Err(error) => {
            let why = format!("{error:#}");
            let refused = |method| (method, host.offers(method).and(Err(Refusal::Refused(why.clone()))));
            (Method::ALL.into_iter().map(refused).collect(), Err(why.clone()))
        }
    };
    let outcome = |method: Method| {
        let known = outcomes.iter().find(|(known, _)| *known == method);
        known.map_or(Err(Refusal::NotWanted), |(_, outcome)| outcome.clone())
    };
    let choice = choose(Wanted::default(), outcome);
    let would_attach = |method| choice.live.iter().any(|(live, ())| *live == method);
    let hooks = Hook::ALL
        .into_iter()
        .map(|hook| HookReport {
            hook: hook.name(),
            methods: hook
                .candidates()
                .iter()
                .map(|method| method_report(method.name(), outcome(*method), would_attach(*method)))
                .collect(),
        })
        .collect();
    Report {
        version: env!("CARGO_PKG_VERSION"),
        kernel: host.release.clone(),
        machine: host.machine.clone(),
        checks: checks(host, ring),
        hooks,
        would_attach: choice.live.iter().map(|(method, ())| method.name()).collect(),
        binds: bind_reports(binds::rehearse(host)),
        limits: host.limits(),
        live: None,
        fit: !choice.live.is_empty(),
    }
}

fn bind_reports(outcomes: Vec<(BindMethod, Result<(), Refusal>)>) -> Vec<MethodReport> {
    let first = outcomes.iter().find(|(_, outcome)| outcome.is_ok()).map(|(method, _)| *method);
    let report =
        |(method, outcome): (BindMethod, _)| method_report(method.name(), outcome, first == Some(method));
    outcomes.into_iter().map(report).collect()
}

fn method_report(method: &'static str, outcome: Result<(), Refusal>, would_attach: bool) -> MethodReport {
    let (verdict, why, cure) = match outcome {
        Ok(()) => ("ok", None, None),
        Err(Refusal::Unsupported(why)) => ("unsupported", Some(why), None),
        Err(Refusal::Refused(why)) => {
            ("refused", Some(why), Some("a policy of this host decides; the other methods do the same work"))
        }
        Err(Refusal::Denied(why)) => {
            ("denied", Some(why), Some("run as root, or with CAP_BPF and CAP_PERFMON in the ambient set"))
        }
        Err(Refusal::Broken(why)) => {
            ("broken", Some(why), Some("please report this: it is a bug in selfconn"))
        }
        Err(Refusal::NotWanted) => ("unsupported", None, None),
    };
    MethodReport { method, verdict, why, cure, would_attach }
}

fn checks(host: &Host, ring: Result<(), String>) -> Vec<Check> {
    let check = |name, ok, finding: String, cure: Option<&str>| {
        let cure = if ok { None } else { cure.map(str::to_owned) };
        Check { name, ok, finding, cure }
    };
    let btf = match (&host.btf, &host.offsets_missing) {
        (Ok(bytes), None) => Ok(format!("{} KiB, every offset found", bytes.len() / 1024)),
        (Ok(_), Some(why)) | (Err(why), _) => Err(why.clone()),
    };
    let tracefs = match host.tracefs {
        Tracefs::At(at) => (true, format!("mounted on {at}")),
        Tracefs::NotMounted if host.capabilities.has(CAP_SYS_ADMIN) => {
            (true, "not mounted; selfconn mounts it for itself alone while it attaches".to_owned())
        }
        Tracefs::NotMounted => (false, "not mounted".to_owned()),
        Tracefs::Absent => (false, "not in this kernel".to_owned()),
    };
    let remedy = sockets::can_destroy().and_then(|()| sockets::can_enter());
    let lockdown = host.lockdown.clone().unwrap_or_else(|| "not told (securityfs is not mounted)".to_owned());
    let missing: Vec<_> = [CAP_BPF, CAP_PERFMON]
        .into_iter()
        .filter(|capability| !host.capabilities.has(*capability))
        .map(|capability| capability.name)
        .collect();
    vec![
        check(
            "btf",
            btf.is_ok(),
            btf.unwrap_or_else(|why| why),
            Some("a kernel with CONFIG_DEBUG_INFO_BTF=y; without it only perf works"),
        ),
        check("tracefs", tracefs.0, tracefs.1, Some("mount -t tracefs tracefs /sys/kernel/tracing")),
        check("lockdown", true, lockdown, None),
        check(
            "probe_read",
            host.probe_read,
            if host.probe_read {
                "bpf_probe_read_kernel may be called"
            } else {
                "bpf_probe_read_kernel may not be called"
            }
            .to_owned(),
            Some("tp_btf and fentry do without it"),
        ),
        check(
            "capabilities",
            missing.is_empty(),
            if missing.is_empty() {
                "CAP_BPF and CAP_PERFMON are there".to_owned()
            } else {
                format!("missing: {}", missing.join(", "))
            },
            Some("run as root, or with these in the ambient set"),
        ),
        check(
            "ring_buffer",
            ring.is_ok(),
            ring.map_or_else(|why| why, |()| "can be made".to_owned()),
            Some("a kernel from v5.8 on, and the capabilities above"),
        ),
        check(
            "remedy",
            remedy.is_ok(),
            remedy.as_ref().map_or_else(Clone::clone, |()| "sockets can be destroyed".to_owned()),
            Some("only --remedy and scan --destroy need it"),
        ),
        check(
            "pid_namespace",
            host.is_initial_pid_ns,
            if host.is_initial_pid_ns {
                "the initial one"
            } else {
                "not the initial one: names can't be looked up"
            }
            .to_owned(),
            Some("run on the host, or with the host's pid namespace (hostPID, --pid=host)"),
        ),
    ]
}

fn text(report: &Report) -> String {
    let mut out =
        format!("selfconn {} on kernel {} ({})\n\n", report.version, escape(&report.kernel), report.machine);
    let mut row = |mark: &str, name: &str, finding: &str, cure: Option<&str>| {
        let _ = writeln!(out, "  {mark:<4} {name:<22} {}", escape(finding));
        if let Some(cure) = cure {
            let _ = writeln!(out, "       {:<22} cure: {}", "", escape(cure));
        }
    };
    for check in &report.checks {
        row(if check.ok { "ok" } else { "--" }, check.name, &check.finding, check.cure.as_deref());
    }
    let hooks = report.hooks.iter().map(|hook| (hook.hook, &hook.methods));
    for (name, methods) in hooks.chain([("failed binds", &report.binds)]) {
        let _ = writeln!(out, "\n  {name}");
        for method in methods {
            let mark = if method.would_attach { "*" } else { " " };
            let why = method.why.as_deref().map(|why| format!(": {}", escape(why))).unwrap_or_default();
            let _ = writeln!(out, "  {mark:<4} {:<22} {}{why}", method.method, method.verdict);
            if let Some(cure) = method.cure {
                let _ = writeln!(out, "       {:<22} cure: {cure}", "");
            }
        }
    }
    for limit in &report.limits {
        let _ = writeln!(out, "\n  limit: {limit}");
    }
    if let Some(live) = &report.live {
        let _ = writeln!(out, "\n  a self-connection was made");
        for Sees { method, sees } in &live.methods {
            let _ = writeln!(
                out,
                "  {:<4} {method:<22} {}",
                if *sees { "ok" } else { "--" },
                match sees {
                    true => "saw it",
                    false => "did not see it",
                }
            );
        }
        let (mark, came) = if live.record { ("ok", "came") } else { ("--", "did not come") };
        let _ = writeln!(out, "  {mark:<4} {:<22} {came} through the ring buffer", "its record");
    }
    let _ = if report.live.as_ref().is_some_and(|live| !live.passed) {
        writeln!(out, "\nNot fit to run: a self-connection was not seen.")
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

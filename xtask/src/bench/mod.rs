//! `cargo xtask bench`: what selfconn costs, beside nothing, beside empty programs on the same hooks, and beside others
//! that watch TCP states. Measured by `selfconn-user/benches/cost`, which is built and run here; judged and shown here.

mod chart;
mod rows;
mod stats;
mod table;

use std::{fs, path::PathBuf, process::Command, time::Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use self::rows::{Samples, Verdict};
use crate::{
    daemon, environment, packages,
    progress::{self, say, seconds},
    vm,
    workspace::{Workspace, here, rewrite_section, write_if_changed},
};

/// How to measure, and what to show.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Fewer and shorter rounds: for development, for much stays undecided
    #[arg(long)]
    quick: bool,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
    /// Write the chart here, too
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Put the table into ARCHITECTURE.md and the chart into docs/cost.svg
    #[arg(long)]
    write: bool,
    /// Don't measure the pair of hooks in a virtual machine
    #[arg(long)]
    no_vm: bool,
    /// Only these: idle, transition, churn, latency, scan, flood
    only: Vec<String>,
}

/// What the helper says.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Line {
    Sample { name: String, value: f64 },
    Fact { name: String, text: String },
    Skipped { name: String, why: String },
    Step { name: String },
}

/// Measures, judges, shows. What is not met is an answer, and no error.
pub(crate) fn run(args: &Args, workspace: &Workspace) -> Result<()> {
    let began = Instant::now();
    ensure!(packages::may_install(), "network namespaces and BPF programs take root: sudo cargo xtask bench");
    set_up();
    daemon::build(workspace)?;
    let helper = build(workspace)?;
    let samples = measure(&helper, args, workspace)?;
    let mut rows = rows::of(&samples);
    // Of the machine that is measured, the guest takes all; so it comes last.
    const IN_GUEST: [&str; 2] = ["transition", "churn"];
    let mut in_guest = Samples::default();
    if !args.no_vm && (args.only.is_empty() || args.only.iter().any(|only| IN_GUEST.contains(&only.as_str())))
    {
        match vm::measure(workspace, &IN_GUEST) {
            Ok((kernel, output)) => {
                output.lines().for_each(|line| drop(take(line, &mut in_guest)));
                rows.extend(rows::of_guest(&kernel, &in_guest));
            }
            Err(error) => say(format!("the pair of hooks was not measured: {error:#}")),
        }
    }
    ensure!(!rows.is_empty(), "nothing was measured");
    let directory = workspace.target.join("bench");
    let machine = machine(&samples);
    let report = serde_json::json!({ "machine": machine, "facts": samples.facts, "rows": rows,
        "skipped": samples.skipped, "samples": samples.values, "samples_in_vm": in_guest.values });
    write_if_changed(&directory.join("report.json"), &serde_json::to_vec_pretty(&report)?)?;
    let table = table::markdown(&machine, &samples, &rows);
    write_if_changed(&directory.join("report.md"), table.as_bytes())?;
    let chart = chart::svg(&rows);
    write_if_changed(&directory.join("cost.svg"), chart.as_bytes())?;
    if args.write {
        let section = format!("\n{table}\n");
        rewrite_section(&workspace.root.join("ARCHITECTURE.md"), "cost", |_| section)?;
        write_if_changed(&workspace.root.join("docs/cost.svg"), chart.as_bytes())?;
    }
    if let Some(path) = &args.chart {
        write_if_changed(path, chart.as_bytes())?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{table}");
    }
    let count = |verdict| rows.iter().filter(|row| row.verdict == verdict).count();
    say(format!(
        "{} met, {} not met, {} undecided, {} skipped, in {}; {}",
        count(Verdict::Met),
        count(Verdict::NotMet),
        count(Verdict::Undecided),
        count(Verdict::Skipped),
        seconds(began.elapsed()),
        here(&directory)
    ));
    Ok(())
}

/// Installs the peers. One that can't be had is a row that is skipped, and no error.
fn set_up() {
    const PEERS: [&str; 3] = ["libbpf-tools", "bpftrace", "iproute2"];
    for package in PEERS.into_iter().filter(|package| !packages::is_installed(package)) {
        if let Err(error) = packages::install(&[package.to_owned()]) {
            say(format!("without {package}: {error:#}"));
        }
    }
}

/// Builds the helper; where it is.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    let mut cargo = environment::cargo();
    cargo
        .args(["bench", "--package", "selfconn-user", "--bench", "cost", "--no-run"])
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(&workspace.root);
    let output = cargo.output().context("run cargo bench")?;
    if !output.status.success() {
        bail!("building the measurement failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == "cost").then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    executable.context("cargo bench names no executable")
}

fn measure(helper: &PathBuf, args: &Args, workspace: &Workspace) -> Result<Samples> {
    /// In memory, so that no disk is measured.
    const MEMORY: &str = "/dev/shm";
    let scratch = PathBuf::from(MEMORY).join(format!("selfconn-bench-{}", std::process::id()));
    fs::create_dir(&scratch).with_context(|| format!("make {}", scratch.display()))?;
    let mut command = Command::new(helper);
    command.arg("measure").arg("--daemon").arg(workspace.daemon()).arg("--scratch").arg(&scratch);
    if args.quick {
        command.arg("--quick");
    }
    command.args(&args.only);
    let mut samples = Samples::default();
    let finished = progress::run_with("measuring", command, None, |line| take(line, &mut samples));
    let removed = fs::remove_dir_all(&scratch);
    finished?.must_have_succeeded("measuring")?;
    removed.with_context(|| format!("remove {}", scratch.display()))?;
    Ok(samples)
}

/// Takes a line of the helper's; what it is about. `None`: it is none of its own.
fn take(line: &str, samples: &mut Samples) -> Option<String> {
    match serde_json::from_str(line).ok()? {
        Line::Sample { name, value } => {
            samples.values.entry(name.clone()).or_default().push(value);
            Some(name)
        }
        Line::Fact { name, text } => {
            samples.facts.insert(name.clone(), text);
            Some(name)
        }
        Line::Skipped { name, why } => {
            samples.skipped.insert(name.clone(), why);
            Some(name)
        }
        Line::Step { name } => Some(name),
    }
}

/// What it was measured on.
fn machine(samples: &Samples) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let model = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| {
            Some(line.strip_prefix("model name")?.trim_start_matches([' ', '\t', ':']).to_owned())
        })
        .unwrap_or_else(|| "unknown".to_owned());
    let methods =
        samples.facts.get("methods").map_or(String::new(), |methods| format!(", {methods} attached"));
    format!("kernel {}, {cpus} CPUs ({model}){methods}", read("/proc/sys/kernel/osrelease"))
}

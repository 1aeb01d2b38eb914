//! `cargo xtask bench`: prepares the bench, `selfconn-user/benches/cost`, which measures, compares with the
//! targets, and prints. It is run on this host; before that in a virtual machine, because this host's kernel
//! may have only one hook.

use anyhow::{Result, bail};

use crate::{daemon, environment, packages, run::say, vm, workspace::Workspace};

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// Fewer and shorter rounds: for development, because many rows are then undecided
    #[arg(long)]
    quick: bool,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
    /// Write the table into docs/benchmarks.md, and the chart into docs/cost.svg
    #[arg(long)]
    write: bool,
    /// Don't measure in a virtual machine
    #[arg(long)]
    no_vm: bool,
    /// Only these groups: idle, transition, bind, churn, pairs, latency, scan, flood, exec, guard
    groups: Vec<String>,
}

/// The other tools, by package. Without one, its rows are skipped.
const PEERS: [&str; 3] = ["libbpf-tools", "bpftrace", "iproute2"];

/// The groups that need both hooks.
const GROUPS_IN_VM: [&str; 4] = ["transition", "bind", "churn", "pairs"];

/// Installs the other tools, builds, and runs the bench. A target that is not met is a result, and no error.
pub(crate) fn run(args: &BenchArgs, workspace: &Workspace) -> Result<()> {
    packages::must_be_root("network namespaces and BPF programs need root", "bench")?;
    for package in PEERS.into_iter().filter(|package| !packages::is_installed(package)) {
        if let Err(error) = packages::install(&[package]) {
            say(format!("without {package}: {error:#}"));
        }
    }
    daemon::build(workspace)?;
    let mut bench = environment::cargo();
    bench.args(["bench", "--quiet", "--package", "selfconn-user", "--bench", "cost", "--"]);
    bench.arg("--report").arg(workspace.target.join("bench"));
    let groups = GROUPS_IN_VM
        .into_iter()
        .filter(|group| args.groups.is_empty() || args.groups.iter().any(|named| named == group));
    let groups: Vec<_> = groups.collect();
    if !args.no_vm && !groups.is_empty() {
        match vm::measure(workspace, &groups) {
            Ok(samples) => {
                bench.arg("--vm-samples").arg(samples);
            }
            Err(error) => say(format!("not measured in a virtual machine: {error:#}")),
        }
    }
    for (is_set, option) in [(args.quick, "--quick"), (args.json, "--json"), (args.write, "--write")] {
        bench.args(is_set.then_some(option));
    }
    // Its output is ours: the table or the JSON object on stdout.
    let status = bench.args(&args.groups).current_dir(&workspace.root).status()?;
    if status.success() { Ok(()) } else { bail!("the bench failed: {status}") }
}

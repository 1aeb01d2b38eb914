//! `cargo xtask vm`: the live tests on other kernels, in virtual machines without an accelerator. A row is a kernel in
//! a variant, and a boot.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result};

use self::{
    bench::Bench,
    binaries::Binaries,
    kernel::Kernel,
    report::Report,
    stock::Stock,
    variant::{VARIANTS, Variant},
};
use crate::{
    build_ebpf,
    environment::is_in_path,
    packages,
    progress::{say, seconds},
    workspace::{Workspace, write_if_changed},
};

mod archive;
mod bench;
mod binaries;
mod boot;
mod facts;
mod initramfs;
mod kernel;
mod kernels;
mod measure;
mod plan;
mod report;
pub(crate) mod service;
mod sources;
mod stock;
mod variant;

pub(crate) use measure::measure;

/// What to run on what.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A kernel image, a kernel package, or a version such as 6.12; without it the newest 5.10, 6.1, 6.12, 6.18 and
    /// 7.x that Debian has
    #[arg(long, value_name = "PATH|VERSION")]
    pub(crate) kernel: Vec<String>,
    /// How to boot the kernels and what to run there; without it all; `rest` is for the oldest
    #[arg(long, value_name = "NAME", value_parser = VARIANTS.map(|variant| variant.name))]
    pub(crate) variant: Vec<String>,
    /// How many machines run beside each other
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) jobs: usize,
    /// How long a machine may take
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    pub(crate) deadline: u64,
    /// Set for the tests; SELFCONN_SCALE divides their counts, and is 10 unless set, but for the load on one CPU
    #[arg(long, value_name = "NAME=VALUE", value_parser = assignment)]
    pub(crate) env: Vec<(String, String)>,
    /// Arguments of the tests, such as a part of their names
    #[arg(last = true, value_name = "TEST-ARGS")]
    pub(crate) test_args: Vec<String>,
}

fn assignment(text: &str) -> Result<(String, String)> {
    let (name, value) = text.split_once('=').context("not NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// What it takes, and the packages it comes in.
const TOOLS: [(&str, &str); 4] =
    [(boot::QEMU, "qemu-system-x86"), ("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("xz", "xz-utils")];

/// Installs what is missing, or says how to.
fn set_up() -> Result<()> {
    let tools = TOOLS.into_iter().filter(|(tool, _)| !is_in_path(tool)).map(|(_, package)| package);
    let keyring = (!Path::new(archive::KEYRING).exists()).then_some("debian-archive-keyring");
    let missing: Vec<String> = tools.chain(keyring).map(str::to_owned).collect();
    if missing.is_empty() { Ok(()) } else { packages::install(&missing) }
}

/// Runs every row; those that did not pass are an error.
pub(crate) fn run(args: &Args, workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    set_up()?;
    let stock = Stock::get(&args.kernel, &directory(workspace))?;
    let variants = variant::asked_for(&args.variant);
    let rows: Vec<_> = variants
        .iter()
        .flat_map(|variant| stock.kernels.iter().map(|kernel| (kernel, *variant)))
        .filter(|(kernel, variant)| !variant.repeats_one_of(&variants, kernel))
        // Tests that somebody names are no rest of others.
        .filter(|(kernel, variant)| {
            !variant.at_oldest || (stock.is_oldest(kernel) && args.test_args.is_empty())
        })
        .collect();
    let report = boot(args, &rows, stock.skipped.clone(), workspace)?;
    // Of a row of some tests nobody knows what it would have been; one that did not pass leaves the last one that did.
    if args.test_args.is_empty() {
        kernels::update(&workspace.root.join("ARCHITECTURE.md"), &report.rows)?;
    }
    report.must_have_passed()?;
    say(format!("{} rows passed in {}", report.rows.len(), seconds(started.elapsed())));
    Ok(())
}

/// What `cargo xtask test` has time for: on the oldest kernel and the newest the tests that go by method, and on the
/// newest under the strictest lockdown, too. What of it can't be had here, and why; rows that did not pass are an
/// error.
pub(crate) fn subset(workspace: &Workspace) -> Result<Vec<String>> {
    let args = Args {
        kernel: SUBSET.map(str::to_owned).into(),
        variant: Vec::new(),
        jobs: 2,
        deadline: 600,
        env: Vec::new(),
        test_args: Vec::new(),
    };
    // An archive out of reach or a machine that can't install is no fault of what is tested.
    if let Err(error) = set_up() {
        return Ok(vec![format!("{error:#}")]);
    }
    let stock = Stock::whatever(&args.kernel, &directory(workspace));
    let skipped = stock.skipped.iter().map(|(kernel, why)| format!("kernel {kernel}: {why}")).collect();
    let as_they_come = stock.kernels.iter().map(|kernel| (kernel, &variant::QUICK));
    let locked = stock.kernels.last().map(|newest| (newest, &variant::STRICTEST));
    let rows: Vec<_> = as_they_come.chain(locked).collect();
    if !rows.is_empty() {
        boot(&args, &rows, stock.skipped.clone(), workspace)?.must_have_passed()?;
    }
    Ok(skipped)
}

/// The oldest series and the newest.
const SUBSET: [&str; 2] = ["5.10", "7"];

fn directory(workspace: &Workspace) -> PathBuf {
    workspace.target.join("vm")
}

/// Boots the rows, and reports on them.
fn boot(
    args: &Args,
    rows: &[(&Kernel, &Variant)],
    skipped: Vec<(String, String)>,
    workspace: &Workspace,
) -> Result<Report> {
    let directory = directory(workspace);
    build_ebpf::build(workspace)?;
    let binaries = Binaries::build(workspace, &directory.join("build"))?;
    let bench = Bench::new(&binaries, args, directory.join("logs"))?;
    let report = Report { rows: bench.run(rows)?, skipped };
    let verdicts = report.verdicts();
    println!("{verdicts}");
    let rendered = verdicts + &report.facts();
    write_if_changed(&directory.join("report.md"), rendered.as_bytes())?;
    write_if_changed(&directory.join("report.json"), &serde_json::to_vec_pretty(&report)?)?;
    Ok(report)
}

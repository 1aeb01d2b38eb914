//! `cargo xtask vm`: the live tests on other kernels, in virtual machines without an accelerator. A row is a kernel in
//! a variant, and a boot.

use std::{path::Path, time::Instant};

use anyhow::{Context as _, Result, ensure};

use self::{bench::Bench, binaries::Binaries, report::Report, stock::Stock, variant::VARIANTS};
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
mod plan;
mod report;
mod sources;
mod stock;
mod variant;

/// What to run on what.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A kernel image, a kernel package, or a version such as 6.12; without it the newest 5.10, 6.1, 6.12, 6.18 and
    /// 7.x that Debian has
    #[arg(long, value_name = "PATH|VERSION")]
    pub(crate) kernel: Vec<String>,
    /// How to boot the kernels; without it in every way
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
    let directory = workspace.target.join("vm");
    set_up()?;
    let stock = Stock::get(&args.kernel, &directory)?;
    build_ebpf::build(workspace)?;
    let binaries = Binaries::build(workspace, &directory.join("build"))?;
    let bench = Bench::new(&binaries, args, directory.join("logs"))?;
    say(format!("ready to boot after {}", seconds(started.elapsed())));

    let variants = variant::asked_for(&args.variant);
    let kernels = stock.kernels.iter();
    let rows: Vec<_> = variants
        .iter()
        .flat_map(|variant| kernels.clone().map(|kernel| (kernel, *variant)))
        .filter(|(kernel, variant)| !variant.repeats_one_of(&variants, kernel))
        .collect();
    let report = Report { rows: bench.run(&rows)?, skipped: stock.skipped };

    let verdicts = report.verdicts();
    println!("{verdicts}");
    let rendered = verdicts + &report.facts();
    write_if_changed(&directory.join("report.md"), rendered.as_bytes())?;
    write_if_changed(&directory.join("report.json"), &serde_json::to_vec_pretty(&report)?)?;
    let failed = report.rows.iter().filter(|row| !row.passed()).count();
    ensure!(failed == 0, "{failed} of {} rows did not pass", report.rows.len());
    say(format!("{} rows passed in {}", report.rows.len(), seconds(started.elapsed())));
    Ok(())
}

//! `cargo xtask soak`: the live test of that name, for as long as it is told, with what is released; and its report.

use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::{
    build_ebpf, environment, packages,
    progress::{self, say, seconds},
    workspace::{Workspace, rewrite_section},
};

/// How long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long the load lasts
    #[arg(long, value_name = "MINUTES", default_value_t = 30)]
    minutes: u64,
    /// Put the report into docs/soak.md
    #[arg(long)]
    write: bool,
}

/// `cargo xtask soak`.
pub(crate) fn run(args: &Args, workspace: &Workspace) -> Result<()> {
    if !packages::may_install() {
        bail!("the daemon needs root: run: sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo xtask soak");
    }
    build_ebpf::build(workspace)?;
    let mut build = environment::cargo();
    build.args(["test", "--release", "--package", "selfconn-user", "--test", "live", "--no-run"]);
    build.current_dir(&workspace.root);
    progress::must("building the daemon and its load", build)?;
    let mut test = environment::cargo();
    test.args(["test", "--release", "--package", "selfconn-user", "--test", "live", "--"]);
    test.args(["--ignored", "--exact", "soak::soak", "--nocapture"]).current_dir(&workspace.root);
    test.env("SELFCONN_SOAK_SECONDS", (args.minutes * 60).to_string());
    let began = Instant::now();
    let finished = progress::run(&format!("mixed load for {} minutes", args.minutes), test, None)?;
    let table = table(&finished.output);
    print!("{table}");
    if !finished.succeeded() {
        eprint!("{}", finished.output);
        bail!("the soak failed: what it said is above");
    }
    if table.is_empty() {
        bail!("the soak told nothing: is there a test soak::soak?");
    }
    say(format!("soak: passed, {}", seconds(began.elapsed())));
    if args.write {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let cpus = std::thread::available_parallelism().context("count the CPUs")?;
        let report = format!("\nOn Linux {kernel}, with {cpus} CPUs:\n\n{table}\n");
        rewrite_section(&workspace.root.join("docs/soak.md"), "soak", |_| report)?;
    }
    Ok(())
}

/// What the test reported, as rows; nothing if it did not come so far.
fn table(output: &str) -> String {
    let rows: String = output
        .lines()
        .filter_map(|line| line.split_once("REPORT ")?.1.split_once('='))
        .map(|(what, value)| format!("| {what} | {value} |\n"))
        .collect();
    if rows.is_empty() { rows } else { format!("| what | count |\n|---|---|\n{rows}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_test_reports_is_a_table() {
        let output = "running 1 test\ntest soak::soak ... REPORT seconds=60\nREPORT `closed`=7\nok\n";
        let rows = table(output);
        assert_eq!(rows, "| what | count |\n|---|---|\n| seconds | 60 |\n| `closed` | 7 |\n");
        assert_eq!(table("error: no such test\n"), "");
    }
}

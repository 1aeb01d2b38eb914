//! `cargo xtask fuzz`: the parsers and sinks under random bytes, each target for a bounded time, and what was tried.
//!
//! The targets are in `fuzz/`, outside the workspace, for they need sanitizers, which only an unstable compiler has.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    build_ebpf, environment, packages, progress,
    workspace::{Workspace, here},
};

/// What to fuzz, and for how long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only these targets; without any, all
    target: Vec<String>,
    /// How long each is run
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    seconds: u32,
}

/// What came of a target, in libFuzzer's words.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    /// Inputs tried.
    runs: u64,
    /// Places of the code that they reached.
    cover: u64,
    /// Inputs worth keeping.
    corpus: u64,
}

/// Runs the targets. A crash is an error that names the input.
pub(crate) fn run(args: &Args, workspace: &Workspace) -> Result<()> {
    let all = targets(workspace)?;
    if let Some(unknown) = args.target.iter().find(|name| !all.contains(name)) {
        bail!("there is no target {unknown}: there are {}", all.join(", "));
    }
    let wanted: Vec<_> =
        all.iter().filter(|name| args.target.is_empty() || args.target.contains(name)).collect();
    let tool = tool(workspace)?;
    build_ebpf::build(workspace)?;
    let mut failed = Vec::new();
    println!("| target | inputs tried | places reached | corpus |\n|---|---|---|---|");
    for name in wanted {
        // What it finds is kept below target; the seeds stay as they are.
        let found = workspace.target.join("fuzz/corpus").join(name);
        fs::create_dir_all(&found).with_context(|| format!("create {}", found.display()))?;
        let mut command = cargo_fuzz(workspace, &tool);
        command.args(["run", name]).arg(&found);
        let seeds = workspace.root.join("fuzz/corpus").join(name);
        if seeds.exists() {
            command.arg(seeds);
        }
        command.arg("--");
        command
            .arg(format!("-max_total_time={}", args.seconds))
            .args(["-print_final_stats=1", "-verbosity=1"]);
        let finished = progress::run(&format!("fuzzing {name}"), command, None)?;
        let Outcome { runs, cover, corpus } = outcome(&finished.output);
        println!("| {name} | {runs} | {cover} | {corpus} |");
        if !finished.succeeded() || runs == 0 {
            eprint!("{}", finished.output);
            failed.push(name.as_str());
        }
    }
    ensure!(
        failed.is_empty(),
        "failed: {}: what was found is above, and in fuzz/artifacts",
        failed.join(", ")
    );
    Ok(())
}

/// Every file in `fuzz/fuzz_targets` is one.
fn targets(workspace: &Workspace) -> Result<Vec<String>> {
    let directory = workspace.root.join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))?;
    let stem = |path: PathBuf| Some(path.file_stem()?.to_str()?.to_owned());
    let mut names: Vec<_> = entries.flatten().filter_map(|entry| stem(entry.path())).collect();
    names.sort_unstable();
    Ok(names)
}

/// cargo-fuzz, from the user's path or built once into the target directory; and the C++ compiler for libFuzzer.
fn tool(workspace: &Workspace) -> Result<PathBuf> {
    if !environment::is_in_path("c++") {
        packages::install(&["g++".to_owned()])?;
    }
    if environment::is_in_path("cargo-fuzz") {
        return Ok("cargo-fuzz".into());
    }
    let root = workspace.target.join("tools");
    let tool = root.join("bin/cargo-fuzz");
    if !tool.exists() {
        let mut cargo = environment::cargo();
        cargo.args(["install", "cargo-fuzz", "--locked", "--root"]).arg(&root);
        progress::must(&format!("building cargo-fuzz into {}", here(&root)), cargo)?;
    }
    Ok(tool)
}

fn cargo_fuzz(workspace: &Workspace, tool: &Path) -> Command {
    let mut command = environment::other(tool);
    // It starts the cargo it is told, and asks for unstable flags, which a stable compiler has as well.
    command.env("CARGO", environment::cargo().get_program()).env("RUSTC_BOOTSTRAP", "1");
    command.env("CARGO_TARGET_DIR", workspace.target.join("fuzz"));
    command.current_dir(workspace.root.join("fuzz"));
    command
}

/// Reads the last line of progress, and the statistics at the end.
fn outcome(output: &str) -> Outcome {
    let number = |text: Option<&str>| text.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let after = |line: &str, what: &str| {
        number(line.split_once(what).and_then(|(_, rest)| rest.split_whitespace().next()?.split('/').next()))
    };
    let progress = output.lines().rfind(|line| line.starts_with('#') && line.contains(" cov: "));
    let runs = output.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    Outcome {
        runs: number(runs),
        cover: progress.map_or(0, |line| after(line, " cov: ")),
        corpus: progress.map_or(0, |line| after(line, " corp: ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_libfuzzer_prints() {
        let output = "INFO: seed corpus: files: 3\n#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 30Mb\n\
            #4711\tNEW    cov: 120 ft: 301 corp: 42/812b lim: 8 exec/s: 9000 rss: 40Mb L: 3/8 MS: 1 CopyPart-\n\
            #9000\tDONE   cov: 121 ft: 302 corp: 43/820b lim: 90 exec/s: 9000 rss: 41Mb\n\
            Done 9000 runs in 1 second(s)\nstat::number_of_executed_units: 9000\n";
        assert_eq!(outcome(output), Outcome { runs: 9_000, cover: 121, corpus: 43 });
        assert_eq!(outcome("error: could not compile"), Outcome::default());
    }
}

//! Does what [`super::next`] asks for, step by step, until a Rust and a bpf-linker are ready.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, bail};

use super::{Linker, Llvm, Machine, Release, Rust, Step, next, probe};
use crate::{
    environment, packages,
    progress::{self, Finished, say},
    workspace::{Workspace, here},
};

/// For a download of some megabytes; a network that swallows packets would hold us for many minutes.
const RUSTUP_LIMIT: Duration = Duration::from_secs(90);

/// A Rust and a bpf-linker that fit, found or installed. `machine` keeps what was learned, for another call after one
/// of them failed.
pub(crate) fn ready(workspace: &Workspace, machine: &mut Machine) -> Result<(Rust, Linker)> {
    let needed: Release = match env!("CARGO_PKG_RUST_VERSION").parse() {
        Ok(release) => release,
        Err(()) => bail!("rust-version in Cargo.toml is no release"),
    };
    let mut done = Vec::new();
    loop {
        probe::refresh(machine, workspace);
        let step = match next(machine, needed) {
            Ok(step) => step,
            Err(refused) => bail!("{}", nothing_fits(machine, needed, &refused)),
        };
        if done.contains(&step) {
            bail!("{step:?} was done and changed nothing: please report this");
        }
        done.push(step.clone());
        match step {
            Step::Ready(rust, linker) => return Ok((rust, linker)),
            Step::AskApt => machine.apt = Some(probe::apt(false)),
            Step::AskLinkerCrate => machine.linker_crate = Some(probe::linker_crate()?),
            Step::UpdateApt => {
                // Who may not update them goes on with the lists as they are.
                if packages::may_install() {
                    packages::update()?;
                }
                machine.apt = Some(probe::apt(true));
            }
            Step::AddSource(toolchain) => {
                let finished = add_source(&toolchain)?;
                if !finished.succeeded() {
                    let why = format!("its rust-src can't be added: {}", finished.why());
                    say(format!("not {toolchain}: {why}"));
                    // A server that did not answer for one toolchain won't for the others.
                    let others = machine.rusts.iter().filter(|rust| finished.took_too_long() && !rust.source);
                    machine.failed.extend(others.map(|rust| (rust.name.clone(), why.clone())));
                    machine.failed.insert(toolchain, why);
                }
            }
            Step::Install(names) => packages::install(&names)?,
            Step::BuildLinker(llvm) => build_linker(workspace, machine, &llvm)?,
        }
    }
}

/// One line for a machine on which nothing can be made to fit.
fn nothing_fits(machine: &Machine, needed: Release, refused: &[String]) -> String {
    let cure = match &machine.apt {
        Some(Some(_)) if !packages::may_install() => {
            "run `sudo apt-get update` and try again, or as root".to_owned()
        }
        _ => "install rustup's nightly with rust-src, and a bpf-linker with its LLVM".to_owned(),
    };
    let refused = if refused.is_empty() { "there is no other Rust".to_owned() } else { refused.join("; ") };
    format!("no Rust of {needed} or newer can build the eBPF programs here: {refused}: {cure}")
}

fn add_source(toolchain: &str) -> Result<Finished> {
    let mut command = environment::plain("rustup");
    command.args(["component", "add", "rust-src", "--toolchain", toolchain]);
    // It would try again and again, and no answer is an answer, for there are other ways.
    command.env("RUSTUP_MAX_RETRIES", "1");
    progress::run(&format!("adding rust-src to {toolchain}"), command, Some(RUSTUP_LIMIT))
}

fn build_linker(workspace: &Workspace, machine: &Machine, llvm: &Llvm) -> Result<()> {
    let version =
        &machine.linker_crate.as_ref().context("bpf-linker's version is known before it is built")?.version;
    for linker in machine.linkers.iter().filter(|linker| !linker.ours) {
        if let Some(old) = linker.llvm.filter(|its| *its < llvm.major) {
            say(format!("not {}: its LLVM is {old}", linker.path.display()));
        }
    }
    let build_dir = workspace.target.join("bpf-linker/build");
    let root = probe::our_linker(workspace, llvm.major);
    let mut command = environment::cargo();
    // For this host, whatever the user builds for.
    for key in ["CARGO_BUILD_TARGET", "CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS"] {
        command.env_remove(key);
    }
    command
        .args(["install", "bpf-linker", "--locked", "--force", "--no-default-features", "--version", version])
        .args(["--features", &format!("llvm-{}", llvm.major)])
        .arg("--root")
        .arg(&root)
        .env("CARGO_TARGET_DIR", &build_dir)
        // LLVM does the work, and that is compiled already: optimising the rest takes a minute and saves half a second.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("LLVM_PREFIX", &llvm.prefix);
    let what = format!("building bpf-linker {version} with LLVM {} into {}", llvm.major, here(&root));
    progress::must(&what, command)?;
    // 150 MB that nobody needs again; if they can't be removed, they lie in target.
    let _ = fs::remove_dir_all(build_dir);
    Ok(())
}

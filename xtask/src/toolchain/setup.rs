//! Takes the steps of [`next_step`] until a Rust and a bpf-linker are ready.

use std::fs;

use anyhow::{Result, bail};

use super::{BPF_LINKER, Linker, Llvm, Machine, Rust, RustVersion, SetupStep, next_step, probe};
use crate::{
    environment, packages,
    run::{self, say},
    workspace::{Workspace, here},
};

/// Seconds for a download of some megabytes. Without a limit, a network that drops packets would stop us for
/// minutes.
const RUSTUP_TIMEOUT: &str = "90";

/// A Rust and a bpf-linker that fit, found or installed.
pub(crate) fn ready(workspace: &Workspace) -> Result<(Rust, Linker)> {
    let needed: RustVersion = match env!("CARGO_PKG_RUST_VERSION").parse() {
        Ok(version) => version,
        Err(()) => bail!("rust-version in Cargo.toml is no version"),
    };
    let mut machine = Machine::default();
    let (mut is_apt_known, mut is_updated, mut done) = (false, false, Vec::new());
    loop {
        machine.rusts = probe::rusts();
        machine.llvms = probe::llvms();
        machine.linkers = probe::linkers(workspace);
        let step = match next_step(&machine, needed) {
            Ok(SetupStep::Ready(rust, linker)) => return Ok((rust, linker)),
            // apt is asked only if something is missing, because it takes half a second.
            _ if !is_apt_known => {
                machine.apt = probe::apt();
                is_apt_known = true;
                continue;
            }
            Err(_) if !is_updated && packages::may_install() && environment::is_in_path("apt-get") => {
                packages::update();
                machine.apt = probe::apt();
                is_updated = true;
                continue;
            }
            Err(refused) => bail!("{}", nothing_fits(needed, &refused)),
            Ok(step) => step,
        };
        if done.contains(&step) {
            bail!("{step:?} was done and changed nothing: please report this");
        }
        done.push(step.clone());
        match step {
            SetupStep::AddSource(toolchain) => add_source(&mut machine, toolchain),
            SetupStep::Install(names) => {
                packages::install(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
            }
            SetupStep::BuildLinker(llvm) => build_linker(workspace, &llvm)?,
            SetupStep::Ready(..) => {}
        }
    }
}

/// One line for a machine on which no Rust can be used.
fn nothing_fits(needed: RustVersion, refused: &[String]) -> String {
    let hint = if environment::is_in_path("apt-get") && !packages::may_install() {
        "run `sudo apt-get update` and try again, or as root"
    } else {
        "install rustup's nightly with rust-src, and LLVM's development files"
    };
    format!("no Rust of {needed} or newer can build the eBPF programs here: {}: {hint}", refused.join("; "))
}

/// A failure is noted, because there may be another toolchain.
fn add_source(machine: &mut Machine, toolchain: String) {
    let mut command = environment::plain("timeout");
    command.args([RUSTUP_TIMEOUT, "rustup", "component", "add", "rust-src", "--toolchain", &toolchain]);
    command.env("RUSTUP_MAX_RETRIES", "1");
    if let Err(error) = run::step(&format!("adding rust-src to {toolchain}"), &mut command) {
        say(format!("{error:#}"));
        machine.failed.insert(toolchain, "its rust-src can't be added".to_owned());
    }
}

fn build_linker(workspace: &Workspace, llvm: &Llvm) -> Result<()> {
    let build_dir = workspace.target.join("bpf-linker/build");
    let root = probe::linker_directory(workspace, llvm.major);
    let mut cargo = environment::cargo();
    // The linker runs on this host, whatever the user builds for.
    for key in ["CARGO_BUILD_TARGET", "CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS"] {
        cargo.env_remove(key);
    }
    cargo
        .args(["install", "bpf-linker", "--quiet", "--locked", "--force", "--version", BPF_LINKER])
        .args(["--no-default-features", "--features", &format!("llvm-{}", llvm.major), "--root"])
        .arg(&root)
        .env("CARGO_TARGET_DIR", &build_dir)
        // LLVM does the work and is already compiled: optimising the rest takes a minute and saves half a
        // second.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("LLVM_PREFIX", &llvm.prefix);
    let what = format!("building bpf-linker {BPF_LINKER} with LLVM {} into {}", llvm.major, here(&root));
    run::step(&what, &mut cargo)?;
    // 150 MB that nobody needs again. If it can't be removed, it does no harm.
    let _ = fs::remove_dir_all(build_dir);
    Ok(())
}

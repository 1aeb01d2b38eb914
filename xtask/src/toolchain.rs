//! Chooses the Rust and the bpf-linker that build the eBPF programs. Pure: [`next_step`] takes what is known
//! of this machine and returns what to do next; `probe.rs` examines the machine, and `setup.rs` takes the
//! steps until [`SetupStep::Ready`].
//!
//! A Rust is usable if it is new enough and has the sources of its library, because `core` is compiled for
//! BPF from them. bpf-linker must have an LLVM at least as new as the compiler's, because it reads the
//! compiler's bitcode. The linker is always built by us, in one pinned version.

mod parse;
mod probe;
pub(crate) mod setup;

use std::{collections::HashMap, path::PathBuf};

pub(crate) use parse::RustVersion;

/// The bpf-linker that we build: MIT or Apache-2.0, from the registry.
pub(crate) const BPF_LINKER: &str = "0.13.0";

/// The LLVMs that this version of bpf-linker can be built with.
const LINKER_LLVMS: [u32; 3] = [21, 22, 23];

/// Where a compiler comes from, in the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RustOrigin {
    /// A nightly of rustup's, made to use unstable features.
    Nightly,
    /// Another toolchain of rustup's.
    Rustup,
    /// Most likely the distribution's.
    System,
}

/// A compiler with its cargo.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rust {
    pub(crate) origin: RustOrigin,
    /// The toolchain's name for rustup, else the path of rustc.
    pub(crate) name: String,
    /// The directory of `rustc` and `cargo`.
    pub(crate) bin: PathBuf,
    pub(crate) sysroot: PathBuf,
    pub(crate) version: RustVersion,
    pub(crate) llvm: u32,
    /// True if the sources of its library are there.
    pub(crate) has_source: bool,
}

/// A bpf-linker that was built by us and runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Linker {
    pub(crate) path: PathBuf,
    pub(crate) llvm: u32,
}

/// An installed LLVM with development files.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Llvm {
    pub(crate) major: u32,
    pub(crate) prefix: PathBuf,
}

/// What apt can install here.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct AptOffer {
    /// The newest Rust that comes with its sources.
    pub(crate) rust: Option<AptRust>,
    /// Each N for which there is a package `llvm-N-dev`.
    pub(crate) llvms: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AptRust {
    pub(crate) packages: [&'static str; 3],
    pub(crate) version: RustVersion,
    pub(crate) llvm: u32,
}

/// What is known of this machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Machine {
    pub(crate) rusts: Vec<Rust>,
    pub(crate) linkers: Vec<Linker>,
    pub(crate) llvms: Vec<Llvm>,
    /// Empty until apt is asked, and where there is no apt.
    pub(crate) apt: AptOffer,
    /// Toolchains to which rust-src could not be added, and why.
    pub(crate) failed: HashMap<String, String>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum SetupStep {
    /// `rustup component add rust-src` for this toolchain.
    AddSource(String),
    /// Install these packages.
    Install(Vec<String>),
    /// Build bpf-linker with this LLVM.
    BuildLinker(Llvm),
    /// Everything is there.
    Ready(Rust, Linker),
}

/// Relative costs of what is missing. A download is cheaper than a build or a package with its dependencies.
/// Where costs are equal, the order of [`RustOrigin`] decides.
mod cost {
    pub(super) const ADD_SOURCE: u32 = 10;
    pub(super) const BUILD_LINKER: u32 = 20;
    pub(super) const INSTALL: u32 = 30;
}

/// How to get a linker for one LLVM.
enum LinkerSource {
    Present(Linker),
    Build(Llvm),
    /// Install this package, then build.
    Install(String),
}

/// The next step of the cheapest way, or the reason against each candidate.
pub(crate) fn next_step(machine: &Machine, needed: RustVersion) -> Result<SetupStep, Vec<String>> {
    let mut refused = Vec::new();
    let mut best: Option<(u32, SetupStep)> = None;
    let mut rusts: Vec<&Rust> = machine.rusts.iter().collect();
    rusts.sort_by_key(|rust| rust.origin);
    let present = rusts.into_iter().map(|rust| (rust.name.clone(), step_with(machine, rust, needed)));
    let apt = ("the distribution's packages".to_owned(), step_with_apt(machine, needed));
    for (name, step) in present.chain([apt]) {
        match step {
            Ok((cost, step)) if best.as_ref().is_none_or(|(least, _)| cost < *least) => {
                best = Some((cost, step));
            }
            Ok(_) => {}
            Err(why) => refused.push(format!("{name}: {why}")),
        }
    }
    best.map(|(_, step)| step).ok_or(refused)
}

/// The cost and the next step with an installed compiler.
fn step_with(machine: &Machine, rust: &Rust, needed: RustVersion) -> Result<(u32, SetupStep), String> {
    if rust.version < needed {
        return Err(format!("{} is older than {needed}", rust.version));
    }
    if let Some(why) = machine.failed.get(&rust.name) {
        return Err(why.clone());
    }
    let (cost, linker) = linker_for(machine, rust.llvm)?;
    if !rust.has_source {
        if rust.origin == RustOrigin::System {
            return Err("the sources of its library are not there".to_owned());
        }
        return Ok((cost + cost::ADD_SOURCE, SetupStep::AddSource(rust.name.clone())));
    }
    let step = match linker {
        LinkerSource::Present(linker) => SetupStep::Ready(rust.clone(), linker),
        LinkerSource::Build(llvm) => SetupStep::BuildLinker(llvm),
        LinkerSource::Install(package) => SetupStep::Install(vec![package]),
    };
    Ok((cost, step))
}

/// The cost and the next step with the compiler that apt has.
fn step_with_apt(machine: &Machine, needed: RustVersion) -> Result<(u32, SetupStep), String> {
    let rust = machine.apt.rust.as_ref().ok_or("no Rust with its sources")?;
    if rust.version < needed {
        return Err(format!("{} {} is older than {needed}", rust.packages[0], rust.version));
    }
    let (cost, linker) = linker_for(machine, rust.llvm)?;
    let mut packages = rust.packages.map(str::to_owned).to_vec();
    if let LinkerSource::Install(llvm) = linker {
        packages.push(llvm);
    }
    Ok((cost + cost::INSTALL, SetupStep::Install(packages)))
}

/// The cost and the source of a bpf-linker that reads this LLVM's bitcode.
fn linker_for(machine: &Machine, llvm: u32) -> Result<(u32, LinkerSource), String> {
    let mut linkers = machine.linkers.iter().filter(|linker| linker.llvm >= llvm);
    if let Some(linker) = linkers.next() {
        return Ok((0, LinkerSource::Present(linker.clone())));
    }
    let is_usable = |major: u32| major >= llvm && LINKER_LLVMS.contains(&major);
    let installed = machine.llvms.iter().filter(|installed| is_usable(installed.major));
    if let Some(installed) = installed.min_by_key(|installed| installed.major) {
        return Ok((cost::BUILD_LINKER, LinkerSource::Build(installed.clone())));
    }
    let package = format!("llvm-{llvm}-dev");
    if let Some(major) = machine.apt.llvms.iter().copied().filter(|major| is_usable(*major)).min() {
        let source = LinkerSource::Install(format!("llvm-{major}-dev"));
        return Ok((cost::INSTALL + cost::BUILD_LINKER, source));
    }
    if LINKER_LLVMS.iter().all(|known| *known < llvm) {
        return Err(format!("it uses LLVM {llvm}, which is too new for bpf-linker {BPF_LINKER}"));
    }
    Err(format!("the development files of LLVM {llvm} to build bpf-linker with are missing ({package})"))
}

#[cfg(test)]
mod tests;

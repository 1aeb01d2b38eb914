//! Which Rust and which bpf-linker build the eBPF programs, and what to do next to have them. Pure: [`next`] takes
//! what is known of this machine; `probe.rs` finds that out and `setup.rs` does what is asked, until [`Step::Ready`].
//!
//! A Rust is fit when its release is new enough and its library's sources are there, for `core` is compiled for BPF
//! from them. A bpf-linker is fit for it when its LLVM is at least as new as the one that wrote the bitcode.

mod parse;
mod probe;
pub(crate) mod setup;

use std::{collections::HashMap, path::PathBuf};

pub(crate) use parse::Release;

/// Where a compiler comes from, in the order of our preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    /// rustup, and made to use unstable features.
    Nightly,
    /// rustup, any other.
    Rustup,
    /// Neither: the distribution's, most likely.
    System,
}

/// A compiler with its cargo.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rust {
    pub(crate) origin: Origin,
    /// For people, and for rustup.
    pub(crate) name: String,
    /// The directory of `rustc` and `cargo`.
    pub(crate) bin: PathBuf,
    pub(crate) sysroot: PathBuf,
    pub(crate) release: Release,
    pub(crate) llvm: u32,
    /// The sources of its library are there.
    pub(crate) source: bool,
}

/// A bpf-linker that runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Linker {
    pub(crate) path: PathBuf,
    /// As it calls itself.
    pub(crate) version: String,
    /// None: it does not tell, so the trial is the build.
    pub(crate) llvm: Option<u32>,
    /// Built by us.
    pub(crate) ours: bool,
}

/// LLVM with development files.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Llvm {
    pub(crate) major: u32,
    pub(crate) prefix: PathBuf,
}

/// What apt can install here.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Apt {
    /// Rust with its sources, the newest.
    pub(crate) rust: Option<AptRust>,
    /// `llvm-N-dev`.
    pub(crate) llvms: Vec<u32>,
    /// The package lists are of today.
    pub(crate) updated: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AptRust {
    pub(crate) packages: &'static [&'static str],
    pub(crate) release: Release,
    pub(crate) llvm: u32,
}

/// The bpf-linker that cargo can build.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LinkerCrate {
    pub(crate) version: String,
    pub(crate) llvms: Vec<u32>,
}

/// What is known of this machine. What costs time to find out comes when [`next`] asks for it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Machine {
    pub(crate) rusts: Vec<Rust>,
    pub(crate) linkers: Vec<Linker>,
    pub(crate) llvms: Vec<Llvm>,
    /// None: not asked yet. Some(None): this is no Debian-like system.
    pub(crate) apt: Option<Option<Apt>>,
    /// None: not asked yet.
    pub(crate) linker_crate: Option<LinkerCrate>,
    /// By a Rust's name or a linker's path: what was tried and why it failed.
    pub(crate) failed: HashMap<String, String>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    /// Find out [`Machine::apt`].
    AskApt,
    /// Find out [`Machine::linker_crate`].
    AskLinkerCrate,
    /// Fetch apt's package lists: nothing is good enough with those at hand.
    UpdateApt,
    /// `rustup component add rust-src` for this toolchain.
    AddSource(String),
    /// Install these packages.
    Install(Vec<String>),
    /// Build bpf-linker against this LLVM.
    BuildLinker(Llvm),
    /// All is there.
    Ready(Rust, Linker),
}

/// What one way still costs, to compare ways: what is there is free, and a download beats a package with its
/// dependencies and a build. Equal costs leave the order of [`Origin`].
mod cost {
    pub(super) const ADD_SOURCE: u32 = 10;
    pub(super) const BUILD_LINKER: u32 = 20;
    pub(super) const INSTALL: u32 = 30;
}

/// How a linker for one LLVM is had.
enum LinkerWay {
    Use(Linker),
    Build(Llvm),
    Install(u32),
    AskApt,
    AskCrate,
}

/// Chooses the way that takes the least, and says its next step; or why there is none, a reason for each candidate.
pub(crate) fn next(machine: &Machine, needed: Release) -> Result<Step, Vec<String>> {
    let mut refused = Vec::new();
    let mut best: Option<(u32, Step)> = None;
    let mut offer = |cost: u32, step: Step| {
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, step));
        }
    };

    let mut rusts: Vec<&Rust> = machine.rusts.iter().collect();
    rusts.sort_by_key(|rust| rust.origin);
    for rust in rusts {
        match step_with(machine, rust, needed) {
            Ok((cost, step)) => offer(cost, step),
            Err(why) => refused.push(format!("{}: {why}", rust.name)),
        }
    }
    match step_with_apts_rust(machine, needed) {
        Some(Ok((cost, step))) => offer(cost, step),
        Some(Err(why)) => refused.push(format!("the distribution's packages: {why}")),
        None => {}
    }
    match (best, &machine.apt) {
        (Some((_, step)), _) => Ok(step),
        (None, Some(Some(apt))) if !apt.updated => Ok(Step::UpdateApt),
        (None, _) => Err(refused),
    }
}

/// The next step with a compiler that is there.
fn step_with(machine: &Machine, rust: &Rust, needed: Release) -> Result<(u32, Step), String> {
    if rust.release < needed {
        return Err(format!("{} is older than {needed}", rust.release));
    }
    if let Some(why) = machine.failed.get(&rust.name) {
        return Err(why.clone());
    }
    let (mut cost, linker) = linker_for(machine, rust.llvm)?;
    if !rust.source {
        if rust.origin == Origin::System {
            return Err("the sources of its library are not there".to_owned());
        }
        cost += cost::ADD_SOURCE;
    }
    let step = match linker {
        // Not before it is known that this way leads anywhere.
        LinkerWay::AskApt => Step::AskApt,
        LinkerWay::AskCrate => Step::AskLinkerCrate,
        _ if !rust.source => Step::AddSource(rust.name.clone()),
        LinkerWay::Use(linker) => Step::Ready(rust.clone(), linker),
        LinkerWay::Build(llvm) => Step::BuildLinker(llvm),
        LinkerWay::Install(llvm) => Step::Install(vec![llvm_package(llvm)]),
    };
    Ok((cost, step))
}

/// The next step with a compiler that apt has. None: this system has no apt.
fn step_with_apts_rust(machine: &Machine, needed: Release) -> Option<Result<(u32, Step), String>> {
    // Not asked yet: as good as it can be, which is to install all of it.
    let Some(apt) = &machine.apt else { return Some(Ok((2 * cost::INSTALL, Step::AskApt))) };
    let Some(rust) = &apt.as_ref()?.rust else { return Some(Err("no Rust with its sources".to_owned())) };
    if rust.release < needed {
        return Some(Err(format!("{} {} is older than {needed}", rust.packages[0], rust.release)));
    }
    Some(linker_for(machine, rust.llvm).map(|(cost, linker)| {
        let mut packages: Vec<String> = rust.packages.iter().map(ToString::to_string).collect();
        let step = match linker {
            LinkerWay::AskApt => Step::AskApt,
            LinkerWay::AskCrate => Step::AskLinkerCrate,
            LinkerWay::Use(_) | LinkerWay::Build(_) => Step::Install(packages),
            LinkerWay::Install(llvm) => {
                packages.push(llvm_package(llvm));
                Step::Install(packages)
            }
        };
        (cost + cost::INSTALL, step)
    }))
}

/// How to come by a bpf-linker that reads what this LLVM writes, and the cost.
fn linker_for(machine: &Machine, llvm: u32) -> Result<(u32, LinkerWay), String> {
    let fit = |linker: &&Linker| {
        linker.llvm.is_none_or(|its| its >= llvm)
            && !machine.failed.contains_key(&linker.path.display().to_string())
    };
    // Ours first: another one may tell nothing of its LLVM and fail at the end of the build, each time.
    let linkers = || machine.linkers.iter().filter(fit);
    if let Some(linker) = linkers().find(|linker| linker.ours).or_else(|| linkers().next()) {
        return Ok((0, LinkerWay::Use(linker.clone())));
    }
    let offered = |major: u32| match &machine.linker_crate {
        None => major >= llvm,
        Some(offer) => major >= llvm && offer.llvms.contains(&major),
    };
    let present =
        machine.llvms.iter().filter(|present| offered(present.major)).min_by_key(|present| present.major);
    if let Some(present) = present {
        let way = if machine.linker_crate.is_none() {
            LinkerWay::AskCrate
        } else {
            LinkerWay::Build(present.clone())
        };
        return Ok((cost::BUILD_LINKER, way));
    }
    let cost = cost::INSTALL + cost::BUILD_LINKER;
    let Some(apt) = &machine.apt else { return Ok((cost, LinkerWay::AskApt)) };
    let installable = apt.iter().flat_map(|apt| &apt.llvms).copied().filter(|major| offered(*major)).min();
    match (installable, &machine.linker_crate) {
        (Some(_), None) => Ok((cost, LinkerWay::AskCrate)),
        (Some(llvm), Some(_)) => Ok((cost, LinkerWay::Install(llvm))),
        (None, Some(offer)) if !offer.llvms.iter().any(|offered| *offered >= llvm) => {
            let llvms: Vec<_> = offer.llvms.iter().map(u32::to_string).collect();
            let llvms = llvms.join(", ");
            Err(format!("it uses LLVM {llvm}, and bpf-linker {} knows only LLVM {llvms}", offer.version))
        }
        (None, _) => Err(format!(
            "no bpf-linker with LLVM {llvm} or newer, nor that LLVM's development files to build one ({})",
            llvm_package(llvm)
        )),
    }
}

/// The development files of an LLVM on Debian and its kin. What else bpf-linker links comes with them.
fn llvm_package(major: u32) -> String {
    format!("llvm-{major}-dev")
}

#[cfg(test)]
mod tests;

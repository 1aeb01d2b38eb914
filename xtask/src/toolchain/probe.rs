//! Asks this machine what it has. What is asked at each start takes well below a second in all.

use std::{
    collections::HashMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{Apt, AptRust, Linker, LinkerCrate, Llvm, Machine, Origin, Release, Rust, parse};
use crate::{environment, progress::say, workspace::Workspace};

/// Debian's packages of Rust: the compiler, cargo, the library's sources. `-web` are the newer ones it keeps for its
/// browsers.
const APT_RUSTS: [&[&str]; 2] =
    [&["rustc-web", "cargo-web", "rust-web-src"], &["rustc", "cargo", "rust-src"]];

/// Finds what changes with each step.
pub(super) fn refresh(machine: &mut Machine, workspace: &Workspace) {
    machine.rusts = rusts();
    machine.llvms = llvms();
    machine.linkers = linkers(workspace, &mut machine.failed);
}

/// rustup's toolchains, and what else is in PATH.
fn rusts() -> Vec<Rust> {
    let listed = ask(environment::plain("rustup").args(["toolchain", "list", "-v"])).unwrap_or_default();
    let mut rusts: Vec<Rust> = parse::rustup_toolchains(&listed)
        .into_iter()
        .filter_map(|(name, path)| rust(&Path::new(path).join("bin"), Some(name)))
        .collect();
    let mut dirs: Vec<PathBuf> = path_dirs();
    // Where a distribution has its own, also when PATH was cut down to rustup's.
    dirs.push("/usr/bin".into());
    dirs.dedup();
    for dir in dirs {
        // rustup's stand-ins live beside it, or are links to it.
        let real = fs::canonicalize(dir.join("rustc"));
        let rustups = dir.join("rustup").exists() || real.is_ok_and(|real| real.ends_with("rustup"));
        if rustups {
            continue;
        }
        if let Some(rust) = rust(&dir, None)
            && rusts.iter().all(|known| known.sysroot != rust.sysroot)
        {
            rusts.push(rust);
        }
    }
    rusts
}

fn rust(bin: &Path, rustups: Option<&str>) -> Option<Rust> {
    let rustc = bin.join("rustc");
    if !rustc.exists() || !bin.join("cargo").exists() {
        return None;
    }
    let version = ask(environment::plain(&rustc).arg("-vV"))?;
    let (release, llvm) = parse::rustc(&version)?;
    let sysroot: PathBuf = ask(environment::plain(&rustc).args(["--print", "sysroot"]))?.trim().into();
    let origin = match rustups {
        Some(_) if version.contains("-nightly") => Origin::Nightly,
        Some(_) => Origin::Rustup,
        None => Origin::System,
    };
    // cargo's build-std resolves by this lock file, so it proves more than the sources of core do.
    let source = library(&sysroot).join("Cargo.lock").exists();
    let name = rustups.map_or_else(|| rustc.display().to_string(), ToOwned::to_owned);
    Some(Rust { origin, name, bin: bin.to_owned(), sysroot, release, llvm, source })
}

/// Where rustc and cargo look for the library's sources.
pub(crate) fn library(sysroot: &Path) -> PathBuf {
    sysroot.join("lib/rustlib/src/rust/library")
}

/// Where we put a bpf-linker for this LLVM.
pub(super) fn our_linker(workspace: &Workspace, llvm: u32) -> PathBuf {
    workspace.target.join(format!("bpf-linker/llvm-{llvm}"))
}

fn linkers(workspace: &Workspace, failed: &mut HashMap<String, String>) -> Vec<Linker> {
    let ours = numbered(&workspace.target.join("bpf-linker"), "llvm-").into_iter();
    let mut linkers: Vec<Linker> = ours
        .filter_map(|(llvm, dir)| {
            let path = dir.join("bin/bpf-linker");
            let version = linker_version(&path).ok()?;
            Some(Linker { path, version, llvm: Some(llvm), ours: true })
        })
        .collect();
    if let Some(path) = path_dirs().into_iter().map(|dir| dir.join("bpf-linker")).find(|path| path.exists()) {
        match linker_version(&path) {
            Ok(version) => {
                let llvm =
                    ask(environment::plain("ldd").arg(&path)).and_then(|libs| parse::linked_llvm(&libs));
                linkers.push(Linker { path, version, llvm, ours: false });
            }
            Err(why) => {
                // Said once, however often we look.
                failed.entry(path.display().to_string()).or_insert_with_key(|path| {
                    say(format!("not {path}: it does not run: {why:#}"));
                    "does not run".to_owned()
                });
            }
        }
    }
    linkers
}

fn linker_version(path: &Path) -> Result<String> {
    let output = environment::plain(path).arg("--version").output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{}", said.lines().next().map_or_else(|| output.status.to_string(), ToOwned::to_owned));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().trim_start_matches("bpf-linker ").to_owned())
}

/// LLVMs that something can be linked with: Debian's, each in a directory of its own, and the one of `llvm-config`.
fn llvms() -> Vec<Llvm> {
    let mut llvms: Vec<Llvm> = numbered(Path::new("/usr/lib"), "llvm-")
        .into_iter()
        .map(|(major, prefix)| Llvm { major, prefix })
        .collect();
    let config = |flag| ask(environment::plain("llvm-config").arg(flag));
    if let (Some(version), Some(prefix)) = (config("--version"), config("--prefix"))
        && let Some(major) = version.split('.').next().and_then(|major| major.trim().parse().ok())
        && llvms.iter().all(|known| known.major != major)
    {
        llvms.push(Llvm { major, prefix: prefix.trim().into() });
    }
    llvms.retain(|llvm| ["lib", "lib64"].iter().any(|lib| llvm.prefix.join(lib).join("libLLVM.so").exists()));
    llvms
}

/// What apt offers, by the package lists at hand.
pub(super) fn apt(updated: bool) -> Option<Apt> {
    let names = APT_RUSTS.concat();
    let policy = ask(environment::plain("apt-cache").arg("policy").args(names))?;
    let candidates = parse::apt_candidates(&policy);
    let version =
        |name: &str| candidates.iter().find(|(candidate, _)| *candidate == name).map(|(_, version)| *version);
    let rust = APT_RUSTS
        .into_iter()
        .filter(|packages| packages.iter().all(|package| version(package).is_some()))
        .filter_map(|packages| Some((packages, version(packages[0])?.parse::<Release>().ok()?)))
        .max_by_key(|(_, release)| *release)
        .and_then(|(packages, release)| {
            Some(AptRust { packages, release, llvm: llvm_of_package(packages[0])? })
        });
    let llvms = ask(environment::plain("apt-cache").args(["pkgnames", "llvm-"])).unwrap_or_default();
    Some(Apt { rust, llvms: parse::llvm_dev_packages(&llvms), updated })
}

/// The LLVM that a packaged compiler depends on.
fn llvm_of_package(rustc: &str) -> Option<u32> {
    const NO: [&str; 6] = [
        "--no-recommends",
        "--no-suggests",
        "--no-conflicts",
        "--no-breaks",
        "--no-replaces",
        "--no-enhances",
    ];
    let output = ask(environment::plain("apt-cache").args(["depends", "--recurse"]).args(NO).arg(rustc))?;
    parse::llvm_library(&output)
}

/// The bpf-linker that cargo would install.
pub(super) fn linker_crate() -> Result<LinkerCrate> {
    let output = environment::cargo()
        .args(["info", "bpf-linker", "--color", "never"])
        .output()
        .context("run cargo info bpf-linker")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let Some((version, llvms)) = parse::linker_crate(&said).filter(|_| output.status.success()) else {
        let why = String::from_utf8_lossy(&output.stderr);
        let why =
            why.lines().find(|line| line.starts_with("error")).unwrap_or("it says nothing we understand");
        bail!("cargo info bpf-linker: {why}: check the network, or install a bpf-linker into PATH");
    };
    Ok(LinkerCrate { version, llvms })
}

/// Entries of a directory that are called by a prefix and a number.
fn numbered(dir: &Path, prefix: &str) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            Some((entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?, entry.path()))
        })
        .collect();
    found.sort();
    found
}

fn path_dirs() -> Vec<PathBuf> {
    env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default()
}

/// What a program says, if it is there and succeeds.
fn ask(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

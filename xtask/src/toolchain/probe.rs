//! Examines this machine: installed compilers, linkers and LLVMs, and what apt offers. It changes nothing.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{AptOffer, AptRust, BPF_LINKER, Linker, Llvm, Rust, RustOrigin, RustVersion, parse};
use crate::{environment, run, workspace::Workspace};

/// Debian's packages of Rust: the compiler, cargo, the library's sources. `-web` are the newer ones that
/// Debian has for its browsers.
const APT_RUSTS: [[&str; 3]; 2] =
    [["rustc-web", "cargo-web", "rust-web-src"], ["rustc", "cargo", "rust-src"]];

/// The toolchains of rustup, and those in PATH.
pub(super) fn rusts() -> Vec<Rust> {
    let listed = ask(environment::plain("rustup").args(["toolchain", "list", "-v"])).unwrap_or_default();
    let mut rusts: Vec<Rust> = parse::rustup_toolchains(&listed)
        .into_iter()
        .filter_map(|(name, path)| rust(&Path::new(path).join("bin"), Some(name)))
        .collect();
    let path = env::var_os("PATH").unwrap_or_default();
    // The distribution's compiler is in /usr/bin, which may be missing in PATH.
    for dir in env::split_paths(&path).chain([PathBuf::from("/usr/bin")]) {
        // The proxies of rustup are beside it, or are links to it.
        let real = fs::canonicalize(dir.join("rustc"));
        if dir.join("rustup").exists() || real.is_ok_and(|real| real.ends_with("rustup")) {
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

fn rust(bin: &Path, rustup_name: Option<&str>) -> Option<Rust> {
    let rustc = bin.join("rustc");
    if !rustc.exists() || !bin.join("cargo").exists() {
        return None;
    }
    let printed = ask(environment::plain(&rustc).arg("-vV"))?;
    let (version, llvm) = parse::rustc(&printed)?;
    let sysroot: PathBuf = ask(environment::plain(&rustc).args(["--print", "sysroot"]))?.trim().into();
    let origin = match rustup_name {
        Some(_) if printed.contains("-nightly") => RustOrigin::Nightly,
        Some(_) => RustOrigin::Rustup,
        None => RustOrigin::System,
    };
    // cargo's build-std reads this lock file, so it is a better sign than the sources of core.
    let has_source = sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").exists();
    let name = rustup_name.map_or_else(|| rustc.display().to_string(), ToOwned::to_owned);
    Some(Rust { origin, name, bin: bin.to_owned(), sysroot, version, llvm, has_source })
}

/// The directory of our linker for this LLVM.
pub(super) fn linker_directory(workspace: &Workspace, llvm: u32) -> PathBuf {
    workspace.target.join(format!("bpf-linker/llvm-{llvm}"))
}

/// Our linkers of the pinned version.
pub(super) fn linkers(workspace: &Workspace) -> Vec<Linker> {
    let linker = |(llvm, directory): (u32, PathBuf)| {
        let path = directory.join("bin/bpf-linker");
        let version = ask(environment::plain(&path).arg("--version"))?;
        (version.trim() == format!("bpf-linker {BPF_LINKER}")).then_some(Linker { path, llvm })
    };
    numbered(&workspace.target.join("bpf-linker")).into_iter().filter_map(linker).collect()
}

/// LLVMs to link with: Debian's, each in a directory of its own, and the one of `llvm-config`.
pub(super) fn llvms() -> Vec<Llvm> {
    let debians = numbered(Path::new("/usr/lib")).into_iter();
    let mut llvms: Vec<Llvm> = debians.map(|(major, prefix)| Llvm { major, prefix }).collect();
    let config = |flag| ask(environment::plain("llvm-config").arg(flag));
    if let (Some(version), Some(prefix)) = (config("--version"), config("--prefix"))
        && let Some(major) = version.split('.').next().and_then(|major| major.trim().parse().ok())
    {
        llvms.push(Llvm { major, prefix: prefix.trim().into() });
    }
    llvms.retain(|llvm| ["lib", "lib64"].iter().any(|lib| llvm.prefix.join(lib).join("libLLVM.so").exists()));
    llvms
}

/// What apt offers, by the package lists on this machine.
pub(super) fn apt() -> AptOffer {
    let policy = ask(environment::plain("apt-cache").arg("policy").args(APT_RUSTS.as_flattened()));
    let policy = policy.unwrap_or_default();
    let candidates = parse::apt_candidates(&policy);
    let version =
        |name: &str| candidates.iter().find(|(candidate, _)| *candidate == name).map(|(_, version)| *version);
    let rust = APT_RUSTS
        .into_iter()
        .filter(|packages| packages.iter().all(|package| version(package).is_some()))
        .filter_map(|packages| Some((packages, version(packages[0])?.parse::<RustVersion>().ok()?)))
        .max_by_key(|(_, version)| *version)
        .and_then(|(packages, version)| {
            Some(AptRust { packages, version, llvm: llvm_of_package(packages[0])? })
        });
    let llvms = ask(environment::plain("apt-cache").args(["pkgnames", "llvm-"])).unwrap_or_default();
    AptOffer { rust, llvms: parse::llvm_dev_packages(&llvms) }
}

/// The LLVM that a packaged compiler depends on.
fn llvm_of_package(rustc: &str) -> Option<u32> {
    let mut depends = environment::plain("apt-cache");
    depends.args(["depends", "--recurse", "--important", rustc]);
    parse::llvm_library(&ask(&mut depends)?)
}

/// The entries `llvm-N` of a directory, the lowest N first.
fn numbered(dir: &Path) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let number = |entry: fs::DirEntry| {
        Some((entry.file_name().to_str()?.strip_prefix("llvm-")?.parse().ok()?, entry.path()))
    };
    let mut found: Vec<_> = entries.filter_map(number).collect();
    found.sort();
    found
}

/// The output of a program, if it is there and succeeds.
fn ask(command: &mut Command) -> Option<String> {
    run::output(command).ok()
}

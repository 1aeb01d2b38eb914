//! Builds the released binary, and its man pages and completions.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use object::{
    Endianness,
    elf::{FileHeader64, PT_INTERP},
    read::elf::{FileHeader as _, ProgramHeader as _},
};

use super::tree::Tree;
use crate::{
    architecture::{self, Architecture},
    environment::{self, plain},
    remap, run,
    workspace::Workspace,
};

/// Compiler options that link with what Rust brings along, so that no linker or library of another architecture is
/// needed.
const LINKING: [&str; 3] = ["-Ctarget-feature=+crt-static", "-Clinker=rust-lld", "-Clink-self-contained=yes"];

/// Builds the release binary, static and without paths of this machine. `target_dir`: for it alone, because its options
/// rebuild everything.
pub(crate) fn build(
    workspace: &Workspace,
    architecture: &Architecture,
    target_dir: &Path,
) -> Result<PathBuf> {
    let target = architecture.release_target();
    architecture::add_target(&target)?;
    let mut flags = LINKING.map(ToOwned::to_owned).to_vec();
    let sysroot = PathBuf::from(ask_rustc(&["--print", "sysroot"])?.trim());
    let library = remap::name_of_library(&ask_rustc(&["--version", "--verbose"])?)?;
    flags.extend(remap::flags(&workspace.root, &sysroot, &library)?);
    let mut cargo = environment::cargo();
    cargo
        .args(["build", "--release", "--locked", "--package", "selfconn-user", "--bin", "selfconn"])
        // With a target, the flags are not used for build scripts and macros.
        .args(["--target", &target, "--target-dir"])
        .arg(target_dir)
        .current_dir(&workspace.root)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    run::step(&format!("building the static binary for {}", architecture.name), &mut cargo)?;
    let binary = target_dir.join(target).join("release/selfconn");
    let bytes = fs::read(&binary).with_context(|| format!("read {}", binary.display()))?;
    check(&bytes, architecture).with_context(|| format!("{} can't be released", binary.display()))?;
    Ok(binary)
}

/// The binary is for this architecture, and needs no library of the host.
fn check(bytes: &[u8], architecture: &Architecture) -> Result<()> {
    let header = FileHeader64::<Endianness>::parse(bytes).context("parse the ELF header")?;
    let endian = header.endian()?;
    let machine = Architecture::of_elf_machine(header.e_machine(endian));
    let name = machine.map_or("another architecture", |machine| machine.name);
    ensure!(machine == Some(architecture), "it is for {name}");
    let segments = header.program_headers(endian, bytes)?;
    let interpreted = segments.iter().any(|segment| segment.p_type(endian) == PT_INTERP);
    ensure!(!interpreted, "it needs the host's dynamic linker");
    Ok(())
}

/// Writes man pages and completions.
pub(super) fn pages(workspace: &Workspace, work: &Path) -> Result<PathBuf> {
    let pages = work.join("pages");
    Tree::empty(&pages)?;
    // In the usual target directory, where `cargo test` has built most of it already.
    let mut cargo = environment::cargo();
    cargo.args(["run", "--quiet", "--locked", "--package", "selfconn-user", "--example", "pages", "--"]);
    run::step("writing man pages and completions", cargo.arg(&pages).current_dir(&workspace.root))?;
    Ok(pages)
}

fn ask_rustc(args: &[&str]) -> Result<String> {
    let mut rustc = plain("rustc");
    let toolchain = environment::toolchain().map(|toolchain| ("RUSTUP_TOOLCHAIN", toolchain));
    rustc.args(args).envs(toolchain);
    run::output(&mut rustc).with_context(|| format!("rustc {}", args.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_of_this_host_is_not_released_for_another_or_with_its_libraries() {
        let bytes = fs::read("/proc/self/exe").unwrap();
        let own = Architecture::named(None).unwrap();
        let error = check(&bytes, own).unwrap_err().to_string();
        assert_eq!(error, "it needs the host's dynamic linker", "tests are linked dynamically");
        let error = check(&bytes, own.other()).unwrap_err().to_string();
        assert_eq!(error, format!("it is for {}", own.name));
    }
}

//! Builds the released binaries, their man pages and completions.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{release::Release, tree::Tree};
use crate::{
    environment::{self, plain},
    remap, run,
    workspace::Workspace,
};

/// What a binary needs of the system.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Linking {
    /// The C library of the system that it was built on, or a newer one.
    Dynamic,
    /// Only a kernel.
    Static,
}

/// Builds the release binary without paths of this machine. Returns a copy for each linking.
pub(super) fn build(
    workspace: &Workspace,
    release: &Release,
    linking: Linking,
    work: &Path,
) -> Result<PathBuf> {
    let (name, feature) = match linking {
        Linking::Dynamic => ("dynamic", "-crt-static"),
        Linking::Static => ("static", "+crt-static"),
    };
    let mut flags = vec![format!("-Ctarget-feature={feature}")];
    flags.extend(remap::flags(&workspace.root, &sysroot()?)?);
    // With a target, the flags are not used for build scripts and macros.
    let triple = release.architecture.rust_target();
    // Each linking has its own directory, because other flags rebuild everything.
    let target_dir = work.join("build").join(name);
    let mut cargo = environment::cargo();
    cargo
        .args(["build", "--release", "--locked", "--package", "selfconn-user", "--bin", "selfconn"])
        .args(["--target", &triple, "--target-dir"])
        .arg(&target_dir)
        .current_dir(&workspace.root)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    run::step(&format!("building the {name} binary"), &mut cargo)?;
    let kept = work.join(name);
    Tree::empty(&kept)?.copy("selfconn", 0o755, &target_dir.join(triple).join("release/selfconn"))?;
    Ok(kept.join("selfconn"))
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

fn sysroot() -> Result<PathBuf> {
    let mut rustc = plain("rustc");
    let toolchain = env::var_os("RUSTUP_TOOLCHAIN").map(|toolchain| ("RUSTUP_TOOLCHAIN", toolchain));
    rustc.args(["--print", "sysroot"]).envs(toolchain);
    Ok(run::output(&mut rustc).context("ask for the sysroot")?.trim().into())
}

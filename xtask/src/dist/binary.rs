//! The binaries that are handed out, and the pages that belong to them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{release::Release, tool, tree::Tree};
use crate::{
    environment::{self, plain},
    progress, remap,
    workspace::{Workspace, here},
};

/// What a binary wants of the system it runs on.
#[derive(Clone, Copy, Debug)]
pub(super) enum Linking {
    /// The C library of the system it was built on, or a newer one.
    Dynamic,
    /// Nothing but a kernel.
    Static,
}

/// Builds the daemon as it is released, without a trace of where. Yields a copy of its own for each linking.
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
    // The target is named so that the flags are for what is handed out, not for what runs while it is built.
    let triple = format!("{}-unknown-linux-gnu", release.architecture.rust);
    // Each its own: other flags would have all of it built anew.
    let target_dir = work.join("build").join(name);
    let mut cargo = environment::cargo();
    cargo
        .args(["build", "--release", "--locked", "--package", "selfconn-user", "--bin", "selfconn"])
        .args(["--target", &triple, "--target-dir"])
        .arg(&target_dir)
        .current_dir(&workspace.root)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    let what = format!("building the {name} binary");
    let finished = progress::run(&what, cargo, None)?;
    finished.must_have_succeeded(&what)?;
    finished.show_warnings();
    let built = target_dir.join(triple).join("release/selfconn");
    let kept = work.join(name).join("selfconn");
    Tree::empty(&work.join(name))?.copy("selfconn", 0o755, &built)?;
    progress::say(format!("{}: {} KiB", here(&kept), fs::metadata(&kept)?.len().div_ceil(1024)));
    Ok(kept)
}

/// Writes man pages and completions.
pub(super) fn pages(workspace: &Workspace, work: &Path) -> Result<PathBuf> {
    let pages = work.join("pages");
    Tree::empty(&pages)?;
    // In the usual target directory, where `cargo test` has most of it already: nothing of this is handed out.
    let mut cargo = environment::cargo();
    cargo.args(["run", "--quiet", "--locked", "--package", "selfconn-user", "--example", "pages", "--"]);
    cargo.arg(&pages).current_dir(&workspace.root);
    progress::must("writing man pages and completions", cargo)?;
    Ok(pages)
}

fn sysroot() -> Result<PathBuf> {
    let mut rustc = plain("rustc");
    rustc.args(["--print", "sysroot"]);
    let toolchain = std::env::var_os("RUSTUP_TOOLCHAIN");
    rustc.envs(toolchain.map(|toolchain| ("RUSTUP_TOOLCHAIN", toolchain)));
    Ok(tool::run(rustc).context("ask for the sysroot")?.trim().into())
}

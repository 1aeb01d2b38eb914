//! What a release says about the crates in it: their licences (cargo-about) and bills of materials
//! (cargo-cyclonedx).

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{
    release::Release,
    tools::{CARGO_ABOUT, CARGO_CYCLONEDX},
};
use crate::{environment, run, workspace::Workspace};

/// The libraries in the binary, and the licence of each crate in it, with its text. `packaging/about.toml` has the
/// targets and the accepted licences, `packaging/about.hbs` the form.
pub(super) fn notices(workspace: &Workspace) -> Result<String> {
    let mut about = CARGO_ABOUT.command(workspace)?;
    // It asks cargo about all targets, and must not look for licences elsewhere.
    let mut fetch = environment::cargo();
    run::step(
        "fetching the crates",
        fetch.args(["fetch", "--locked", "--quiet"]).current_dir(&workspace.root),
    )?;
    about.args(["generate", "--frozen", "--fail", "--config", "packaging/about.toml"]);
    about.args(["--manifest-path", "selfconn-user/Cargo.toml", "packaging/about.hbs"]);
    let crates = run::output(&mut about)?;
    let libraries = workspace.root.join("packaging/static-libraries.txt");
    let libraries =
        fs::read_to_string(&libraries).with_context(|| format!("read {}", libraries.display()))?;
    Ok(libraries + &crates)
}

/// The bills of materials in CycloneDX's format: one for user space, and one for the eBPF programs, because a
/// bill is for one target.
pub(super) fn bills_of_materials(
    workspace: &Workspace,
    release: &Release,
    directory: &Path,
) -> Result<Vec<PathBuf>> {
    const FILE: &str = "selfconn-bill-of-materials";
    let host = release.architecture.release_target();
    let mut bills = Vec::new();
    for (package, target, name) in [
        ("selfconn-user", host.as_str(), release.architecture.name),
        ("selfconn-ebpf", "bpfel-unknown-none", "bpf"),
    ] {
        let mut cyclonedx = CARGO_CYCLONEDX.command(workspace)?;
        cyclonedx.args(["cyclonedx", "--quiet", "--format", "json", "--spec-version", "1.5"]);
        cyclonedx.args(["--no-build-deps", "--target", target, "--override-filename", FILE]);
        cyclonedx.env("SOURCE_DATE_EPOCH", release.epoch.to_string());
        run::output(&mut cyclonedx)?;
        // It writes a file for each member of the workspace, beside its Cargo.toml.
        let mut text = None;
        for member in ["selfconn-ebpf", "selfconn-user", "xtask"] {
            let file = workspace.root.join(member).join(FILE).with_extension("json");
            if member == package {
                text = fs::read_to_string(&file).ok();
            }
            fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
        }
        // References contain the path of the clone.
        let root = format!("file://{}", workspace.root.display());
        let text = text.with_context(|| format!("no bill of {package}"))?.replace(&root, "file://.");
        let bill = directory.join(format!("{package}-{}-{name}.cdx.json", release.version));
        fs::write(&bill, text).with_context(|| format!("write {}", bill.display()))?;
        bills.push(bill);
    }
    Ok(bills)
}

//! The tarball: a static binary, which needs only a kernel, and the files that belong to it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use super::{LICENCES, ReleaseParts, release::Release, tree::Tree};
use crate::{environment::plain, run};

/// Writes its files. Returns their directory, which has the name of the archive.
pub(super) fn fill(parts: &ReleaseParts) -> Result<PathBuf> {
    let release = &parts.release;
    let name = format!("selfconn-{}-{}-linux", release.version, release.architecture.name);
    let tree = Tree::empty(&parts.work.join("tarball").join(release.architecture.name))?;
    let inside = |path: &str| format!("{name}/{path}");
    tree.copy(&inside("selfconn"), 0o755, &parts.binary)?;
    for (page, path) in parts.man_pages()? {
        tree.copy(&inside(&format!("man/{page}")), 0o644, &path)?;
    }
    for completion in ["bash/selfconn", "zsh/_selfconn", "fish/selfconn.fish"] {
        tree.copy(&inside(&format!("completions/{completion}")), 0o644, &parts.pages.join(completion))?;
    }
    for file in ["systemd/selfconn.service", "logrotate/selfconn"] {
        tree.copy(&inside(file), 0o644, &parts.root.join("packaging").join(file))?;
    }
    let files = [parts.examples()?, parts.manifests()?, parts.documents()?].concat();
    for (file, path) in files {
        tree.copy(&inside(&file), 0o644, &path)?;
    }
    for file in LICENCES.into_iter().chain(["CHANGELOG.md"]) {
        tree.copy(&inside(file), 0o644, &parts.root.join(file))?;
    }
    tree.write(&inside("THIRD-PARTY"), 0o644, parts.notices.as_bytes())?;
    let containerfile = fs::read_to_string(parts.root.join("packaging/Containerfile"));
    let containerfile = of_release(&containerfile.context("read the Containerfile")?, release)?;
    tree.write(&inside("Containerfile"), 0o644, containerfile.as_bytes())?;
    Ok(tree.root.join(name))
}

/// The Containerfile with the values of a release, so that it needs no arguments.
fn of_release(containerfile: &str, release: &Release) -> Result<String> {
    let Release { version, revision, architecture, .. } = release;
    let mut filled = containerfile.to_owned();
    for (line, value) in [
        ("\nFROM scratch\n", format!("\nFROM --platform=linux/{} scratch\n", architecture.debian)),
        ("\nARG VERSION\n", format!("\nARG VERSION={version}\n")),
        ("\nARG REVISION\n", format!("\nARG REVISION={revision}\n")),
    ] {
        ensure!(
            filled.matches(line).count() == 1,
            "the Containerfile does not have the line {:?} once",
            line.trim()
        );
        filled = filled.replace(line, &value);
    }
    Ok(filled)
}

/// Builds it into this directory.
pub(super) fn build(parts: &ReleaseParts, directory: &Path) -> Result<PathBuf> {
    let files = fill(parts)?;
    let (root, name) = (files.parent().context("a root")?, files.file_name().context("a name")?);
    let mut tar = plain("tar");
    tar.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.arg(format!("--mtime=@{}", parts.release.epoch)).arg("--directory").arg(root);
    let archive = run::output_bytes(tar.arg("--file=-").arg(name))?;
    // Several threads would split the input at places that depend on the machine.
    let compressed = run::filter(plain("xz").args(["--threads=1", "--stdout"]), &archive)?;
    let file = directory.join(format!("{}.tar.xz", name.display()));
    fs::write(&file, compressed).with_context(|| format!("write {}", file.display()))?;
    Ok(file)
}

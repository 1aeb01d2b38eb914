//! The tarball: a binary that needs nothing but a kernel, and what belongs to it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{Kit, notices, tool, tree::Tree};
use crate::environment::plain;

/// Said before the crates: the C library is in this binary, too.
const C_LIBRARY: &str = "\
This binary is linked statically with the GNU C Library, which is under the GNU Lesser General
Public License, version 2.1 or later. The sources of selfconn, from which `cargo xtask dist` links
it anew, are where you got this archive.

";

/// Builds it into this directory.
pub(super) fn build(kit: &Kit, directory: &Path) -> Result<PathBuf> {
    let release = &kit.release;
    let name = format!("selfconn-{}-{}-linux", release.version, release.architecture.rust);
    let binary = kit.alone.as_ref().context("no static binary was built")?;
    let tree = Tree::empty(&kit.work.join("tarball"))?;
    let inside = |path: &str| format!("{name}/{path}");
    tree.copy(&inside("selfconn"), 0o755, binary)?;
    for (page, path) in kit.man_pages()? {
        tree.copy(&inside(&format!("man/{page}")), 0o644, &path)?;
    }
    for completion in ["bash/selfconn", "zsh/_selfconn", "fish/selfconn.fish"] {
        tree.copy(&inside(&format!("completions/{completion}")), 0o644, &kit.pages.join(completion))?;
    }
    for file in ["systemd/selfconn.service", "logrotate/selfconn"] {
        tree.copy(&inside(file), 0o644, &kit.root.join("packaging").join(file))?;
    }
    for (file, path) in kit.examples()?.into_iter().chain(kit.documents()?) {
        tree.copy(&inside(&file), 0o644, &path)?;
    }
    for file in ["LICENSE-MIT", "LICENSE-APACHE", "LICENSE-GPL2", "CHANGELOG.md"] {
        tree.copy(&inside(file), 0o644, &kit.root.join(file))?;
    }
    let notices = C_LIBRARY.to_owned() + &notices::of(&kit.crates)?;
    tree.write(&inside("THIRD-PARTY"), 0o644, notices.as_bytes())?;

    let mut tar = plain("tar");
    tar.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.arg(format!("--mtime=@{}", release.epoch)).arg("--directory").arg(&tree.root);
    tar.args(["--file=-", &name]);
    let mut xz = plain("xz");
    // One thread: more of them cut the input where they like.
    xz.args(["--threads=1", "--stdout"]);
    let file = directory.join(format!("{name}.tar.xz"));
    let archive = tool::filter(xz, &tool::run_for_bytes(tar)?)?;
    fs::write(&file, archive).with_context(|| format!("write {}", file.display()))?;
    Ok(file)
}

//! The tarball: a static binary, which needs only a kernel, and the files that belong to it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{ReleaseParts, tree::Tree};
use crate::{environment::plain, run};

/// Precedes the notices of the crates, because the C library is in this binary.
const C_LIBRARY_NOTICE: &str = "\
This binary is linked statically with the GNU C Library, which is under the GNU Lesser General
Public License, version 2.1 or later. The sources of selfconn, from which `cargo xtask dist` links
it anew, are where you got this archive.

";

/// Builds it into this directory.
pub(super) fn build(parts: &ReleaseParts, directory: &Path) -> Result<PathBuf> {
    let release = &parts.release;
    let name = format!("selfconn-{}-{}-linux", release.version, release.architecture.rust);
    let binary = parts.static_binary.as_ref().context("no static binary was built")?;
    let tree = Tree::empty(&parts.work.join("tarball"))?;
    let inside = |path: &str| format!("{name}/{path}");
    tree.copy(&inside("selfconn"), 0o755, binary)?;
    for (page, path) in parts.man_pages()? {
        tree.copy(&inside(&format!("man/{page}")), 0o644, &path)?;
    }
    for completion in ["bash/selfconn", "zsh/_selfconn", "fish/selfconn.fish"] {
        tree.copy(&inside(&format!("completions/{completion}")), 0o644, &parts.pages.join(completion))?;
    }
    for file in ["systemd/selfconn.service", "logrotate/selfconn"] {
        tree.copy(&inside(file), 0o644, &parts.root.join("packaging").join(file))?;
    }
    for (file, path) in parts.examples()?.into_iter().chain(parts.documents()?) {
        tree.copy(&inside(&file), 0o644, &path)?;
    }
    for file in ["LICENSE-MIT", "LICENSE-APACHE", "LICENSE-GPL2", "CHANGELOG.md"] {
        tree.copy(&inside(file), 0o644, &parts.root.join(file))?;
    }
    let notices = C_LIBRARY_NOTICE.to_owned() + &parts.notices;
    tree.write(&inside("THIRD-PARTY"), 0o644, notices.as_bytes())?;

    let mut tar = plain("tar");
    tar.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.arg(format!("--mtime=@{}", release.epoch)).arg("--directory").arg(&tree.root);
    let archive = run::output_bytes(tar.args(["--file=-", &name]))?;
    // Several threads would split the input at places that depend on the machine.
    let compressed = run::filter(plain("xz").args(["--threads=1", "--stdout"]), &archive)?;
    let file = directory.join(format!("{name}.tar.xz"));
    fs::write(&file, compressed).with_context(|| format!("write {}", file.display()))?;
    Ok(file)
}

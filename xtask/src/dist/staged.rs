//! The files of a package, in the folders in which they are installed: what both formats have in common. The tools
//! that make the packages take them from here (`package.metadata` in selfconn-user/Cargo.toml).

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::{ReleaseParts, tree::Tree};

/// The documents of the package.
pub(super) const DOCS: &str = "usr/share/doc/selfconn";

/// Writes them to the directory of this name beside the binary, where the tools look for them. `zsh`: the folder of the
/// completions of zsh, which differs.
pub(super) fn stage(parts: &ReleaseParts, name: &str, zsh: &str) -> Result<Tree> {
    let tree = Tree::empty(&parts.binary.with_file_name(name))?;
    let packaging = |path: &str| parts.root.join("packaging").join(path);
    tree.copy("usr/bin/selfconn", 0o755, &parts.binary)?;
    let unit = "usr/lib/systemd/system/selfconn.service";
    tree.copy(unit, 0o644, &packaging("systemd/selfconn.service"))?;
    tree.copy("etc/logrotate.d/selfconn", 0o644, &packaging("logrotate/selfconn"))?;
    for (name, path) in [
        ("bash/selfconn", "usr/share/bash-completion/completions/selfconn"),
        ("zsh/_selfconn", &format!("{zsh}/_selfconn")),
        ("fish/selfconn.fish", "usr/share/fish/vendor_completions.d/selfconn.fish"),
    ] {
        tree.copy(path, 0o644, &parts.pages.join(name))?;
    }
    for (name, path) in parts.man_pages()? {
        let page = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        tree.write_gz(&format!("usr/share/man/man1/{name}.gz"), &page)?;
    }
    for (name, path) in parts.examples()? {
        tree.copy(&format!("usr/share/selfconn/{name}"), 0o644, &path)?;
    }
    for (name, path) in parts.documents()? {
        tree.copy(&format!("{DOCS}/{name}"), 0o644, &path)?;
    }
    tree.write_gz(&format!("{DOCS}/THIRD-PARTY.gz"), parts.notices.as_bytes())?;
    Ok(tree)
}

/// The target directory of the build, in which a tool looks for `TARGET/release/NAME`.
pub(super) fn target_dir(parts: &ReleaseParts) -> Result<&Path> {
    parts.binary.ancestors().nth(3).context("the binary is in no target directory")
}

//! The Debian package, made by cargo-deb.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{
    ReleaseParts,
    staged::{self, DOCS},
    tools::CARGO_DEB,
};
use crate::{environment::plain, run, workspace::Workspace};

/// A package file.
#[derive(Debug)]
pub(crate) struct Deb {
    pub(crate) file: PathBuf,
}

impl Deb {
    /// Builds this revision of it into this directory.
    pub(crate) fn build(
        workspace: &Workspace,
        parts: &ReleaseParts,
        revision: u32,
        directory: &Path,
    ) -> Result<Self> {
        let release = &parts.release;
        let version = format!("{}-{revision}", release.version);
        stage(parts, &version)?;
        let file = directory.join(format!("selfconn_{version}_{}.deb", release.architecture.debian));
        let mut deb = CARGO_DEB.command(workspace)?;
        deb.args(["deb", "--quiet", "--no-build", "--no-strip", "--no-dbgsym", "--compress-type", "xz"]);
        deb.args(["--package", "selfconn-user", "--deb-version", &version]);
        deb.args(["--target", &release.architecture.release_target(), "--output"]).arg(&file);
        deb.env("CARGO_TARGET_DIR", staged::target_dir(parts)?);
        // It lowers later times to this one.
        deb.env("SOURCE_DATE_EPOCH", release.epoch.to_string());
        run::output(&mut deb)?;
        Ok(Self { file })
    }

    /// Runs lintian, which must find no error and no warning.
    pub(crate) fn lint(&self) -> Result<()> {
        let mut lintian = plain("lintian");
        lintian.args(["--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0"]);
        lintian.arg(&self.file);
        run::step("checking the package with lintian", &mut lintian)
    }
}

/// Writes all files of the package.
fn stage(parts: &ReleaseParts, version: &str) -> Result<()> {
    let tree = staged::stage(parts, "deb", "usr/share/zsh/vendor-completions")?;
    let debian = parts.root.join("packaging/debian");
    tree.copy("usr/share/lintian/overrides/selfconn", 0o644, &debian.join("lintian-overrides"))?;
    let changes = fs::read(parts.root.join("CHANGELOG.md")).context("read CHANGELOG.md")?;
    tree.write_gz(&format!("{DOCS}/changelog.gz"), &changes)?;
    let manifest = fs::read_to_string(parts.root.join("selfconn-user/Cargo.toml"));
    let manifest = manifest.context("read selfconn-user/Cargo.toml")?;
    let maintainer = manifest.lines().find_map(|line| line.strip_prefix("maintainer = "));
    let maintainer = maintainer.context("the package has no maintainer")?.trim_matches('"');
    let date = parts.release.date("+%a, %d %b %Y %H:%M:%S +0000")?;
    let of_debian = format!(
        "selfconn ({version}) unstable; urgency=medium\n\n  * The changes are in changelog.gz beside this file.\n\n \
         -- {maintainer}  {date}\n"
    );
    tree.write_gz(&format!("{DOCS}/changelog.Debian.gz"), of_debian.as_bytes())
}

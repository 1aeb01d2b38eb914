//! The RPM package, made by cargo-generate-rpm.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{
    LICENCES, ReleaseParts,
    staged::{self, DOCS},
    tools::CARGO_GENERATE_RPM,
};
use crate::{run, workspace::Workspace};

const LICENSES: &str = "usr/share/licenses/selfconn";

/// Builds this revision of it into this directory.
pub(crate) fn build(
    workspace: &Workspace,
    parts: &ReleaseParts,
    revision: u32,
    directory: &Path,
) -> Result<PathBuf> {
    let release = &parts.release;
    let tree = staged::stage(parts, "rpm", "usr/share/zsh/site-functions")?;
    tree.copy(&format!("{DOCS}/CHANGELOG.md"), 0o644, &parts.root.join("CHANGELOG.md"))?;
    for name in LICENCES {
        tree.copy(&format!("{LICENSES}/{name}"), 0o644, &parts.root.join(name))?;
    }
    let architecture = release.architecture.name;
    let file = directory.join(format!("selfconn-{}-{revision}.{architecture}.rpm", release.version));
    let mut rpm = CARGO_GENERATE_RPM.command(workspace)?;
    rpm.args(["generate-rpm", "--package", "selfconn-user", "--arch", architecture]);
    rpm.args(["--set-metadata", &format!("release = \"{revision}\"")]);
    // Every rpm since 2009 reads xz; zstd is read since rpm 4.14.
    rpm.args(["--payload-compress", "xz", "--target", &release.architecture.release_target()]);
    rpm.arg("--target-dir").arg(staged::target_dir(parts)?).arg("--output").arg(&file);
    // Later times are lowered to this one, which is also the time of the build.
    rpm.args(["--source-date", &release.epoch.to_string()]);
    run::output(&mut rpm)?;
    Ok(file)
}

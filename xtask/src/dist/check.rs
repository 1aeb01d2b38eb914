//! Builds the release a second time, from a clone in another directory, and compares the checksums.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use super::Tree;
use crate::{
    architecture::Architecture,
    environment::{cargo, plain},
    run::{self, say},
    workspace::{Workspace, here},
};

/// Builds twice. The clone is removed if the results are equal.
pub(super) fn run(workspace: &Workspace, architectures: &[&'static Architecture]) -> Result<()> {
    let git = |arguments: &[&str]| run::output(plain("git").arg("-C").arg(&workspace.root).args(arguments));
    let changed = git(&["status", "--porcelain"])?;
    ensure!(
        changed.is_empty(),
        "a clone has only committed files; commit or remove these: {}",
        changed.trim()
    );
    // The clone is made first, because somebody may commit during the build.
    let clone = workspace.target.join("dist-check/clone-elsewhere");
    Tree::empty(&clone)?;
    git(&["clone", "--quiet", "--no-hardlinks", ".", &clone.to_string_lossy()])?;
    super::make(workspace, architectures)?;
    // The tools are the same: the clone need not build them again, which takes minutes.
    fs::create_dir_all(clone.join("target")).context("make the clone's target directory")?;
    for tools in ["bpf-linker", "tools"] {
        std::os::unix::fs::symlink(workspace.target.join(tools), clone.join("target").join(tools))
            .context("link the tools into the clone")?;
    }
    let mut again = cargo();
    again.args(["run", "--quiet", "--package", "xtask", "--", "dist"]).current_dir(&clone);
    again.args(architectures.iter().flat_map(|architecture| ["--arch", architecture.name]));
    run::step(&format!("building it again in {}", here(&clone)), again.env_remove("CARGO_TARGET_DIR"))?;

    let sums = |directory: &Path| {
        fs::read_to_string(directory.join("SHA256SUMS"))
            .with_context(|| format!("read SHA256SUMS in {}", directory.display()))
    };
    let (first, second) = (sums(&workspace.target.join("dist"))?, sums(&clone.join("target/dist"))?);
    ensure!(first == second, "not reproducible; both are kept. Here:\n{first}in the clone:\n{second}");
    fs::remove_dir_all(&clone).with_context(|| format!("remove {}", clone.display()))?;
    say(format!("both builds are equal:\n{first}"));
    Ok(())
}

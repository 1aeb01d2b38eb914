//! Builds everything a second time, from a clone in a directory of another name, and compares.

use std::{collections::BTreeMap, env, fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};

use super::tool;
use crate::{
    environment::{cargo, plain},
    progress::{self, say},
    workspace::{Workspace, here},
};

/// Builds here and there. The clone is removed when it was as it should be.
pub(super) fn run(workspace: &Workspace) -> Result<()> {
    let git = |arguments: &[&str]| {
        let mut git = plain("git");
        git.arg("-C").arg(&workspace.root).args(arguments);
        tool::run(git)
    };
    let changed = git(&["status", "--porcelain"])?;
    ensure!(changed.is_empty(), "a clone has only what is committed, and this is not: {}", changed.trim());
    // First, for somebody may commit while this is built.
    let clone = workspace.target.join("dist-check/a clone elsewhere");
    super::Tree::empty(&clone)?;
    git(&["clone", "--quiet", "--no-hardlinks", ".", &clone.to_string_lossy()])?;
    super::make(workspace)?;
    say(format!("the same again in {}", here(&clone)));
    let mut again = cargo();
    again.args(["run", "--quiet", "--package", "xtask", "--", "dist"]).current_dir(&clone);
    // A bpf-linker that was built here would be built there, too: from the same sources, in minutes.
    let linkers = fs::read_dir(workspace.target.join("bpf-linker")).into_iter().flatten().flatten();
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = linkers.map(|linker| linker.path().join("bin")).chain(env::split_paths(&path));
    again.env("PATH", env::join_paths(directories).context("extend PATH")?).env_remove("CARGO_TARGET_DIR");
    progress::must("building it there", again)?;

    let (first, second) = (sums(&workspace.target.join("dist"))?, sums(&clone.join("target/dist"))?);
    if first != second {
        bail!("not reproducible: here {first:?}, there {second:?}; both are kept");
    }
    fs::remove_dir_all(&clone).with_context(|| format!("remove {}", clone.display()))?;
    for (name, sum) in first {
        say(format!("twice the same: {sum}  {name}"));
    }
    Ok(())
}

/// The sums there, by file.
fn sums(directory: &Path) -> Result<BTreeMap<String, String>> {
    let path = directory.join("SHA256SUMS");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let sums = text.lines().filter_map(|line| line.split_once("  "));
    Ok(sums.map(|(sum, name)| (name.to_owned(), sum.to_owned())).collect())
}

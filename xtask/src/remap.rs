//! Keeps paths of this machine out of binaries, so that the same sources give the same bytes wherever they
//! are.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Compiler options that rename the paths of the sources at `root`, of the library in this sysroot, and of
/// crates.
pub(crate) fn flags(root: &Path, sysroot: &Path) -> Result<Vec<String>> {
    let library = sysroot.join("lib/rustlib/src/rust");
    let mut remaps = vec![(root.to_owned(), "."), (library.clone(), "/rust")];
    // A distribution may have a symbolic link there.
    remaps.extend(fs::canonicalize(&library).ok().map(|real| (real, "/rust")));
    let cargo_home: Option<PathBuf> =
        env::var_os("CARGO_HOME").map(Into::into).or_else(|| Some(env::home_dir()?.join(".cargo")));
    let registries = cargo_home.map(|home| home.join("registry/src"));
    for registry in registries.iter().flat_map(fs::read_dir).flatten().flatten() {
        remaps.push((registry.path(), "/cargo"));
    }
    let flag = |(from, to): (PathBuf, &str)| Ok(format!("--remap-path-prefix={}={to}", utf8(&from)?));
    remaps.into_iter().map(flag).collect()
}

/// A path as text, for an option.
pub(crate) fn utf8(path: &Path) -> Result<String> {
    path.to_str().map(ToOwned::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
}

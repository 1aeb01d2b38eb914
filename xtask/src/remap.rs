//! Keeps paths of this machine out of binaries, so that the same sources give the same bytes wherever they
//! are.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Compiler options that rename the paths of the sources at `root`, of the library in this sysroot to `library`, and
/// of crates.
pub(crate) fn flags(root: &Path, sysroot: &Path, library: &str) -> Result<Vec<String>> {
    let sources = sysroot.join("lib/rustlib/src/rust");
    let mut remaps = vec![(root.to_owned(), "."), (sources.clone(), library)];
    // A distribution may have a symbolic link there.
    remaps.extend(fs::canonicalize(&sources).ok().map(|real| (real, library)));
    let cargo_home: Option<PathBuf> =
        env::var_os("CARGO_HOME").map(Into::into).or_else(|| Some(env::home_dir()?.join(".cargo")));
    let registries = cargo_home.map(|home| home.join("registry/src"));
    for registry in registries.iter().flat_map(fs::read_dir).flatten().flatten() {
        remaps.push((registry.path(), "/cargo"));
    }
    let flag = |(from, to): (PathBuf, &str)| Ok(format!("--remap-path-prefix={}={to}", utf8(&from)?));
    remaps.into_iter().map(flag).collect()
}

/// The path that the library which comes with a compiler has in a program, if the compiler does not find the sources of
/// the library; with it as the name of the sources, a program is the same with and without them. `version`: what
/// `rustc --version --verbose` prints.
pub(crate) fn name_of_library(version: &str) -> Result<String> {
    let commit = version.lines().find_map(|line| line.strip_prefix("commit-hash: "));
    let release = version.lines().find_map(|line| line.strip_prefix("release: "));
    let name = commit.filter(|commit| *commit != "unknown").or(release);
    Ok(format!("/rustc/{}", name.context("rustc does not say which version it is")?))
}

/// A path as text, for an option.
pub(crate) fn utf8(path: &Path) -> Result<String> {
    path.to_str().map(ToOwned::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_has_the_commit_of_the_compiler_or_its_version() {
        let of_rustup = "rustc 1.95.0 (59807616e 2026-04-14)\nbinary: rustc\ncommit-hash: 59807616e1fa\nrelease: 1.95.0\n";
        assert_eq!(name_of_library(of_rustup).unwrap(), "/rustc/59807616e1fa");
        let of_distribution = "rustc 1.95.0\ncommit-hash: unknown\nrelease: 1.95.0\n";
        assert_eq!(name_of_library(of_distribution).unwrap(), "/rustc/1.95.0");
        assert!(name_of_library("").is_err());
    }
}

//! The environment of the programs that we start. `cargo xtask` sets variables that name a toolchain and a
//! package; a cargo of another toolchain would use them and fail, so they are removed.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Command,
};

/// A cargo of the toolchain that runs us, to build for this host.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    clean(&mut command, about_our_package);
    command
}

/// rustup's name of the toolchain that runs us. None without rustup.
pub(crate) fn toolchain() -> Option<String> {
    env::var("RUSTUP_TOOLCHAIN").ok()
}

/// A program that must not see the toolchain that runs us.
pub(crate) fn other(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    clean(&mut command, |key| about_our_package(key) || about_our_toolchain(key));
    command
}

/// A system program whose output is parsed, so it must not be translated.
pub(crate) fn plain(program: impl AsRef<OsStr>) -> Command {
    let mut command = other(program);
    command.env("LC_ALL", "C");
    command
}

/// True if this program is in PATH.
pub(crate) fn is_in_path(program: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

fn clean(command: &mut Command, leave_out: impl Fn(&str) -> bool) {
    for (key, _) in env::vars_os() {
        if key.to_str().is_some_and(&leave_out) {
            command.env_remove(key);
        }
    }
    const LIBRARIES: &str = "LD_LIBRARY_PATH";
    if let Some(value) = env::var_os(LIBRARIES) {
        match without_cargos(&value, env::current_exe().ok().as_deref()) {
            Some(value) => command.env(LIBRARIES, value),
            None => command.env_remove(LIBRARIES),
        };
    }
}

/// True for variables that cargo sets about the package it runs. They mislead a cargo that runs another
/// package.
fn about_our_package(key: &str) -> bool {
    const EXACT: [&str; 4] = ["CARGO_CRATE_NAME", "CARGO_BIN_NAME", "CARGO_PRIMARY_PACKAGE", "OUT_DIR"];
    const PREFIXES: [&str; 3] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_EXE_"];
    EXACT.contains(&key) || PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

/// True for variables that choose or configure a compiler. Variables about the registry, the output and the
/// number of jobs are kept.
fn about_our_toolchain(key: &str) -> bool {
    const EXACT: [&str; 9] = [
        "CARGO",
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "RUST_RECURSION_COUNT",
        "RUST_TARGET_PATH",
        "RUSTUP_TOOLCHAIN",
        "RUSTUP_TOOLCHAIN_SOURCE",
    ];
    const KEPT: [&str; 8] = [
        "CARGO_BUILD_JOBS",
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTRIES_",
        "CARGO_REGISTRY_",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
    ];
    let is_cargos = key.starts_with("CARGO_") && !KEPT.iter().any(|prefix| key.starts_with(prefix));
    is_cargos || key.starts_with("RUSTC_") || EXACT.contains(&key)
}

/// `LD_LIBRARY_PATH` without the directories that cargo adds: its target directory, and its toolchain's
/// libraries, whose libLLVM another toolchain must not load.
fn without_cargos(value: &OsStr, this_program: Option<&Path>) -> Option<OsString> {
    let ours = this_program.and_then(Path::parent);
    let paths: Vec<PathBuf> = env::split_paths(value).collect();
    let is_rustlib = |path: &Path| path.components().any(|part| part.as_os_str() == "rustlib");
    // The toolchain's libraries are in the parent of `rustlib`.
    let lib = paths
        .iter()
        .find(|path| is_rustlib(path))
        .and_then(|path| path.ancestors().find(|path| path.ends_with("rustlib")))
        .and_then(Path::parent)
        .map(Path::to_owned);
    let kept: Vec<_> = paths
        .iter()
        .filter(|path| !path.as_os_str().is_empty())
        .filter(|path| !is_rustlib(path) && ours.is_none_or(|ours| !path.starts_with(ours)))
        .filter(|path| lib.as_ref() != Some(path))
        .collect();
    if kept.is_empty() { None } else { env::join_paths(kept).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_toolchain_sees_registry_settings_but_not_our_toolchain() {
        let is_kept = |key: &str| !about_our_package(key) && !about_our_toolchain(key);
        for key in [
            "PATH",
            "HOME",
            "CARGO_HOME",
            "RUSTUP_HOME",
            "CARGO_HTTP_PROXY",
            "CARGO_NET_OFFLINE",
            "CARGO_REGISTRIES_CRATES_IO_PROTOCOL",
            "CARGO_TERM_COLOR",
            "CARGO_BUILD_JOBS",
            "RUST_BACKTRACE",
        ] {
            assert!(is_kept(key), "{key} is needed");
        }
        for key in [
            "CARGO",
            "CARGO_MANIFEST_DIR",
            "CARGO_PKG_VERSION",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "CARGO_BUILD_RUSTFLAGS",
            "CARGO_TARGET_DIR",
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER",
            "CARGO_PROFILE_RELEASE_LTO",
            "RUSTC",
            "RUSTC_WRAPPER",
            "RUSTC_BOOTSTRAP",
            "RUSTFLAGS",
            "RUSTUP_TOOLCHAIN",
        ] {
            assert!(!is_kept(key), "{key} breaks another toolchain");
        }
    }

    #[test]
    fn our_cargo_keeps_its_toolchain_settings() {
        for key in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_TARGET_DIR"] {
            assert!(!about_our_package(key), "{key}");
        }
    }

    #[test]
    fn only_cargos_directories_leave_the_library_path() {
        let program = Some(Path::new("/src/target/debug/xtask"));
        let added = "/src/target/debug:/src/target/debug/deps:/r/stable/lib/rustlib/x86_64/lib:/r/stable/lib";
        for (value, kept) in [
            (added.to_owned(), None),
            (format!("{added}:/opt/lib"), Some("/opt/lib")),
            ("/opt/lib:/opt/other".to_owned(), Some("/opt/lib:/opt/other")),
            (String::new(), None),
        ] {
            assert_eq!(without_cargos(value.as_ref(), program), kept.map(OsString::from), "{value}");
        }
    }
}

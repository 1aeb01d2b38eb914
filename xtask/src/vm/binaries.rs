//! What runs in the guests: built without a need for libraries, in a directory of its own, so that it doesn't drive out
//! what is built for this host.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};

use crate::{environment, progress::say, workspace::Workspace};

const TARGET: &str = "x86_64-unknown-linux-gnu";
pub(super) const GUEST_INIT: &str = "selfconn-guest-init";
const DAEMON: &str = "selfconn";

/// The tests of user space that need a kernel.
const LIVE_TESTS: &str = "live";

/// A program and its content.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// What goes into every guest.
#[derive(Debug)]
pub(super) struct Binaries {
    pub(super) init: Program,
    pub(super) daemon: Program,
    pub(super) tests: Program,
}

impl Binaries {
    /// Builds them below this directory. The eBPF object must be there.
    pub(super) fn build(workspace: &Workspace, directory: &Path) -> Result<Self> {
        say("building what runs in the guests");
        let mut init = build(workspace, directory, &["build", "--package", "xtask", "--bin", GUEST_INIT])?;
        let arguments = ["test", "--no-run", "--package", "selfconn-user", "--test", LIVE_TESTS];
        let mut built = build(workspace, directory, &arguments)?;
        let mut take = |name: &str| {
            let index = built.iter().position(|program| program.name == name);
            index.map(|index| built.swap_remove(index)).with_context(|| format!("cargo built no {name}"))
        };
        Ok(Self {
            init: init.pop().with_context(|| format!("cargo built no {GUEST_INIT}"))?,
            daemon: take(DAEMON)?,
            tests: take(LIVE_TESTS)?,
        })
    }
}

/// Runs cargo, and yields the programs it says it built.
pub(super) fn build(workspace: &Workspace, directory: &Path, arguments: &[&str]) -> Result<Vec<Program>> {
    let mut cargo = environment::cargo();
    cargo
        .args(arguments)
        .args([
            "--quiet",
            "--release",
            "--locked",
            "--target",
            TARGET,
            "--message-format",
            "json-render-diagnostics",
        ])
        .arg("--target-dir")
        .arg(directory)
        .current_dir(&workspace.root)
        // The released profile but for the linking of everything with everything, which takes minutes.
        .envs([("CARGO_PROFILE_RELEASE_LTO", "off"), ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = cargo.output().context("start cargo")?;
    ensure!(output.status.success(), "cargo {}: {}", arguments.join(" "), output.status);
    let messages = String::from_utf8(output.stdout).context("cargo's messages")?;
    built_in(&messages)?
        .into_iter()
        .map(|(name, file)| {
            let content = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
            Ok(Program { name, content })
        })
        .collect()
}

/// The names and files of the programs in cargo's messages.
fn built_in(messages: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("parse cargo's messages")?;
        if let (Some(file), Some(name)) = (message["executable"].as_str(), message["target"]["name"].as_str())
        {
            programs.push((name.to_owned(), file.into()));
        }
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_programs_in_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"anyhow"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"live","kind":["test"]},"executable":"/t/deps/live-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(built_in(messages).unwrap(), [("live".to_owned(), PathBuf::from("/t/deps/live-1"))]);
        assert!(built_in("warning: x").is_err());
    }
}

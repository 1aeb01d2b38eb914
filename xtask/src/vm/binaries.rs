//! Builds the programs that run in test machines: static, and in a target directory of their own, so that
//! they do not replace what is built for this host.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::{
    architecture::{self, Architecture},
    environment, packages,
    run::say,
    workspace::Workspace,
};

/// Installs what is needed to build for another architecture.
pub(super) fn prepare(architecture: &Architecture) -> Result<()> {
    if architecture.is_this_machines() {
        return Ok(());
    }
    if !environment::is_in_path(architecture.linker) {
        packages::install(architecture.linker_packages)?;
    }
    architecture::add_target(&architecture.rust_target())
}

/// Builds programs of selfconn-user with these arguments of cargo, and copies those with these names into a
/// directory. Returns their paths in the order of the names.
pub(super) fn build<const N: usize>(
    workspace: &Workspace,
    architecture: &Architecture,
    arguments: &[&str],
    names: [&str; N],
) -> Result<[PathBuf; N]> {
    prepare(architecture)?;
    let target = architecture.rust_target();
    say(format!("building the programs for test machines of {}", architecture.name));
    let mut cargo = environment::cargo();
    cargo
        .args(arguments)
        .args(["--package", "selfconn-user", "--quiet", "--release", "--locked", "--target", &target])
        .args(["--message-format", "json-render-diagnostics", "--target-dir"])
        .arg(workspace.target.join("vm/build"))
        .current_dir(&workspace.root)
        // The release profile without LTO, which takes minutes.
        .envs([("CARGO_PROFILE_RELEASE_LTO", "off"), ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .stderr(std::process::Stdio::inherit());
    if !architecture.is_this_machines() {
        // Cargo, and the crates that compile C, if there are any.
        let name = target.to_uppercase().replace('-', "_");
        cargo.env(format!("CARGO_TARGET_{name}_LINKER"), architecture.linker);
        cargo.env(format!("CC_{}", target.replace('-', "_")), architecture.linker);
    }
    let output = cargo.output().context("start cargo")?;
    ensure!(output.status.success(), "cargo {}: {}", arguments.join(" "), output.status);
    let built = executables(&String::from_utf8(output.stdout).context("cargo's messages")?)?;
    let directory = super::directory(workspace).join(format!("programs-{}", architecture.debian));
    std::fs::create_dir_all(&directory).context("make the directory of programs")?;
    let mut paths = names.map(|name| directory.join(name));
    for (name, path) in names.into_iter().zip(&mut paths) {
        let (_, file) = built
            .iter()
            .find(|(built, _)| built == name)
            .with_context(|| format!("cargo built no {name}"))?;
        std::fs::copy(file, &*path).with_context(|| format!("copy {}", file.display()))?;
    }
    Ok(paths)
}

/// The names and files of the executables in cargo's messages.
fn executables(messages: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("parse cargo's messages")?;
        if let (Some(file), Some(name)) = (message["executable"].as_str(), message["target"]["name"].as_str())
        {
            programs.push((name.to_owned(), Path::new(file).to_owned()));
        }
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_in_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"anyhow"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"live","kind":["test"]},"executable":"/t/deps/live-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executables(messages).unwrap(), [("live".to_owned(), PathBuf::from("/t/deps/live-1"))]);
        assert!(executables("warning: x").is_err());
    }
}

//! Programs from the registry of crates, in pinned versions. Each is built once into `target/tools`, which takes
//! minutes.

use std::{fs, path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    environment::{self, plain},
    run,
    workspace::{Workspace, here},
};

/// A program from the registry.
pub(super) struct Tool {
    name: &'static str,
    version: &'static str,
    features: &'static [&'static str],
}

/// Licences of the crates. MIT or Apache-2.0.
pub(super) const CARGO_ABOUT: Tool =
    Tool { name: "cargo-about", version: "0.9.3", features: &["--features", "cli"] };

/// Bills of materials. Apache-2.0.
pub(super) const CARGO_CYCLONEDX: Tool = Tool { name: "cargo-cyclonedx", version: "0.5.9", features: &[] };

/// Debian packages. MIT.
pub(super) const CARGO_DEB: Tool = Tool { name: "cargo-deb", version: "3.8.0", features: &[] };

/// RPM packages. MIT.
pub(super) const CARGO_GENERATE_RPM: Tool =
    Tool { name: "cargo-generate-rpm", version: "0.21.1", features: &[] };

impl Tool {
    /// A command of it, in the repository. It is built if it is not there in this version.
    pub(super) fn command(&self, workspace: &Workspace) -> Result<Command> {
        let mut command = plain(self.get(workspace)?);
        command.current_dir(&workspace.root).env("CARGO", environment::cargo().get_program());
        Ok(command)
    }

    fn get(&self, workspace: &Workspace) -> Result<PathBuf> {
        let root = workspace.target.join("tools").join(format!("{}-{}", self.name, self.version));
        let program = root.join("bin").join(self.name);
        if !program.exists() {
            let mut cargo = environment::cargo();
            cargo.args(["install", "--quiet", "--locked", self.name, "--version", self.version]);
            cargo.args(self.features).arg("--root").arg(&root);
            cargo.env("CARGO_TARGET_DIR", root.join("build"));
            run::step(&format!("building {} {} into {}", self.name, self.version, here(&root)), &mut cargo)?;
            // Only the program is needed again.
            let _ = fs::remove_dir_all(root.join("build"));
        }
        Ok(program)
    }
}

//! QEMU: the one in PATH, or Debian's, unpacked with the libraries that are missing here. It is not installed: its
//! packages may conflict with what the machine has, such as a newer qemu-utils.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{architecture::Architecture, environment, packages, workspace::Workspace};

/// The emulator of an architecture.
#[derive(Debug)]
pub(super) struct Emulator {
    program: String,
    /// Where it is unpacked. `None`: it is in PATH.
    root: Option<PathBuf>,
}

impl Emulator {
    pub(super) fn find_or_fetch(workspace: &Workspace, architecture: &Architecture) -> Result<Self> {
        let program = architecture.emulator();
        if environment::is_in_path(&program) {
            return Ok(Self { program, root: None });
        }
        let root = super::directory(workspace).join(&program);
        let unfinished = root.with_extension("unfinished");
        if !program_in(&root, &program).is_file() {
            let missing = packages::missing_with_dependencies(&[architecture.emulator_package])?;
            packages::unpack(&missing.iter().map(String::as_str).collect::<Vec<_>>(), &unfinished)?;
            fs::rename(&unfinished, &root).with_context(|| format!("rename {}", unfinished.display()))?;
        }
        Ok(Self { program, root: Some(root) })
    }

    /// QEMU finds its firmware beside itself.
    pub(super) fn command(&self) -> Command {
        let Some(root) = &self.root else { return environment::plain(&self.program) };
        let mut command = environment::plain(program_in(root, &self.program));
        let libraries = ["usr/lib", "lib"].map(|folder| packages::libraries_in(&root.join(folder)));
        command.env("LD_LIBRARY_PATH", libraries.map(|path| path.display().to_string()).join(":"));
        command
    }
}

fn program_in(root: &Path, program: &str) -> PathBuf {
    root.join("usr/bin").join(program)
}

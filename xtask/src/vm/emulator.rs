//! QEMU: the one in PATH, or Debian's, unpacked with the libraries that are missing here. It is not installed: its
//! packages may conflict with what the machine has, such as a newer qemu-utils.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{environment, packages, workspace::Workspace};

const PROGRAM: &str = "qemu-system-x86_64";

const PACKAGE: &str = "qemu-system-x86";

/// The emulator.
#[derive(Debug)]
pub(super) struct Emulator {
    /// Where it is unpacked. `None`: it is in PATH.
    root: Option<PathBuf>,
}

impl Emulator {
    pub(super) fn find_or_fetch(workspace: &Workspace) -> Result<Self> {
        if environment::is_in_path(PROGRAM) {
            return Ok(Self { root: None });
        }
        let directory = super::directory(workspace);
        let (root, unfinished) = (directory.join("qemu"), directory.join("qemu.unfinished"));
        if !program_in(&root).is_file() {
            let missing = packages::missing_with_dependencies(PACKAGE)?;
            packages::unpack(&missing.iter().map(String::as_str).collect::<Vec<_>>(), &unfinished)?;
            fs::rename(&unfinished, &root).with_context(|| format!("rename {}", unfinished.display()))?;
        }
        Ok(Self { root: Some(root) })
    }

    /// QEMU finds its firmware beside itself.
    pub(super) fn command(&self) -> Command {
        let Some(root) = &self.root else { return environment::plain(PROGRAM) };
        let mut command = environment::plain(program_in(root));
        let libraries = ["usr/lib", "lib"].map(|folder| packages::libraries_in(&root.join(folder)));
        command.env("LD_LIBRARY_PATH", libraries.map(|path| path.display().to_string()).join(":"));
        command
    }
}

fn program_in(root: &Path) -> PathBuf {
    root.join("usr/bin").join(PROGRAM)
}

//! Python packages in a virtual environment of their own, in these versions.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{environment::plain, packages, run, workspace::Workspace};

/// The interpreter, and what makes virtual environments.
const PROGRAMS: [(&str, &str); 2] =
    [("/usr/bin/python3", "python3"), ("/usr/share/doc/python3-venv", "python3-venv")];

/// Packages that are installed together, each with its version.
pub(super) struct Requirements {
    /// Options of `pip install`.
    pub(super) options: &'static [&'static str],
    pub(super) packages: &'static [&'static str],
}

pub(super) struct PythonEnvironment {
    interpreter: PathBuf,
}

impl PythonEnvironment {
    /// Makes the environment with this name, unless it is there with these packages.
    pub(super) fn find_or_make(
        workspace: &Workspace,
        name: &str,
        requirements: &[Requirements],
    ) -> Result<Self> {
        let directory = workspace.target.join("operations").join(name);
        let environment = Self { interpreter: directory.join("bin/python") };
        let wanted: Vec<&str> = requirements.iter().flat_map(|wanted| wanted.packages).copied().collect();
        let (mark, wanted) = (directory.join("installed"), wanted.join(" "));
        if fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) {
            return Ok(environment);
        }
        packages::install_programs(&PROGRAMS)?;
        let mut make = plain("/usr/bin/python3");
        make.args(["-m", "venv", "--clear"]).arg(&directory);
        run::step(&format!("making a virtual environment for {name}"), &mut make)?;
        for Requirements { options, packages } in requirements {
            let mut pip = environment.command();
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
            pip.arg("--only-binary=:all:").args(*options).args(*packages);
            run::step(&format!("installing {}", packages.join(" ")), &mut pip)?;
        }
        fs::write(&mark, wanted).with_context(|| format!("write {}", mark.display()))?;
        Ok(environment)
    }

    /// The interpreter, without arguments.
    pub(super) fn command(&self) -> Command {
        plain(&self.interpreter)
    }

    /// The interpreter with a script.
    pub(super) fn script(&self, path: &Path) -> Command {
        let mut command = self.command();
        command.arg(path);
        command
    }
}

//! Validates the manifests with the schemas of several versions of Kubernetes and of the Prometheus operator, before and
//! after kustomize. The tools are Python packages in a virtual environment of their own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{environment::plain, packages, run, workspace::Workspace};

/// The interpreter, and what makes virtual environments.
const PROGRAMS: [(&str, &str); 2] =
    [("/usr/bin/python3", "python3"), ("/usr/share/doc/python3-venv", "python3-venv")];

/// The schemas of Kubernetes and of the Prometheus operator, and what the next one needs.
const SCHEMAS: [&str; 3] =
    ["kubernetes-validate==1.37.0", "cloudcoil-models-prometheus-operator==0.80.1.0", "cffi==2.1.1"];

/// kustomize as a library. It asks for a newer Python than distributions have, and does not need it.
const KUSTOMIZE: &str = "pykustomize==0.1.4";

pub(crate) struct Validator {
    python: PathBuf,
}

impl Validator {
    /// Makes the virtual environment, unless it is there with these versions.
    pub(crate) fn find_or_install(workspace: &Workspace) -> Result<Self> {
        let directory = workspace.target.join("operations/kubernetes");
        let validator = Self { python: directory.join("bin/python") };
        let (mark, wanted) = (directory.join("installed"), format!("{} {KUSTOMIZE}", SCHEMAS.join(" ")));
        if fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) {
            return Ok(validator);
        }
        packages::install_programs(&PROGRAMS)?;
        let mut make = plain("/usr/bin/python3");
        make.args(["-m", "venv", "--clear"]).arg(&directory);
        run::step("making a virtual environment for the validator", &mut make)?;
        validator.install(&[], &SCHEMAS)?;
        validator.install(&["--no-deps", "--ignore-requires-python"], &[KUSTOMIZE])?;
        fs::write(&mark, wanted).with_context(|| format!("write {}", mark.display()))?;
        Ok(validator)
    }

    fn install(&self, options: &[&str], names: &[&str]) -> Result<()> {
        let mut pip = plain(&self.python);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]);
        run::step(&format!("installing {}", names.join(" ")), pip.args(options).args(names))
    }

    pub(super) fn takes_the_manifests(&self, workspace: &Workspace) -> Result<String> {
        let mut validate = plain(&self.python);
        validate.arg(workspace.root.join("xtask/src/operations/kubernetes/validate.py"));
        validate.arg(workspace.root.join("packaging")).arg(workspace.root.join("docs/install.md"));
        Ok(run::output(&mut validate)?.trim().to_owned())
    }

    /// The objects in a manifest.
    pub(crate) fn objects(&self, manifest: &Path) -> Result<Vec<Value>> {
        const TO_JSON: &str =
            "import json, sys, yaml; json.dump(list(yaml.safe_load_all(sys.stdin)), sys.stdout)";
        let text = fs::read(manifest).with_context(|| format!("read {}", manifest.display()))?;
        let json = run::filter(plain(&self.python).args(["-c", TO_JSON]), &text)?;
        serde_json::from_slice(&json).with_context(|| format!("parse {}", manifest.display()))
    }
}

#[cfg(test)]
mod tests {
    use crate::workspace::Workspace;

    #[test]
    fn the_daemon_set_names_the_image_of_this_version() {
        let manifest = Workspace::find().unwrap().root.join("packaging/kubernetes/daemonset.yaml");
        let text = std::fs::read_to_string(manifest).unwrap();
        let image = text.lines().find_map(|line| line.trim().strip_prefix("image: ")).unwrap();
        assert_eq!(image, concat!("selfconn:", env!("CARGO_PKG_VERSION")));
    }
}

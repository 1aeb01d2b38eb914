//! Validates the manifests with the schemas of several versions of Kubernetes and of the Prometheus operator, before
//! and after kustomize. The tools are Python packages in a virtual environment of their own.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::python::{PythonEnvironment, Requirements};
use crate::{environment, run, workspace::Workspace};

const REQUIREMENTS: [Requirements; 2] = [
    // The schemas of Kubernetes and of the Prometheus operator, and what the next one needs.
    Requirements {
        options: &[],
        packages: &[
            "kubernetes-validate==1.37.0",
            "cloudcoil-models-prometheus-operator==0.80.1.0",
            "cffi==2.1.1",
        ],
    },
    // kustomize as a library. It asks for a newer Python than distributions have, and does not need it.
    Requirements { options: &["--no-deps", "--ignore-requires-python"], packages: &["pykustomize==0.1.4"] },
];

pub(crate) struct Validator {
    python: PythonEnvironment,
}

impl Validator {
    pub(crate) fn find_or_install(workspace: &Workspace) -> Result<Self> {
        Ok(Self { python: PythonEnvironment::find_or_make(workspace, "kubernetes", &REQUIREMENTS)? })
    }

    /// Validates the manifests, and what kustomize makes of them if [`skipped`] finds a kustomize.
    pub(super) fn takes_the_manifests(&self, workspace: &Workspace) -> Result<String> {
        let script = workspace.root.join("xtask/src/operations/kubernetes/validate.py");
        let mut validate = self.python.script(&script);
        validate.arg(workspace.root.join("packaging"));
        if skipped().is_none() {
            validate.arg(workspace.root.join("docs/install.md"));
        }
        Ok(run::output(&mut validate)?.trim().to_owned())
    }

    /// The objects in a manifest.
    pub(crate) fn objects(&self, manifest: &Path) -> Result<Vec<Value>> {
        const TO_JSON: &str =
            "import json, sys, yaml; json.dump(list(yaml.safe_load_all(sys.stdin)), sys.stdout)";
        let text = fs::read(manifest).with_context(|| format!("read {}", manifest.display()))?;
        let json = run::filter(self.python.command().args(["-c", TO_JSON]), &text)?;
        serde_json::from_slice(&json).with_context(|| format!("parse {}", manifest.display()))
    }
}

/// What can't be validated here, with the reason: the library is for x86-64 only, and `kubectl` has a kustomize, too.
pub(super) fn skipped() -> Option<String> {
    let has_kustomize = cfg!(target_arch = "x86_64") || environment::is_in_path("kubectl");
    (!has_kustomize).then(|| {
        "the manifests after kustomize: there is no kubectl in PATH: install kubectl 1.21 or newer".to_owned()
    })
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

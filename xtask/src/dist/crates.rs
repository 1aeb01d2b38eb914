//! The crates that are in the binary: by cargo's own account, for this host what user space is made of, and for BPF
//! what the embedded programs are made of.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::tool;
use crate::{environment, workspace::Workspace};

/// A package and a target for which it, and what it depends on, is compiled.
const ROOTS: [(&str, &str); 2] = [("selfconn-user", "HOST"), ("selfconn-ebpf", "bpfel-unknown-none")];

/// A crate.
#[derive(Clone, Debug)]
pub(super) struct Crate {
    pub(super) name: String,
    pub(super) version: String,
    /// An SPDX expression.
    pub(super) licence: Option<String>,
    /// Where its sources are on this machine.
    pub(super) directory: PathBuf,
    /// SHA-256 of the crate as the registry has it; none for our own.
    pub(super) checksum: Option<String>,
    /// The ids of those it depends on.
    pub(super) depends: BTreeSet<String>,
}

/// All of them, by cargo's ids.
#[derive(Debug, Default)]
pub(super) struct Crates {
    pub(super) all: BTreeMap<String, Crate>,
}

impl Crates {
    /// Asks cargo.
    pub(super) fn of(workspace: &Workspace) -> Result<Self> {
        let lock = fs::read_to_string(workspace.root.join("Cargo.lock")).context("read Cargo.lock")?;
        let checksums = checksums(&lock);
        let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let mut this = Self::default();
        for (root, target) in ROOTS {
            let target = if target == "HOST" { &host } else { target };
            let mut cargo = environment::cargo();
            cargo.args(["metadata", "--format-version", "1", "--locked", "--filter-platform", target]);
            cargo.current_dir(&workspace.root);
            let metadata: Value =
                serde_json::from_str(&tool::run(cargo)?).context("read cargo's metadata")?;
            this.add(root, &metadata, &checksums).with_context(|| format!("the crates of {root}"))?;
        }
        Ok(this)
    }

    /// Adds what this package is made of. What only builds or tests it is not in it.
    fn add(
        &mut self,
        root: &str,
        metadata: &Value,
        checksums: &BTreeMap<(String, String), String>,
    ) -> Result<()> {
        let list = |value: &'_ Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let packages = list(&metadata["packages"]);
        let nodes = list(&metadata["resolve"]["nodes"]);
        let root =
            packages.iter().find(|package| package["name"] == root).context("cargo has no such package")?;
        let mut wanted = vec![text(&root["id"]).context("a package without an id")?];
        while let Some(id) = wanted.pop() {
            let package = packages.iter().find(|package| package["id"] == id.as_str());
            let node = nodes.iter().find(|node| node["id"] == id.as_str());
            let (package, node) = package.zip(node).with_context(|| format!("{id} is not resolved"))?;
            let depends: BTreeSet<String> = list(&node["deps"])
                .iter()
                .filter(|dep| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()))
                .filter_map(|dep| text(&dep["pkg"]))
                .collect();
            let name = text(&package["name"]).context("a package without a name")?;
            let version = text(&package["version"]).context("a package without a version")?;
            let manifest = text(&package["manifest_path"]).context("a package without a manifest")?;
            let found = self.all.entry(id).or_insert_with(|| Crate {
                licence: text(&package["license"]),
                directory: PathBuf::from(manifest).parent().map(Into::into).unwrap_or_default(),
                checksum: checksums.get(&(name.clone(), version.clone())).cloned(),
                depends: BTreeSet::new(),
                name,
                version,
            });
            let new: Vec<_> = depends.difference(&found.depends).cloned().collect();
            found.depends.extend(depends);
            wanted.extend(new);
        }
        Ok(())
    }

    /// Those of others: with a checksum, from a registry.
    pub(super) fn foreign(&self) -> impl Iterator<Item = &Crate> {
        self.all.values().filter(|one| one.checksum.is_some())
    }
}

/// The checksums in a Cargo.lock, by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let field = |paragraph: &str, key: &str| {
        let value = paragraph.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "))?;
        Some(value.trim_matches('"').to_owned())
    };
    let of = |paragraph: &str| {
        let key = (field(paragraph, "name")?, field(paragraph, "version")?);
        Some((key, field(paragraph, "checksum")?))
    };
    lock.split("[[package]]").filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn checksums_are_those_of_the_registry() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nsource = \"registry\"\n\
                    checksum = \"abc\"\ndependencies = [\n \"b\",\n]\n\n[[package]]\nname = \"ours\"\nversion = \"2.0.0\"\n";
        let expected = BTreeMap::from([(("a".to_owned(), "1.0.0".to_owned()), "abc".to_owned())]);
        assert_eq!(checksums(lock), expected);
    }

    #[test]
    fn what_only_builds_or_tests_is_left_out_and_a_crate_is_there_once() {
        let package = |name: &str| json!({"id": name, "name": name, "version": "1.0.0", "license": "MIT", "manifest_path": "/r/Cargo.toml"});
        let dep = |name: &str, kind: Value| json!({"pkg": name, "dep_kinds": [{"kind": kind}]});
        let packages = ["root", "a", "b", "build", "dev"].map(package);
        let metadata = json!({
            "packages": packages,
            "resolve": {"nodes": [
                {"id": "root", "deps": [
                    dep("a", Value::Null), dep("b", Value::Null), dep("build", json!("build")), dep("dev", json!("dev"))
                ]},
                {"id": "a", "deps": [dep("b", Value::Null)]},
                {"id": "b", "deps": []},
            ]},
        });
        let mut crates = Crates::default();
        crates.add("root", &metadata, &BTreeMap::new()).unwrap();
        assert_eq!(crates.all.keys().collect::<Vec<_>>(), ["a", "b", "root"]);
        assert_eq!(crates.all["a"].depends, BTreeSet::from(["b".to_owned()]));
        assert!(crates.add("none", &metadata, &BTreeMap::new()).is_err());
    }
}

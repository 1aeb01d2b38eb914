//! The bill of materials, in CycloneDX's form (ECMA-424), version 1.5: what scanners of vulnerabilities read. Of our
//! own making, for cargo's plug-in for it sees one target, and our binary is made for two.

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    crates::{Crate, Crates},
    release::Release,
};

/// The bill, as a file.
pub(super) fn of(release: &Release, crates: &Crates) -> Result<Vec<u8>> {
    let timestamp = release.date("+%Y-%m-%dT%H:%M:%SZ")?;
    let mut bytes = serde_json::to_vec_pretty(&bill(release, crates, &timestamp))?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn bill(release: &Release, crates: &Crates, timestamp: &str) -> Value {
    let reference = |id: &String| crates.all.get(id).map(purl);
    // The binary is what user space is built to; the programs are in it, so it depends on them.
    let ours = |one: &&Crate| one.checksum.is_none();
    let of_root = crates.all.values().filter(ours).flat_map(|one| &one.depends).filter_map(reference);
    let mut of_root: Vec<String> = of_root.filter(|purl| !purl.starts_with("pkg:cargo/selfconn-")).collect();
    of_root.sort();
    of_root.dedup();
    let root = format!("pkg:generic/selfconn@{}", release.version);
    let mut dependencies = vec![json!({"ref": root, "dependsOn": of_root})];
    dependencies.extend(crates.foreign().map(|one| {
        json!({"ref": purl(one), "dependsOn": one.depends.iter().filter_map(reference).collect::<Vec<_>>()})
    }));
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": timestamp,
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": "selfconn",
                "version": release.version,
                "purl": root,
                "licenses": [{"expression": "(MIT OR Apache-2.0) AND GPL-2.0-only"}],
            },
        },
        "components": crates.foreign().map(component).collect::<Vec<_>>(),
        "dependencies": dependencies,
    })
}

fn component(one: &Crate) -> Value {
    let mut component = json!({
        "type": "library",
        "bom-ref": purl(one),
        "name": one.name,
        "version": one.version,
        "purl": purl(one),
    });
    if let Some(licence) = &one.licence {
        component["licenses"] = json!([{"expression": spdx(licence)}]);
    }
    if let Some(checksum) = &one.checksum {
        component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
    }
    component
}

fn purl(one: &Crate) -> String {
    format!("pkg:cargo/{}@{}", one.name, one.version)
}

/// Cargo takes a slash for OR; SPDX doesn't.
fn spdx(licence: &str) -> String {
    licence.replace('/', " OR ")
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::PathBuf};

    use super::*;
    use crate::dist::release::Architecture;

    #[test]
    fn names_each_crate_and_what_it_depends_on() {
        let one = |name: &str, checksum: Option<&str>, depends: &[&str]| Crate {
            name: name.into(),
            version: "1.0.0".into(),
            licence: Some("MIT/Apache-2.0".into()),
            directory: PathBuf::new(),
            checksum: checksum.map(Into::into),
            depends: depends.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>(),
        };
        let all = [
            ("user", one("selfconn-user", None, &["a", "ebpf"])),
            ("ebpf", one("selfconn-ebpf", None, &["b"])),
            ("a", one("a", Some("1a"), &["b"])),
            ("b", one("b", Some("1b"), &[])),
        ];
        let crates = Crates { all: all.map(|(id, one)| (id.to_owned(), one)).into() };
        let architecture = Architecture { rust: "x86_64", debian: "amd64" };
        let bill = bill(&Release { version: "0.1.0".into(), epoch: 0, architecture }, &crates, "");
        let names: Vec<_> = bill["components"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
        assert_eq!(names, ["a", "b"], "our own are the product, not its parts");
        assert_eq!(bill["components"][0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(bill["components"][0]["hashes"][0]["content"], "1a");
        let dependencies = json!([
            {"ref": "pkg:generic/selfconn@0.1.0", "dependsOn": ["pkg:cargo/a@1.0.0", "pkg:cargo/b@1.0.0"]},
            {"ref": "pkg:cargo/a@1.0.0", "dependsOn": ["pkg:cargo/b@1.0.0"]},
            {"ref": "pkg:cargo/b@1.0.0", "dependsOn": []},
        ]);
        assert_eq!(bill["dependencies"], dependencies);
    }
}

//! The digests of an archive of images. By its digest a registry hands out exactly these bytes, so a signature of the
//! digest covers the image.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{architecture::Architecture, environment::plain, run};

/// The file in `target/dist`.
pub(super) const FILE: &str = "IMAGE-DIGESTS";

#[derive(Debug, PartialEq)]
pub(super) struct Digests {
    /// Of the image, or of the list of images.
    top: String,
    /// Of each image in the list, with the architecture that it names.
    listed: Vec<(String, String)>,
}

impl Digests {
    /// Reads them from an archive in OCI's format.
    pub(super) fn of_archive(archive: &Path) -> Result<Self> {
        let blob = |path: &str| -> Result<Value> {
            let mut tar = plain("tar");
            let text = run::output(tar.args(["--extract", "--to-stdout", "--file"]).arg(archive).arg(path))?;
            serde_json::from_str(&text).with_context(|| format!("parse {path}"))
        };
        Self::read(&blob).with_context(|| format!("read {}", archive.display()))
    }

    /// `blob` returns a file of the archive.
    fn read(blob: &dyn Fn(&str) -> Result<Value>) -> Result<Self> {
        let text =
            |value: &Value| value.as_str().map(str::to_owned).context("a digest or platform is missing");
        let index = blob("index.json")?;
        let entries = index["manifests"].as_array().map_or(&[][..], Vec::as_slice);
        ensure!(entries.len() == 1, "it has {} entries, not one", entries.len());
        let top = text(&entries[0]["digest"])?;
        let manifest = blob(&format!("blobs/{}", top.replace(':', "/")))?;
        let images = manifest["manifests"].as_array().map_or(&[][..], Vec::as_slice);
        let listed = images
            .iter()
            .map(|image| Ok((text(&image["digest"])?, text(&image["platform"]["architecture"])?)));
        let mut listed = listed.collect::<Result<Vec<_>>>()?;
        listed.sort_by(|(_, one), (_, other)| one.cmp(other));
        Ok(Self { top, listed })
    }

    /// The list has an image for each of these architectures, and no others.
    pub(super) fn are_for(&self, architectures: &[&Architecture]) -> Result<()> {
        let listed: Vec<_> = self.listed.iter().map(|(_, architecture)| architecture.as_str()).collect();
        let mut wanted: Vec<_> = architectures.iter().map(|architecture| architecture.debian).collect();
        wanted.sort_unstable();
        ensure!(listed == wanted, "the list is for {listed:?}");
        Ok(())
    }

    /// A line for each: the digest, and what it is of. The first one is of what is pushed.
    pub(super) fn render(&self, version: &str) -> String {
        let mut lines = format!("{}  selfconn:{version}\n", self.top);
        for (digest, architecture) in &self.listed {
            lines += &format!("{digest}  selfconn:{version} linux/{architecture}\n");
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::architecture::{AARCH64, X86_64};

    fn read(files: &[(&str, Value)]) -> Result<Digests> {
        Digests::read(&|path| {
            let file = files.iter().find(|(name, _)| *name == path);
            file.map(|(_, content)| content.clone()).with_context(|| format!("no {path}"))
        })
    }

    #[test]
    fn a_list_has_its_digest_and_those_of_its_images() {
        let platform = |architecture: &str| json!({ "architecture": architecture, "os": "linux" });
        let files = [
            ("index.json", json!({ "manifests": [{ "digest": "sha256:aa" }] })),
            (
                "blobs/sha256/aa",
                json!({ "manifests": [
                    { "digest": "sha256:cc", "platform": platform("arm64") },
                    { "digest": "sha256:bb", "platform": platform("amd64") },
                ] }),
            ),
        ];
        let digests = read(&files).unwrap();
        assert_eq!(
            digests.render("1.2.3"),
            "sha256:aa  selfconn:1.2.3\nsha256:bb  selfconn:1.2.3 linux/amd64\n\
             sha256:cc  selfconn:1.2.3 linux/arm64\n"
        );
        digests.are_for(&[&AARCH64, &X86_64]).unwrap();
        let error = digests.are_for(&[&X86_64]).unwrap_err().to_string();
        assert_eq!(error, "the list is for [\"amd64\", \"arm64\"]");
    }

    #[test]
    fn an_image_alone_has_one_digest() {
        let image = ("blobs/sha256/aa", json!({ "config": {}, "layers": [] }));
        let index = |entries: Value| ("index.json", json!({ "manifests": entries }));
        let digests = read(&[index(json!([{ "digest": "sha256:aa" }])), image.clone()]).unwrap();
        assert_eq!(digests.render("1.2.3"), "sha256:aa  selfconn:1.2.3\n");
        assert!(read(&[index(json!([])), image.clone()]).is_err(), "an empty archive");
        assert!(read(&[index(json!([{ "digest": "sha256:bb" }])), image]).is_err(), "another image");
    }
}

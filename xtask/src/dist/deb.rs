//! The Debian package, made with dpkg's own tools.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use super::{ReleaseParts, tree::Tree};
use crate::{environment::plain, run};

/// The scripts that dpkg runs at installation and removal.
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// Files that an administrator may edit.
const CONFIGURATION: [&str; 1] = ["etc/logrotate.d/selfconn"];

const DOCS: &str = "usr/share/doc/selfconn";

/// A package file.
#[derive(Debug)]
pub(crate) struct Deb {
    pub(crate) file: PathBuf,
}

impl Deb {
    /// Builds this revision of it into this directory.
    pub(crate) fn build(parts: &ReleaseParts, revision: u32, directory: &Path) -> Result<Self> {
        let release = &parts.release;
        let version = format!("{}-{revision}", release.version);
        let control = fs::read_to_string(parts.root.join("packaging/debian/control"));
        let control = control.context("read the control file")?;
        let tree = Tree::empty(&parts.work.join("deb"))?;
        fill(&tree, parts, &version, field(&control, "Maintainer").context("there is no maintainer")?)?;

        let files = tree.files()?;
        let mut size = 0;
        for file in &files {
            size += fs::metadata(tree.root.join(file))?.len().div_ceil(1024);
        }
        let control = control
            .replace("@VERSION@", &version)
            .replace("@ARCHITECTURE@", release.architecture.debian)
            .replace("@SIZE@", &size.to_string());
        tree.write("DEBIAN/control", 0o644, control.as_bytes())?;
        tree.write("DEBIAN/md5sums", 0o644, md5sums(&tree, &files)?.as_bytes())?;
        let configuration: String = CONFIGURATION.iter().map(|path| format!("/{path}\n")).collect();
        tree.write("DEBIAN/conffiles", 0o644, configuration.as_bytes())?;
        for script in SCRIPTS {
            let source = parts.root.join("packaging/debian").join(script);
            tree.copy(&format!("DEBIAN/{script}"), 0o755, &source)?;
        }

        let file = directory.join(format!("selfconn_{version}_{}.deb", release.architecture.debian));
        let mut dpkg = plain("dpkg-deb");
        dpkg.args(["--root-owner-group", "-Zxz", "--build"]).arg(&tree.root).arg(&file);
        // dpkg-deb lowers later times to this one.
        dpkg.env("SOURCE_DATE_EPOCH", release.epoch.to_string());
        run::output(&mut dpkg)?;
        Ok(Self { file })
    }

    /// Runs lintian, which must find no error and no warning.
    pub(crate) fn lint(&self) -> Result<()> {
        let mut lintian = plain("lintian");
        lintian.args(["--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0"]);
        lintian.arg(&self.file);
        run::step("checking the package with lintian", &mut lintian)
    }
}

/// Writes all files of the package.
fn fill(tree: &Tree, parts: &ReleaseParts, version: &str, maintainer: &str) -> Result<()> {
    let packaging = |path: &str| parts.root.join("packaging").join(path);
    tree.copy("usr/bin/selfconn", 0o755, &parts.binary)?;
    let unit = "usr/lib/systemd/system/selfconn.service";
    tree.copy(unit, 0o644, &packaging("systemd/selfconn.service"))?;
    tree.copy(CONFIGURATION[0], 0o644, &packaging("logrotate/selfconn"))?;
    for (name, path) in [
        ("bash/selfconn", "usr/share/bash-completion/completions/selfconn"),
        ("zsh/_selfconn", "usr/share/zsh/vendor-completions/_selfconn"),
        ("fish/selfconn.fish", "usr/share/fish/vendor_completions.d/selfconn.fish"),
    ] {
        tree.copy(path, 0o644, &parts.pages.join(name))?;
    }
    for (name, path) in parts.man_pages()? {
        let page = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        tree.write_gz(&format!("usr/share/man/man1/{name}.gz"), &page)?;
    }
    for (name, path) in parts.examples()? {
        tree.copy(&format!("usr/share/selfconn/{name}"), 0o644, &path)?;
    }
    for (name, path) in parts.documents()? {
        tree.copy(&format!("{DOCS}/{name}"), 0o644, &path)?;
    }
    tree.copy("usr/share/lintian/overrides/selfconn", 0o644, &packaging("debian/lintian-overrides"))?;
    tree.copy(&format!("{DOCS}/copyright"), 0o644, &packaging("debian/copyright"))?;
    tree.write_gz(&format!("{DOCS}/THIRD-PARTY.gz"), parts.notices.as_bytes())?;
    let changes = fs::read(parts.root.join("CHANGELOG.md")).context("read CHANGELOG.md")?;
    tree.write_gz(&format!("{DOCS}/changelog.gz"), &changes)?;
    let date = parts.release.date("+%a, %d %b %Y %H:%M:%S +0000")?;
    let of_debian = format!(
        "selfconn ({version}) unstable; urgency=medium\n\n  * The changes are in changelog.gz beside this file.\n\n \
         -- {maintainer}  {date}\n"
    );
    tree.write_gz(&format!("{DOCS}/changelog.Debian.gz"), of_debian.as_bytes())
}

fn md5sums(tree: &Tree, files: &[PathBuf]) -> Result<String> {
    let configuration = CONFIGURATION.map(PathBuf::from);
    let mut md5sum = plain("md5sum");
    md5sum.args(files.iter().filter(|file| !configuration.contains(file))).current_dir(&tree.root);
    let sums = run::output(&mut md5sum)?;
    // md5sum escapes such a name, and dpkg can't read that.
    ensure!(!sums.contains('\\'), "a file's name has to be escaped: {sums}");
    Ok(sums)
}

fn field<'a>(control: &'a str, name: &str) -> Option<&'a str> {
    control.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

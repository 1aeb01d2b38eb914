//! The Debian package, put together with dpkg's own tools.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use super::{Kit, notices, tool, tree::Tree};
use crate::{
    environment::plain,
    progress::{self, say},
};

/// What dpkg runs as the package comes and goes.
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// What an administrator may have edited.
const CONFIGURATION: [&str; 1] = ["etc/logrotate.d/selfconn"];

const DOCS: &str = "usr/share/doc/selfconn";

/// A package, built.
#[derive(Debug)]
pub(crate) struct Deb {
    pub(crate) file: PathBuf,
}

impl Deb {
    /// Builds this revision of it into this directory.
    pub(crate) fn build(kit: &Kit, revision: u32, directory: &Path) -> Result<Self> {
        let release = &kit.release;
        let version = format!("{}-{revision}", release.version);
        let control = fs::read_to_string(kit.root.join("packaging/debian/control"));
        let control = control.context("read the control file")?;
        let tree = Tree::empty(&kit.work.join("deb"))?;
        fill(&tree, kit, &version, field(&control, "Maintainer").context("there is no maintainer")?)?;

        let files = tree.files()?;
        let mut size = 0;
        for file in &files {
            size += fs::metadata(tree.root.join(file))?.len().div_ceil(1024);
        }
        let control = control
            .replace("@VERSION@", &version)
            .replace("@ARCHITECTURE@", release.architecture.debian)
            .replace("@SIZE@", &size.to_string())
            .replace("@DEPENDS@", &libraries(kit)?);
        tree.write("DEBIAN/control", 0o644, control.as_bytes())?;
        tree.write("DEBIAN/md5sums", 0o644, md5sums(&tree, &files)?.as_bytes())?;
        let configuration: String = CONFIGURATION.iter().map(|path| format!("/{path}\n")).collect();
        tree.write("DEBIAN/conffiles", 0o644, configuration.as_bytes())?;
        for script in SCRIPTS {
            let source = kit.root.join("packaging/debian").join(script);
            tree.copy(&format!("DEBIAN/{script}"), 0o755, &source)?;
        }

        let file = directory.join(format!("selfconn_{version}_{}.deb", release.architecture.debian));
        let mut dpkg = plain("dpkg-deb");
        dpkg.args(["--root-owner-group", "-Zxz", "--build"]).arg(&tree.root).arg(&file);
        // Nothing in it is younger than the commit.
        dpkg.env("SOURCE_DATE_EPOCH", release.epoch.to_string());
        tool::run(dpkg)?;
        Ok(Self { file })
    }

    /// Shows it to lintian, which must have nothing to say against it.
    pub(crate) fn lint(&self) -> Result<()> {
        let mut lintian = plain("lintian");
        lintian.args(["--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0"]);
        lintian.arg(&self.file);
        progress::must("looking at the package with lintian", lintian)?;
        say("lintian has no error and no warning");
        Ok(())
    }
}

/// All that the package puts on a disk.
fn fill(tree: &Tree, kit: &Kit, version: &str, maintainer: &str) -> Result<()> {
    let packaging = |path: &str| kit.root.join("packaging").join(path);
    tree.copy("usr/bin/selfconn", 0o755, &kit.dynamic)?;
    let unit = "usr/lib/systemd/system/selfconn.service";
    tree.copy(unit, 0o644, &packaging("systemd/selfconn.service"))?;
    tree.copy(CONFIGURATION[0], 0o644, &packaging("logrotate/selfconn"))?;
    for (name, path) in [
        ("bash/selfconn", "usr/share/bash-completion/completions/selfconn"),
        ("zsh/_selfconn", "usr/share/zsh/vendor-completions/_selfconn"),
        ("fish/selfconn.fish", "usr/share/fish/vendor_completions.d/selfconn.fish"),
    ] {
        tree.copy(path, 0o644, &kit.pages.join(name))?;
    }
    for (name, path) in kit.man_pages()? {
        let page = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        tree.write_gz(&format!("usr/share/man/man1/{name}.gz"), &page)?;
    }
    for (name, path) in kit.examples()? {
        tree.copy(&format!("usr/share/selfconn/{name}"), 0o644, &path)?;
    }
    for (name, path) in kit.documents()? {
        tree.copy(&format!("{DOCS}/{name}"), 0o644, &path)?;
    }
    tree.copy("usr/share/lintian/overrides/selfconn", 0o644, &packaging("debian/lintian-overrides"))?;
    tree.copy(&format!("{DOCS}/copyright"), 0o644, &packaging("debian/copyright"))?;
    tree.write_gz(&format!("{DOCS}/THIRD-PARTY.gz"), notices::of(&kit.crates)?.as_bytes())?;
    let changes = fs::read(kit.root.join("CHANGELOG.md")).context("read CHANGELOG.md")?;
    tree.write_gz(&format!("{DOCS}/changelog.gz"), &changes)?;
    let date = kit.release.date("+%a, %d %b %Y %H:%M:%S +0000")?;
    let of_debian = format!(
        "selfconn ({version}) unstable; urgency=medium\n\n  * What changed is in changelog.gz beside this file.\n\n \
         -- {maintainer}  {date}\n"
    );
    tree.write_gz(&format!("{DOCS}/changelog.Debian.gz"), of_debian.as_bytes())
}

/// The packages of the libraries that the binary was linked with, each in the version it needs at least.
fn libraries(kit: &Kit) -> Result<String> {
    let tree = Tree::empty(&kit.work.join("shlibdeps"))?;
    // It reads the description of a source package, of which nothing counts here.
    tree.write("debian/control", 0o644, b"Source: selfconn\n\nPackage: selfconn\nArchitecture: any\n")?;
    let mut dpkg = plain("dpkg-shlibdeps");
    dpkg.args(["-O", "--warnings=0"]).arg(&kit.dynamic).current_dir(&tree.root);
    let said = tool::run(dpkg)?;
    let depends = said.trim().strip_prefix("shlibs:Depends=");
    depends.map(str::to_owned).with_context(|| format!("dpkg-shlibdeps says {said:?}"))
}

fn md5sums(tree: &Tree, files: &[PathBuf]) -> Result<String> {
    let configuration = CONFIGURATION.map(PathBuf::from);
    let mut md5sum = plain("md5sum");
    md5sum.args(files.iter().filter(|file| !configuration.contains(file))).current_dir(&tree.root);
    let sums = tool::run(md5sum)?;
    // A backslash would begin the line of a name that dpkg can't read.
    ensure!(!sums.contains('\\'), "a file's name has to be escaped: {sums}");
    Ok(sums)
}

fn field<'a>(control: &'a str, name: &str) -> Option<&'a str> {
    control.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

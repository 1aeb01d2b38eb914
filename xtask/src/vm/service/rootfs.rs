//! A Debian system: of this machine's own suite, so that what was linked here runs there; from this machine's own
//! archive; as little of it as has systemd and logrotate. Kept, for making it takes a minute.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use super::super::archive;
use crate::{
    environment::plain,
    fingerprint,
    progress::{self, say},
    workspace::here,
};

/// Beside what is essential.
const PACKAGES: &str = "systemd,systemd-sysv,logrotate,kmod,libgcc-s1";

/// Nobody reads them there, and memory is what they would take.
const LEFT_OUT: [&str; 4] =
    ["/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*"];

/// The system as an archive that a kernel unpacks.
pub(super) fn get(directory: &Path) -> Result<PathBuf> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let suite = suite.context("/etc/os-release names no release")?.trim_matches('"');
    let sources = archive::sources_of(suite)?;
    // Made anew when anything that it is made of is another.
    let made_of = format!("{sources}{PACKAGES}{LEFT_OUT:?}");
    let name = format!("{suite}-{}", &fingerprint::of_bytes(made_of.as_bytes())[..12]);
    let file = directory.join(format!("{name}.cpio"));
    if file.exists() {
        say(format!("using {}", here(&file)));
        return Ok(file);
    }
    let (list, tar, new) = (
        directory.join(format!("{name}.list")),
        directory.join(format!("{name}.tar")),
        directory.join(format!("{name}.cpio.new")),
    );
    fs::write(&list, sources).with_context(|| format!("write {}", list.display()))?;
    let mut mmdebstrap = plain("mmdebstrap");
    mmdebstrap.args(["--variant=minbase", "--include", PACKAGES]);
    for path in LEFT_OUT {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    mmdebstrap.arg(suite).arg(&tar).arg(&list);
    progress::must(&format!("making a Debian system: {suite}"), mmdebstrap)?;
    let mut bsdtar = plain("bsdtar");
    bsdtar.args(["--create", "--format=newc", "--file"]).arg(&new).arg(format!("@{}", tar.display()));
    let status = bsdtar.status().context("start bsdtar")?;
    ensure!(status.success(), "bsdtar: {status}");
    fs::remove_file(&tar).with_context(|| format!("remove {}", tar.display()))?;
    fs::rename(&new, &file).with_context(|| format!("write {}", file.display()))?;
    Ok(file)
}

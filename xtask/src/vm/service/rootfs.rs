//! A small Debian system with systemd, as an initramfs. It comes from this machine's archive, and is kept, because
//! making it takes a minute.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{super::apt, Format};
use crate::{
    environment::plain,
    fingerprint,
    run::{self, say},
    workspace::here,
};

/// Beside essential packages.
const PACKAGES: &str = "systemd,systemd-sysv,logrotate,kmod,jq";

/// Files that only take memory.
const LEFT_OUT: [&str; 4] =
    ["/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*"];

/// The system of this suite as a cpio archive, with rpm where it is needed.
pub(super) fn get(directory: &Path, suite: &str, format: Format) -> Result<PathBuf> {
    let sources = apt::sources_of(suite)?;
    let packages = if format == Format::Rpm { format!("{PACKAGES},rpm") } else { PACKAGES.to_owned() };
    // It is made again when one of its ingredients changes.
    let ingredients = format!("{sources}{packages}{LEFT_OUT:?}");
    let name = format!("{suite}-{}", &fingerprint::of_bytes(ingredients.as_bytes())[..12]);
    let path = |end: &str| directory.join(format!("{name}{end}"));
    let (file, new, list, tar) = (path(".cpio"), path(".cpio.new"), path(".list"), path(".tar"));
    if file.exists() {
        say(format!("using {}", here(&file)));
        return Ok(file);
    }
    fs::write(&list, sources).with_context(|| format!("write {}", list.display()))?;
    let mut mmdebstrap = plain("mmdebstrap");
    mmdebstrap.args(["--variant=minbase", "--include", &packages]);
    mmdebstrap.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    run::step(&format!("making a Debian system: {suite}"), mmdebstrap.arg(suite).args([&tar, &list]))?;
    let mut bsdtar = plain("bsdtar");
    bsdtar.args(["--create", "--format=newc", "--file"]).arg(&new).arg(format!("@{}", tar.display()));
    run::output(&mut bsdtar)?;
    fs::remove_file(&tar).with_context(|| format!("remove {}", tar.display()))?;
    fs::rename(&new, &file).with_context(|| format!("write {}", file.display()))?;
    Ok(file)
}

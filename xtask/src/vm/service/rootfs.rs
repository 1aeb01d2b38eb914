//! A small Debian system with systemd, as an initramfs. It comes from this machine's archive, and is kept, because
//! making it takes a minute. A system of another architecture is only unpacked here, because its programs don't run
//! here; the machine installs its packages when it boots.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{super::apt, Format};
use crate::{
    architecture::Architecture,
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

/// Options for a system that is only unpacked, with its packages.
const UNPACKED: [&str; 4] = [
    "--variant=extract",
    "--skip=essential/unlink,cleanup/apt/cache,cleanup/apt",
    "--include=?essential",
    "--include=init-system-helpers",
];

/// Installs the packages of a system that was only unpacked. dpkg has no record of any package, and everything is there
/// already, so that each script finds what it needs.
pub(super) const SECOND_STAGE: &str = "\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mkdir -p /var/lib/dpkg/updates /var/lib/dpkg/info
touch /var/lib/dpkg/status /var/lib/dpkg/available
[ -e /usr/bin/awk ] || ln -s mawk /usr/bin/awk
cd /var/cache/apt/archives
dpkg --force-depends --install base-passwd_*.deb base-files_*.deb
dpkg --force-depends --force-confnew --install *.deb || dpkg --configure --pending ||
    echo \"the packages are not installed\"
rm *.deb
cd /
umount /dev /proc
";

/// The system of this suite as a cpio archive, with rpm where it is needed.
pub(super) fn get(
    directory: &Path,
    suite: &str,
    format: Format,
    architecture: &Architecture,
) -> Result<PathBuf> {
    let sources = apt::sources_of(suite, architecture)?;
    let packages = if format == Format::Rpm { format!("{PACKAGES},rpm") } else { PACKAGES.to_owned() };
    let mut options = LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")).to_vec();
    options.push(format!("--include={packages}"));
    let of_variant: &[&str] =
        if architecture.is_this_machines() { &["--variant=minbase"] } else { &UNPACKED };
    options.extend(of_variant.iter().map(|option| (*option).to_owned()));
    options.extend(["--architectures".to_owned(), architecture.debian.to_owned()]);
    // It is made again when one of its ingredients changes.
    let ingredients = format!("{sources}{options:?}");
    let name =
        format!("{suite}-{}-{}", architecture.debian, &fingerprint::of_bytes(ingredients.as_bytes())[..12]);
    let path = |end: &str| directory.join(format!("{name}{end}"));
    let (file, new, list, tar) = (path(".cpio"), path(".cpio.new"), path(".list"), path(".tar"));
    if file.exists() {
        say(format!("using {}", here(&file)));
        return Ok(file);
    }
    fs::write(&list, sources).with_context(|| format!("write {}", list.display()))?;
    let mut mmdebstrap = plain("mmdebstrap");
    mmdebstrap.args(options);
    run::step(
        &format!("making a Debian system: {suite} for {}", architecture.name),
        mmdebstrap.arg(suite).args([&tar, &list]),
    )?;
    let mut bsdtar = plain("bsdtar");
    bsdtar.args(["--create", "--format=newc", "--file"]).arg(&new).arg(format!("@{}", tar.display()));
    run::output(&mut bsdtar)?;
    fs::remove_file(&tar).with_context(|| format!("remove {}", tar.display()))?;
    fs::rename(&new, &file).with_context(|| format!("write {}", file.display()))?;
    Ok(file)
}

//! A kernel to boot: its image and the modules that tests need, taken out of Debian packages. An unpacked
//! kernel is kept, with a note of what it is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::flavour::{Emulation, Flavour};
use crate::{environment::plain, packages::debs_in, run};

/// Modules of Debian's cloud kernels that tests need: the socket table, disturbances of the network, and a user of
/// sockets in the kernel. Some kernels have them built in, or don't have them.
const MODULES: [&str; 10] =
    ["tcp_diag", "sch_netem", "sch_tbf", "veth", "dummy", "vrf", "nfsv3", "sch_ingress", "cls_bpf", "fuse"];

/// The note in a kernel's directory. It is written last: without it the directory is not complete.
const NOTE: &str = "kernel.json";

/// A kernel that can be booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kernel {
    /// Its version, as people write it.
    pub(super) version: String,
    pub(super) image: PathBuf,
    /// Uncompressed module files, each after its dependencies.
    pub(super) modules: Vec<PathBuf>,
    #[serde(skip, default = "Flavour::usual")]
    pub(super) flavour: &'static Flavour,
    /// True for Debian's kernels: the tests know which features they must have.
    #[serde(skip)]
    pub(super) is_known: bool,
    /// The names that the modules were taken by. A kernel that was kept with other ones is taken out again.
    #[serde(default)]
    pub(super) module_names: Vec<String>,
}

impl Kernel {
    /// Its version, architecture and flavour.
    pub(super) fn label(&self) -> String {
        self.flavour.label(&self.version)
    }

    /// The kernel of this flavour in this directory, if it is complete. The directory is named by its package.
    pub(super) fn kept(directory: &Path, flavour: &'static Flavour) -> Option<Self> {
        let is_of_flavour =
            file_name(directory).split_once('_').is_some_and(|(package, _)| flavour.has_package(package));
        let note = is_of_flavour.then(|| fs::read(directory.join(NOTE)).ok())??;
        let kernel = Self { flavour, ..serde_json::from_slice(&note).ok()? };
        let is_same = kernel.module_names == MODULES;
        (is_same && kernel.image.exists() && kernel.modules.iter().all(|module| module.exists()))
            .then_some(kernel)
    }

    /// Takes a kernel out of its packages, and keeps it in this directory.
    pub(super) fn unpack(packages: &[PathBuf], directory: &Path, flavour: &'static Flavour) -> Result<Self> {
        let tree = directory.join("unpacked");
        fs::create_dir_all(&tree).with_context(|| format!("create {}", tree.display()))?;
        for package in packages {
            run::output(plain("dpkg-deb").arg("--extract").args([package, &tree]))?;
        }
        let image = run::output(plain("find").arg(&tree).args(["-type", "f", "-name", "vmlinuz*"]))?;
        let image = image.lines().next().with_context(|| format!("no kernel image in {packages:?}"))?;
        let kept = directory.join("vmlinuz");
        fs::copy(image, &kept).with_context(|| format!("copy {image}"))?;
        // modprobe looks in /lib; newer packages have /usr/lib.
        if !tree.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", tree.join("lib")).context("link lib")?;
        }
        let release = fs::read_dir(tree.join("lib/modules")).context("list the releases of modules")?;
        let release = release.map(|entry| Ok(file_name(&entry?.path()))).collect::<Result<Vec<_>>>()?;
        let [release] = release.as_slice() else { bail!("modules of several releases: {release:?}") };
        let package = packages.first().context("a kernel without a package")?;
        let version = run::output(plain("dpkg-deb").arg("--field").arg(package).arg("Version"))?;
        let version = version.split('-').next().unwrap_or_default().trim().to_owned();
        run::output(plain("/sbin/depmod").arg("-b").arg(&tree).arg(release))?;
        let modules = take_modules(&tree, release, directory)?;
        fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
        let kernel = Self {
            version,
            image: kept,
            modules,
            flavour,
            is_known: false,
            module_names: MODULES.map(str::to_owned).into(),
        };
        fs::write(directory.join(NOTE), serde_json::to_vec_pretty(&kernel)?).context("write the note")?;
        Ok(kernel)
    }

    /// A kernel from a file: a package, or an image with the modules that are installed on this machine.
    pub(super) fn from_file(file: &Path, directory: &Path, flavour: &'static Flavour) -> Result<Self> {
        if file.extension().is_some_and(|extension| extension == "deb") {
            // The package of a split kernel has the package of its modules beside it.
            let modules = file.with_file_name(file_name(file).replace("linux-binary-", "linux-modules-"));
            let has_modules = modules != file && modules.exists();
            let packages = [file.to_owned()].into_iter().chain(has_modules.then_some(modules));
            return Self::unpack(&packages.collect::<Vec<_>>(), directory, flavour);
        }
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        let release = release_in(&bytes);
        let release = release.with_context(|| format!("{}: no kernel image for x86", file.display()))?;
        let modules = take_modules(Path::new("/"), &release, directory)?;
        Ok(Self {
            version: release,
            image: file.to_owned(),
            modules,
            flavour,
            is_known: false,
            module_names: Vec::new(),
        })
    }

    /// A kernel from the packages in a directory.
    pub(super) fn from_packages(
        packages: &Path,
        directory: &Path,
        flavour: &'static Flavour,
    ) -> Result<Self> {
        Self::unpack(&debs_in(packages)?, directory, flavour)
    }

    pub(super) fn emulation(&self) -> Emulation {
        self.flavour.emulation(&self.version)
    }
}

/// Copies the modules and their dependencies, uncompressed, and returns them in the order in which they load.
fn take_modules(root: &Path, release: &str, directory: &Path) -> Result<Vec<PathBuf>> {
    let mut taken = Vec::new();
    for name in MODULES {
        let mut modprobe = plain("/sbin/modprobe");
        modprobe.args(["--config", "/dev/null", "--dirname"]).arg(root).args([
            "--set-version",
            release,
            "--show-depends",
            name,
        ]);
        // It fails where there is no such module. Options of this machine's modules are not used.
        let order = run::output(&mut modprobe).unwrap_or_default();
        for source in order.lines().filter_map(|line| line.strip_prefix("insmod ")?.split(' ').next()) {
            let source = Path::new(source);
            let (program, name) = match source.extension().and_then(|extension| extension.to_str()) {
                Some("xz") => ("xz", source.file_stem()),
                Some("zst") => ("zstd", source.file_stem()),
                Some("gz") => ("gzip", source.file_stem()),
                _ => ("cat", source.file_name()),
            };
            let file = directory.join(name.context("a module without a name")?);
            if taken.contains(&file) {
                continue;
            }
            let options = if program == "cat" { &[][..] } else { &["-dc"] };
            let module = run::output_bytes(plain(program).args(options).arg(source))?;
            fs::write(&file, module).with_context(|| format!("write {}", file.display()))?;
            taken.push(file);
        }
    }
    Ok(taken)
}

/// The release in the header of a bzImage: `HdrS` at 0x202, and at 0x20e the offset of the text from 0x200
/// (`Documentation/arch/x86/boot.rst`).
fn release_in(image: &[u8]) -> Option<String> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?);
    let text = image.get(0x200 + usize::from(offset)..)?;
    let word = text.split(|byte| *byte == 0 || *byte == b' ').next()?;
    String::from_utf8(word.to_vec()).ok()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_read_from_an_image() {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x80_u16.to_le_bytes());
        image[0x280..0x296].copy_from_slice(b"6.12.117-cloud (build@");
        assert_eq!(release_in(&image).as_deref(), Some("6.12.117-cloud"));
        assert_eq!(release_in(&image[..0x210]), None);
        assert_eq!(release_in(&[0; 0x400]), None);
        assert_eq!(release_in(b"\x7fELF"), None);
    }
}

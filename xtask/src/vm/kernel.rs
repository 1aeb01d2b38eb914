//! A kernel to boot: its image and the modules that tests need, taken out of Debian packages. An unpacked
//! kernel is kept, with a note of what it is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{flavour::Flavour, stock::series_of};
use crate::{
    architecture::{AARCH64, Architecture, Emulation, X86_64},
    environment::plain,
    packages::debs_in,
    run,
};

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

    /// True for the oldest kernel of its architecture.
    pub(super) fn is_oldest(&self) -> bool {
        let oldest = self.flavour.architecture.kernels[0];
        let is_of_flavour = Flavour::of(self.flavour.architecture, oldest).is_ok_and(|of| of == self.flavour);
        is_of_flavour && series_of(&self.version) == series_of(oldest)
    }

    /// A usual kernel without files.
    #[cfg(test)]
    pub(super) fn of_version(version: &str) -> Self {
        Self {
            version: version.to_owned(),
            image: PathBuf::new(),
            modules: Vec::new(),
            flavour: Flavour::usual(),
            is_known: false,
            module_names: Vec::new(),
        }
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
    pub(super) fn from_file(
        file: &Path,
        directory: &Path,
        architecture: &'static Architecture,
    ) -> Result<Self> {
        if file.extension().is_some_and(|extension| extension == "deb") {
            let field = |name: &str| {
                let value = run::output(plain("dpkg-deb").arg("--field").arg(file).arg(name))?;
                Ok::<_, anyhow::Error>(value.trim().to_owned())
            };
            let (package, of) = (field("Package")?, field("Architecture")?);
            ensure!(of == architecture.debian, "{}: a package for {of}: see --arch", file.display());
            // The package of a split kernel has the package of its modules beside it.
            let modules = file.with_file_name(file_name(file).replace("linux-binary-", "linux-modules-"));
            let has_modules = modules != file && modules.exists();
            let packages = [file.to_owned()].into_iter().chain(has_modules.then_some(modules));
            let unpack = |flavour| Self::unpack(&packages.collect::<Vec<_>>(), directory, flavour);
            return match Flavour::of_package(architecture, &package) {
                Some(flavour) => unpack(flavour),
                None => Ok(Self {
                    version: release_of(&package).to_owned(),
                    ..unpack(Flavour::of(architecture, "")?)?
                }),
            };
        }
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        let (of, release) = release_in(&bytes).with_context(|| {
            format!("{}: neither a bzImage of x86_64 nor an uncompressed Image of aarch64", file.display())
        })?;
        ensure!(of == architecture, "{}: an image of {}: see --arch", file.display(), of.name);
        let modules = take_modules(Path::new("/"), &release, directory)?;
        // The label has the name of the flavour at the end of the version.
        let (version, flavour) = match Flavour::of_package(architecture, &release) {
            Some(flavour) => {
                (release.strip_suffix(flavour.packages).unwrap_or(&release).trim_end_matches('-'), flavour)
            }
            None => (release.as_str(), Flavour::of(architecture, "")?),
        };
        Ok(Self {
            version: version.to_owned(),
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

/// The release in the name of a kernel's package.
fn release_of(package: &str) -> &str {
    let release = package.strip_prefix("linux-image-").or_else(|| package.strip_prefix("linux-binary-"));
    release.unwrap_or(package)
}

/// The architecture of an image, and its release.
fn release_in(image: &[u8]) -> Option<(&'static Architecture, String)> {
    let (architecture, text) = match x86_release(image) {
        Some(text) => (&X86_64, text),
        None => (&AARCH64, arm64_release(image)?),
    };
    let word = text.split(|byte| *byte == 0 || *byte == b' ').next()?;
    Some((architecture, String::from_utf8(word.to_vec()).ok()?))
}

/// The text with the release in the header of a bzImage: `HdrS` at 0x202, and at 0x20e the offset of the text from
/// 0x200 (`Documentation/arch/x86/boot.rst`).
fn x86_release(image: &[u8]) -> Option<&[u8]> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?);
    image.get(0x200 + usize::from(offset)..)
}

/// The text with the release in an Image, whose header has a magic number and no release
/// (`Documentation/arch/arm64/booting.rst`). The kernel's banner has it (`init/version-timestamp.c` at v6.1).
fn arm64_release(image: &[u8]) -> Option<&[u8]> {
    const BANNER: &[u8] = b"Linux version ";
    if image.get(56..60)? != b"ARM\x64" {
        return None;
    }
    let is_banner = |at: &usize| {
        let text = &image[*at..];
        text.starts_with(BANNER) && text.get(BANNER.len()).is_some_and(u8::is_ascii_digit)
    };
    let at = (0..image.len()).find(is_banner)?;
    image.get(at + BANNER.len()..)
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
        assert_eq!(release_in(&image), Some((&X86_64, "6.12.117-cloud".to_owned())));
        assert_eq!(release_in(&image[..0x210]), None);
        assert_eq!(release_in(&[0; 0x400]), None);
        assert_eq!(release_in(b"\x7fELF"), None);
        let mut image = vec![0; 0x100];
        image[56..60].copy_from_slice(b"ARM\x64");
        image[0x80..0x90].copy_from_slice(b"Linux version %s");
        assert_eq!(release_in(&image), None, "a format is no banner");
        image[0xa0..0xc0].copy_from_slice(b"Linux version 6.1.0-56-arm64 (x@");
        assert_eq!(release_in(&image), Some((&AARCH64, "6.1.0-56-arm64".to_owned())));
        image[56] = 0;
        assert_eq!(release_in(&image), None);
    }

    /// A package with an image and a directory for modules.
    fn package(directory: &Path, name: &str, architecture: &Architecture) -> PathBuf {
        let tree = directory.join(name);
        let write = |path: &str, text: &str| {
            let file = tree.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        let control = format!(
            "Package: {name}\nVersion: 6.1.192-2\nArchitecture: {}\nMaintainer: a <a@b>\nDescription: a kernel\n",
            architecture.debian
        );
        write("DEBIAN/control", &control);
        write("boot/vmlinuz-6.1.0", "an image");
        write("lib/modules/6.1.0/modules.order", "");
        write("lib/modules/6.1.0/modules.builtin", "");
        let file = directory.join(format!("{name}.deb"));
        run::output(plain("dpkg-deb").args(["--root-owner-group", "--build"]).arg(&tree).arg(&file)).unwrap();
        file
    }

    #[test]
    fn flavours_that_are_given_as_files_keep_apart() {
        let directory = tempfile::tempdir().unwrap();
        let from = |name: &str, architecture| {
            let file = package(directory.path(), name, architecture);
            Kernel::from_file(&file, &directory.path().join(format!("{name}-kept")), &X86_64)
        };
        for (name, label, cpus) in [
            ("linux-image-6.1.0-56-rt-amd64", "6.1.192-rt", 2),
            ("linux-image-6.1.0-56-cloud-amd64", "6.1.192", 2),
            ("linux-image-6.1.0-56-amd64", "6.1.192-generic", 2),
            ("linux-image-6.8.0-45-generic", "6.8.0-45-generic", 2),
        ] {
            let kernel = from(name, &X86_64).unwrap();
            assert_eq!((kernel.label().as_str(), kernel.emulation().max_cpus), (label, cpus), "{name}");
            assert!(!kernel.is_known, "{name}");
        }
        let error = from("linux-image-6.1.0-56-arm64", &AARCH64).unwrap_err().to_string();
        assert!(
            error.ends_with("linux-image-6.1.0-56-arm64.deb: a package for arm64: see --arch"),
            "{error}"
        );
    }

    #[test]
    fn the_oldest_kernel_is_that_of_the_architecture() {
        for (version, flavour, is_oldest) in
            [("5.10.262", "", true), ("5.10.262", "-generic", false), ("6.12.118", "", false)]
        {
            let flavour = Flavour::of(&X86_64, &format!("{version}{flavour}")).unwrap();
            let kernel = Kernel { version: version.into(), flavour, ..Kernel::of_version("") };
            assert_eq!(kernel.is_oldest(), is_oldest, "{version} {flavour:?}");
        }
    }
}

//! Kernels to boot: what is asked for, and the image and the few modules taken out of packages. A kernel once taken
//! out is kept, with a note of what it is.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::archive::numbers;
use crate::environment;

/// What the tests need and the cloud kernels have as modules: the socket table, and disturbances of the network. What
/// is built into a kernel, or unknown to it, is left out there.
const MODULES: [&str; 5] = ["tcp_diag", "sch_netem", "sch_tbf", "veth", "dummy"];

/// The note in a kernel's directory. Written last: without it the directory is not complete.
const NOTE: &str = "kernel.json";

/// A kernel that can be booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kernel {
    /// Its version, as people call it.
    pub(super) version: String,
    /// The image.
    pub(super) image: PathBuf,
    /// Uncompressed module files, each after those it depends on.
    pub(super) modules: Vec<PathBuf>,
    /// Whether it is one of Debian's, of which the tests know what it must have.
    #[serde(skip)]
    pub(super) is_known: bool,
}

impl Kernel {
    /// The kernel kept in this directory.
    pub(super) fn kept(directory: &Path) -> Option<Self> {
        let kernel: Self = serde_json::from_slice(&fs::read(directory.join(NOTE)).ok()?).ok()?;
        (kernel.image.exists() && kernel.modules.iter().all(|module| module.exists())).then_some(kernel)
    }

    /// Takes a kernel out of its packages, to be kept in this directory.
    pub(super) fn unpack(packages: &[PathBuf], directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        let tree = directory.join("unpacked");
        for package in packages {
            let status = environment::plain("dpkg-deb").arg("-x").arg(package).arg(&tree).status();
            let status = status.context("start dpkg-deb")?;
            ensure!(status.success(), "dpkg-deb -x {}: {status}", package.display());
        }
        let files = files_below(&tree)?;
        let image = files
            .iter()
            .find(|file| file_name(file).starts_with("vmlinuz"))
            .with_context(|| format!("no kernel image in {packages:?}"))?;
        let kept = directory.join("vmlinuz");
        fs::copy(image, &kept).with_context(|| format!("copy {}", image.display()))?;
        let version = package_version(packages)?;
        let kernel =
            Self { version, image: kept, modules: take_modules(&files, directory)?, is_known: false };
        fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
        let note = directory.join(NOTE);
        fs::write(&note, serde_json::to_vec_pretty(&kernel)?)
            .with_context(|| format!("write {}", note.display()))?;
        Ok(kernel)
    }

    /// A kernel from a file: a package, or an image, whose modules are looked for where installed ones are.
    pub(super) fn from_file(file: &Path, directory: &Path) -> Result<Self> {
        if file.extension().is_some_and(|extension| extension == "deb") {
            return Self::unpack(&with_counterpart(file), directory);
        }
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        let version = image_version(file)?;
        let installed = Path::new("/lib/modules").join(&version);
        let files = if installed.exists() { files_below(&installed)? } else { Vec::new() };
        let modules = take_modules(&files, directory)?;
        Ok(Self { version, image: file.to_owned(), modules, is_known: false })
    }

    /// How QEMU must run it. TCG of QEMU 7.2 to 10 gets some things wrong, and then it is the kernel that dies: with
    /// more than one CPU, 7.x in the patching of its own code; 6.12 in the 16-byte compare-and-exchange of its slab
    /// allocator, which it leaves alone where the CPU says that it has none.
    pub(super) fn emulation(&self) -> Emulation {
        match numbers(&self.version).as_slice() {
            [7..=u32::MAX, ..] => Emulation { cpu: "qemu64", most_cpus: 1 },
            [6, 12, ..] => Emulation { cpu: "qemu64,-cx16", most_cpus: 2 },
            _ => Emulation { cpu: "qemu64", most_cpus: 2 },
        }
    }
}

/// What the emulator can do for a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Emulation {
    /// QEMU's model of CPU.
    pub(super) cpu: &'static str,
    /// How many of them it can have.
    pub(super) most_cpus: u32,
}

/// A package of an image alone comes with its modules' package, where that lies beside it.
fn with_counterpart(file: &Path) -> Vec<PathBuf> {
    let modules = file.with_file_name(file_name(file).replace("linux-binary-", "linux-modules-"));
    if modules != file && modules.exists() { vec![file.to_owned(), modules] } else { vec![file.to_owned()] }
}

/// Copies the wanted modules and all they depend on into the directory, uncompressed, and yields them in the order in
/// which they load.
fn take_modules(files: &[PathBuf], directory: &Path) -> Result<Vec<PathBuf>> {
    let by_name: BTreeMap<String, &PathBuf> =
        files.iter().filter_map(|file| Some((module_name(&file_name(file))?, file))).collect();
    let mut images: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let order = load_order(&MODULES, |name| {
        let Some(file) = by_name.get(name) else { return Ok(None) };
        let image = read_module(file)?;
        let depends = dependencies(&image);
        images.insert(name.to_owned(), image);
        Ok(Some(depends))
    })?;
    let mut taken = Vec::new();
    for name in order {
        let file = directory.join(format!("{name}.ko"));
        let image = images.get(&name).with_context(|| format!("module {name} was ordered but not read"))?;
        fs::write(&file, image).with_context(|| format!("write {}", file.display()))?;
        taken.push(file);
    }
    Ok(taken)
}

/// The modules wanted and what they depend on, each after its dependencies. `depends_on` knows a module's
/// dependencies, or that there is no such module.
fn load_order(
    wanted: &[&str],
    mut depends_on: impl FnMut(&str) -> Result<Option<Vec<String>>>,
) -> Result<Vec<String>> {
    enum Step {
        Enter(String),
        Leave(String),
    }
    let (mut order, mut seen) = (Vec::new(), Vec::new());
    let mut steps: Vec<Step> = wanted.iter().rev().map(|name| Step::Enter((*name).to_owned())).collect();
    while let Some(step) = steps.pop() {
        match step {
            Step::Leave(name) => order.push(name),
            Step::Enter(name) if seen.contains(&name) => {}
            Step::Enter(name) => {
                seen.push(name.clone());
                if let Some(depends) = depends_on(&name)? {
                    steps.push(Step::Leave(name));
                    steps.extend(depends.into_iter().rev().map(Step::Enter));
                }
            }
        }
    }
    Ok(order)
}

/// The name a module's file has in the kernel; none where it is another kind of file.
fn module_name(file_name: &str) -> Option<String> {
    let stem =
        ["", ".xz", ".zst", ".gz"].iter().find_map(|end| file_name.strip_suffix(end)?.strip_suffix(".ko"))?;
    Some(stem.replace('-', "_"))
}

/// What a module says it depends on: the packages come without `modules.dep`, which is made when they are installed.
/// The statements are `key=value` strings between zero bytes (`MODULE_INFO`, include/linux/moduleparam.h).
fn dependencies(image: &[u8]) -> Vec<String> {
    image
        .split(|byte| *byte == 0)
        .find_map(|statement| std::str::from_utf8(statement.strip_prefix(b"depends=")?).ok())
        .map(|names| {
            names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
        })
        .unwrap_or_default()
}

fn read_module(file: &Path) -> Result<Vec<u8>> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return fs::read(file).with_context(|| format!("read {}", file.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{}: unknown compression", file.display()),
    };
    let output = environment::plain(program)
        .arg("-dc")
        .arg(file)
        .output()
        .with_context(|| format!("start {program}"))?;
    ensure!(output.status.success(), "{program} -dc {}: {}", file.display(), output.status);
    Ok(output.stdout)
}

/// The kernel's own version, which a package has before the dash.
fn package_version(packages: &[PathBuf]) -> Result<String> {
    let package = packages.first().context("a kernel of no package")?;
    let output = environment::plain("dpkg-deb")
        .arg("-f")
        .arg(package)
        .arg("Version")
        .output()
        .context("start dpkg-deb")?;
    ensure!(output.status.success(), "dpkg-deb -f {}: {}", package.display(), output.status);
    let version = String::from_utf8(output.stdout).context("dpkg-deb: output")?;
    Ok(version.trim().split('-').next().unwrap_or_default().to_owned())
}

fn image_version(image: &Path) -> Result<String> {
    let bytes = fs::read(image).with_context(|| format!("read {}", image.display()))?;
    version_in(&bytes).with_context(|| format!("{}: not a kernel image for x86", image.display()))
}

/// The version in the header of a bzImage: `HdrS` at 0x202, and at 0x20e where the text begins, counted from 0x200
/// (`Documentation/arch/x86/boot.rst`).
fn version_in(image: &[u8]) -> Option<String> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let at = u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?);
    let text = image.get(0x200 + usize::from(at)..)?;
    let word = text.split(|byte| *byte == 0 || *byte == b' ').next()?;
    String::from_utf8(word.to_vec()).ok()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Every file below a directory; symbolic links are left alone.
fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut directories) = (Vec::new(), vec![directory.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                directories.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_what_a_module_depends_on_before_it_and_once() {
        let tree: BTreeMap<&str, &[&str]> = BTreeMap::from([
            ("a", ["c", "b"].as_slice()),
            ("b", &["d"]),
            ("c", &["d"]),
            ("d", &["missing"]),
            ("e", &[]),
            ("loop", &["loop"]),
        ]);
        for (wanted, expected) in [
            (["a", "e"].as_slice(), ["d", "c", "b", "a", "e"].as_slice()),
            (&["d", "a"], &["d", "c", "b", "a"]),
            (&["missing", "e"], &["e"]),
            (&["loop"], &["loop"]),
            (&[], &[]),
        ] {
            let order = load_order(wanted, |name| {
                Ok(tree.get(name).map(|names| names.iter().map(|name| (*name).to_owned()).collect()))
            });
            assert_eq!(order.unwrap(), expected, "{wanted:?}");
        }
    }

    #[test]
    fn reads_what_a_module_depends_on() {
        for (image, expected) in [
            (b"\x7fELF\0license=GPL\0depends=inet_diag\0intree=Y\0".as_slice(), ["inet_diag"].as_slice()),
            (b"depends=a-b,c\0", &["a_b", "c"]),
            (b"x\0depends=\0", &[]),
            (b"nodepends=x\0", &[]),
        ] {
            assert_eq!(dependencies(image), expected, "{image:?}");
        }
    }

    #[test]
    fn knows_a_modules_name_from_its_file() {
        for (file, name) in [
            ("tcp_diag.ko", Some("tcp_diag")),
            ("sch_netem.ko.xz", Some("sch_netem")),
            ("crc32c-generic.ko.zst", Some("crc32c_generic")),
            ("modules.dep", None),
            ("tcp_diag.ko.sig", None),
        ] {
            assert_eq!(module_name(file).as_deref(), name, "{file}");
        }
    }

    #[test]
    fn reads_the_version_out_of_an_image() {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x80_u16.to_le_bytes());
        image[0x280..0x296].copy_from_slice(b"6.12.117-cloud (build@");
        assert_eq!(version_in(&image).as_deref(), Some("6.12.117-cloud"));
        assert_eq!(version_in(&image[..0x210]), None);
        assert_eq!(version_in(&[0; 0x400]), None);
        assert_eq!(version_in(b"\x7fELF"), None);
    }

    #[test]
    fn asks_of_the_emulator_what_it_can_do() {
        for (version, cpu, most_cpus) in [
            ("5.10.0-46-cloud-amd64", "qemu64", 2),
            ("6.1.192", "qemu64", 2),
            ("6.12.117+deb13-cloud-amd64", "qemu64,-cx16", 2),
            ("6.18.15+deb13-cloud-amd64", "qemu64", 2),
            ("7.3.4+deb13-cloud-amd64", "qemu64", 1),
        ] {
            let kernel = Kernel {
                version: version.into(),
                image: PathBuf::new(),
                modules: Vec::new(),
                is_known: false,
            };
            assert_eq!(kernel.emulation(), Emulation { cpu, most_cpus }, "{version}");
        }
    }
}

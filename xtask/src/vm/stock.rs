//! Gets the kernels to boot: from files, from the archive, or those that are kept from before.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::{
    apt::{KernelPackage, PrivateApt, is_version, newest, numbers},
    kernel::Kernel,
};
use crate::run::say;

/// One kernel of each long-term series since 5.10, and the newest.
const DEFAULT_SERIES: [&str; 5] = ["5.10", "6.1", "6.12", "6.18", "7"];

/// With fewer kernels than this the default set is an error.
const MIN_DEFAULT_KERNELS: usize = 4;

/// The series of a kernel: one of the default set, or else its first two numbers.
pub(super) fn series_of(version: &str) -> Vec<u32> {
    let version = numbers(version);
    let series = DEFAULT_SERIES.into_iter().map(numbers).find(|series| version.starts_with(series));
    series.unwrap_or_else(|| version.into_iter().take(2).collect())
}

/// The kernels to boot; and what can't be had, with the reason.
#[derive(Debug, Default)]
pub(super) struct KernelStock {
    pub(super) kernels: Vec<Kernel>,
    pub(super) skipped: Vec<(String, String)>,
}

impl KernelStock {
    /// Gets all that are wanted, each a file or a version, or else most of the default set.
    pub(super) fn get_all(wanted: &[String], directory: &Path) -> Result<Self> {
        let default: Vec<String> = DEFAULT_SERIES.map(str::to_owned).into();
        let (wanted, fewest) =
            if wanted.is_empty() { (&default[..], MIN_DEFAULT_KERNELS) } else { (wanted, wanted.len()) };
        let stock = Self::get_available(wanted, directory);
        let count = stock.kernels.len();
        ensure!(count >= fewest, "{count} kernels can be had, and {fewest} are needed");
        Ok(stock)
    }

    /// Gets those of the wanted kernels that can be had. They are kept in this directory.
    pub(super) fn get_available(wanted: &[String], directory: &Path) -> Self {
        let kept = directory.join("kernels");
        let mut archive = None;
        let mut stock = Self::default();
        for (index, wanted) in wanted.iter().enumerate() {
            let kernel = if is_version(wanted) {
                let archive =
                    archive.get_or_insert_with(|| KernelArchive::open(directory.join("apt"), kept.clone()));
                archive.kernel(wanted).map(|kernel| Kernel { is_known: true, ..kernel })
            } else {
                Kernel::from_file(Path::new(wanted), &kept.join(format!("given-{index}")))
            };
            match kernel {
                Ok(kernel) => {
                    say(format!("kernel {wanted}: {}", kernel.version));
                    stock.kernels.push(kernel);
                }
                Err(error) => {
                    say(format!("kernel {wanted}: skipped: {error:#}"));
                    stock.skipped.push((wanted.clone(), format!("{error:#}")));
                }
            }
        }
        stock
    }

    /// True for the first kernel, which is the oldest of the default set.
    pub(super) fn is_oldest(&self, kernel: &Kernel) -> bool {
        self.kernels.first().is_some_and(|first| first.version == kernel.version)
    }
}

/// The archive, if it can be reached, and the directory of the kernels from before.
struct KernelArchive {
    apt: Result<(PrivateApt, Vec<KernelPackage>)>,
    kept: PathBuf,
}

impl KernelArchive {
    fn open(directory: PathBuf, kept: PathBuf) -> Self {
        let apt = PrivateApt::open(directory).and_then(|apt| {
            let packages = apt.kernels()?;
            Ok((apt, packages))
        });
        Self { apt, kept }
    }

    /// The newest kernel of this series; one from before if the archive can't be reached.
    fn kernel(&mut self, version: &str) -> Result<Kernel> {
        let (apt, packages) = match &mut self.apt {
            Ok((apt, packages)) => (apt, packages),
            Err(error) => return newest_kept(&self.kept, version).with_context(|| format!("{error:#}")),
        };
        match fetch(version, apt, packages, &self.kept) {
            // The lists may name packages that the archive has replaced.
            Err(error) if !apt.is_updated => {
                say(format!("kernel {version}: {error:#}; fetching the package lists again"));
                apt.update()?;
                *packages = apt.kernels()?;
                fetch(version, apt, packages, &self.kept)
            }
            result => result,
        }
    }
}

fn newest_kept(kept: &Path, version: &str) -> Result<Kernel> {
    let directories = fs::read_dir(kept).into_iter().flatten();
    directories
        .filter_map(|entry| Kernel::kept(&entry.ok()?.path()))
        .filter(|kernel| numbers(&kernel.version).starts_with(&numbers(version)))
        .max_by_key(|kernel| numbers(&kernel.version))
        .ok_or_else(|| anyhow!("no kernel of it is kept from before"))
}

fn fetch(version: &str, apt: &PrivateApt, packages: &[KernelPackage], kept: &Path) -> Result<Kernel> {
    let package = newest(packages, version).context("the archive has no such kernel")?;
    let directory = kept.join(package.id());
    if let Some(kernel) = Kernel::kept(&directory) {
        return Ok(kernel);
    }
    say(format!("kernel {version}: fetching {}", package.id()));
    let packages = apt.fetch(package)?;
    let kernel = Kernel::from_packages(&packages, &directory)?;
    fs::remove_dir_all(&packages).with_context(|| format!("remove {}", packages.display()))?;
    Ok(kernel)
}

//! Gets the kernels to boot: from files, from the archive, or those that are kept from before.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::{
    apt::{KernelPackage, PrivateApt, is_version, newest_first, numbers},
    flavour::Flavour,
    kernel::Kernel,
};
use crate::{architecture::Architecture, run::say};

/// How many of the default kernels may be missing.
const MAX_MISSING_KERNELS: usize = 1;

/// How many kernels of a series are tried, from the newest on.
const MAX_TRIED: usize = 20;

/// The series of a kernel: its first two numbers, or the first one of the newest.
pub(super) fn series_of(version: &str) -> Vec<u32> {
    let version = numbers(version);
    let length = if version.first() >= Some(&7) { 1 } else { 2 };
    version.into_iter().take(length).collect()
}

/// The kernels to boot; and what can't be had, with the reason.
#[derive(Debug, Default)]
pub(super) struct KernelStock {
    pub(super) kernels: Vec<Kernel>,
    pub(super) skipped: Vec<(String, String)>,
}

impl KernelStock {
    /// Gets all that are wanted, each a file or a version, or else most of the architecture's. It is an error if too
    /// few can be had.
    pub(super) fn get_all(
        wanted: &[String],
        architecture: &'static Architecture,
        directory: &Path,
    ) -> Result<Self> {
        let default: Vec<String> = architecture.kernels.iter().map(|kernel| (*kernel).to_owned()).collect();
        let (wanted, missing) =
            if wanted.is_empty() { (&default[..], MAX_MISSING_KERNELS) } else { (wanted, 0) };
        let fewest = wanted.len() - missing;
        let stock = Self::get_available(wanted, architecture, directory);
        let count = stock.kernels.len();
        ensure!(count >= fewest, "{count} kernels can be had, and {fewest} are needed");
        Ok(stock)
    }

    /// Gets those of the wanted kernels that can be had. They are kept in this directory.
    pub(super) fn get_available(
        wanted: &[String],
        architecture: &'static Architecture,
        directory: &Path,
    ) -> Self {
        let kept = directory.join("kernels");
        let mut archive = None;
        let mut stock = Self::default();
        for (index, wanted) in wanted.iter().enumerate() {
            let kernel = if is_version(wanted) {
                let archive =
                    archive.get_or_insert_with(|| KernelArchive::open(directory, architecture, kept.clone()));
                archive.kernel(wanted).map(|kernel| Kernel { is_known: true, ..kernel })
            } else {
                let directory = kept.join(format!("given-{index}"));
                Kernel::from_file(Path::new(wanted), &directory, architecture)
            };
            match kernel.and_then(|kernel| stock.distinct(kernel)) {
                Ok(kernel) => {
                    say(format!("kernel {wanted}: {}", kernel.label()));
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

    /// This kernel, if its rows and logs have names of their own.
    fn distinct(&self, kernel: Kernel) -> Result<Kernel> {
        let label = kernel.label();
        ensure!(self.kernels.iter().all(|other| other.label() != label), "{label} is named twice");
        Ok(kernel)
    }
}

/// The archive, if it can be reached, and the directory of the kernels from before.
struct KernelArchive {
    apt: Result<PrivateApt>,
    architecture: &'static Architecture,
    kept: PathBuf,
}

impl KernelArchive {
    fn open(directory: &Path, architecture: &'static Architecture, kept: PathBuf) -> Self {
        Self { apt: PrivateApt::open(directory, architecture), architecture, kept }
    }

    /// The newest kernel of this series and flavour; one from before if the archive can't be reached.
    fn kernel(&mut self, version: &str) -> Result<Kernel> {
        let flavour = Flavour::of(self.architecture, version)?;
        let apt = match &mut self.apt {
            Ok(apt) => apt,
            Err(error) => {
                return newest_kept(&self.kept, version, flavour).with_context(|| format!("{error:#}"));
            }
        };
        match fetch(version, flavour, apt, &self.kept) {
            // The lists may name packages that the archive has replaced.
            Err(error) if !apt.is_updated => {
                say(format!("kernel {version}: {error:#}; fetching the package lists again"));
                apt.update()?;
                fetch(version, flavour, apt, &self.kept)
            }
            result => result,
        }
    }
}

fn newest_kept(kept: &Path, version: &str, flavour: &'static Flavour) -> Result<Kernel> {
    let directories = fs::read_dir(kept).into_iter().flatten();
    directories
        .filter_map(|entry| Kernel::kept(&entry.ok()?.path(), flavour))
        .filter(|kernel| numbers(&kernel.version).starts_with(&numbers(version)))
        .max_by_key(|kernel| numbers(&kernel.version))
        .ok_or_else(|| anyhow!("no kernel of it is kept from before"))
}

fn fetch(version: &str, flavour: &'static Flavour, apt: &PrivateApt, kept: &Path) -> Result<Kernel> {
    let packages = apt.kernels(flavour)?;
    let mut failed = None;
    for package in newest_first(&packages, version).into_iter().take(MAX_TRIED) {
        match fetch_package(version, package, flavour, apt, kept) {
            Ok(kernel) => return Ok(kernel),
            // Newer lists come first.
            Err(error) if !apt.is_updated => return Err(error),
            // The archive has lost the file.
            Err(error) => {
                say(format!("kernel {version}: {}: {error:#}", package.id()));
                failed = failed.or(Some(error));
            }
        }
    }
    Err(failed.unwrap_or_else(|| anyhow!("the archive has no such kernel")))
}

fn fetch_package(
    version: &str,
    package: &KernelPackage,
    flavour: &'static Flavour,
    apt: &PrivateApt,
    kept: &Path,
) -> Result<Kernel> {
    let directory = kept.join(package.id());
    if let Some(kernel) = Kernel::kept(&directory, flavour) {
        return Ok(kernel);
    }
    say(format!("kernel {version}: fetching {}", package.id()));
    let packages = apt.fetch(package)?;
    let kernel = Kernel::from_packages(&packages, &directory, flavour)?;
    fs::remove_dir_all(&packages).with_context(|| format!("remove {}", packages.display()))?;
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_named_twice_is_booted_once() {
        let stock = KernelStock { kernels: vec![Kernel::of_version("6.1.192")], skipped: Vec::new() };
        let error = stock.distinct(Kernel::of_version("6.1.192")).unwrap_err().to_string();
        assert_eq!(error, "6.1.192 is named twice");
        assert!(stock.distinct(Kernel::of_version("6.12.118")).is_ok());
    }

    #[test]
    fn the_series_is_the_first_number_of_the_newest_kernels_and_two_of_the_others() {
        for (version, series) in [("6.12.118", [6, 12].as_slice()), ("7.3.4-rt", &[7]), ("5.10", &[5, 10])] {
            assert_eq!(series_of(version), series, "{version}");
        }
    }
}

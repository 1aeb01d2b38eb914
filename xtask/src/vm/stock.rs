//! The kernels asked for, from wherever they come: a file, the archive, or what was taken from it before.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::{
    archive::{Apt, Package, newest, numbers},
    kernel::Kernel,
};
use crate::progress::say;

/// One of each long-term series from 5.10 on, and the newest there is.
const DEFAULT: [&str; 5] = ["5.10", "6.1", "6.12", "6.18", "7"];

/// Fewer of the default ones than these are no matrix.
const FEWEST: usize = 4;

/// The series of a kernel: the one of the default set that it is of, or else its first two numbers.
pub(super) fn series_of(version: &str) -> String {
    let all = numbers(version);
    let of = DEFAULT.into_iter().find(|series| all.starts_with(&numbers(series)));
    of.map_or_else(
        || all.iter().take(2).map(ToString::to_string).collect::<Vec<_>>().join("."),
        str::to_owned,
    )
}

/// The kernels to boot, and what of the wanted can't be had, with the reason.
#[derive(Debug, Default)]
pub(super) struct Stock {
    pub(super) kernels: Vec<Kernel>,
    pub(super) skipped: Vec<(String, String)>,
}

impl Stock {
    /// Gets what is wanted, each a file or a version, or else the default set. Everything is kept in this directory.
    pub(super) fn get(wanted: &[String], directory: &Path) -> Result<Self> {
        let default: Vec<String> = DEFAULT.map(str::to_owned).into();
        let (wanted, fewest) =
            if wanted.is_empty() { (default.as_slice(), FEWEST) } else { (wanted, wanted.len()) };
        let stock = Self::whatever(wanted, directory);
        ensure!(
            stock.kernels.len() >= fewest,
            "{} kernels can be had, and it takes {fewest}",
            stock.kernels.len()
        );
        Ok(stock)
    }

    /// Whether it is the oldest one here.
    pub(super) fn is_oldest(&self, kernel: &Kernel) -> bool {
        self.kernels.first().is_some_and(|first| first.version == kernel.version)
    }

    /// Gets what can be had of what is wanted.
    pub(super) fn whatever(wanted: &[String], directory: &Path) -> Self {
        let kept = directory.join("kernels");
        let mut shop = None;
        let mut stock = Self::default();
        for (index, wanted) in wanted.iter().enumerate() {
            let kernel = if numbers(wanted).is_empty() || Path::new(wanted).is_file() {
                Kernel::from_file(Path::new(wanted), &kept.join(format!("given-{index}")))
            } else {
                let shop = shop.get_or_insert_with(|| Shop::open(directory.join("apt"), kept.clone()));
                shop.kernel(wanted).map(|kernel| Kernel { is_known: true, ..kernel })
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
}

/// The archive, if it can be reached, and what was taken from it before.
struct Shop {
    archive: Result<(Apt, Vec<Package>)>,
    kept: PathBuf,
}

impl Shop {
    fn open(directory: PathBuf, kept: PathBuf) -> Self {
        let archive = Apt::open(directory).and_then(|apt| {
            let packages = apt.kernels()?;
            Ok((apt, packages))
        });
        Self { archive, kept }
    }

    /// The newest kernel of this series.
    fn kernel(&mut self, version: &str) -> Result<Kernel> {
        let (apt, packages) = match &mut self.archive {
            Ok((apt, packages)) => (apt, packages),
            Err(error) => return newest_kept(&self.kept, version).with_context(|| format!("{error:#}")),
        };
        match take(version, apt, packages, &self.kept) {
            // The lists may name what the archive has replaced since.
            Err(error) if !apt.is_up_to_date() => {
                say(format!("kernel {version}: {error:#}; fetching the lists anew"));
                apt.update()?;
                *packages = apt.kernels()?;
                take(version, apt, packages, &self.kept)
            }
            result => result,
        }
    }
}

/// Where the archive is out of reach, an older kernel is better than none.
fn newest_kept(kept: &Path, version: &str) -> Result<Kernel> {
    let directories = fs::read_dir(kept).ok().into_iter().flatten();
    directories
        .filter_map(|entry| Kernel::kept(&entry.ok()?.path()))
        .filter(|kernel| numbers(&kernel.version).starts_with(&numbers(version)))
        .max_by_key(|kernel| numbers(&kernel.version))
        .ok_or_else(|| anyhow!("and none is kept from before"))
}

fn take(version: &str, apt: &Apt, packages: &[Package], kept: &Path) -> Result<Kernel> {
    let package = newest(packages, version).context("the archive has no such kernel")?;
    let directory = kept.join(package.id());
    if let Some(kernel) = Kernel::kept(&directory) {
        return Ok(kernel);
    }
    say(format!("kernel {version}: fetching {}", package.id()));
    let files = apt.fetch(package)?;
    let kernel = Kernel::unpack(&files, &directory)?;
    apt.forget(package)?;
    Ok(kernel)
}

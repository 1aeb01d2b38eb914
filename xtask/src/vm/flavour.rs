//! The flavours of Debian's kernels.

use anyhow::{Context as _, Result};

use super::apt::numbers;
use crate::architecture::{AARCH64, Architecture, Emulation, X86_64};

/// A flavour of Debian's kernels.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Flavour {
    pub(super) architecture: &'static Architecture,
    /// Its name for people, behind a version. Empty: the usual one.
    pub(super) name: &'static str,
    /// The end of the names of its packages.
    pub(super) packages: &'static str,
}

/// The name of the real-time flavours.
const REAL_TIME: &str = "rt";

static FLAVOURS: [Flavour; 7] = [
    Flavour { architecture: &X86_64, name: "", packages: "cloud-amd64" },
    Flavour { architecture: &X86_64, name: REAL_TIME, packages: "rt-amd64" },
    Flavour { architecture: &X86_64, name: "generic", packages: "amd64" },
    Flavour { architecture: &AARCH64, name: "", packages: "cloud-arm64" },
    Flavour { architecture: &AARCH64, name: REAL_TIME, packages: "rt-arm64" },
    Flavour { architecture: &AARCH64, name: "16k", packages: "arm64-16k" },
    Flavour { architecture: &AARCH64, name: "generic", packages: "arm64" },
];

impl Flavour {
    /// The flavour in a version that a user named, such as `6.12-rt`.
    pub(super) fn of(architecture: &Architecture, version: &str) -> Result<&'static Self> {
        let name = version.split_once('-').map_or("", |(_, name)| name);
        let of_architecture = || FLAVOURS.iter().filter(|known| known.architecture == architecture);
        of_architecture().find(|known| known.name == name).with_context(|| {
            let names: Vec<&str> =
                of_architecture().map(|known| known.name).filter(|name| !name.is_empty()).collect();
            format!("{}: no flavour {name:?}, only {}", architecture.name, names.join(" and "))
        })
    }

    /// The flavour of a package or of a release: both end with it.
    pub(super) fn of_package(architecture: &Architecture, name: &str) -> Option<&'static Self> {
        let name = name.strip_suffix("-unsigned").unwrap_or(name);
        FLAVOURS.iter().find(|known| known.architecture == architecture && known.has_package(name))
    }

    /// Of kernels for x86-64 that are not named otherwise.
    pub(super) fn usual() -> &'static Self {
        &FLAVOURS[0]
    }

    /// True for the name of a package of this flavour: `amd64` is also the end of other flavours' names.
    pub(super) fn has_package(&self, name: &str) -> bool {
        let ends =
            |flavour: &&Self| name.strip_suffix(flavour.packages).is_some_and(|rest| rest.ends_with('-'));
        let longest = FLAVOURS.iter().filter(ends).max_by_key(|flavour| flavour.packages.len());
        longest.is_some_and(|longest| longest.packages == self.packages)
    }

    /// The version of a kernel, with what distinguishes this flavour from the usual one on x86-64.
    pub(super) fn label(&self, version: &str) -> String {
        let architecture = (*self.architecture != X86_64).then_some(self.architecture.debian);
        let parts = [Some(version), architecture, Some(self.name)].into_iter().flatten();
        parts.filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
    }

    /// What QEMU emulates for a kernel of this flavour.
    pub(super) fn emulation(&self, version: &str) -> Emulation {
        let version = numbers(version);
        let all = self.architecture.emulations;
        let newest = *all.iter().rfind(|known| version >= known.since.into()).unwrap_or(&all[0]);
        let is_real_time = self.name == REAL_TIME;
        Emulation {
            max_cpus: if is_real_time { newest.max_cpus_real_time } else { newest.max_cpus },
            ..newest
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture::Threads;

    #[test]
    fn a_kernel_is_named_by_version_architecture_and_flavour() {
        for (architecture, wanted, packages, label) in [
            (&X86_64, "6.12", "cloud-amd64", "6.12.118"),
            (&X86_64, "6.12-rt", "rt-amd64", "6.12.118-rt"),
            (&X86_64, "6.12-generic", "amd64", "6.12.118-generic"),
            (&AARCH64, "6.12", "cloud-arm64", "6.12.118-arm64"),
            (&AARCH64, "6.12-16k", "arm64-16k", "6.12.118-arm64-16k"),
        ] {
            let flavour = Flavour::of(architecture, wanted).unwrap();
            assert_eq!((flavour.packages, flavour.label("6.12.118").as_str()), (packages, label));
        }
        let error = Flavour::of(&X86_64, "6.12-16k").unwrap_err().to_string();
        assert_eq!(error, "x86_64: no flavour \"16k\", only rt and generic");
    }

    #[test]
    fn a_package_is_of_the_flavour_with_the_longest_name() {
        for (version, is_generic, is_cloud) in [("6.12-generic", true, false), ("6.12", false, true)] {
            let flavour = Flavour::of(&X86_64, version).unwrap();
            assert_eq!(flavour.has_package("linux-image-6.12.118+deb13-amd64"), is_generic);
            assert_eq!(flavour.has_package("linux-image-6.12.118+deb13-cloud-amd64"), is_cloud);
            assert!(!flavour.has_package("linux-image-6.12.118+deb13-rt-amd64"));
        }
    }

    #[test]
    fn a_file_has_the_flavour_of_its_package() {
        for (architecture, package, name) in [
            (&X86_64, "linux-image-6.1.0-56-rt-amd64", Some("rt")),
            (&X86_64, "linux-image-6.1.0-56-cloud-amd64", Some("")),
            (&X86_64, "linux-image-6.1.0-56-amd64-unsigned", Some("generic")),
            (&AARCH64, "linux-image-6.12.118+deb13-arm64-16k", Some("16k")),
            (&AARCH64, "linux-image-6.1.0-56-rt-amd64", None),
            (&X86_64, "linux-image-6.8.0-45-generic", None),
        ] {
            assert_eq!(Flavour::of_package(architecture, package).map(|found| found.name), name, "{package}");
        }
    }

    #[test]
    fn the_emulator_gets_what_it_can_do_for_a_kernel() {
        for (version, cpu, max_cpus, of_real_time) in [
            ("5.10.0-46-cloud-amd64", "qemu64", 2, 2),
            ("6.1.192", "qemu64", 2, 2),
            ("6.12.117+deb13-cloud-amd64", "qemu64,-cx16", 2, 1),
            ("6.18.15+deb13-cloud-amd64", "qemu64", 2, 1),
            ("7.3.4+deb13-cloud-amd64", "qemu64", 1, 1),
        ] {
            for (flavour, max_cpus) in [("", max_cpus), ("-rt", of_real_time)] {
                let flavour = Flavour::of(&X86_64, &format!("6.1{flavour}")).unwrap();
                let emulation = flavour.emulation(version);
                let found = (emulation.cpu, emulation.max_cpus, emulation.threads_for(max_cpus));
                assert_eq!(found, (cpu, max_cpus, Threads::OneForAll), "{version} {flavour:?}");
                assert_eq!(emulation.threads_for(32), Threads::OnePerCpu);
            }
        }
        let arm64 = Flavour::of(&AARCH64, "").unwrap().emulation("5.10.223");
        let found = (arm64.cpu, arm64.max_cpus, arm64.threads_for(2));
        assert_eq!(found, ("neoverse-n1", 2, Threads::OneForAll));
    }
}

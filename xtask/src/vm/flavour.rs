//! The flavours of Debian's kernels, and what QEMU can emulate for them.

use anyhow::{Context as _, Result};

use super::apt::numbers;
use crate::architecture::{AARCH64, Architecture, X86_64};

/// A flavour of Debian's kernels.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Flavour {
    pub(super) architecture: &'static Architecture,
    /// Its name for people, behind a version. Empty: the usual one.
    pub(super) name: &'static str,
    /// The end of the names of its packages.
    pub(super) packages: &'static str,
}

static FLAVOURS: [Flavour; 7] = [
    Flavour { architecture: &X86_64, name: "", packages: "cloud-amd64" },
    Flavour { architecture: &X86_64, name: "rt", packages: "rt-amd64" },
    Flavour { architecture: &X86_64, name: "generic", packages: "amd64" },
    Flavour { architecture: &AARCH64, name: "", packages: "cloud-arm64" },
    Flavour { architecture: &AARCH64, name: "rt", packages: "rt-arm64" },
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

    /// Of a kernel that was given as a file, and of those for x86-64 that are not named otherwise.
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

    /// What QEMU can emulate. QEMU 7.2 to 10 without an accelerator makes some kernels of x86-64 crash: 7.x, and
    /// real-time ones since 6.12, with more than one CPU, while they patch their own code; 6.12 in the 16-byte
    /// compare-and-exchange of its slab allocator, which it does not use on a CPU without that instruction. With a
    /// thread for each CPU, QEMU 7.2 also executed an instruction for ever that another CPU had replaced: twice a CPU
    /// of 5.10 stood at a NOP or a jump in memory, where a breakpoint had been while a probe or a static key was
    /// switched.
    pub(super) fn emulation(&self, version: &str) -> Emulation {
        if self.architecture.name == AARCH64.name {
            // The oldest of QEMU's models with pages of 16 KiB.
            return Emulation { cpu: "neoverse-n1", max_cpus: 2, threads: Threads::OnePerCpu };
        }
        let is_real_time = self.name == "rt";
        let (cpu, max_cpus) = match numbers(version).as_slice() {
            [7..=u32::MAX, ..] => ("qemu64", 1),
            [6, 12, ..] if is_real_time => ("qemu64,-cx16", 1),
            [6, 12, ..] => ("qemu64,-cx16", 2),
            [6, 13..=u32::MAX, ..] if is_real_time => ("qemu64", 1),
            _ => ("qemu64", 2),
        };
        let threads = match numbers(version).as_slice() {
            [5, ..] => Threads::OneForAll,
            _ => Threads::OnePerCpu,
        };
        Emulation { cpu, max_cpus, threads }
    }
}

/// What QEMU can emulate for a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Emulation {
    /// QEMU's name of the CPU model.
    pub(super) cpu: &'static str,
    pub(super) max_cpus: u32,
    pub(super) threads: Threads,
}

/// The threads of the host that run the CPUs of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Threads {
    OnePerCpu,
    /// The CPUs take turns.
    OneForAll,
}

impl Threads {
    /// QEMU's option of its translator.
    pub(super) fn accelerator(self) -> &'static str {
        match self {
            Self::OnePerCpu => "tcg,thread=multi",
            Self::OneForAll => "tcg,thread=single",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_emulator_gets_what_it_can_do_for_a_kernel() {
        for (version, cpu, max_cpus, accelerator) in [
            ("5.10.0-46-cloud-amd64", "qemu64", 2, "tcg,thread=single"),
            ("6.1.192", "qemu64", 2, "tcg,thread=multi"),
            ("6.12.117+deb13-cloud-amd64", "qemu64,-cx16", 2, "tcg,thread=multi"),
            ("6.18.15+deb13-cloud-amd64", "qemu64", 2, "tcg,thread=multi"),
            ("7.3.4+deb13-cloud-amd64", "qemu64", 1, "tcg,thread=multi"),
        ] {
            let emulation = Flavour::usual().emulation(version);
            let found = (emulation.cpu, emulation.max_cpus, emulation.threads.accelerator());
            assert_eq!(found, (cpu, max_cpus, accelerator), "{version}");
        }
    }
}

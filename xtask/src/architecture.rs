//! The architectures for which selfconn is built: what Rust, Debian and QEMU call them, how to link for them on another
//! one, and what their test machines are.

use anyhow::{Context as _, Result};

use crate::{environment, run};

/// An architecture.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Architecture {
    /// The name that Rust, QEMU and the kernel have for it.
    pub(crate) name: &'static str,
    /// Debian's name.
    pub(crate) debian: &'static str,
    /// Debian's package of its emulator.
    pub(crate) emulator_package: &'static str,
    /// QEMU's options of the machine.
    pub(crate) machine: &'static [&'static str],
    /// The kernel's console, which is the first serial line.
    pub(crate) console: &'static str,
    /// The second serial line, for the output of tests, and QEMU's options for it with the character device `output`.
    pub(crate) output: &'static str,
    pub(crate) output_line: &'static [&'static str],
    /// The kernels of `cargo xtask vm`: one of each long-term series since 5.10, and the newest. The oldest is first.
    pub(crate) kernels: &'static [&'static str],
    /// The program that links for it on another architecture, and its Debian packages.
    pub(crate) linker: &'static str,
    pub(crate) linker_packages: &'static [&'static str],
}

pub(crate) static X86_64: Architecture = Architecture {
    name: "x86_64",
    debian: "amd64",
    emulator_package: "qemu-system-x86",
    machine: &[],
    console: "ttyS0",
    output: "ttyS1",
    output_line: &["-serial", "chardev:output"],
    kernels: &["5.10", "6.1", "6.12", "6.18", "7"],
    linker: "x86_64-linux-gnu-gcc",
    linker_packages: &["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"],
};

pub(crate) static AARCH64: Architecture = Architecture {
    name: "aarch64",
    debian: "arm64",
    emulator_package: "qemu-system-arm",
    machine: &["-machine", "virt"],
    // The machine has one serial line of its own.
    console: "ttyAMA0",
    output: "ttyS0",
    output_line: &["-device", "pci-serial,chardev=output"],
    kernels: &["5.10", "6.1", "6.12-16k", "7"],
    linker: "aarch64-linux-gnu-gcc",
    linker_packages: &["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
};

/// The names of the architectures.
pub(crate) const NAMES: [&str; 2] = ["x86_64", "aarch64"];

impl Architecture {
    /// The architecture with this name, or that of this machine.
    pub(crate) fn named(name: Option<&str>) -> Result<&'static Self> {
        let name = name.unwrap_or(std::env::consts::ARCH);
        [&X86_64, &AARCH64]
            .into_iter()
            .find(|known| known.name == name)
            .with_context(|| format!("there is nothing for {name}, only for {}", NAMES.join(" and ")))
    }

    /// The other one.
    pub(crate) fn other(&self) -> &'static Self {
        if self.name == X86_64.name { &AARCH64 } else { &X86_64 }
    }

    /// The target of programs that run where they are built, and of those of the test machines.
    pub(crate) fn rust_target(&self) -> String {
        format!("{}-unknown-linux-gnu", self.name)
    }

    /// The target of what is released: with musl a program needs no library of the host.
    pub(crate) fn release_target(&self) -> String {
        format!("{}-unknown-linux-musl", self.name)
    }

    pub(crate) fn emulator(&self) -> String {
        format!("qemu-system-{}", self.name)
    }

    pub(crate) fn is_this_machines(&self) -> bool {
        self.name == std::env::consts::ARCH
    }
}

/// Installs the library for a target.
///
/// # Errors
/// If there is no rustup, or it can't.
pub(crate) fn add_target(target: &str) -> Result<()> {
    let mut add = environment::plain("rustup");
    run::step(&format!("adding the target {target}"), add.args(["target", "add", target])).with_context(
        || format!("Rust's library for {target} is needed: install rustup, or let it reach its server"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_architecture_is_found_by_its_name() {
        let arm64 = Architecture::named(Some("aarch64")).unwrap();
        assert_eq!((arm64.debian, arm64.rust_target().as_str()), ("arm64", "aarch64-unknown-linux-gnu"));
        assert_eq!(arm64.other().name, "x86_64");
        let error = Architecture::named(Some("mips")).unwrap_err().to_string();
        assert_eq!(error, "there is nothing for mips, only for x86_64 and aarch64");
        assert!(NAMES.iter().all(|name| Architecture::named(Some(name)).is_ok()));
    }
}

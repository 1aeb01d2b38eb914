//! The architectures for which selfconn is built: what Rust, Debian and QEMU call them, how to link for them on another
//! one, and what their test machines are.

use anyhow::{Context as _, Result};
use object::elf::{EM_AARCH64, EM_X86_64};

use crate::{environment, run};

/// An architecture.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Architecture {
    /// The name that Rust, QEMU and the kernel have for it.
    pub(crate) name: &'static str,
    /// Debian's name.
    pub(crate) debian: &'static str,
    /// The machine in the ELF header of its programs.
    pub(crate) elf_machine: u16,
    /// Debian's package of its emulator.
    pub(crate) emulator_package: &'static str,
    /// QEMU's options of the machine.
    pub(crate) machine: &'static [&'static str],
    /// The kernel's console, which is the first serial line.
    pub(crate) console: &'static str,
    /// The second serial line, for the output of tests, and QEMU's options for it with the character device `output`.
    pub(crate) output: &'static str,
    pub(crate) output_line: &'static [&'static str],
    /// What QEMU emulates for a kernel: the last of these that is not newer than the kernel.
    pub(crate) emulations: &'static [Emulation],
    /// The kernels of `cargo xtask vm`, of long-term series since 5.10 and the newest that Debian has. The oldest is
    /// first.
    pub(crate) kernels: &'static [&'static str],
    /// The names of the variants in which `cargo xtask vm --all` boots them. None: all.
    pub(crate) variants: &'static [&'static str],
    /// The real-time kernels of `cargo xtask vm --all`, which boots them without changes.
    pub(crate) real_time_kernels: &'static [&'static str],
    /// Its kernels that are not made for clouds, on which only the tests run that force the methods.
    pub(crate) generic_kernels: &'static [&'static str],
    /// The program that links for it on another architecture, and its Debian packages.
    pub(crate) linker: &'static str,
    pub(crate) linker_packages: &'static [&'static str],
}

/// What QEMU emulates for kernels since a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Emulation {
    /// The series of the oldest kernel.
    pub(crate) since: [u32; 2],
    /// QEMU's name of the CPU model.
    pub(crate) cpu: &'static str,
    pub(crate) max_cpus: u32,
    /// The same for real-time kernels.
    pub(crate) max_cpus_real_time: u32,
    pub(crate) threads: Threads,
}

impl Emulation {
    /// The threads for this number of CPUs. More of them than usual would not come to an end in one thread.
    pub(crate) const fn threads_for(self, cpus: u32) -> Threads {
        if cpus > self.max_cpus { Threads::OnePerCpu } else { self.threads }
    }
}

/// The threads of the host that run the CPUs of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    OnePerCpu,
    /// The CPUs take turns.
    OneForAll,
}

impl Threads {
    /// QEMU's option of its translator.
    pub(crate) fn accelerator(self) -> &'static str {
        match self {
            Self::OnePerCpu => "tcg,thread=multi",
            Self::OneForAll => "tcg,thread=single",
        }
    }
}

/// Two CPUs that take turns.
const TWO_CPUS: Emulation = Emulation {
    since: [0, 0],
    cpu: "qemu64",
    max_cpus: 2,
    max_cpus_real_time: 2,
    threads: Threads::OneForAll,
};

pub(crate) static X86_64: Architecture = Architecture {
    name: "x86_64",
    debian: "amd64",
    elf_machine: EM_X86_64,
    emulator_package: "qemu-system-x86",
    machine: &[],
    console: "ttyS0",
    output: "ttyS1",
    output_line: &["-serial", "chardev:output"],
    // QEMU 7.2 to 10 without an accelerator makes some kernels crash: 7.x, and real-time ones since 6.12, with more
    // than one CPU, while they patch their own code; 6.12 in the 16-byte compare-and-exchange of its slab allocator,
    // which it does not use on a CPU without that instruction. With a thread for each CPU, QEMU 7.2 also executed
    // instructions that another CPU had replaced: twice a CPU of 5.10 stood for ever at a NOP or a jump in memory, where
    // a breakpoint had been while a probe or a static key was switched, and once one of 6.12 went to address 0 at the
    // entry of `tcp_set_state`, where a probe can be.
    emulations: &[
        TWO_CPUS,
        Emulation { since: [6, 12], cpu: "qemu64,-cx16", max_cpus_real_time: 1, ..TWO_CPUS },
        Emulation { since: [6, 13], max_cpus_real_time: 1, ..TWO_CPUS },
        Emulation { since: [7, 0], max_cpus: 1, max_cpus_real_time: 1, ..TWO_CPUS },
    ],
    kernels: &["5.10", "6.1", "6.12", "6.18", "7"],
    variants: &[],
    real_time_kernels: &["6.1-rt", "6.12-rt", "7-rt"],
    generic_kernels: &["5.10-generic", "7-generic"],
    linker: "x86_64-linux-gnu-gcc",
    linker_packages: &["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"],
};

pub(crate) static AARCH64: Architecture = Architecture {
    name: "aarch64",
    debian: "arm64",
    elf_machine: EM_AARCH64,
    emulator_package: "qemu-system-arm",
    machine: &["-machine", "virt"],
    // The machine has one serial line of its own.
    console: "ttyAMA0",
    output: "ttyS0",
    output_line: &["-device", "pci-serial,chardev=output"],
    // The oldest of QEMU's models with pages of 16 KiB. With a thread for each CPU, QEMU 7.2 goes on with instructions
    // that another CPU has replaced: after 56 of 400 times that an event of tracefs was switched on while another CPU
    // made system calls, the event was not seen for a second and longer.
    emulations: &[Emulation { cpu: "neoverse-n1", ..TWO_CPUS }],
    kernels: &["5.10", "6.1", "6.12-16k", "7"],
    variants: &["default", "confidentiality"],
    real_time_kernels: &[],
    generic_kernels: &[],
    linker: "aarch64-linux-gnu-gcc",
    linker_packages: &["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
};

/// All architectures.
pub(crate) static ALL: [&Architecture; 2] = [&X86_64, &AARCH64];

/// Their names.
pub(crate) const NAMES: [&str; 2] = ["x86_64", "aarch64"];

impl Architecture {
    /// The architecture with this name, or that of this machine.
    pub(crate) fn named(name: Option<&str>) -> Result<&'static Self> {
        let name = name.unwrap_or(std::env::consts::ARCH);
        ALL.into_iter()
            .find(|known| known.name == name)
            .with_context(|| format!("there is nothing for {name}, only for {}", NAMES.join(" and ")))
    }

    /// The one with this machine in the ELF header of its programs.
    pub(crate) fn of_elf_machine(machine: u16) -> Option<&'static Self> {
        ALL.into_iter().find(|known| known.elf_machine == machine)
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

/// Installs the library for a target of the toolchain that runs us, with which we build for it.
///
/// # Errors
/// If there is no rustup, or it can't.
pub(crate) fn add_target(target: &str) -> Result<()> {
    let mut add = environment::plain("rustup");
    add.args(["target", "add", target]);
    if let Some(toolchain) = environment::toolchain() {
        add.args(["--toolchain", &toolchain]);
    }
    run::step(&format!("adding the target {target}"), &mut add).with_context(|| {
        format!("Rust's library for {target} is needed: install rustup, or let it reach its server")
    })
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
        assert_eq!(ALL.map(|known| known.name), NAMES);
    }

    #[test]
    fn the_licences_of_what_each_architecture_links_are_checked() {
        for (file, text) in [
            ("deny.toml", include_str!("../../deny.toml")),
            ("packaging/about.toml", include_str!("../../packaging/about.toml")),
        ] {
            for target in ALL.map(Architecture::release_target) {
                assert!(text.contains(&format!("\"{target}\"")), "{file} has no target {target}");
            }
        }
    }
}

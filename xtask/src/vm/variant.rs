//! The ways in which each kernel is booted: the columns of the matrix. The methods of the hooks are no columns, for in
//! each boot the tests force one after another.

use super::kernel::Kernel;

/// One of them.
#[derive(Debug)]
pub(super) struct Variant {
    pub(super) name: &'static str,
    /// Added to the kernel's command line.
    pub(super) kernel_args: &'static [&'static str],
    /// How many CPUs the machine has.
    pub(super) cpus: u32,
}

/// As it comes; with what a kernel under Secure Boot denies, and more than that; and where nothing runs beside a
/// preempted program.
pub(super) const VARIANTS: [Variant; 4] = [
    Variant { name: "default", kernel_args: &[], cpus: 2 },
    Variant { name: "integrity", kernel_args: &["lockdown=integrity"], cpus: 2 },
    Variant { name: "confidentiality", kernel_args: &["lockdown=confidentiality"], cpus: 2 },
    Variant { name: "one-cpu", kernel_args: &[], cpus: 1 },
];

impl Variant {
    /// How many CPUs it has with this kernel: fewer where the emulator can't do more.
    pub(super) fn cpus_with(&self, kernel: &Kernel) -> u32 {
        self.cpus.min(kernel.emulation().most_cpus)
    }

    /// Whether an earlier variant is the same with this kernel.
    pub(super) fn repeats_another_with(&self, kernel: &Kernel) -> bool {
        let same = |other: &&Self| {
            other.kernel_args == self.kernel_args && other.cpus_with(kernel) == self.cpus_with(kernel)
        };
        VARIANTS.iter().find(same).is_some_and(|first| first.name != self.name)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn one_cpu_is_a_variant_of_its_own_only_where_there_can_be_two() {
        for (version, expected) in [
            ("6.1.1", ["default", "integrity", "confidentiality", "one-cpu"].as_slice()),
            ("7.3.4", &["default", "integrity", "confidentiality"]),
        ] {
            let kernel = Kernel { version: version.into(), image: PathBuf::new(), modules: Vec::new() };
            let names: Vec<&str> = VARIANTS
                .iter()
                .filter(|variant| !variant.repeats_another_with(&kernel))
                .map(|variant| variant.name)
                .collect();
            assert_eq!(names, expected, "{version}");
        }
    }
}

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
    /// Whether it is run when none is named.
    pub(super) is_usual: bool,
}

/// As it comes; with what a kernel under Secure Boot denies, and more than that; and, only when asked for, where
/// nothing runs beside a preempted program.
pub(super) const VARIANTS: [Variant; 4] = [
    Variant { name: "default", kernel_args: &[], cpus: 2, is_usual: true },
    Variant { name: "integrity", kernel_args: &["lockdown=integrity"], cpus: 2, is_usual: true },
    Variant { name: "confidentiality", kernel_args: &["lockdown=confidentiality"], cpus: 2, is_usual: true },
    Variant { name: "one-cpu", kernel_args: &[], cpus: 1, is_usual: false },
];

impl Variant {
    /// How many CPUs it has with this kernel: fewer where the emulator can't do more.
    pub(super) fn cpus_with(&self, kernel: &Kernel) -> u32 {
        self.cpus.min(kernel.emulation().most_cpus)
    }

    /// Whether one of these, before it, is the same with this kernel.
    pub(super) fn repeats_one_of(&self, variants: &[&Self], kernel: &Kernel) -> bool {
        let same = |other: &&&Self| {
            other.kernel_args == self.kernel_args && other.cpus_with(kernel) == self.cpus_with(kernel)
        };
        variants.iter().find(same).is_some_and(|first| first.name != self.name)
    }
}

/// Those with these names; or the usual ones, where there are no names.
pub(super) fn asked_for(names: &[String]) -> Vec<&'static Variant> {
    let is_asked_for = |variant: &&Variant| match names {
        [] => variant.is_usual,
        names => names.iter().any(|name| name == variant.name),
    };
    VARIANTS.iter().filter(is_asked_for).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn one_cpu_is_a_row_of_its_own_only_where_there_can_be_two() {
        for (version, names, expected) in [
            ("6.1.1", [].as_slice(), ["default", "integrity", "confidentiality"].as_slice()),
            ("6.1.1", &["one-cpu", "default"], &["default", "one-cpu"]),
            ("7.3.4", &["one-cpu", "default"], &["default"]),
            ("7.3.4", &["one-cpu"], &["one-cpu"]),
        ] {
            let kernel = Kernel { version: version.into(), image: PathBuf::new(), modules: Vec::new() };
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let variants = asked_for(&names);
            let rows = variants.iter().filter(|variant| !variant.repeats_one_of(&variants, &kernel));
            assert_eq!(rows.map(|variant| variant.name).collect::<Vec<_>>(), expected, "{version} {names:?}");
        }
    }
}

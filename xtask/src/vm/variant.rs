//! The variants in which each kernel is booted: the columns of the matrix. The methods of the hooks are not
//! among them, because in each boot the tests force one method after another.

use super::kernel::Kernel;

/// A column of the matrix.
#[derive(Debug)]
pub(super) struct Variant {
    pub(super) name: &'static str,
    /// Added to the kernel's command line.
    pub(super) kernel_args: &'static [&'static str],
    pub(super) cpus: u32,
    /// True if it is for the oldest kernel only.
    pub(super) at_oldest: bool,
    /// They run one after another.
    pub(super) parts: &'static [TestSelection],
}

/// A selection of the live tests.
#[derive(Debug)]
pub(super) struct TestSelection {
    pub(super) name: &'static str,
    /// Arguments of libtest: parts of names, and what is skipped.
    pub(super) args: &'static [&'static str],
    /// Divisors of the tests' counts, with several CPUs and with one. Emulation is some ten times slower than
    /// the machine it runs on; on one CPU only the full counts make it lose what it can lose.
    scale: [u32; 2],
}

impl TestSelection {
    /// The divisor on a machine with this number of CPUs.
    pub(super) fn scale(&self, cpus: u32) -> u32 {
        self.scale[usize::from(cpus == 1)]
    }
}

/// The module `load` runs alone, because it needs the whole machine, and has other counts.
const LOAD: TestSelection = TestSelection { name: "load", args: &["load::"], scale: [4, 1] };

/// What depends on the kernel: what loads and is seen, which process is named, what the socket table has.
const CORE: TestSelection = TestSelection { name: "live", args: &["kernel::"], scale: [10, 10] };

/// What an operator does with the daemon. The tests of files, pipes, HTTP and a service manager (`files::`)
/// run in no machine, because they don't depend on the kernel.
const REST: TestSelection = TestSelection { name: "live", args: &["operations::"], scale: [10, 10] };

/// The base for tests that the user names.
pub(super) const EVERYTHING: TestSelection = TestSelection { name: "live", args: &[], scale: [10, 10] };

/// The tests that force the methods one after another. A lockdown decides which programs load and what they
/// may read, and nothing else that we do.
const BY_METHOD: TestSelection =
    TestSelection { name: "live", args: &["kernel::by_method::"], scale: [10, 10] };

/// The kernel without changes; with one CPU, where no other program runs beside a preempted one; and under
/// the two lockdowns, of which a kernel under Secure Boot has the first. The longest come first.
pub(super) const VARIANTS: [Variant; 5] = [
    Variant { name: "default", kernel_args: &[], cpus: 2, at_oldest: false, parts: &[CORE, LOAD] },
    Variant { name: "rest", kernel_args: &[], cpus: 2, at_oldest: true, parts: &[REST] },
    Variant { name: "one-cpu", kernel_args: &[], cpus: 1, at_oldest: false, parts: &[LOAD] },
    Variant {
        name: "integrity",
        kernel_args: &["lockdown=integrity"],
        cpus: 2,
        at_oldest: false,
        parts: &[BY_METHOD],
    },
    STRICTEST,
];

/// The kernel without changes, for `cargo xtask test`.
pub(super) const QUICK: Variant =
    Variant { name: "default", kernel_args: &[], cpus: 2, at_oldest: false, parts: &[BY_METHOD] };

/// The lockdown that denies most.
pub(super) const STRICTEST: Variant = Variant {
    name: "confidentiality",
    kernel_args: &["lockdown=confidentiality"],
    cpus: 2,
    at_oldest: false,
    parts: &[BY_METHOD],
};

impl Variant {
    /// The number of CPUs with this kernel, which the emulator may limit.
    pub(super) fn cpus_with(&self, kernel: &Kernel) -> u32 {
        self.cpus.min(kernel.emulation().max_cpus)
    }

    /// Its place in the matrix.
    pub(super) fn index(&self) -> Option<usize> {
        VARIANTS.iter().position(|variant| variant.name == self.name)
    }

    /// The lockdown on the kernel's command line.
    pub(super) fn lockdown(&self) -> &'static str {
        self.kernel_args.iter().find_map(|arg| arg.strip_prefix("lockdown=")).unwrap_or("none")
    }

    /// True if an earlier one of these has the same tests in the same machine with this kernel.
    pub(super) fn repeats_one_of(&self, variants: &[&Self], kernel: &Kernel) -> bool {
        let has_parts =
            |other: &Self| self.parts.iter().all(|part| other.parts.iter().any(|has| has.args == part.args));
        let same = |other: &&&Self| {
            other.kernel_args == self.kernel_args
                && other.cpus_with(kernel) == self.cpus_with(kernel)
                && has_parts(other)
        };
        variants.iter().find(same).is_some_and(|first| first.name != self.name)
    }
}

/// The variants with these names, or all if there are no names.
pub(super) fn named(names: &[String]) -> Vec<&'static Variant> {
    let is_named = |variant: &&Variant| names.is_empty() || names.iter().any(|name| name == variant.name);
    VARIANTS.iter().filter(is_named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cpu_is_a_row_of_its_own_only_if_there_can_be_two() {
        for (version, names, expected) in [
            (
                "6.1.1",
                [].as_slice(),
                ["default", "rest", "one-cpu", "integrity", "confidentiality"].as_slice(),
            ),
            ("7.3.4", &[], &["default", "rest", "integrity", "confidentiality"]),
            ("6.1.1", &["one-cpu", "default"], &["default", "one-cpu"]),
            ("7.3.4", &["one-cpu", "default"], &["default"]),
            ("7.3.4", &["one-cpu"], &["one-cpu"]),
        ] {
            let kernel = Kernel::of_version(version);
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let variants = named(&names);
            let rows = variants.iter().filter(|variant| !variant.repeats_one_of(&variants, &kernel));
            assert_eq!(rows.map(|variant| variant.name).collect::<Vec<_>>(), expected, "{version} {names:?}");
        }
    }
}

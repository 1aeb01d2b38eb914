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
    /// Only on the oldest kernel.
    pub(super) at_oldest: bool,
    /// What is run, one after another.
    pub(super) parts: &'static [Part],
}

/// Some of the live tests.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) name: &'static str,
    /// As libtest takes them: parts of names, of which one must fit, and what leaves out.
    pub(super) args: &'static [&'static str],
    /// Divides the counts, where there is more than one CPU, and where there is one: emulation is some ten times slower
    /// than the machine it runs on, and on one CPU loses what it loses only in earnest.
    scale: [u32; 2],
}

impl Part {
    /// What divides the counts on a machine with so many CPUs.
    pub(super) fn scale(&self, cpus: u32) -> u32 {
        self.scale[usize::from(cpus == 1)]
    }
}

/// The module `load` is a part of its own, for it needs the machine for itself and other counts.
const LOAD: Part = Part { name: "load", args: &["load::"], scale: [4, 1] };

/// What each kernel may do in its own way: what loads and is seen, who is named, what the socket table has.
const CORE: Part = Part {
    name: "live",
    args: &[
        "accident::",
        "accounting::with_room",
        "detection::",
        "kinds::",
        "methods::",
        "not_ours::",
        "openers::",
        "risk::the_twentieth",
        "scan::",
        "steering::",
        "table::",
        "who::",
        "--skip=openers::ordinary",
        "--skip=scan::many",
    ],
    scale: [10, 10],
};

/// All that neither [`CORE`] nor [`LOAD`] has, but for what is about files, pipes, HTTP and a service manager: no kernel
/// would do that differently.
const REST: Part = Part {
    name: "live",
    args: &[
        "--skip=accident::",
        "--skip=accounting::a_disk",
        "--skip=accounting::with_room",
        "--skip=detection::",
        "--skip=kinds::",
        "--skip=load::",
        "--skip=log::",
        "--skip=log_file::",
        "--skip=methods::",
        "--skip=metrics::",
        "--skip=not_ours::",
        "--skip=openers::a_",
        "--skip=openers::an_",
        "--skip=openers::refused",
        "--skip=openers::self",
        "--skip=risk::the_twentieth",
        "--skip=scan::a_",
        "--skip=scan::an_",
        "--skip=scan::connects",
        "--skip=scan::without",
        "--skip=service::",
        "--skip=stdout::",
        "--skip=steering::",
        "--skip=table::",
        "--skip=who::",
    ],
    scale: [10, 10],
};

/// What is run of those tests that somebody names.
pub(super) const EVERYTHING: Part = Part { name: "live", args: &[], scale: [10, 10] };

/// The modules that go through the methods one after another: a lockdown decides which programs load and what they may
/// read, and nothing else that we do.
const BY_METHOD: Part = Part {
    name: "live",
    args: &["accident::", "detection::", "kinds::", "methods::", "risk::the_twentieth", "who::"],
    scale: [10, 10],
};

/// As it comes, in two parts; where nothing runs beside a preempted program; with what a kernel under Secure Boot denies,
/// and more than that. What takes long comes first.
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

/// A kernel as it comes, for those who have little time.
pub(super) const QUICK: Variant =
    Variant { name: "default", kernel_args: &[], cpus: 2, at_oldest: false, parts: &[BY_METHOD] };

/// What denies most.
pub(super) const STRICTEST: Variant = Variant {
    name: "confidentiality",
    kernel_args: &["lockdown=confidentiality"],
    cpus: 2,
    at_oldest: false,
    parts: &[BY_METHOD],
};

impl Variant {
    /// How many CPUs it has with this kernel: fewer where the emulator can't do more.
    pub(super) fn cpus_with(&self, kernel: &Kernel) -> u32 {
        self.cpus.min(kernel.emulation().most_cpus)
    }

    /// The lockdown it is booted with.
    pub(super) fn lockdown(&self) -> &'static str {
        self.kernel_args.iter().find_map(|arg| arg.strip_prefix("lockdown=")).unwrap_or("none")
    }

    /// Whether one of these, before it, has its tests, in the same machine with this kernel.
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

/// Those with these names; or all, where there are no names.
pub(super) fn asked_for(names: &[String]) -> Vec<&'static Variant> {
    let is_asked_for = |variant: &&Variant| names.is_empty() || names.iter().any(|name| name == variant.name);
    VARIANTS.iter().filter(is_asked_for).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn one_cpu_is_a_row_of_its_own_only_where_there_can_be_two() {
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
            let kernel = Kernel {
                version: version.into(),
                image: PathBuf::new(),
                modules: Vec::new(),
                is_known: false,
            };
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let variants = asked_for(&names);
            let rows = variants.iter().filter(|variant| !variant.repeats_one_of(&variants, &kernel));
            assert_eq!(rows.map(|variant| variant.name).collect::<Vec<_>>(), expected, "{version} {names:?}");
        }
    }
}

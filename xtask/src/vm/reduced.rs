//! `cargo xtask reduced-kernels`: kernels without a part that all of Debian's have: BTF, kprobes, tracefs. They are
//! built from Debian's kernel source with a small configuration, and booted. `doctor` must name what is missing, and
//! the live tests that are about what is left must pass.

use std::{
    env::consts::ARCH,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    VmArgs,
    apt::PrivateApt,
    boot,
    flavour::Flavour,
    kernel::Kernel,
    report::MatrixRow,
    variant::{self, Variant},
};
use crate::{
    architecture::X86_64,
    environment::plain,
    fingerprint, packages,
    run::{self, say, seconds_since},
    workspace::{Workspace, here},
};

/// The series whose source is used. Debian 12 has it, and its compiler builds it.
const SERIES: &str = "6.1";

/// All that selfconn uses.
const CONFIG: &str = include_str!("reduced/kernel.config");

/// The fault in the row of a kernel on which `run` can attach nothing.
const UNFIT: &str = "doctor: failed, exit status 1";

/// A kernel without a part.
struct ReducedKernel {
    name: &'static str,
    /// The options that are off.
    without: &'static [&'static str],
    /// True if something can be attached.
    is_fit: bool,
    /// What `doctor` must say of checks or methods: a part of the text.
    findings: &'static [(&'static str, &'static str)],
    /// Parts of the names of the live tests that are about what is left.
    tests: &'static [&'static str],
}

const KERNELS: [ReducedKernel; 3] = [
    ReducedKernel {
        name: "no-btf",
        without: &["DEBUG_INFO_BTF"],
        is_fit: true,
        findings: &[("btf", "the kernel was built without CONFIG_DEBUG_INFO_BTF")],
        tests: &["by_method::methods::", "without_btf_self_connections"],
    },
    ReducedKernel {
        name: "no-kprobes",
        without: &["KPROBES", "KPROBE_EVENTS"],
        is_fit: true,
        findings: &[("kprobe", "the kernel was built without CONFIG_KPROBE_EVENTS")],
        tests: &["by_method::methods::", "by_method::detection::"],
    },
    ReducedKernel {
        name: "no-tracefs",
        without: &[
            "FTRACE",
            "FUNCTION_TRACER",
            "DYNAMIC_FTRACE",
            "KPROBE_EVENTS",
            "UPROBE_EVENTS",
            "BPF_EVENTS",
        ],
        is_fit: false,
        // Without it, there are no tracing programs, and nothing can be attached.
        findings: &[
            ("tracefs", "not in this kernel"),
            ("perf", "the kernel was built without CONFIG_BPF_EVENTS"),
            ("fentry", "the kernel was built without CONFIG_BPF_EVENTS"),
        ],
        tests: &["forcing_an_unavailable_method"],
    },
];

/// Programs and a header, and their packages.
const PROGRAMS: [(&str, &str); 7] = [
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("pahole", "dwarves"),
    ("xz", "xz-utils"),
    ("/usr/include/libelf.h", "libelf-dev"),
];

/// Builds what is not there, and boots all.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let start = Instant::now();
    check_machine(ARCH)?;
    packages::install_programs(&[&super::PROGRAMS[..], &PROGRAMS].concat())?;
    let directory = super::directory(workspace).join("reduced");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    let mut wrong = Vec::new();
    for reduced in &KERNELS {
        let kernel = Kernel {
            version: format!("{SERIES}-{}", reduced.name),
            image: reduced.image(workspace, &directory)?,
            modules: Vec::new(),
            flavour: Flavour::usual(),
            is_known: false,
            module_names: Vec::new(),
        };
        let tests = reduced.tests.iter().map(|name| (*name).to_owned()).collect();
        let args = VmArgs::for_tests(vec![kernel.version.clone()], tests);
        let quick: &Variant = &variant::QUICK;
        let report = boot(&args, &X86_64, &[(&kernel, quick)], Vec::new(), workspace, |_, _| Ok(()))?;
        let row = report.rows.first().context("no row")?;
        let doctor = report_of_doctor(row)?;
        // An unfit kernel fails `doctor`, and must fail nothing else.
        let is_unfit = doctor["fit"] == false && row.faults == [UNFIT] && row.has_passed_tests();
        ensure!(is_unfit != reduced.is_fit, "{}: fit: {}, {}", reduced.name, doctor["fit"], row.summary());
        if reduced.is_fit {
            report.check()?;
        }
        for (subject, text) in reduced.findings {
            match said_of(&doctor, subject) {
                Some(found) if found.contains(text) => {
                    say(format!("{}: doctor says of {subject}: {found}", reduced.name));
                }
                found => wrong.push(format!("{}: {subject}: {found:?}", reduced.name)),
            }
        }
    }
    ensure!(wrong.is_empty(), "doctor does not say what is missing: {}", wrong.join("; "));
    say(format!("done in {}", seconds_since(start)));
    Ok(())
}

/// The configuration is for x86-64, and this machine's compiler builds the kernels.
fn check_machine(architecture: &str) -> Result<()> {
    let wanted = X86_64.name;
    ensure!(
        architecture == wanted,
        "the reduced kernels are of {wanted}, and this machine is {architecture}: build them on one of {wanted}"
    );
    Ok(())
}

impl ReducedKernel {
    /// Its configuration: all lines but those of the options that are off.
    fn config(&self) -> String {
        let is_off =
            |line: &&str| self.without.iter().any(|option| line.starts_with(&format!("CONFIG_{option}=")));
        let on: String =
            CONFIG.lines().filter(|line| !is_off(line)).map(|line| format!("{line}\n")).collect();
        let off = self.without.iter().map(|option| format!("# CONFIG_{option} is not set\n"));
        on + &off.collect::<String>()
    }

    /// Its image. It is kept until the configuration changes.
    fn image(&self, workspace: &Workspace, directory: &Path) -> Result<PathBuf> {
        let config = self.config();
        let name = format!("{}-{}", self.name, &fingerprint::of_bytes(config.as_bytes())[..12]);
        let image = directory.join(format!("{name}.bzImage"));
        if image.exists() {
            say(format!("using {}", here(&image)));
            return Ok(image);
        }
        let source = source(workspace, directory)?;
        let build = directory.join("build");
        let _ = fs::remove_dir_all(&build);
        fs::create_dir_all(&build).with_context(|| format!("create {}", build.display()))?;
        let requested = build.join("requested.config");
        fs::write(&requested, &config).with_context(|| format!("write {}", requested.display()))?;
        let make = || {
            let mut make = plain("make");
            make.arg("--silent").arg("-C").arg(&source).arg(format!("O={}", build.display()));
            make
        };
        run::output(make().arg("allnoconfig").env("KCONFIG_ALLCONFIG", &requested))?;
        // An option whose conditions are not met is dropped silently.
        let got = fs::read_to_string(build.join(".config")).context("read the kernel's configuration")?;
        let is_missing =
            |line: &&str| line.starts_with("CONFIG_") && !got.lines().any(|other| other == *line);
        let missing: Vec<&str> = config.lines().filter(is_missing).collect();
        ensure!(missing.is_empty(), "{}: without a condition of {missing:?}", self.name);
        let is_on = |option: &&&str| got.lines().any(|line| line == format!("CONFIG_{option}=y"));
        let left: Vec<&&str> = self.without.iter().filter(is_on).collect();
        ensure!(left.is_empty(), "{}: something else needs {left:?}", self.name);
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        run::step(
            &format!("building the kernel {}", self.name),
            make().arg(format!("-j{jobs}")).arg("bzImage"),
        )?;
        fs::rename(build.join("arch/x86/boot/bzImage"), &image)
            .with_context(|| format!("keep {}", image.display()))?;
        fs::remove_dir_all(&build).with_context(|| format!("remove {}", build.display()))?;
        Ok(image)
    }
}

/// The JSON that `doctor` printed in a machine.
fn report_of_doctor(row: &MatrixRow) -> Result<Value> {
    let log = fs::read_to_string(&row.log).with_context(|| format!("read {}", row.log.display()))?;
    let is_object = |line: &&str| line.starts_with('{');
    let doctor = log.lines().filter(is_object).find_map(|line| serde_json::from_str(line).ok());
    doctor.context("doctor has printed nothing")
}

/// What `doctor` said of a check or a method.
fn said_of(doctor: &Value, subject: &str) -> Option<String> {
    let hooks = doctor["hooks"].as_array().into_iter().flatten();
    let methods = hooks.flat_map(|hook| hook["methods"].as_array().into_iter().flatten());
    let checks = doctor["checks"].as_array().into_iter().flatten();
    let of_method = methods.filter(|method| method["method"] == subject).map(|method| &method["why"]);
    let of_check = checks.filter(|check| check["name"] == subject).map(|check| &check["finding"]);
    of_method.chain(of_check).find_map(|text| text.as_str().map(str::to_owned))
}

/// The unpacked source, which is kept.
fn source(workspace: &Workspace, directory: &Path) -> Result<PathBuf> {
    let name = format!("linux-source-{SERIES}");
    let source = directory.join(&name);
    if source.exists() {
        return Ok(source);
    }
    let package = directory.join("package");
    let _ = fs::remove_dir_all(&package);
    say(format!("fetching and unpacking {name}"));
    PrivateApt::open(&super::directory(workspace), &X86_64)?.unpack(&name, &package)?;
    let archive = package.join(format!("usr/src/{name}.tar.xz"));
    run::output(plain("tar").arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(&package))?;
    fs::rename(package.join(&name), &source).with_context(|| format!("keep {}", source.display()))?;
    fs::remove_dir_all(&package).with_context(|| format!("remove {}", package.display()))?;
    Ok(source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_built_on_their_own_architecture_only() {
        assert!(check_machine("x86_64").is_ok());
        let error = check_machine("aarch64").unwrap_err().to_string();
        assert_eq!(
            error,
            "the reduced kernels are of x86_64, and this machine is aarch64: build them on one of x86_64"
        );
    }

    #[test]
    fn a_configuration_lacks_what_it_is_without_and_nothing_else() {
        for kernel in &KERNELS {
            let config = kernel.config();
            for option in kernel.without {
                assert!(!config.contains(&format!("CONFIG_{option}=y")), "{}: {option}", kernel.name);
                assert!(
                    CONFIG.contains(&format!("CONFIG_{option}=y")),
                    "{}: {option} is never on",
                    kernel.name
                );
            }
            assert_eq!(config.lines().count(), CONFIG.lines().count(), "{}", kernel.name);
        }
    }
}

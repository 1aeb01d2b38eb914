//! `cargo xtask reduced-kernels`: kernels without a part that all of Debian's have: BTF, kprobes, tracefs. They are
//! built from Debian's kernel source with a small configuration, and booted. `doctor` must name what is missing, and the
//! live tests that are about what is left must pass.

use std::{
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

/// A kernel without a part.
struct ReducedKernel {
    name: &'static str,
    /// The options that are off, and with them what needs them.
    without: &'static [&'static str],
    /// What `doctor` must say: of a check, or of a method, and a part of the text.
    finding: (&'static str, &'static str),
    /// Parts of the names of the live tests that are about what is left.
    tests: &'static [&'static str],
}

const KERNELS: [ReducedKernel; 3] = [
    ReducedKernel {
        name: "no-btf",
        without: &["DEBUG_INFO_BTF"],
        finding: ("btf", "the kernel was built without CONFIG_DEBUG_INFO_BTF"),
        tests: &["by_method::methods::", "without_btf_self_connections"],
    },
    ReducedKernel {
        name: "no-kprobes",
        without: &["KPROBES", "KPROBE_EVENTS"],
        finding: ("kprobe", "the kernel was built without CONFIG_KPROBES"),
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
        finding: ("tracefs", "not in this kernel"),
        tests: &["forcing_an_unavailable_method", "the_object_and_its_architecture"],
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
        let report = boot(&args, &X86_64, &[(&kernel, quick)], Vec::new(), workspace)?;
        report.check()?;
        let row = report.rows.first().context("no row")?;
        match reduced.finding_in(row)? {
            Some(found) if found.contains(reduced.finding.1) => {
                say(format!("{}: doctor says of {}: {found}", reduced.name, reduced.finding.0));
            }
            found => wrong.push(format!("{}: {}: {found:?}", reduced.name, reduced.finding.0)),
        }
    }
    ensure!(wrong.is_empty(), "doctor does not say what is missing: {}", wrong.join("; "));
    say(format!("done in {}", seconds_since(start)));
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
        let wanted = build.join("wanted.config");
        fs::write(&wanted, &config).with_context(|| format!("write {}", wanted.display()))?;
        let make = || {
            let mut make = plain("make");
            make.arg("--silent").arg("-C").arg(&source).arg(format!("O={}", build.display()));
            make
        };
        run::output(make().arg("allnoconfig").env("KCONFIG_ALLCONFIG", &wanted))?;
        // An option whose conditions are not met is dropped without a word.
        let got = fs::read_to_string(build.join(".config")).context("read the kernel's configuration")?;
        let is_missing =
            |line: &&str| line.starts_with("CONFIG_") && !got.lines().any(|other| other == *line);
        let missing: Vec<&str> = config.lines().filter(is_missing).collect();
        // Some options of tracing go with the one that is off.
        say(format!(
            "{}: without {}, and so without {}",
            self.name,
            self.without.join(", "),
            missing.join(", ")
        ));
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

    /// What `doctor` said there of the check or the method.
    fn finding_in(&self, row: &MatrixRow) -> Result<Option<String>> {
        let log = fs::read_to_string(&row.log).with_context(|| format!("read {}", row.log.display()))?;
        let doctor = log.lines().find_map(|line| serde_json::from_str::<Value>(line).ok());
        let doctor = doctor.context("doctor has printed nothing")?;
        let hooks = doctor["hooks"].as_array().into_iter().flatten();
        let methods = hooks.flat_map(|hook| hook["methods"].as_array().into_iter().flatten());
        let checks = doctor["checks"].as_array().into_iter().flatten();
        let of_method =
            methods.filter(|method| method["method"] == self.finding.0).map(|method| &method["why"]);
        let of_check = checks.filter(|check| check["name"] == self.finding.0).map(|check| &check["finding"]);
        Ok(of_method.chain(of_check).find_map(|text| text.as_str().map(str::to_owned)))
    }
}

/// The unpacked source, which is kept.
fn source(workspace: &Workspace, directory: &Path) -> Result<PathBuf> {
    let name = format!("linux-source-{SERIES}");
    let source = directory.join(&name);
    if source.join("Makefile").exists() {
        return Ok(source);
    }
    let package = directory.join("package");
    let _ = fs::remove_dir_all(&package);
    say(format!("fetching and unpacking {name}"));
    PrivateApt::open(&super::directory(workspace), &X86_64)?.unpack(&name, &package)?;
    let archive = package.join(format!("usr/src/{name}.tar.xz"));
    run::output(plain("tar").arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(directory))?;
    fs::remove_dir_all(&package).with_context(|| format!("remove {}", package.display()))?;
    Ok(source)
}

#[cfg(test)]
mod tests {
    use super::*;

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

//! The initramfs of a test machine: a static busybox whose shell is PID 1 and runs `init.sh`, the kernel's
//! modules, the programs to run, and the plan: a shell script of `run` lines.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{apt::PrivateApt, kernel::Kernel};
use crate::{
    architecture::Architecture,
    dist::Tree,
    environment::plain,
    packages, run,
    workspace::{Workspace, write_if_changed},
};

/// PID 1.
pub(super) const INIT: &str = include_str!("init.sh");

/// A program that PID 1 runs.
#[derive(Clone, Debug, Default)]
pub(super) struct GuestRun {
    pub(super) name: String,
    pub(super) env: Vec<(String, String)>,
    pub(super) program: String,
    pub(super) args: Vec<String>,
}

impl GuestRun {
    /// Its line in the plan.
    fn line(&self) -> String {
        let env = self.env.iter().map(|(key, value)| format!("{key}={value}"));
        let words = [self.name.clone()].into_iter().chain(env).chain([self.program.clone()]);
        let words = words.chain(self.args.iter().cloned()).map(|word| quote(&word));
        format!("run {}\n", words.collect::<Vec<_>>().join(" "))
    }
}

/// A word of a shell script.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// busybox, linked statically, from the distribution's package. It is GPL-2, and used in test machines only.
/// The package is not installed, because it would replace another busybox.
pub(super) fn busybox(workspace: &Workspace, architecture: &'static Architecture) -> Result<PathBuf> {
    const PACKAGE: &str = "busybox-static";
    let of_machines = super::directory(workspace);
    let directory = of_machines.join(format!("busybox-{}", architecture.debian));
    let find = || ["bin/busybox", "usr/bin/busybox"].map(|path| directory.join(path)).into_iter();
    if !find().any(|path| path.exists()) {
        if architecture.is_this_machines() {
            packages::unpack(&[PACKAGE], &directory)?;
        } else {
            PrivateApt::open(&of_machines, architecture)?.unpack(PACKAGE, &directory)?;
        }
    }
    find().find(|path| path.exists()).with_context(|| format!("no busybox in the package {PACKAGE}"))
}

/// Writes an initramfs. Each program goes to `/bin`.
pub(super) fn initramfs(
    file: &Path,
    busybox: &Path,
    kernel: &Kernel,
    programs: &[&Path],
    runs: &[GuestRun],
    deadline_s: u64,
) -> Result<()> {
    let tree = Tree::empty(&file.with_extension("tree"))?;
    tree.write("init", 0o755, INIT.as_bytes())?;
    tree.copy("sbin/busybox", 0o755, busybox)?;
    for program in programs {
        tree.copy(&format!("bin/{}", file_name(program)), 0o755, program)?;
    }
    add_modules(&tree, kernel)?;
    tree.write("plan.sh", 0o644, runs.iter().map(GuestRun::line).collect::<String>().as_bytes())?;
    tree.write("output", 0o644, kernel.flavour.architecture.output.as_bytes())?;
    tree.write("deadline", 0o644, format!("{deadline_s}\n").as_bytes())?;
    write_if_changed(file, &cpio(&tree)?)?;
    fs::remove_dir_all(&tree.root).with_context(|| format!("remove {}", tree.root.display()))
}

/// Adds a kernel's modules, and `modules/order` with their names in the order in which they load.
pub(super) fn add_modules(tree: &Tree, kernel: &Kernel) -> Result<()> {
    for module in &kernel.modules {
        tree.copy(&format!("modules/{}", file_name(module)), 0o644, module)?;
    }
    let order: String = kernel.modules.iter().map(|module| file_name(module) + "\n").collect();
    tree.write("modules/order", 0o644, order.as_bytes())
}

/// The tree in the form that kernels unpack, owned by root. The kernel itself makes /dev/console
/// (`usr/default_cpio_list` at v5.10).
pub(super) fn cpio(tree: &Tree) -> Result<Vec<u8>> {
    let mut bsdtar = plain("bsdtar");
    bsdtar.args(["--create", "--format=newc", "--uid=0", "--gid=0", "--file=-", "--directory"]);
    run::output_bytes(bsdtar.arg(&tree.root).arg("."))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_plan_is_quoted() {
        let run = GuestRun {
            name: "live".into(),
            env: vec![("A".into(), "b c".into())],
            program: "/bin/live".into(),
            args: vec!["it's".into()],
        };
        assert_eq!(run.line(), "run 'live' 'A=b c' '/bin/live' 'it'\\''s'\n");
    }
}

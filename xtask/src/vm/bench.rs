//! Runs the bench in a virtual machine, because this host's kernel may have only one of the two hooks.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{
    PROGRAMS, binaries,
    boot::{Boot, Ending},
    directory,
    emulator::Emulator,
    guest::{self, GuestRun},
    stock::KernelStock,
};
use crate::{
    architecture::Architecture,
    packages,
    run::{say, seconds},
    workspace::{Workspace, here},
};

/// A kernel on which no BPF program is preempted, so that the kernel's run time of a program is the program's
/// own.
const KERNEL: &str = "6.12";

const DEADLINE: Duration = Duration::from_secs(900);

/// Measures these groups. Returns the file with the samples.
pub(crate) fn measure(workspace: &Workspace, groups: &[&str]) -> Result<PathBuf> {
    packages::install_programs(&PROGRAMS)?;
    let architecture = Architecture::named(None)?;
    let emulator = Emulator::find_or_fetch(workspace, architecture)?;
    let stock = KernelStock::get_all(&[KERNEL.to_owned()], architecture, &directory(workspace))?;
    let kernel = stock.kernels.first().context("no kernel")?;
    let programs = ["build", "--bin", "selfconn", "--bench", "cost"];
    let [daemon, cost] = binaries::build(workspace, architecture, &programs, ["selfconn", "cost"])?;
    let file = |name: &str| directory(workspace).join(name);
    let (initramfs, log, console) = (file("bench.cpio"), file("bench.log"), file("bench.console.log"));
    let arguments = ["--daemon", "/bin/selfconn", "--kernel", &kernel.version, "--samples", "--quick"];
    let run = GuestRun {
        name: "cost".into(),
        program: "/bin/cost".into(),
        args: arguments.iter().chain(groups).map(|argument| (*argument).to_owned()).collect(),
        env: Vec::new(),
    };
    let busybox = guest::busybox(workspace, architecture)?;
    guest::initramfs(&initramfs, &busybox, kernel, &[&daemon, &cost], &[run], DEADLINE.as_secs())?;
    say(format!("measuring on {} in a virtual machine", kernel.version));
    let boot = Boot {
        emulator: &emulator,
        kernel,
        initramfs: &initramfs,
        kernel_args: &[],
        cpus: kernel.emulation().max_cpus,
        memory_mib: 1024,
        deadline: DEADLINE,
    };
    let result = boot.run(&log, &console)?;
    fs::remove_file(&initramfs).with_context(|| format!("remove {}", initramfs.display()))?;
    let (ending, log) = (&result.ending, here(&log));
    ensure!(*ending == Ending::Passed, "measuring on {}: {ending:?}: the output is in {log}", kernel.version);
    let samples = result.output.lines().find(|line| line.starts_with("{\"values\":"));
    let samples = samples.with_context(|| format!("the bench printed no samples: {log}"))?;
    say(format!("measured on {} in {}", kernel.version, seconds(result.duration)));
    let file = file("bench.json");
    fs::write(&file, samples).with_context(|| format!("write {}", file.display()))?;
    Ok(file)
}

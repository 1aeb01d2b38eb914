//! `cargo xtask bench`'s measurement of the pair of hooks, where this host's kernel has only one of them: the same helper,
//! linked statically, in a machine of its own.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, bail};

use super::{
    binaries,
    boot::{Boot, Ending},
    directory,
    initramfs::Initramfs,
    plan::{self, Plan, Run},
    set_up,
    stock::Stock,
};
use crate::{
    progress::{say, seconds},
    workspace::{Workspace, here},
};

/// One on which no program can be preempted, so that the kernel's own account of a program is of that program.
const KERNEL: &str = "6.12";

const DEADLINE: Duration = Duration::from_secs(900);

/// The kernel it was measured on, and what the helper said.
pub(crate) fn measure(workspace: &Workspace, groups: &[&str]) -> Result<(String, String)> {
    set_up()?;
    let directory = directory(workspace);
    let stock = Stock::get(&[KERNEL.to_owned()], &directory)?;
    let kernel = stock.kernels.first().context("no kernel")?;
    say("building what measures in a virtual machine");
    let build = directory.join("build");
    let mut programs =
        binaries::build(workspace, &build, &["build", "--package", "xtask", "--bin", binaries::GUEST_INIT])?;
    let measured = ["build", "--package", "selfconn-user", "--bin", "selfconn", "--bench", "cost"];
    programs.extend(binaries::build(workspace, &build, &measured)?);

    let mut own = Initramfs::new();
    for program in &programs {
        let path =
            if program.name == binaries::GUEST_INIT { "/init" } else { &format!("/bin/{}", program.name) };
        own.file(path, &program.content);
    }
    let arguments = ["measure", "--daemon", "/bin/selfconn", "--scratch", "/", "--quick"];
    let run = Run {
        name: "measure".into(),
        program: "/bin/cost".into(),
        args: arguments.iter().chain(groups).map(|argument| (*argument).to_owned()).collect(),
        env: Vec::new(),
    };
    let plan = Plan { modules: Vec::new(), env: Vec::new(), runs: vec![run], deadline_s: DEADLINE.as_secs() };
    own.file(plan::PATH, &serde_json::to_vec(&plan).context("write the plan")?);
    let logs = directory.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
    let [initramfs, log, console] =
        ["measure.cpio", "measure.log", "measure.console.log"].map(|name| logs.join(name));
    fs::write(&initramfs, own.finish()).with_context(|| format!("write {}", initramfs.display()))?;
    say(format!("measuring on {} in a virtual machine", kernel.version));
    let boot = Boot {
        kernel,
        initramfs: &initramfs,
        kernel_args: &[],
        cpus: kernel.emulation().most_cpus.min(2),
        memory_mib: 1024,
        deadline: DEADLINE,
    };
    let remains = boot.run(&log, &console)?;
    fs::remove_file(&initramfs).with_context(|| format!("remove {}", initramfs.display()))?;
    if remains.ending != Ending::Passed {
        bail!("measuring on {}: {:?}: all of it is in {}", kernel.version, remains.ending, here(&log));
    }
    say(format!("measured on {} in {}", kernel.version, seconds(remains.took)));
    Ok((kernel.version.clone(), remains.output))
}

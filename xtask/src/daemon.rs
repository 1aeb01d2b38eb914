//! `cargo xtask build` and `cargo xtask run`: the release build of the daemon, and one command to see it
//! work.

use std::{env, ffi::OsString, os::unix::process::CommandExt as _};

use anyhow::{Result, anyhow, bail};

use crate::{
    architecture::Architecture,
    build_ebpf,
    dist::binary,
    environment,
    packages::may_install,
    run::{self, say},
    workspace::{Workspace, here},
};

/// As [`build`], for this architecture, static: the host needs no library.
pub(crate) fn build_for(workspace: &Workspace, architecture: &Architecture) -> Result<()> {
    build_ebpf::build(workspace)?;
    let binary = binary::build(workspace, architecture, &workspace.target)?;
    say(format!("{} is for {} and needs no library", here(&binary), architecture.name));
    Ok(())
}

/// Builds the eBPF object and the daemon, for release.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    build_ebpf::build(workspace)?;
    let mut cargo = environment::cargo();
    cargo.args(["build", "--release", "--package", "selfconn-user"]).current_dir(&workspace.root);
    run::step(&format!("building {}", here(&workspace.daemon())), &mut cargo)
}

/// Builds all, and replaces this process by the daemon.
pub(crate) fn run(workspace: &Workspace, arguments: &[OsString]) -> Result<()> {
    build(workspace)?;
    let daemon = here(&workspace.daemon());
    let mut command = if may_install() {
        environment::other(workspace.daemon())
    } else if environment::is_in_path("sudo") {
        let mut sudo = environment::other("sudo");
        sudo.arg(workspace.daemon());
        sudo
    } else {
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
        bail!("the daemon needs root: run as root: {daemon} run {}", arguments.join(" "));
    };
    command.arg("run").args(arguments);
    say(format!("starting {daemon} run; ctrl-c ends it"));
    // A second shell is most likely in the workspace's root, where the short path is right.
    let in_root = env::current_dir().is_ok_and(|directory| directory == workspace.root);
    let typed = if in_root { daemon } else { workspace.daemon().display().to_string() };
    say(format!("to see it work, in a second shell: {typed} repro"));
    // The daemon takes this process's place, so that signals and the terminal are its own.
    let error = command.exec();
    Err(anyhow!(error).context(format!("start {}", command.get_program().display())))
}

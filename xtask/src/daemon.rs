//! `cargo xtask build` and `cargo xtask run`: the daemon as it is released, and one command to see it work.

use std::{env, ffi::OsString, os::unix::process::CommandExt as _};

use anyhow::{Result, anyhow, bail};

use crate::{
    build_ebpf, environment,
    packages::may_install,
    progress::{self, say},
    workspace::{Workspace, here},
};

/// Builds all, for release.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    build_ebpf::build(workspace)?;
    let mut cargo = environment::cargo();
    cargo.args(["build", "--release", "--package", "selfconn-user"]).current_dir(&workspace.root);
    let what = format!("building {}", here(&workspace.daemon()));
    let finished = progress::run(&what, cargo, None)?;
    finished.must_have_succeeded(&what)?;
    finished.show_warnings();
    Ok(())
}

/// Builds all, and becomes the daemon.
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
    say(format!("to see it work, in a second shell: {} repro", in_any_shell(workspace)));
    // In our place, so that signals and the terminal are its own.
    let error = command.exec();
    Err(anyhow!(error).context(format!("start {}", command.get_program().display())))
}

/// The binary as the reader types it in a shell that is where this one is.
fn in_any_shell(workspace: &Workspace) -> String {
    let daemon = workspace.daemon();
    // A path below a directory that the shell may not be in would mislead.
    match env::current_dir() {
        Ok(dir) if dir == workspace.root => here(&daemon),
        _ => daemon.display().to_string(),
    }
}

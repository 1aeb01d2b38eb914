//! The distribution's packages: installed by us as root, else by the one command we print.

use std::{env, time::Duration};

use anyhow::{Result, bail};

use crate::{
    environment,
    progress::{self, say},
};

/// Whether we are root.
pub(crate) fn may_install() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this package is there.
pub(crate) fn is_installed(name: &str) -> bool {
    let query =
        environment::plain("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", name]).output();
    query.is_ok_and(|query| query.stdout == b"installed")
}

/// Fetches the package lists.
pub(crate) fn update() -> Result<()> {
    let finished =
        progress::run("fetching the package lists (apt-get update)", apt_get(&["update"]), Some(LIMIT))?;
    if !finished.succeeded() {
        // One broken source of many is no reason to stop; what is missing will be told.
        say(format!("apt-get update failed: {}", finished.why()));
    }
    Ok(())
}

const LIMIT: Duration = Duration::from_secs(15 * 60);

/// Installs packages, or says how to.
pub(crate) fn install(names: &[String]) -> Result<()> {
    let list = names.join(" ");
    if !may_install() {
        bail!("missing packages: run: sudo apt-get install --no-install-recommends {list}");
    }
    let what = format!("installing {list}");
    // Never at the price of what the user has: rather fail and show what apt says.
    let mut arguments = vec!["install", "--yes", "--no-install-recommends", "--no-remove"];
    arguments.extend(names.iter().map(String::as_str));
    let finished = progress::run(&what, apt_get(&arguments), Some(LIMIT))?;
    if finished.succeeded() {
        return Ok(());
    }
    // Lists that are older than the mirror name files that it no longer has.
    update()?;
    progress::must(&what, apt_get(&arguments))
}

fn apt_get(arguments: &[&str]) -> std::process::Command {
    let mut command = environment::plain("apt-get");
    command
        .args(["--option", "DPkg::Lock::Timeout=300"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    if let Some(path) = env::var_os("PATH") {
        // dpkg needs these, and who became root with another user's PATH may not have them.
        let mut dirs: Vec<_> = env::split_paths(&path).collect();
        dirs.extend(["/usr/sbin", "/sbin"].map(Into::into));
        if let Ok(path) = env::join_paths(dirs) {
            command.env("PATH", path);
        }
    }
    command
}

//! The distribution's packages. As root they are installed; otherwise the error is the one command that does
//! it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    environment,
    run::{self, say},
};

/// True if we are root.
pub(crate) fn may_install() -> bool {
    rustix::process::geteuid().is_root()
}

/// Fails with the command to run instead, if we are not root.
pub(crate) fn must_be_root(why: &str, command: &str) -> Result<()> {
    if may_install() {
        return Ok(());
    }
    bail!("{why}: run: sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo xtask {command}")
}

/// True if dpkg has this package installed.
pub(crate) fn is_installed(name: &str) -> bool {
    let query =
        environment::plain("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", name]).output();
    query.is_ok_and(|query| query.stdout == b"installed")
}

/// Installs the packages of the programs that are not in PATH. Each pair is a program and its package.
pub(crate) fn install_programs(programs: &[(&str, &str)]) -> Result<()> {
    let missing = programs.iter().filter(|(program, package)| {
        !environment::is_in_path(program) && !Path::new(program).exists() && !is_installed(package)
    });
    let missing: Vec<&str> = missing.map(|(_, package)| *package).collect();
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

/// Fetches the package lists. One broken source of many is no reason to stop: apt then names what is missing.
pub(crate) fn update() {
    if let Err(error) = run::step("fetching the package lists", &mut apt_get(&["update"])) {
        say(format!("{error:#}"));
    }
}

/// Installs packages, or fails with the command that does it.
pub(crate) fn install(names: &[&str]) -> Result<()> {
    let list = names.join(" ");
    if !may_install() {
        bail!("missing packages: run: sudo apt-get install --no-install-recommends {list}");
    }
    let what = format!("installing {list}");
    // Nothing that the user has is removed: apt fails instead and says why.
    let arguments = [&["install", "--yes", "--no-install-recommends", "--no-remove"], names].concat();
    run::step(&what, &mut apt_get(&arguments)).or_else(|_| {
        // Lists that are older than the mirror name files that it no longer has.
        update();
        run::step(&what, &mut apt_get(&arguments))
    })
}

/// The packages that an installation of these would install: they, and what they depend on.
pub(crate) fn missing_with_dependencies(names: &[&str]) -> Result<Vec<String>> {
    let simulate = || {
        let arguments = [&["--simulate", "--no-install-recommends", "install"], names].concat();
        run::output(environment::plain("apt-get").args(arguments))
    };
    let simulated = simulate().or_else(|error| {
        if !may_install() {
            return Err(error.context("run: sudo apt-get update"));
        }
        update();
        simulate()
    })?;
    Ok(to_be_installed(&simulated))
}

/// The packages in the output of a simulated installation.
fn to_be_installed(simulated: &str) -> Vec<String> {
    let names = simulated.lines().filter_map(|line| line.strip_prefix("Inst ")?.split_whitespace().next());
    names.map(str::to_owned).collect()
}

/// The folder of libraries in a `lib` of an unpacked package.
pub(crate) fn libraries_in(lib: &Path) -> PathBuf {
    lib.join(format!("{}-linux-gnu", env::consts::ARCH))
}

/// Downloads packages and unpacks them into this directory, without installing them: an installation may start a
/// service or conflict with another package.
pub(crate) fn unpack(names: &[&str], directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    let fetch = || {
        let mut download = environment::plain("apt-get");
        // As root, apt would download as another user, who can't write here.
        download.args(["--option", "APT::Sandbox::User=root", "download"]).args(names);
        run::step(&format!("fetching {}", names.join(" ")), download.current_dir(directory))
    };
    fetch().or_else(|error| {
        if !may_install() {
            return Err(error.context("run: sudo apt-get update"));
        }
        update();
        fetch()
    })?;
    extract_debs(directory)
}

/// Unpacks the packages in a directory there, and removes their files.
pub(crate) fn extract_debs(directory: &Path) -> Result<()> {
    for package in debs_in(directory)? {
        run::output(environment::plain("dpkg-deb").arg("--extract").args([&*package, directory]))?;
        fs::remove_file(&package).with_context(|| format!("remove {}", package.display()))?;
    }
    Ok(())
}

/// The package files in a directory.
pub(crate) fn debs_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
    let mut debs = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    debs.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    Ok(debs)
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = environment::plain("apt-get");
    command
        .args(["--quiet=2", "--option", "DPkg::Lock::Timeout=300"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    if let Some(path) = env::var_os("PATH") {
        // dpkg needs these. A user who became root with his own PATH may not have them.
        let dirs = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(Into::into));
        if let Ok(path) = env::join_paths(dirs) {
            command.env("PATH", path);
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_installation_would_remove_is_not_fetched() {
        let simulated = "The following packages will be REMOVED:\n  qemu-utils\n\
                         Remv qemu-utils [1:10.0.2]\n\
                         Inst libslirp0 (4.7.0-1 Debian:12.15/oldstable [amd64])\n\
                         Inst qemu-system-x86 (1:7.2 Debian:12.15/oldstable [amd64])\n\
                         Conf libslirp0 (4.7.0-1 Debian:12.15/oldstable [amd64])\n";
        assert_eq!(to_be_installed(simulated), ["libslirp0", "qemu-system-x86"]);
    }
}

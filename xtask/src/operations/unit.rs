//! Checks of the unit with systemd's own programs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::{environment, run, workspace::Workspace};

/// The highest exposure that `systemd-analyze security` may find: 2.4 of 10.
const MAX_EXPOSURE_TENTHS: u32 = 24;

/// Neither the unit nor a drop-in has a setting that systemd doesn't know. It only warns about one, and
/// succeeds.
pub(super) fn is_understood(workspace: &Workspace) -> Result<String> {
    let examples: Vec<PathBuf> = fs::read_dir(workspace.root.join("packaging/systemd/examples"))
        .context("list the drop-ins")?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    ensure!(!examples.is_empty(), "there are no drop-ins");
    for example in [None].into_iter().chain(examples.iter().map(Some)) {
        let unit = copy_unit(workspace, example.map(PathBuf::as_path))?;
        let output =
            analyze(unit.path(), &["verify", "--man=no"]).output().context("start systemd-analyze")?;
        let warnings = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success() && warnings.is_empty(),
            "with {example:?}: {}: {warnings}",
            output.status
        );
    }
    Ok(format!("alone and with each of {} drop-ins", examples.len()))
}

/// systemd's estimate of what an attacker could do in the service is low enough.
pub(super) fn exposes_little(workspace: &Workspace) -> Result<String> {
    let unit = copy_unit(workspace, None)?;
    let threshold = format!("--threshold={MAX_EXPOSURE_TENTHS}");
    let found =
        run::output(&mut analyze(unit.path(), &["security", "--offline=true", "--no-pager", &threshold]))?;
    let exposure = found.lines().rfind(|line| line.contains("exposure level"));
    let exposure = exposure.context("systemd-analyze found no exposure level")?;
    Ok(exposure.trim_start_matches(|letter: char| !letter.is_alphabetic()).trim().to_owned())
}

/// The unit in a directory of its own, with a program that exists on this machine.
fn copy_unit(workspace: &Workspace, drop_in: Option<&Path>) -> Result<TempDir> {
    let dir = tempfile::tempdir().context("make a directory for the unit")?;
    let unit = workspace.root.join("packaging/systemd/selfconn.service");
    let text = fs::read_to_string(&unit).with_context(|| format!("read {}", unit.display()))?;
    ensure!(text.contains("ExecStart=/usr/bin/selfconn "), "the unit starts another program");
    fs::write(dir.path().join("selfconn.service"), text.replace("/usr/bin/selfconn ", "/bin/true "))?;
    if let Some(drop_in) = drop_in {
        let directory = dir.path().join("selfconn.service.d");
        fs::create_dir(&directory)?;
        fs::copy(drop_in, directory.join("drop-in.conf"))?;
    }
    Ok(dir)
}

fn analyze(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = environment::plain("systemd-analyze");
    command.args(arguments).arg(directory.join("selfconn.service"));
    command
}

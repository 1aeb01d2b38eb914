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

const UNIT: &str = "selfconn.service";

/// Neither the unit, nor a drop-in, nor another unit of the examples has a setting that systemd doesn't know. It
/// only warns about one, and succeeds.
pub(super) fn is_understood(workspace: &Workspace) -> Result<String> {
    let examples: Vec<PathBuf> = fs::read_dir(workspace.root.join("packaging/systemd/examples"))
        .context("list the examples")?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    let (drop_ins, units): (Vec<_>, Vec<_>) =
        examples.iter().partition(|example| example.extension().is_some_and(|extension| extension == "conf"));
    ensure!(!drop_ins.is_empty() && !units.is_empty(), "there are no drop-ins, or no units beside them");
    for drop_in in [None].into_iter().chain(drop_ins.iter().map(Some)) {
        let unit = copy_unit(workspace, drop_in.map(|path| path.as_path()))?;
        verify(&unit.path().join(UNIT), &format!("with {drop_in:?}"))?;
    }
    for unit in &units {
        verify(unit, &unit.display().to_string())?;
    }
    Ok(format!("alone, with each of {} drop-ins, and {} other units", drop_ins.len(), units.len()))
}

/// systemd has nothing to say about this unit.
fn verify(unit: &Path, which: &str) -> Result<()> {
    let output = analyze(unit, &["verify", "--man=no"]).output().context("start systemd-analyze")?;
    let warnings = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && warnings.is_empty(), "{which}: {}: {warnings}", output.status);
    Ok(())
}

/// systemd's estimate of what an attacker could do in the service is low enough.
pub(super) fn exposes_little(workspace: &Workspace) -> Result<String> {
    let unit = copy_unit(workspace, None)?;
    let threshold = format!("--threshold={MAX_EXPOSURE_TENTHS}");
    let found = run::output(&mut analyze(
        &unit.path().join(UNIT),
        &["security", "--offline=true", "--no-pager", &threshold],
    ))?;
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
    fs::write(dir.path().join(UNIT), text.replace("/usr/bin/selfconn ", "/bin/true "))?;
    if let Some(drop_in) = drop_in {
        let directory = dir.path().join(format!("{UNIT}.d"));
        fs::create_dir(&directory)?;
        fs::copy(drop_in, directory.join("drop-in.conf"))?;
    }
    Ok(dir)
}

fn analyze(unit: &Path, arguments: &[&str]) -> Command {
    let mut command = environment::plain("systemd-analyze");
    command.args(arguments).arg(unit);
    command
}

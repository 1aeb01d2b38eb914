//! The unit, as the real systemd reads it.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{environment, workspace::Workspace};

/// The exposure that `systemd-analyze security` may find, in tenths.
const THRESHOLD: u32 = 25;

/// Neither the unit nor a drop-in has anything that systemd doesn't know. It only warns of that, and succeeds.
pub(super) fn is_understood(workspace: &Workspace) -> Result<String> {
    let examples: Vec<PathBuf> = fs::read_dir(workspace.root.join("packaging/systemd/examples"))
        .context("the drop-ins")?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    ensure!(!examples.is_empty(), "there are no drop-ins");
    for example in [None].into_iter().chain(examples.iter().map(Some)) {
        let unit = Copy::new(workspace, example)?;
        let output = unit.analyze(&["verify", "--man=no"]).output().context("run systemd-analyze")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.is_empty(), "with {example:?}: {}: {said}", output.status);
    }
    Ok(format!("alone and with each of {} drop-ins", examples.len()))
}

/// What the service could do, were it taken over.
pub(super) fn exposes_little(workspace: &Workspace) -> Result<String> {
    let unit = Copy::new(workspace, None)?;
    let threshold = format!("--threshold={THRESHOLD}");
    let output = unit
        .analyze(&["security", "--offline=true", "--no-pager", &threshold])
        .output()
        .context("run systemd-analyze")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let verdict = said.lines().rfind(|line| line.contains("exposure level")).unwrap_or_default().trim();
    ensure!(
        output.status.success() && !verdict.is_empty(),
        "{verdict}: {} or more; it said:\n{said}{}",
        f64::from(THRESHOLD) / 10.0,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(verdict.trim_start_matches(['→', '-', '>', ' ']).to_owned())
}

/// A copy of the unit whose program exists here, in a directory of its own.
struct Copy(tempfile::TempDir);

impl Copy {
    fn new(workspace: &Workspace, drop_in: Option<&PathBuf>) -> Result<Self> {
        let dir = tempfile::tempdir().context("a directory for the unit")?;
        let unit = workspace.root.join("packaging/systemd/selfconn.service");
        let text = fs::read_to_string(&unit).with_context(|| format!("read {}", unit.display()))?;
        ensure!(text.contains("ExecStart=/usr/bin/selfconn "), "the unit starts another program");
        fs::write(dir.path().join("selfconn.service"), text.replace("/usr/bin/selfconn ", "/bin/true "))?;
        if let Some(drop_in) = drop_in {
            let into = dir.path().join("selfconn.service.d");
            fs::create_dir(&into)?;
            fs::copy(drop_in, into.join("drop-in.conf"))?;
        }
        Ok(Self(dir))
    }

    fn analyze(&self, arguments: &[&str]) -> Command {
        let mut command = environment::plain("systemd-analyze");
        command.args(arguments).arg(self.0.path().join("selfconn.service"));
        command
    }
}

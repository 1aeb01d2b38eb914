//! Checks of the unit with systemd's own programs.

use std::{
    collections::HashMap,
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

/// Each of these drop-ins is enough: with it, and only with it, the service starts the daemon with the option, and the
/// daemon takes its options. All variables of the command are set, because systemd warns otherwise.
const DROP_INS: [(&str, [&str; 2]); 3] = [
    ("guard.conf", ["--guard", "refuse"]),
    ("remedy.conf", ["--remedy", "destroy"]),
    ("metrics.conf", ["--metrics", "0.0.0.0:21435"]),
];

pub(super) fn drop_ins_are_enough(workspace: &Workspace) -> Result<String> {
    let packaging = workspace.root.join("packaging/systemd");
    let read = |name: &str| fs::read_to_string(packaging.join(name)).with_context(|| format!("read {name}"));
    let unit = read(UNIT)?;
    let alone = command_line(&unit)?;
    for (name, option) in DROP_INS {
        let is_on = |command: &[String]| command.windows(2).any(|pair| pair == option);
        ensure!(!is_on(&alone), "the unit alone has {option:?}: {alone:?}");
        let with_drop_in = command_line(&format!("{unit}{}", read(&format!("examples/{name}"))?))?;
        ensure!(is_on(&with_drop_in), "with {name} the service starts {with_drop_in:?}");
        // With --help it only reads its options. It refuses a value that it does not know before it sees --help.
        let mut daemon = environment::plain(workspace.target.join("debug/selfconn"));
        run::output(daemon.args(&with_drop_in[1..]).arg("--help"))?;
    }
    Ok(DROP_INS.map(|(name, option)| format!("{name}: {}", option.join(" "))).join(", "))
}

/// The command that systemd starts, from the settings of a unit and its drop-ins, one after another. Like systemd it
/// splits the value of a `$VARIABLE` at spaces.
fn command_line(settings: &str) -> Result<Vec<String>> {
    let values = |name: &'static str| settings.lines().filter_map(move |line| line.strip_prefix(name));
    let mut variables = HashMap::new();
    for line in values("Environment=") {
        // Either one assignment in quotes, or several without.
        let quoted = line.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        let assignments = quoted.map_or_else(|| line.split_whitespace().collect(), |one| vec![one]);
        for assignment in assignments {
            variables.extend(assignment.split_once('='));
        }
    }
    let command = values("ExecStart=").next_back().context("there is no ExecStart")?;
    let mut words = Vec::new();
    for word in command.split_whitespace() {
        match word.strip_prefix('$') {
            Some(name) => {
                let value = variables.get(name).with_context(|| format!("{word} is not set"))?;
                words.extend(value.split_whitespace().map(str::to_owned));
            }
            None => words.push(word.to_owned()),
        }
    }
    Ok(words)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_has_the_values_of_its_variables() {
        let unit = "Environment=A= B=1\nExecStart=/bin/x run $A $B\n";
        assert_eq!(command_line(unit).unwrap(), ["/bin/x", "run", "1"]);
        let drop_in = "[Service]\nEnvironment=\"A=--b c\"\n";
        assert_eq!(command_line(&format!("{unit}{drop_in}")).unwrap(), ["/bin/x", "run", "--b", "c", "1"]);
        assert!(command_line("Environment=A=\nExecStart=/bin/x $B\n").is_err(), "systemd warns of $B");
    }
}

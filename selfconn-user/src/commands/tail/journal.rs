//! The journal as a source of lines, through systemd's `journalctl`: the format of its files is nobody else's business.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use jiff::Timestamp;
use serde_json::{Map, Value};

/// A running `journalctl`.
#[derive(Debug)]
pub(super) struct Journal {
    child: Child,
    lines: BufReader<ChildStdout>,
    /// Where it is, so that another one can go on from there.
    cursor: Option<String>,
}

impl Journal {
    /// What is there now.
    ///
    /// # Errors
    /// When there is no `journalctl`.
    pub(super) fn read(directory: Option<&Path>, since: Option<Timestamp>) -> Result<Self> {
        let mut command = journalctl(directory);
        if let Some(since) = since {
            command.arg(format!("--since=@{}", since.as_second()));
        }
        Self::start(command)
    }

    /// What comes after that.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(super) fn follow(self, directory: Option<&Path>) -> Result<Self> {
        let mut command = journalctl(directory);
        command.args(["--follow", "--lines=all"]);
        if let Some(cursor) = &self.cursor {
            command.arg(format!("--after-cursor={cursor}"));
        }
        Self::start(command)
    }

    fn start(mut command: Command) -> Result<Self> {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context(
                "cannot read the journal: journalctl can't be started: is this a host with systemd?",
            )?;
        let stdout = child.stdout.take().context("a pipe was asked for")?;
        Ok(Self { child, lines: BufReader::new(stdout), cursor: None })
    }

    /// The next event's line.
    ///
    /// # Errors
    /// When it can't be read, or `journalctl` fails, which says why itself.
    pub(super) fn next(&mut self) -> Result<Option<String>> {
        let mut entry = Vec::new();
        loop {
            entry.clear();
            if self.lines.read_until(b'\n', &mut entry).context("cannot read the journal")? == 0 {
                let status = self.child.wait().context("cannot wait for journalctl")?;
                if !status.success() {
                    bail!("cannot read the journal: journalctl failed: {status}");
                }
                return Ok(None);
            }
            let Ok(mut fields) = serde_json::from_slice::<Map<String, Value>>(&entry) else { continue };
            if let Some(Value::String(cursor)) = fields.remove("__CURSOR") {
                self.cursor = Some(cursor);
            }
            if let Some(Value::String(event)) = fields.remove("SELFCONN_JSON") {
                return Ok(Some(event));
            }
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // Ended already, unless we stop reading.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn journalctl(directory: Option<&Path>) -> Command {
    let mut command = Command::new("journalctl");
    // `--all`: a long field would be left out.
    command.args(["--output=json", "--all", "--no-pager", "--quiet", "--output-fields=SELFCONN_JSON"]);
    if let Some(directory) = directory {
        command.arg("--directory").arg(directory);
    }
    command.arg("SYSLOG_IDENTIFIER=selfconn");
    command
}

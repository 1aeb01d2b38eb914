//! The journal as a source of event lines. It is read through systemd's `journalctl`, because the format of
//! the journal files belongs to systemd.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use jiff::Timestamp;
use serde_json::Value;

use crate::event::text::parse;

/// A running `journalctl`.
#[derive(Debug)]
pub(super) struct JournalReader {
    child: Child,
    lines: BufReader<ChildStdout>,
    /// Cursor of the last entry, from which another `journalctl` can continue.
    cursor: Option<String>,
}

impl JournalReader {
    /// Reads the existing entries.
    ///
    /// # Errors
    /// If `journalctl` cannot be started.
    pub(super) fn read(directory: Option<&Path>, since: Option<Timestamp>) -> Result<Self> {
        let mut command = journalctl_command(directory);
        if let Some(since) = since {
            command.arg(format!("--since=@{}", since.as_second()));
        }
        Self::start(command)
    }

    /// Continues with the entries after the last one that was read, and waits for new ones.
    ///
    /// # Errors
    /// See [`Self::read`].
    pub(super) fn follow(self, directory: Option<&Path>) -> Result<Self> {
        let mut command = journalctl_command(directory);
        command.args(["--follow", "--lines=all"]);
        if let Some(cursor) = &self.cursor {
            command.arg(format!("--after-cursor={cursor}"));
        }
        Self::start(command)
    }

    fn start(mut command: Command) -> Result<Self> {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context(
                "cannot read the journal: journalctl cannot be started: does this host use systemd?",
            )?;
        let stdout = child.stdout.take().context("journalctl has no pipe for its output")?;
        Ok(Self { child, lines: BufReader::new(stdout), cursor: None })
    }

    /// The line of the next event.
    ///
    /// # Errors
    /// If reading fails or `journalctl` fails. `journalctl` prints the reason itself.
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
            let Some(mut fields) = parse(&entry) else { continue };
            if let Some(Value::String(cursor)) = fields.remove("__CURSOR") {
                self.cursor = Some(cursor);
            }
            if let Some(Value::String(event)) = fields.remove("SELFCONN_JSON") {
                return Ok(Some(event));
            }
        }
    }
}

impl Drop for JournalReader {
    fn drop(&mut self) {
        // Fails if it has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn journalctl_command(directory: Option<&Path>) -> Command {
    let mut command = Command::new("journalctl");
    // Without `--all`, a long field is omitted.
    command.args(["--output=json", "--all", "--no-pager", "--quiet", "--output-fields=SELFCONN_JSON"]);
    if let Some(directory) = directory {
        command.arg("--directory").arg(directory);
    }
    command.arg("SYSLOG_IDENTIFIER=selfconn");
    command
}

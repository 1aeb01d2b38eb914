//! A daemon that writes an event log, the self-connections that it sees, and the rotation of the log.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use super::super::background::BackgroundProcess;
use crate::{environment, run, workspace::Workspace};

/// The host in the events.
pub(super) const HOST: &str = "web-1.example";

pub(super) struct LogSource {
    selfconn: PathBuf,
    log: PathBuf,
    rotations: usize,
    daemon: BackgroundProcess,
}

/// The `seq` of each event in the log's files, the length of the longest line, and whether `stopped` is there.
pub(super) struct Written {
    pub(super) numbers: BTreeSet<u64>,
    pub(super) longest: usize,
    has_ended: bool,
}

impl LogSource {
    pub(super) fn start(workspace: &Workspace, dir: &Path) -> Result<Self> {
        let selfconn = workspace.target.join("debug/selfconn");
        let log = dir.join("events.jsonl");
        let mut command = environment::other(&selfconn);
        // No command line is cut, so that there are long lines. Other programs' floods are kept out.
        command.args(["run", "--quiet", "--states", "--cmdline", "full", "--log-rate", "200"]);
        command.args(["--host-name", HOST, "--log"]).arg(&log);
        let mut daemon = BackgroundProcess::start(command, "selfconn", dir)?;
        daemon.wait_until("the daemon has started", || {
            Ok(fs::read_to_string(&log).is_ok_and(|text| text.contains("\"event\":\"started\"")))
        })?;
        Ok(Self { selfconn, log, rotations: 0, daemon })
    }

    /// Makes self-connections.
    pub(super) fn load(&self, count: usize) -> Result<()> {
        connect_to_self(&self.selfconn, count)
    }

    /// Moves the files of the log as logrotate does.
    pub(super) fn rotate(&mut self) -> Result<()> {
        let numbered = |number: usize| self.log.with_extension(format!("jsonl.{number}"));
        for number in (1..=self.rotations).rev() {
            fs::rename(numbered(number), numbered(number + 1))?;
        }
        fs::rename(&self.log, numbered(1)).context("rotate the log")?;
        self.rotations += 1;
        Ok(())
    }

    /// Ends the run. Returns everything that the daemon has made.
    pub(super) fn finish(&mut self) -> Result<Written> {
        self.daemon.end();
        let written = self.written()?;
        ensure!(written.has_ended, "the run has not ended in order");
        Ok(written)
    }

    /// What is in the files of the log.
    pub(super) fn written(&self) -> Result<Written> {
        let mut written = Written { numbers: BTreeSet::new(), longest: 0, has_ended: false };
        for path in self.files() {
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            for line in whole_lines(&text) {
                let number = number_of(line)?;
                ensure!(written.numbers.insert(number), "seq {number} is twice in the log");
                written.longest = written.longest.max(line.len());
                written.has_ended |= line.contains("\"event\":\"stopped\"");
            }
        }
        Ok(written)
    }

    /// The files of the log, the newest last.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let rotated =
            (1..=self.rotations).rev().map(|number| self.log.with_extension(format!("jsonl.{number}")));
        rotated.chain([self.log.clone()]).collect()
    }
}

/// Makes self-connections, one of them by a process with the longest command line that is read.
pub(super) fn connect_to_self(selfconn: &Path, count: usize) -> Result<()> {
    let repro = || {
        let mut repro = environment::other(selfconn);
        repro.args(["repro", "--mode", "bind"]);
        repro
    };
    run::output(repro().arg0("\u{1}".repeat(4_000)))?;
    for _ in 1..count {
        run::output(&mut repro())?;
    }
    Ok(())
}

/// The lines of a file that grows: the last one may still be incomplete.
pub(super) fn whole_lines(text: &str) -> impl Iterator<Item = &str> {
    text[..text.rfind('\n').map_or(0, |end| end + 1)].lines()
}

/// The number in an event's line. A name that a process chose can't look like it, because it would be escaped.
pub(super) fn number_of(line: &str) -> Result<u64> {
    let digits = line.rsplit_once("\"seq\":").map(|(_, rest)| rest.split(',').next().unwrap_or_default());
    digits.and_then(|digits| digits.parse().ok()).with_context(|| format!("no seq in: {line}"))
}

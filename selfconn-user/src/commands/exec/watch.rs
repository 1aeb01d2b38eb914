//! The watch: `selfconn run` as a child process, whose events come as JSON lines through a pipe. It begins before the
//! command, and what it has seen by the end of the command is in its last line.

use std::{
    env,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvError, RecvTimeoutError, channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use super::{findings::Findings, signals::SignalMask, tree};
use crate::{
    event::text::{LogRecord, parse},
    guard::GuardMode,
    system::cgroup::WatchedGroup,
};

/// How long the daemon may take to end. It takes milliseconds, and five seconds behind a flood.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// What is watched.
pub(super) struct WatchOptions<'a> {
    /// `None`: everything. Then the ancestors of each process decide.
    pub(super) group: Option<&'a WatchedGroup>,
    pub(super) guard: GuardMode,
    /// The signals that were blocked when this program was started.
    pub(super) mask: SignalMask,
}

/// A daemon that has attached its programs.
pub(super) struct Watch {
    daemon: Child,
    /// Gets what was seen when the daemon has ended.
    findings: Receiver<Findings>,
    messages: JoinHandle<String>,
}

impl Watch {
    /// Starts the daemon, and waits until it sees everything.
    ///
    /// # Errors
    /// Why this host can't be watched: the daemon's own message.
    pub(super) fn start(options: &WatchOptions<'_>) -> Result<Self> {
        let program = env::current_exe().context("cannot find this program's file")?;
        let mut command = Command::new(program);
        // The environment is the command's. The daemon reports to nobody else.
        command.env_remove("NOTIFY_SOCKET").env_remove("WATCHDOG_USEC");
        command.args(["run", "--json", "--guard", options.guard.name()]);
        if let Some(group) = options.group {
            command.arg("--only-group").arg(group.to_string());
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Signals of the terminal are for the command only.
        command.process_group(0);
        let mask = options.mask;
        let prepare = move || {
            mask.set();
            Ok(set_parent_process_death_signal(Some(Signal::TERM))?)
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(prepare) };
        let mut daemon = command.spawn().context("cannot start the watch")?;
        let (Some(stdout), Some(mut stderr)) = (daemon.stdout.take(), daemon.stderr.take()) else {
            bail!("cannot start the watch: it has no pipes");
        };
        let messages = thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        let mut lines = BufReader::new(stdout);
        match next_event(&mut lines) {
            Some(started) => {
                let mut findings = Findings::new(started);
                let is_watched = options.group.is_none().then_some(tree::is_ours as fn(u32) -> Option<bool>);
                let (sender, receiver) = channel();
                thread::spawn(move || {
                    while let Some(event) = next_event(&mut lines) {
                        findings.add(event, is_watched);
                    }
                    let _ = sender.send(findings);
                });
                Ok(Self { daemon, findings: receiver, messages })
            }
            None => {
                daemon.wait().context("cannot wait for the watch")?;
                let messages = messages.join().unwrap_or_default();
                Err(anyhow!("{}", last_message(&messages).unwrap_or("the watch ended before it began")))
            }
        }
    }

    /// The process of the daemon.
    pub(super) fn pid(&self) -> Pid {
        Pid::from_child(&self.daemon)
    }

    /// Ends the daemon, unless it has ended by itself, because its programs saw nothing any more: `ended`. Returns what
    /// it saw.
    ///
    /// # Errors
    /// If it can't be ended.
    pub(super) fn end(mut self, ended: Option<ExitStatus>) -> Result<Findings> {
        if ended.is_none() {
            kill_process(self.pid(), Signal::TERM).context("cannot end the watch")?;
        }
        let findings = match self.findings.recv_timeout(STOP_TIMEOUT) {
            Err(RecvTimeoutError::Timeout) => {
                self.daemon.kill().context("cannot kill the watch")?;
                self.findings.recv()
            }
            outcome => outcome.map_err(|_| RecvError),
        };
        let status = match ended {
            Some(status) => status,
            None => self.daemon.wait().context("cannot wait for the watch")?,
        };
        let messages = self.messages.join().unwrap_or_default();
        let mut findings = findings.context("the reader of events panicked")?;
        if !status.success() {
            findings.ended_early = Some(last_message(&messages).unwrap_or("it was ended").to_owned());
        }
        Ok(findings)
    }
}

/// The next line that is an event.
fn next_event(lines: &mut BufReader<ChildStdout>) -> Option<crate::event::text::JsonFields> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line).ok()? == 0 {
            return None;
        }
        if let Some(event) = parse(&line).filter(|event| !LogRecord::new(event).event().is_empty()) {
            return Some(event);
        }
    }
}

/// The last line that the daemon wrote, without its name.
fn last_message(messages: &str) -> Option<&str> {
    let line = messages.lines().rfind(|line| !line.trim().is_empty())?;
    Some(line.strip_prefix("selfconn: ").unwrap_or(line))
}

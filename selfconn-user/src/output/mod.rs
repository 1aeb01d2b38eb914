//! The outputs of events: the log file, and stdout or the journal in its place. A slow output does not stop
//! the daemon: its events wait in a bounded queue, and events that do not fit are dropped and counted.

use std::{io, time::Instant};

use jiff::Timestamp;
use selfconn_ebpf::Owner;

use crate::{
    budget::{
        cmdline::CmdlineLimit,
        log::{LogBudget, LogRate, SuppressedEvents},
    },
    event::{self, Envelope, Event, EventKind, LossCause, Losses, ProgramCounters, Stopped},
};
use log_file::LogFile;
use stdout::Stdout;

pub mod journald;
pub mod log_file;
mod stdout;
mod write_queue;
mod writer;

pub use stdout::StdoutFormat;

/// All outputs of events.
#[derive(Debug)]
pub struct Outputs {
    log: Option<LogFile>,
    stdout: Option<Stdout>,
    envelope: Envelope,
    /// Number of events emitted so far: the `seq` of the newest one.
    made: u64,
    /// The JSON line of the current event. Empty if no output has it.
    line: Vec<u8>,
    budget: LogBudget,
    cmdline: CmdlineLimit,
    started: Instant,
}

/// Limits of the events, whatever the outputs are.
#[derive(Clone, Copy, Debug)]
pub struct OutputLimits {
    /// That of an owner.
    pub rate: LogRate,
    pub cmdline: CmdlineLimit,
}

impl Outputs {
    /// An output that is `None` is not used.
    ///
    /// # Errors
    /// If the writer of stdout cannot be started.
    pub fn new(
        stdout: Option<StdoutFormat>,
        log: Option<LogFile>,
        envelope: Envelope,
        limits: OutputLimits,
    ) -> io::Result<Self> {
        let stdout = stdout.map(Stdout::start).transpose()?;
        Ok(Self {
            log,
            stdout,
            envelope,
            made: 0,
            line: Vec::new(),
            budget: LogBudget::new(limits.rate),
            cmdline: limits.cmdline,
            started: Instant::now(),
        })
    }

    /// Identifies this run in the events.
    #[must_use]
    pub fn run(&self) -> u64 {
        self.envelope.run()
    }

    /// The connection with this number has ended without an event of its end.
    pub fn forget_connection(&mut self, number: u64) {
        self.budget.forget(&event::connection_id(self.run(), number));
    }

    /// Emits an event with the current time.
    pub fn emit(&mut self, kind: EventKind) {
        self.emit_at(Timestamp::now(), kind);
    }

    /// Emits an event, unless it is beyond its owner's rate. It is written at the next flush.
    pub fn emit_at(&mut self, time: Timestamp, mut kind: EventKind) {
        self.made += 1;
        let now_ns = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut owner = None;
        if let Some(request) = kind.log_request() {
            if !self.budget.admits(&request, now_ns) {
                return;
            }
            owner = Some((request.owner, request.other_owner, request.phase));
        }
        kind.limit_cmdline(self.cmdline);
        let event = Event { time, seq: self.made, kind };
        self.write_json(&event);
        if let Some((owner, _, phase)) = owner {
            self.budget.on_line(owner, phase, self.line.len(), now_ns);
        }
        if let Some(log) = &mut self.log {
            match owner {
                Some((owner, other, _)) => log.push_of(owner, other, &self.line),
                None => log.push(&self.line),
            }
        }
        if let Some(stdout) = &mut self.stdout {
            stdout.push(&event, &self.envelope, &self.line);
        }
    }

    /// Makes the JSON line of an event, if an output has it.
    fn write_json(&mut self, event: &Event) {
        self.line.clear();
        if self.log.is_some() || self.stdout.as_ref().is_some_and(Stdout::has_json) {
            event.write_json_line(&self.envelope, &mut self.line);
        }
    }

    /// Writes the emitted events as far as the outputs accept them.
    ///
    /// # Errors
    /// Only a broken pipe: nobody reads stdout any more, and the caller ends the run. Every other error is
    /// logged and counted where it happens.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(log) = &mut self.log {
            log.flush();
        }
        if let Some(stdout) = &mut self.stdout {
            stdout.writer.flush();
            if stdout.writer.is_gone() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
        Ok(())
    }

    /// True if stdout has many pending events and its reader takes them: what can wait should wait.
    #[must_use]
    pub fn is_filling(&self) -> bool {
        self.stdout.as_ref().is_some_and(|stdout| stdout.writer.is_filling())
    }

    /// True if records should wait in the ring buffer, because stdout is the only output and is filling. With
    /// a log they do not wait: stdout loses events, so that the log does not.
    #[must_use]
    pub fn holds_back_records(&self) -> bool {
        self.log.is_none() && self.is_filling()
    }

    /// Flushes as [`Self::flush`] does, then makes room for the events of the next batch. If stdout is the
    /// only output and its reader is slow, this waits, and further records wait in the ring buffer. With a
    /// log it does not wait: stdout loses events, so that the log does not.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub async fn make_room(&mut self) -> io::Result<()> {
        self.flush()?;
        if let (Some(stdout), None) = (&mut self.stdout, &self.log) {
            stdout.writer.make_room().await;
        }
        Ok(())
    }

    /// Waits until stdout has written its chunk and has more events, so that the caller should flush. Cancel
    /// safe.
    pub async fn ready(&mut self) {
        match &mut self.stdout {
            Some(stdout) => stdout.writer.ready().await,
            None => std::future::pending().await,
        }
    }

    /// Reopens the log. This is the reaction to SIGHUP.
    ///
    /// # Errors
    /// A broken pipe if stdout was a terminal and the terminal was hung up.
    pub fn reopen(&mut self) -> io::Result<()> {
        if let Some(log) = &mut self.log {
            log.reopen();
        }
        match &self.stdout {
            Some(stdout) if stdout.is_hung_up() => Err(io::ErrorKind::BrokenPipe.into()),
            _ => Ok(()),
        }
    }

    /// True if SIGHUP has something to reopen. Otherwise SIGHUP ends the run.
    #[must_use]
    pub fn can_reopen(&self) -> bool {
        self.log.is_some() || self.is_journal()
    }

    /// True if events go to the journal instead of stdout.
    fn is_journal(&self) -> bool {
        self.stdout.as_ref().is_some_and(Stdout::is_journal)
    }

    /// True if the output that counts losses of this cause has pending events. Such losses are reported only
    /// after it accepts events again, because otherwise the `lost` event would be dropped as well.
    #[must_use]
    pub fn is_pending(&self, cause: LossCause) -> bool {
        match cause {
            LossCause::Log => self.log.as_ref().is_some_and(LogFile::has_pending),
            _ if cause == self.stdout_cause() => {
                self.stdout.as_ref().is_some_and(|stdout| stdout.writer.has_pending())
            }
            _ => false,
        }
    }

    /// True if any output has pending events.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        LossCause::ALL.into_iter().any(|cause| self.is_pending(cause))
    }

    /// Events that each output dropped: the part of [`Losses`] that the outputs count.
    #[must_use]
    pub fn lost(&self) -> Losses {
        let mut losses = self.losses(
            self.log.as_ref().map_or(0, LogFile::lost),
            self.stdout.as_ref().map_or(0, |stdout| stdout.writer.lost()),
        );
        losses.set(LossCause::Suppressed, self.budget.suppressed());
        losses
    }

    /// The suppressed events since the last call, by owner.
    pub fn take_suppressed(&mut self) -> Vec<SuppressedEvents> {
        self.budget.take_unreported()
    }

    /// The events that the log file had no room for since the last call, by owner.
    pub fn take_over_share(&mut self) -> Vec<(Owner, u64)> {
        self.log.as_mut().map_or_else(Vec::new, LogFile::take_over_share)
    }

    /// The cause under which losses of stdout are counted: stdout or, if it is connected to the journal, the journal.
    fn stdout_cause(&self) -> LossCause {
        if self.is_journal() { LossCause::Journal } else { LossCause::Stdout }
    }

    fn losses(&self, log: u64, stdout: u64) -> Losses {
        Losses::from([(LossCause::Log, log), (self.stdout_cause(), stdout)])
    }

    /// Number of events in the log file so far. `None` without a log file.
    #[must_use]
    pub fn written(&self) -> Option<u64> {
        self.log.as_ref().map(LogFile::written)
    }

    /// Number of failed attempts to write or reopen the log.
    #[must_use]
    pub fn log_write_errors(&self) -> u64 {
        self.log.as_ref().map_or(0, LogFile::errors)
    }

    /// True if the last attempt to write the log succeeded, or if there is no log file.
    #[must_use]
    pub fn can_write_log(&self) -> bool {
        !self.log.as_ref().is_some_and(LogFile::is_failing)
    }

    /// The run ends: from now on the reader of stdout is waited for less.
    pub fn begin_end(&mut self) {
        if let Some(stdout) = &mut self.stdout {
            stdout.writer.begin_end();
        }
    }

    /// Emits and writes the last event, `stopped`. Its counts include the event itself: the number of emitted
    /// events is the number of written events plus the number of lost events.
    pub async fn stop(&mut self, lost: Losses, open: u64, programs: ProgramCounters) {
        let is_log_writable = self.log.as_mut().is_none_or(LogFile::finish);
        self.drain().await;
        self.made += 1;
        // An output that does not accept the last event loses it.
        let is_stuck = self.stdout.as_ref().is_some_and(|stdout| stdout.writer.is_stuck());
        let lost = lost.plus(self.losses(u64::from(!is_log_writable), u64::from(is_stuck)));
        let mut event = self.stopped_event(lost, open, programs, u64::from(is_log_writable));
        if is_log_writable {
            self.write_json(&event);
            if let Some(log) = &mut self.log {
                log.push(&self.line);
                if !log.finish() {
                    // The log has counted the line as lost.
                    event = self.stopped_event(lost, open, programs, 0);
                }
            }
        }
        self.write_json(&event);
        if let Some(stdout) = &mut self.stdout {
            stdout.push(&event, &self.envelope, &self.line);
        }
        self.drain().await;
    }

    /// Builds the `stopped` event. `written` is 1 if the event itself will be in the log, else 0.
    fn stopped_event(&self, lost: Losses, open: u64, programs: ProgramCounters, written: u64) -> Event {
        let stopped = Stopped {
            made: self.made,
            written: self.written().map(|before| before + written),
            lost: lost.plus(self.lost()),
            open,
            programs,
        };
        Event { time: Timestamp::now(), seq: self.made, kind: EventKind::Stopped(stopped) }
    }

    async fn drain(&mut self) {
        if let Some(stdout) = &mut self.stdout {
            stdout.writer.drain().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event::Lost, system::identity::Identity};

    #[test]
    fn the_json_line_is_made_only_for_an_output_that_has_it() {
        let folder = tempfile::tempdir().unwrap();
        for (stdout, has_log, has_line) in [
            (None, false, false),
            (Some(StdoutFormat::Text), false, false),
            (Some(StdoutFormat::Text), true, true),
            (Some(StdoutFormat::Json), false, true),
        ] {
            let log = has_log.then(|| LogFile::open(&folder.path().join("events.jsonl")).unwrap());
            let envelope = Envelope::new(&Identity::read(None).unwrap());
            let limits = OutputLimits { rate: LogRate::new(1), cmdline: CmdlineLimit::Off };
            let mut outputs = Outputs::new(stdout, log, envelope, limits).unwrap();
            outputs.emit(EventKind::Lost(Lost::new(LossCause::Ring, 1, None)));
            assert_eq!(!outputs.line.is_empty(), has_line, "{stdout:?}, log: {has_log}");
        }
    }
}

//! Where events go: people's text or JSON lines on stdout, the journal, and the log file. Nothing here waits for a reader: what
//! can't be written waits itself, within bounds, and is counted beyond them.

use std::io;

use jiff::Timestamp;

use self::{file::LogFile, journal::Journal, stdout::Stdout};
use crate::event::{Event, Losses, Programs, Stopped, What};

mod backlog;
pub mod file;
pub mod journal;
mod stdout;
pub mod text;
mod writer;

pub use stdout::Format;

/// Appends an event as one JSON line.
pub fn json_line(event: &Event, out: &mut Vec<u8>) {
    let start = out.len();
    match serde_json::to_writer(&mut *out, event) {
        Ok(()) => out.push(b'\n'),
        // Can't happen with a schema of strings and numbers; but half a line must never stay.
        Err(error) => {
            out.truncate(start);
            log::error!("an event can't be written as JSON: {error}");
        }
    }
}

/// The places that have events waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behind {
    /// The log file.
    pub log: bool,
    /// Standard output.
    pub stdout: bool,
    /// The journal.
    pub journal: bool,
}

impl Behind {
    /// Whether any has.
    #[must_use]
    pub fn any(self) -> bool {
        self.log || self.stdout || self.journal
    }
}

/// Every place that events go to.
#[derive(Debug)]
pub struct Sinks {
    stdout: Option<Stdout>,
    journal: Option<Journal>,
    log: Option<LogFile>,
    made: u64,
    line: Vec<u8>,
}

impl Sinks {
    /// `None`: no such place.
    ///
    /// # Errors
    /// When a thread can't be started.
    pub fn new(stdout: Option<Format>, journal: bool, log: Option<LogFile>) -> io::Result<Self> {
        let stdout = stdout.map(Stdout::start).transpose()?;
        let journal = journal.then(Journal::start).transpose()?;
        Ok(Self { stdout, journal, log, made: 0, line: Vec::new() })
    }

    /// Makes an event of now.
    pub fn emit(&mut self, what: What) {
        self.emit_at(Timestamp::now(), what);
    }

    /// Makes an event. It is written at the next flush.
    pub fn emit_at(&mut self, time: Timestamp, what: What) {
        let event = Event { time, what };
        self.made += 1;
        self.write_json(&event);
        if let Some(log) = &mut self.log {
            log.push(&self.line);
        }
        if let Some(stdout) = &mut self.stdout {
            stdout.push(&event, &self.line);
        }
        if let Some(journal) = &mut self.journal {
            journal.push(&self.line);
        }
    }

    fn write_json(&mut self, event: &Event) {
        self.line.clear();
        json_line(event, &mut self.line);
    }

    /// Writes what was made, as far as it can be.
    ///
    /// # Errors
    /// A broken pipe: nobody reads stdout any more, which the caller takes for a wish to end. Every other error is said
    /// and counted where it happens.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(log) = &mut self.log {
            log.flush();
        }
        if let Some(journal) = &mut self.journal {
            journal.writer.flush();
        }
        match &mut self.stdout {
            Some(stdout) => {
                stdout.writer.flush();
                if stdout.writer.is_gone() { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
            }
            None => Ok(()),
        }
    }

    /// Writes what was made, as [`Self::flush`] does, and makes room for what the next batch of a flood becomes: what is
    /// still in the ring buffer waits there for the only reader, if that is slow. Where there are others, a slow one
    /// loses events, so that none of them is lost for all.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub async fn make_room(&mut self) -> io::Result<()> {
        self.flush()?;
        match (&mut self.stdout, &mut self.journal, &self.log) {
            (Some(stdout), None, None) => stdout.writer.make_room().await,
            (None, Some(journal), None) => journal.writer.make_room().await,
            _ => {}
        }
        Ok(())
    }

    /// Waits until a reader took what it was given, so that it is time to flush. Dropped, it loses nothing.
    pub async fn ready(&mut self) {
        let writers = (self.stdout.as_mut(), self.journal.as_mut());
        match writers {
            (Some(stdout), Some(journal)) => tokio::select! {
                () = stdout.writer.ready() => {}
                () = journal.writer.ready() => {}
            },
            (Some(stdout), None) => stdout.writer.ready().await,
            (None, Some(journal)) => journal.writer.ready().await,
            (None, None) => std::future::pending().await,
        }
    }

    /// SIGHUP: the log is opened anew.
    ///
    /// # Errors
    /// A broken pipe, when stdout was a terminal and has gone.
    pub fn reopen(&mut self) -> io::Result<()> {
        if let Some(log) = &mut self.log {
            log.reopen();
        }
        match &self.stdout {
            Some(stdout) if stdout.is_hung_up() => Err(io::ErrorKind::BrokenPipe.into()),
            _ => Ok(()),
        }
    }

    /// Whether SIGHUP has something to reopen.
    #[must_use]
    pub fn can_reopen(&self) -> bool {
        self.log.is_some() || self.journal.is_some()
    }

    /// Which places have events waiting. Of what such a place lost it is told once it takes events again.
    #[must_use]
    pub fn behind(&self) -> Behind {
        Behind {
            log: self.log.as_ref().is_some_and(LogFile::is_behind),
            stdout: self.stdout.as_ref().is_some_and(|stdout| stdout.writer.is_behind()),
            journal: self.journal.as_ref().is_some_and(|journal| journal.writer.is_behind()),
        }
    }

    /// Events that a place never took and never will: its part of [`Losses`].
    #[must_use]
    pub fn lost(&self) -> Losses {
        Losses {
            log: self.log.as_ref().map_or(0, LogFile::lost),
            stdout: self.stdout.as_ref().map_or(0, |stdout| stdout.writer.lost()),
            journal: self.journal.as_ref().map_or(0, |journal| journal.writer.lost()),
            ..Losses::default()
        }
    }

    /// Events made so far.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.made
    }

    /// Events in the log file so far; none without one.
    #[must_use]
    pub fn written(&self) -> Option<u64> {
        self.log.as_ref().map(LogFile::written)
    }

    /// Attempts to write or reopen the log that failed.
    #[must_use]
    pub fn log_write_errors(&self) -> u64 {
        self.log.as_ref().map_or(0, LogFile::errors)
    }

    /// Whether the log takes lines, as far as is known from the last attempt. True without one.
    #[must_use]
    pub fn can_write_log(&self) -> bool {
        !self.log.as_ref().is_some_and(LogFile::is_failing)
    }

    /// Makes and writes the last event. Its numbers count what became of everything, itself included: events made are
    /// those written and those lost.
    pub async fn stop(&mut self, lost: Losses, open: u64, programs: Programs) {
        let log_takes_it = self.log.as_mut().is_none_or(LogFile::finish);
        self.drain().await;
        self.made += 1;
        // Where it can't go it is lost itself.
        let own = Losses {
            log: u64::from(!log_takes_it),
            stdout: u64::from(self.stdout.as_ref().is_some_and(|stdout| stdout.writer.is_stuck())),
            journal: u64::from(self.journal.as_ref().is_some_and(|journal| journal.writer.is_stuck())),
            ..Losses::default()
        };
        let mut event = self.stopped(lost.plus(own), open, programs, u64::from(log_takes_it));
        if log_takes_it {
            self.write_json(&event);
            if let Some(log) = &mut self.log {
                log.push(&self.line);
                if !log.finish() {
                    // It has counted the line as lost.
                    event = self.stopped(lost.plus(own), open, programs, 0);
                }
            }
        }
        self.write_json(&event);
        if let Some(stdout) = &mut self.stdout {
            stdout.push(&event, &self.line);
        }
        if let Some(journal) = &mut self.journal {
            journal.push(&self.line);
        }
        self.drain().await;
    }

    /// `written` of it will be in the log.
    fn stopped(&self, lost: Losses, open: u64, programs: Programs, written: u64) -> Event {
        let stopped = Stopped {
            made: self.made,
            written: self.written().map(|before| before + written),
            lost: lost.plus(self.lost()),
            open,
            programs,
        };
        Event { time: Timestamp::now(), what: What::Stopped(stopped) }
    }

    async fn drain(&mut self) {
        if let Some(stdout) = &mut self.stdout {
            stdout.writer.drain().await;
        }
        if let Some(journal) = &mut self.journal {
            journal.writer.drain().await;
        }
    }
}

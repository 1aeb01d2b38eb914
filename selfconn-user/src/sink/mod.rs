//! Where events go: people's text or JSON lines on stdout, and the log file.

use std::io::{self, Write as _};

use jiff::Timestamp;

use self::file::LogFile;
use crate::event::{Event, Losses, Stopped, What};

pub mod file;
pub mod text;

/// How stdout speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

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

/// Standard output, written a batch at a time.
#[derive(Debug)]
pub struct Stdout {
    format: Option<Format>,
    batch: Vec<u8>,
}

impl Stdout {
    /// `None`: says nothing.
    #[must_use]
    pub fn new(format: Option<Format>) -> Self {
        Self { format, batch: Vec::new() }
    }

    /// Adds an event to the batch.
    pub fn push(&mut self, event: &Event) {
        match self.format {
            Some(Format::Json) => json_line(event, &mut self.batch),
            Some(Format::Text) => text::line(event, &mut self.batch),
            None => {}
        }
    }

    /// Writes the batch.
    ///
    /// # Errors
    /// As writing does; a broken pipe included, which the caller takes for a wish to end.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        let outcome = stdout.write_all(&self.batch).and_then(|()| stdout.flush());
        self.batch.clear();
        outcome
    }
}

/// Every place that events go to.
#[derive(Debug)]
pub struct Sinks {
    stdout: Stdout,
    log: Option<LogFile>,
    made: u64,
    line: Vec<u8>,
}

impl Sinks {
    /// `None`: no such place.
    #[must_use]
    pub fn new(stdout: Option<Format>, log: Option<LogFile>) -> Self {
        Self { stdout: Stdout::new(stdout), log, made: 0, line: Vec::new() }
    }

    /// Makes an event of now.
    pub fn emit(&mut self, what: What) {
        self.emit_at(Timestamp::now(), what);
    }

    /// Makes an event. It is written at the next flush.
    pub fn emit_at(&mut self, time: Timestamp, what: What) {
        let event = Event { time, what };
        self.made += 1;
        if let Some(log) = &mut self.log {
            self.line.clear();
            json_line(&event, &mut self.line);
            log.push(&self.line);
        }
        self.stdout.push(&event);
    }

    /// Writes what was made. The log first: nobody who stops reading stdout keeps an event from it.
    ///
    /// # Errors
    /// As [`Stdout::flush`]; the log says and counts its own.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(log) = &mut self.log {
            log.flush();
        }
        self.stdout.flush()
    }

    /// Whether events wait for a log that refuses them.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.log.as_ref().is_some_and(LogFile::is_behind)
    }

    /// Events that the log refused for good.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.log.as_ref().map_or(0, LogFile::lost)
    }

    /// Makes and writes the last event, whose numbers count it, too.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub fn stop(&mut self, lost: Losses, open: u64) -> io::Result<()> {
        if let Some(log) = &mut self.log {
            log.flush();
        }
        let written = self.log.as_ref().map(|log| log.written() + 1);
        self.emit(What::Stopped(Stopped { made: self.made + 1, written, lost, open }));
        self.flush()
    }
}

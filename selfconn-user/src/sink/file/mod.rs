//! The event log: JSON lines appended to a file. Whole lines go in one write; what a full disk takes only half of is
//! completed later from where it stopped, and what can't be kept until then is counted.
//!
//! The file may be moved or removed at any moment (logrotate does): from the next line on a new one at the same path
//! is written. A torn line is completed in the file that has its beginning. Where that can't be, for the file was
//! removed or emptied, the line is written whole where the next ones go.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Error, Result, anyhow};

use self::place::Place;
use super::backlog::Backlog;

mod place;

/// As much as waits for a file that refuses writes; some 10,000 lines.
const PENDING_LIMIT: usize = 8 << 20;

/// The open log.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    place: Place,
    backlog: Backlog,
    /// Where in the file a torn line stops.
    torn_at: u64,
    errors: u64,
    /// In a burst of errors, which is said once.
    is_failing: bool,
    /// Writing a file that the path doesn't lead to, for there is no making another; said once.
    is_astray: bool,
}

impl LogFile {
    /// Opens the file for appending, or makes it.
    ///
    /// # Errors
    /// When it can't be opened for writing; with the cure.
    pub fn open(path: &Path) -> Result<Self> {
        let place = Place::open(path).map_err(|error| explain(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            place,
            backlog: Backlog::new(PENDING_LIMIT),
            torn_at: 0,
            errors: 0,
            is_failing: false,
            is_astray: false,
        })
    }

    /// Adds a line, which ends in a newline. It is written at the next flush.
    pub fn push(&mut self, line: &[u8]) {
        self.backlog.push(line);
    }

    /// Writes what waits, if anything does. An error is said once for each burst, and what waits goes on waiting.
    pub fn flush(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        match self.follow().and_then(|()| self.write()) {
            Ok(()) => {
                if std::mem::take(&mut self.is_failing) {
                    log::warn!("the event log {} can be written again", self.path.display());
                }
            }
            Err(error) => {
                self.errors += 1;
                if !std::mem::replace(&mut self.is_failing, true) {
                    log::error!("cannot write the event log {}: {error}; events wait", self.path.display());
                }
            }
        }
    }

    /// Lets go of a file that was moved, also when there is nothing to write: what SIGHUP asks for.
    pub fn reopen(&mut self) {
        if let Err(error) = self.follow() {
            self.errors += 1;
            log::error!("cannot reopen the event log {}: {error}", self.path.display());
        }
        self.flush();
    }

    /// Goes to the file that the path leads to now, which may have to be made.
    fn follow(&mut self) -> io::Result<()> {
        if self.place.is_at(&self.path) {
            self.is_astray = false;
            return Ok(());
        }
        match Place::open(&self.path) {
            Ok(next) => {
                self.complete_before(&next)?;
                log::info!("the event log {} was moved or removed: opened anew", self.path.display());
                self.place = next;
                self.is_astray = false;
                Ok(())
            }
            // Written there it would be gone.
            Err(error) if self.place.is_deleted() => Err(error),
            Err(error) => {
                if !std::mem::replace(&mut self.is_astray, true) {
                    self.errors += 1;
                    log::error!(
                        "cannot reopen the event log {}: {error}; going on in the file that was moved",
                        self.path.display()
                    );
                }
                Ok(())
            }
        }
    }

    /// Writes the rest of a torn line into the file that has its beginning.
    fn complete_before(&mut self, next: &Place) -> io::Result<()> {
        self.check_torn();
        while !self.backlog.torn_rest().is_empty() {
            if self.place.is_deleted() {
                self.backlog.restart();
                break;
            }
            match write_once(&self.place, self.backlog.torn_rest()) {
                Ok(count) => self.took(count),
                // The next one would have no room, either.
                Err(error) if self.place.shares_filesystem(next) => return Err(error),
                Err(_) => {
                    self.backlog.restart();
                    break;
                }
            }
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        self.check_torn();
        if self.place.has_torn_end {
            write_once(&self.place, b"\n")?;
            self.place.has_torn_end = false;
        }
        while !self.backlog.is_empty() {
            let count = write_once(&self.place, self.backlog.rest())?;
            self.took(count);
        }
        Ok(())
    }

    fn took(&mut self, count: usize) {
        self.backlog.take(count);
        if !self.backlog.torn_rest().is_empty() {
            self.torn_at = self.place.len().unwrap_or(0);
        }
    }

    /// Somebody may have emptied the file, and with it the beginning of a torn line.
    fn check_torn(&mut self) {
        if !self.backlog.torn_rest().is_empty() && self.place.len().is_some_and(|len| len < self.torn_at) {
            self.backlog.restart();
        }
    }

    /// The run is over: what can't be written now is lost. Says whether all was written.
    pub fn finish(&mut self) -> bool {
        self.flush();
        let is_written = self.backlog.is_empty();
        self.backlog.give_up();
        is_written
    }

    /// Whether lines wait for a file that refuses them.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether the last attempt to write failed.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.is_failing
    }

    /// Lines that are in the file.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.backlog.taken()
    }

    /// Lines that are not, and never will be.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.backlog.lost()
    }

    /// Attempts to write or reopen that failed.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.errors
    }
}

fn explain(path: &Path, error: io::Error) -> Error {
    let what = format!("cannot write the event log {}", path.display());
    match place::cure(path, &error) {
        Some(cure) => anyhow!("{what}: {error}: {cure}"),
        None => Error::new(error).context(what),
    }
}

fn write_once(place: &Place, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match (&place.file).write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

//! The event log: JSON lines appended to a file. Whole lines go in one write. If a full disk accepts only a
//! part of a line, the rest is written later. Lines that do not fit into the queue until then are dropped and
//! counted.
//!
//! The file may be moved or removed at any time, for example by logrotate. The next line then goes to a new
//! file at the same path. A partial line is completed in the file that has its beginning. If that file was
//! removed or truncated, the whole line is written to the new file.
//!
//! A file that has reached its limit is like a full disk: lines wait until the file is rotated. Owners share what is
//! below the limit, so that one alone does not reach it.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Error, Result, anyhow};

use selfconn_ebpf::Owner;

use super::write_queue::WriteQueue;
use crate::budget::memory;
use place::OpenLogFile;
use room::Room;

mod place;
mod room;

/// Bytes in the queue from which it is written without waiting for the next flush.
const FLUSH_THRESHOLD: usize = 1 << 20;

#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    current: OpenLogFile,
    queue: WriteQueue,
    /// Maximum length of the file. `None`: no limit.
    limit: Option<u64>,
    room: Room,
    /// True if the path was looked at since the last flush, because an owner had no room.
    has_looked: bool,
    /// Length of the file, as far as it was last looked at and written since.
    len: u64,
    /// Length of the file after a partial line was written.
    len_after_partial: u64,
    errors: u64,
    /// The last write failed. A burst of errors is logged once.
    is_failing: bool,
    /// The open file was moved and no new one can be created, so lines still go to the moved file. Logged
    /// once.
    is_on_moved_file: bool,
}

impl LogFile {
    /// Opens the file for appending. Creates it if it does not exist.
    ///
    /// # Errors
    /// If the file cannot be opened for writing. The error has a hint.
    pub fn open(path: &Path) -> Result<Self> {
        let current = OpenLogFile::open(path).map_err(|error| open_error(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            current,
            queue: WriteQueue::new(memory::LOG_QUEUE_BYTES),
            limit: None,
            room: Room::default(),
            has_looked: false,
            len: 0,
            len_after_partial: 0,
            errors: 0,
            is_failing: false,
            is_on_moved_file: false,
        })
    }

    /// The same, but the file never grows beyond `limit` bytes. `None`: no limit.
    #[must_use]
    pub fn with_limit(self, limit: Option<u64>) -> Self {
        let len = self.current.len().unwrap_or(0);
        Self { limit, len, room: Room::new(limit, len), ..self }
    }

    /// Adds a line, which ends in a newline. It is written at the next flush, or at once if the queue is long:
    /// a snapshot with thousands of connections makes more lines than the queue holds.
    pub fn push(&mut self, line: &[u8]) {
        if self.queue.len() + line.len() > FLUSH_THRESHOLD && !self.is_failing {
            self.flush();
        }
        self.queue.push(line);
    }

    /// As [`Self::push`], if this owner has room for the line, or the other one. Otherwise the line is dropped.
    pub fn push_of(&mut self, owner: Owner, other: Option<Owner>, line: &[u8]) {
        let try_take =
            |room: &mut Room| [owner].into_iter().chain(other).any(|owner| room.try_take(owner, line.len()));
        let mut has_room = try_take(&mut self.room);
        if !has_room && !std::mem::replace(&mut self.has_looked, true) {
            // The file may have been rotated since its last line. The next flush reports an error.
            let _ = self.follow_path();
            has_room = try_take(&mut self.room);
        }
        if has_room {
            self.push(line);
        } else if self.room.count_over_share(owner) {
            let path = self.path.display();
            log::warn!("uid {} has filled its share of {path} (--log-limit); rotate it", owner.uid);
        }
    }

    /// Writes all lines that wait. After an error they continue to wait. A burst of errors is logged once.
    pub fn flush(&mut self) {
        self.has_looked = false;
        if self.queue.is_empty() {
            return;
        }
        match self.follow_path().and_then(|()| self.write()) {
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

    /// Closes a file that was moved, even if there is nothing to write. This is the reaction to SIGHUP.
    pub fn reopen(&mut self) {
        if let Err(error) = self.follow_path() {
            self.errors += 1;
            log::error!("cannot reopen the event log {}: {error}", self.path.display());
        }
        self.flush();
    }

    /// Switches to the file that is now at the path. Creates it if it does not exist.
    fn follow_path(&mut self) -> io::Result<()> {
        if let Some(len) = self.current.len_at(&self.path) {
            if len < self.len {
                // Truncated.
                self.room.reset(self.limit, len + self.queue.len() as u64);
            }
            self.len = len;
            self.is_on_moved_file = false;
            return Ok(());
        }
        match OpenLogFile::open(&self.path) {
            Ok(next) => {
                self.complete_partial_line(&next)?;
                log::info!("the event log {} was moved or removed: reopened", self.path.display());
                self.len = next.len().unwrap_or(0);
                self.room.reset(self.limit, self.len + self.queue.len() as u64);
                self.current = next;
                self.is_on_moved_file = false;
                Ok(())
            }
            // Lines written to a deleted file would be lost.
            Err(error) if self.current.is_deleted() => Err(error),
            Err(error) => {
                if !std::mem::replace(&mut self.is_on_moved_file, true) {
                    self.errors += 1;
                    log::error!(
                        "cannot reopen the event log {}: {error}; still writing to the moved file",
                        self.path.display()
                    );
                }
                Ok(())
            }
        }
    }

    /// Writes the rest of a partial line to the file that has its beginning.
    fn complete_partial_line(&mut self, next: &OpenLogFile) -> io::Result<()> {
        self.check_truncation();
        while !self.queue.partial_rest().is_empty() {
            if self.current.is_deleted() {
                self.queue.rewind();
                break;
            }
            match write_once(&self.current, self.queue.partial_rest()) {
                Ok(count) => self.advance(count),
                // The next file has no room either, because it is on the same filesystem.
                Err(error) if self.current.shares_filesystem(next) => return Err(error),
                Err(_) => {
                    self.queue.rewind();
                    break;
                }
            }
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        self.check_truncation();
        while !self.queue.is_empty() {
            if self.current.has_partial_last_line {
                self.room_for(1)?;
                write_once(&self.current, b"\n")?;
                self.len += 1;
                self.current.has_partial_last_line = false;
            }
            let room = self.room_for(self.queue.chunk(0).len())?;
            let count = write_once(&self.current, self.queue.chunk(room))?;
            self.len += count as u64;
            self.advance(count);
        }
        Ok(())
    }

    /// The number of bytes that may be written. It is an error if they are less than this.
    fn room_for(&self, bytes: usize) -> io::Result<usize> {
        let room = self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.len));
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        if bytes <= room {
            Ok(room)
        } else {
            Err(io::Error::new(io::ErrorKind::QuotaExceeded, "it has reached --log-limit; rotate it"))
        }
    }

    fn advance(&mut self, count: usize) {
        self.queue.advance(count);
        if !self.queue.partial_rest().is_empty() {
            self.len_after_partial = self.current.len().unwrap_or(0);
        }
    }

    /// If the file was truncated, the beginning of a partial line is gone, so the whole line is written
    /// again.
    fn check_truncation(&mut self) {
        if !self.queue.partial_rest().is_empty()
            && self.current.len().is_some_and(|len| len < self.len_after_partial)
        {
            self.queue.rewind();
        }
    }

    /// Writes all lines at the end of the run and drops the lines that cannot be written. Returns true if all
    /// were written.
    pub fn finish(&mut self) -> bool {
        self.flush();
        let is_written = self.queue.is_empty();
        self.queue.drop_all();
        is_written
    }

    /// True if lines wait because the file refuses writes.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        !self.queue.is_empty()
    }

    /// True if the last attempt to write failed.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.is_failing
    }

    /// Number of lines written to the file.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.queue.completed()
    }

    /// Number of lines that were dropped.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.queue.lost() + self.room.over_share()
    }

    /// The lines that were dropped since the last call because their owner has filled its share of the file.
    pub fn take_over_share(&mut self) -> Vec<(Owner, u64)> {
        self.room.take_over_share()
    }

    /// Number of failed attempts to write or reopen.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.errors
    }
}

fn open_error(path: &Path, error: io::Error) -> Error {
    let context = format!("cannot write the event log {}", path.display());
    match place::hint(path, &error) {
        Some(hint) => anyhow!("{context}: {error}: {hint}"),
        None => Error::new(error).context(context),
    }
}

fn write_once(log: &OpenLogFile, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match (&log.file).write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_lines_than_the_queue_holds_are_written_before_they_are_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = LogFile::open(&path).unwrap();
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        for _ in 0..2 * memory::LOG_QUEUE_BYTES / line.len() {
            log.push(&line);
        }
        assert!(log.queue.len() <= FLUSH_THRESHOLD);
        assert!(log.finish() && log.lost() == 0);
        assert_eq!(
            std::fs::metadata(&path).unwrap().len() as usize,
            2 * memory::LOG_QUEUE_BYTES / 1_000 * 1_000
        );
    }

    #[test]
    fn one_owner_fills_three_quarters_of_the_file_and_others_have_the_rest_until_it_is_rotated() {
        const LIMIT: u64 = 100_000;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = LogFile::open(&path).unwrap().with_limit(Some(LIMIT));
        let line = [b"x".repeat(99), b"\n".to_vec()].concat();
        let (flooder, other) = (Owner::new(1, 1), Owner::new(2, 2));
        for _ in 0..1_000 {
            log.push_of(flooder, None, &line);
        }
        log.flush();
        let len = || std::fs::metadata(&path).unwrap().len();
        assert_eq!((len(), log.lost()), (75_000, 250));
        for _ in 0..10 {
            log.push_of(other, None, &line);
            log.push(&line);
        }
        log.flush();
        assert_eq!((len(), log.lost(), log.is_failing()), (77_000, 250, false));
        assert_eq!(log.take_over_share(), [(flooder, 250)]);
        // A warning about a port to which both connect.
        log.push_of(flooder, Some(other), &line);
        log.flush();
        assert_eq!((len(), log.lost()), (77_100, 250));
        // What nobody pays for waits at the limit.
        for _ in 0..1_000 {
            log.push(&line);
        }
        log.flush();
        assert_eq!((len(), log.lost(), log.is_failing(), log.has_pending()), (LIMIT, 250, true, true));
        std::fs::rename(&path, folder.path().join("log.1")).unwrap();
        log.push_of(flooder, None, &line);
        assert!(log.finish() && log.take_over_share().is_empty());
        assert_eq!((len(), log.lost()), (77_200, 250), "what waited, and the new line");
    }

    #[test]
    fn what_the_file_has_at_the_start_is_nobodys_and_a_truncated_file_has_room_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (owner, line) = (Owner::new(1, 1), b"x".repeat(100));
        std::fs::write(&path, b"\n".repeat(60_000)).unwrap();
        let mut log = LogFile::open(&path).unwrap().with_limit(Some(100_000));
        let fill = |log: &mut LogFile| {
            let before = log.lost();
            for _ in 0..1_000 {
                log.push_of(owner, None, &line);
            }
            log.flush();
            1_000 - (log.lost() - before)
        };
        assert_eq!(fill(&mut log), 300, "three quarters of the rest");
        std::fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        log.push(b"\n");
        log.flush();
        assert_eq!(fill(&mut log), 749, "of the whole");
    }
}

//! The event log: JSON lines appended to a file. Whole lines go in one write; what a full disk takes only half of is
//! completed later from where it stopped, and what can't be kept until then is counted.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// As much as waits for a file that refuses writes; some 10,000 lines.
const PENDING_LIMIT: usize = 8 << 20;

/// The open log.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    queue: Queue,
    /// In a burst of errors, which is said once.
    is_failing: bool,
}

impl LogFile {
    /// Opens the file for appending, or makes it, readable for its owner and group.
    ///
    /// # Errors
    /// When it can't be opened for writing.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .open(path)
            .with_context(|| format!("cannot write the event log {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file, queue: Queue::new(PENDING_LIMIT), is_failing: false })
    }

    /// Adds a line, which ends in a newline. It is written at the next flush.
    pub fn push(&mut self, line: &[u8]) {
        self.queue.push(line);
    }

    /// Writes what waits. An error is said once for each burst, and what waits goes on waiting.
    pub fn flush(&mut self) {
        match self.queue.write_to(&mut self.file) {
            Ok(()) => {
                if std::mem::take(&mut self.is_failing) {
                    log::warn!("the event log {} can be written again", self.path.display());
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.is_failing, true) {
                    log::error!("cannot write the event log {}: {error}; events wait", self.path.display());
                }
            }
        }
    }

    /// Whether lines wait for a file that refuses them.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        !self.queue.pending.is_empty()
    }

    /// Lines that are in the file.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.queue.written
    }

    /// Lines that are not, and never will be.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.queue.lost
    }
}

/// Lines on their way into something that may refuse them.
#[derive(Debug)]
struct Queue {
    /// Whole lines, but for the first, whose beginning may be written already.
    pending: Vec<u8>,
    limit: usize,
    written: u64,
    lost: u64,
}

impl Queue {
    fn new(limit: usize) -> Self {
        Self { pending: Vec::new(), limit, written: 0, lost: 0 }
    }

    fn push(&mut self, line: &[u8]) {
        if self.pending.len() + line.len() > self.limit {
            self.lost += 1;
        } else {
            self.pending.extend_from_slice(line);
        }
    }

    fn write_to(&mut self, to: &mut impl Write) -> io::Result<()> {
        let mut done = 0;
        let outcome = loop {
            if done == self.pending.len() {
                break Ok(());
            }
            match to.write(&self.pending[done..]) {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.written += self.pending[..done].iter().filter(|byte| **byte == b'\n').count() as u64;
        self.pending.drain(..done);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes `room` bytes, at most three at a time, then refuses.
    struct Disk {
        holds: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.room).min(3);
            if count == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= count;
            self.holds.extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_torn_line_is_completed_and_no_line_is_repeated() {
        for room in 0..30 {
            let mut disk = Disk { holds: Vec::new(), room };
            let mut queue = Queue::new(1 << 10);
            for line in ["first\n", "second\n", "third\n"] {
                queue.push(line.as_bytes());
                let _ = queue.write_to(&mut disk);
            }
            disk.room = 100;
            queue.write_to(&mut disk).unwrap();
            assert_eq!(disk.holds, b"first\nsecond\nthird\n", "after {room} bytes");
            assert_eq!((queue.written, queue.lost), (3, 0));
        }
    }

    #[test]
    fn what_does_not_fit_is_lost_whole_and_counted() {
        let mut disk = Disk { holds: Vec::new(), room: 4 };
        let mut queue = Queue::new(12);
        for _ in 0..5 {
            queue.push(b"12345\n");
        }
        assert_eq!(queue.lost, 3);
        assert!(queue.write_to(&mut disk).is_err());
        assert_eq!(queue.written, 0);
        disk.room = 100;
        queue.write_to(&mut disk).unwrap();
        assert_eq!(disk.holds, b"12345\n12345\n");
        assert_eq!((queue.written, queue.lost), (2, 3));
    }
}

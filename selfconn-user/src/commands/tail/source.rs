//! A log file as a stream of bytes: finds the position of the last events, reads, and follows the file when
//! it is moved, removed or truncated.

use std::{
    collections::HashSet,
    fs::{File, Metadata},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use super::filter::Filter;
use crate::event::text::{LogRecord, parse};

/// Maximum bytes of one read.
pub(super) const BLOCK_BYTES: usize = 64 << 10;

/// An open log file and the position up to which it was read.
#[derive(Debug)]
pub(super) struct LogSource {
    path: PathBuf,
    file: File,
    position: u64,
}

/// Change of a followed file since the last read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileChange {
    /// This many new bytes were read.
    Bytes(usize),
    /// The path has another file now, or the file was truncated. An incomplete line will not be completed.
    Restarted,
    /// No change.
    None,
}

impl LogSource {
    /// # Errors
    /// If the file cannot be opened or is a directory.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        Ok(Self { path: path.to_owned(), file, position: 0 })
    }

    /// Seeks to the beginning of the last events that the search looks for. If there are fewer, seeks to the
    /// beginning of the file, and `search.remaining` is the missing number.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(super) fn seek_last(&mut self, search: &mut LastEventsSearch<'_>) -> io::Result<()> {
        let mut end = self.file.metadata()?.len();
        // The beginning of a line whose end is in the block that was read before.
        let mut rest: Vec<u8> = Vec::new();
        self.position = 0;
        while end > 0 {
            let start = end.saturating_sub(BLOCK_BYTES as u64);
            let mut block = vec![0; usize::try_from(end - start).unwrap_or(BLOCK_BYTES)];
            self.file.read_exact_at(&mut block, start)?;
            block.extend_from_slice(&rest);
            // The first line of a block is complete only at the beginning of the file.
            let first_line_start = if start == 0 {
                0
            } else {
                block.iter().position(|byte| *byte == b'\n').map_or(block.len(), |at| at + 1)
            };
            let mut line_end = block.len();
            for at in (first_line_start..block.len()).rev() {
                if at == first_line_start || block[at - 1] == b'\n' {
                    if search.counts(block[at..line_end].trim_ascii_end()) {
                        self.position = start + at as u64;
                        if search.remaining == 0 {
                            return self.file.seek(SeekFrom::Start(self.position)).map(drop);
                        }
                    }
                    line_end = at;
                }
            }
            rest = block;
            rest.truncate(first_line_start);
            // A line of this length is not an event.
            if rest.len() > super::lines::MAX_LINE_BYTES {
                rest.clear();
            }
            end = start;
        }
        self.position = 0;
        self.file.rewind()
    }

    /// # Errors
    /// If seeking fails.
    pub(super) fn seek_end(&mut self) -> io::Result<()> {
        self.position = self.file.seek(SeekFrom::End(0))?;
        Ok(())
    }

    /// Reads the next bytes.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(super) fn read(&mut self, block: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read(block) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(count) => {
                    self.position += count as u64;
                    return Ok(count);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads the next bytes, and switches to the file that is now at the path when this one is read
    /// completely.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(super) fn follow(&mut self, block: &mut [u8]) -> io::Result<FileChange> {
        // Checked before the read: once the next file has content, the daemon no longer writes to this one.
        let next = self.path.metadata().ok();
        let current = self.file.metadata()?;
        let count = self.read(block)?;
        if count > 0 {
            return Ok(FileChange::Bytes(count));
        }
        match next {
            Some(next) if !is_same_file(&next, &current) && next.len() > 0 => {
                // The new file may be gone again. The next call checks again.
                let Ok(moved_to) = Self::open(&self.path) else { return Ok(FileChange::None) };
                *self = moved_to;
                Ok(FileChange::Restarted)
            }
            Some(next) if is_same_file(&next, &current) && next.len() < self.position => {
                self.file.rewind()?;
                self.position = 0;
                Ok(FileChange::Restarted)
            }
            _ => Ok(FileChange::None),
        }
    }
}

fn is_same_file(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Search for the last matching events, backwards from the end.
#[derive(Debug)]
pub(super) struct LastEventsSearch<'a> {
    pub(super) filter: &'a Filter,
    /// A connection is one line, so its `established` is not counted in addition to its `closed`.
    pub(super) merges_connections: bool,
    /// Number of events that are still to be found.
    pub(super) remaining: usize,
    pub(super) closed: HashSet<String>,
}

impl LastEventsSearch<'_> {
    fn counts(&mut self, line: &[u8]) -> bool {
        if self.remaining == 0 {
            return false;
        }
        let Some(fields) = parse(line) else { return false };
        let record = LogRecord::new(&fields);
        if record.event().is_empty() || !self.filter.matches(record) {
            return false;
        }
        if self.merges_connections
            && let Some(id) = record.text("id")
        {
            match record.event() {
                "closed" => drop(self.closed.insert(id.to_owned())),
                "established" if self.closed.remove(id) => return false,
                _ => {}
            }
        }
        self.remaining -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn line(kind: &str, number: usize) -> String {
        format!("{{\"event\":\"{kind}\",\"id\":\"{number}\"}}\n")
    }

    #[test]
    fn the_last_events_are_found_from_the_end() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        // Invalid lines between the events are not counted. One of them is longer than a block.
        for number in 0..5_000 {
            file.write_all(line("established", number).as_bytes()).unwrap();
            file.write_all(line("closed", number).as_bytes()).unwrap();
            if number % 1_000 == 0 {
                file.write_all(&vec![b'x'; BLOCK_BYTES * 2]).unwrap();
                file.write_all(b"\n\xff\xfe\n\n[]\n{}\n").unwrap();
            }
        }
        file.write_all(b"{\"event\":\"closed\",\"id\":\"to").unwrap();
        let filter = Filter::default();
        for (count, merges_connections, first, missing) in [
            (1, true, Some(line("closed", 4_999)), 0),
            (3, true, Some(line("closed", 4_997)), 0),
            (1_500, true, Some(line("closed", 3_500)), 0),
            (3, false, Some(line("closed", 4_998)), 0),
            (4, false, Some(line("established", 4_998)), 0),
            (5_000, true, Some(line("closed", 0)), 0),
            (6_000, true, None, 1_000),
            (10_000, false, Some(line("established", 0)), 0),
        ] {
            let mut source = LogSource::open(file.path()).unwrap();
            let mut search = LastEventsSearch {
                filter: &filter,
                merges_connections,
                remaining: count,
                closed: HashSet::new(),
            };
            source.seek_last(&mut search).unwrap();
            assert_eq!(search.remaining, missing, "{count}");
            let mut text = String::new();
            let _ = source.file.read_to_string(&mut text);
            let mut block = [0; 64];
            source.file.seek(SeekFrom::Start(source.position)).unwrap();
            let read = source.read(&mut block).unwrap();
            let found = String::from_utf8_lossy(&block[..read]);
            match first {
                Some(first) => assert!(found.starts_with(&first), "{count}: {found}"),
                None => assert_eq!(source.position as usize, read, "from the beginning"),
            }
        }
    }
}

//! A log as a stream of bytes: from where on it is read, and how it is followed when it is moved, removed or emptied.

use std::{
    collections::HashSet,
    fs::{File, Metadata},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use super::filter::Filter;
use crate::sink::text::{Record, parse};

/// So much is read at once.
pub(super) const BLOCK: usize = 64 << 10;

/// An open file, and how far it was read.
#[derive(Debug)]
pub(super) struct Source {
    path: PathBuf,
    file: File,
    position: u64,
}

/// What is new in a followed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// So many bytes.
    Bytes(usize),
    /// It is another file now, or was emptied: what was begun will not be completed.
    Restarted,
    /// Nothing.
    None,
}

impl Source {
    /// # Errors
    /// When it can't be opened, or is a folder.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        Ok(Self { path: path.to_owned(), file, position: 0 })
    }

    /// Goes to where the last so many events begin that are wanted. Says how many there are, if there are fewer.
    ///
    /// # Errors
    /// As reading does.
    pub(super) fn seek_last(&mut self, search: &mut Search<'_>) -> io::Result<()> {
        let mut end = self.file.metadata()?.len();
        // The beginning of a line whose end is in a block that was looked at already.
        let mut rest: Vec<u8> = Vec::new();
        self.position = 0;
        while end > 0 {
            let start = end.saturating_sub(BLOCK as u64);
            let mut block = vec![0; usize::try_from(end - start).unwrap_or(BLOCK)];
            self.file.read_exact_at(&mut block, start)?;
            block.extend_from_slice(&rest);
            // The first line of a block is whole only at the beginning of the file.
            let whole = if start == 0 {
                0
            } else {
                block.iter().position(|byte| *byte == b'\n').map_or(block.len(), |at| at + 1)
            };
            let mut line_end = block.len();
            for at in (whole..block.len()).rev() {
                if at == whole || block[at - 1] == b'\n' {
                    if search.counts(block[at..line_end].trim_ascii_end()) {
                        self.position = start + at as u64;
                        if search.left == 0 {
                            return self.file.seek(SeekFrom::Start(self.position)).map(drop);
                        }
                    }
                    line_end = at;
                }
            }
            rest = block;
            rest.truncate(whole);
            // A line that long is no event.
            if rest.len() > super::lines::LONGEST {
                rest.clear();
            }
            end = start;
        }
        self.position = 0;
        self.file.rewind()
    }

    /// Goes to the end.
    ///
    /// # Errors
    /// As seeking does.
    pub(super) fn seek_end(&mut self) -> io::Result<()> {
        self.position = self.file.seek(SeekFrom::End(0))?;
        Ok(())
    }

    /// Reads on.
    ///
    /// # Errors
    /// As reading does.
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

    /// Reads on, in the file that the path leads to now.
    ///
    /// # Errors
    /// As reading does.
    pub(super) fn follow(&mut self, block: &mut [u8]) -> io::Result<News> {
        // Asked before the read: who writes to the next file already, writes to this one no more.
        let next = self.path.metadata().ok();
        let own = self.file.metadata()?;
        let count = self.read(block)?;
        if count > 0 {
            return Ok(News::Bytes(count));
        }
        match next {
            Some(next) if !is_same(&next, &own) && next.len() > 0 => {
                // It may be gone again; then the next look finds out.
                let Ok(moved_to) = Self::open(&self.path) else { return Ok(News::None) };
                *self = moved_to;
                Ok(News::Restarted)
            }
            Some(next) if is_same(&next, &own) && next.len() < self.position => {
                self.file.rewind()?;
                self.position = 0;
                Ok(News::Restarted)
            }
            _ => Ok(News::None),
        }
    }
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Looks for the last events that are wanted, from the end backwards.
#[derive(Debug)]
pub(super) struct Search<'a> {
    pub(super) filter: &'a Filter,
    /// A connection is one line: what opened it is not counted beside what closed it.
    pub(super) joins: bool,
    /// How many are still to be found.
    pub(super) left: usize,
    pub(super) closed: HashSet<String>,
}

impl Search<'_> {
    fn counts(&mut self, line: &[u8]) -> bool {
        if self.left == 0 {
            return false;
        }
        let Some(fields) = parse(line) else { return false };
        let record = Record::new(&fields);
        if record.event().is_empty() || !self.filter.wants(record) {
            return false;
        }
        if self.joins
            && let Some(id) = record.text("id")
        {
            match record.event() {
                "closed" => drop(self.closed.insert(id.to_owned())),
                "established" if self.closed.remove(id) => return false,
                _ => {}
            }
        }
        self.left -= 1;
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
    fn the_last_lines_are_found_from_the_end() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        // Garbage in between is not counted; a line is longer than a block.
        for number in 0..5_000 {
            file.write_all(line("established", number).as_bytes()).unwrap();
            file.write_all(line("closed", number).as_bytes()).unwrap();
            if number % 1_000 == 0 {
                file.write_all(&vec![b'x'; BLOCK * 2]).unwrap();
                file.write_all(b"\n\xff\xfe\n\n[]\n{}\n").unwrap();
            }
        }
        file.write_all(b"{\"event\":\"closed\",\"id\":\"to").unwrap();
        let filter = Filter::default();
        for (count, joins, first, left) in [
            (1, true, Some(line("closed", 4_999)), 0),
            (3, true, Some(line("closed", 4_997)), 0),
            (1_500, true, Some(line("closed", 3_500)), 0),
            (3, false, Some(line("closed", 4_998)), 0),
            (4, false, Some(line("established", 4_998)), 0),
            (5_000, true, Some(line("closed", 0)), 0),
            (6_000, true, None, 1_000),
            (10_000, false, Some(line("established", 0)), 0),
        ] {
            let mut source = Source::open(file.path()).unwrap();
            let mut search = Search { filter: &filter, joins, left: count, closed: HashSet::new() };
            source.seek_last(&mut search).unwrap();
            assert_eq!(search.left, left, "{count}");
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

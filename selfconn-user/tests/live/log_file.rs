//! The log file alone, on a disk that fills up, and under the hands of whoever rotates it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use selfconn::sink::file::LogFile;

use crate::disk::Disk;

/// Lines of 600 bytes, which no page ends with.
fn line(number: usize) -> Vec<u8> {
    format!("{number:0599}\n").into_bytes()
}

/// The numbers of a file's lines, all of them whole.
#[track_caller]
fn numbers(path: &Path) -> Vec<usize> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{} is torn", path.display());
    let number = |line: &str| {
        assert_eq!(line.len(), 599, "{} has a torn line", path.display());
        line.parse().unwrap()
    };
    text.lines().map(number).collect()
}

/// A log of ten lines on a disk with room for some of them.
struct Full {
    disk: Disk,
    path: PathBuf,
    log: LogFile,
    filler: PathBuf,
}

impl Full {
    fn new() -> Self {
        let disk = Disk::private(64);
        let path = disk.join("log");
        let mut log = LogFile::open(&path).unwrap();
        let filler = disk.fill_but(1);
        for number in 0..10 {
            log.push(&line(number));
        }
        log.flush();
        assert!(log.is_behind() && log.is_failing());
        assert_eq!(log.errors(), 1);
        let written = fs::read(&path).unwrap();
        assert_eq!(written.len(), 4_096, "six lines and a torn one");
        assert_eq!(log.written(), 6);
        Self { disk, path, log, filler }
    }

    /// Makes room, and has everything written.
    fn relieve(&mut self) {
        fs::remove_file(&self.filler).unwrap();
        self.log.flush();
        assert!(!self.log.is_behind() && !self.log.is_failing());
        assert_eq!((self.log.written(), self.log.lost()), (10, 0));
    }
}

#[test]
fn a_line_that_a_full_disk_tore_is_completed_when_there_is_room() {
    let mut full = Full::new();
    full.log.flush();
    assert_eq!(full.log.errors(), 2, "each attempt is counted");
    full.relieve();
    assert_eq!(numbers(&full.path), (0..10).collect::<Vec<_>>());
}

#[test]
fn a_torn_line_is_completed_in_the_file_that_was_moved_and_the_next_goes_to_the_new_one() {
    let mut full = Full::new();
    let moved = full.disk.join("log.1");
    fs::rename(&full.path, &moved).unwrap();
    full.log.flush();
    assert_eq!(fs::read(&full.path).unwrap(), b"", "no half of a line goes there");
    assert_eq!(fs::read(&moved).unwrap().len(), 4_096);
    full.relieve();
    assert_eq!(numbers(&moved), (0..7).collect::<Vec<_>>());
    assert_eq!(numbers(&full.path), (7..10).collect::<Vec<_>>());
}

#[test]
fn a_line_whose_beginning_was_removed_is_written_whole_into_the_new_file() {
    let mut full = Full::new();
    fs::remove_file(&full.path).unwrap();
    full.relieve();
    assert_eq!(numbers(&full.path), (6..10).collect::<Vec<_>>());
}

#[test]
fn a_line_whose_beginning_was_truncated_away_is_written_whole() {
    let mut full = Full::new();
    fs::OpenOptions::new().write(true).open(&full.path).unwrap().set_len(0).unwrap();
    full.relieve();
    assert_eq!(numbers(&full.path), (6..10).collect::<Vec<_>>());
}

#[test]
fn a_new_file_on_another_disk_does_not_wait_for_the_full_one() {
    let mut full = Full::new();
    full.disk.mount_over(64);
    full.log.flush();
    assert!(!full.log.is_behind());
    assert_eq!(numbers(&full.path), (6..10).collect::<Vec<_>>());
}

#[test]
fn lines_wait_for_a_directory_that_was_removed_with_the_file() {
    let disk = Disk::private(64);
    let folder = disk.join("folder");
    fs::create_dir(&folder).unwrap();
    let path = folder.join("log");
    let mut log = LogFile::open(&path).unwrap();
    log.push(&line(0));
    log.flush();
    fs::remove_dir_all(&folder).unwrap();
    log.push(&line(1));
    log.flush();
    assert!(log.is_behind() && log.is_failing(), "what is written to a removed file is gone");
    fs::create_dir(&folder).unwrap();
    log.flush();
    assert_eq!(numbers(&path), [1]);
}

#[test]
fn a_directory_that_was_moved_with_the_file_keeps_getting_lines() {
    let disk = Disk::private(64);
    let (folder, moved) = (disk.join("folder"), disk.join("moved"));
    fs::create_dir(&folder).unwrap();
    let path = folder.join("log");
    let mut log = LogFile::open(&path).unwrap();
    fs::rename(&folder, &moved).unwrap();
    for number in 0..2 {
        log.push(&line(number));
        log.flush();
    }
    assert_eq!(log.errors(), 1, "said and counted once");
    assert_eq!(numbers(&moved.join("log")), [0, 1]);
    fs::create_dir(&folder).unwrap();
    log.push(&line(2));
    log.flush();
    assert_eq!(numbers(&path), [2]);
}

#[test]
fn a_symbolic_link_at_the_path_is_never_followed() {
    let disk = Disk::private(64);
    let (path, victim) = (disk.join("log"), disk.join("victim"));
    fs::write(&victim, "precious\n").unwrap();
    symlink(&victim, &path).unwrap();
    let error = format!("{:#}", LogFile::open(&path).unwrap_err());
    assert!(error.contains("symbolic link") && error.contains("points to"), "{error}");
    fs::remove_file(&path).unwrap();
    let mut log = LogFile::open(&path).unwrap();
    // Put there while we run.
    let moved = disk.join("moved");
    fs::rename(&path, &moved).unwrap();
    symlink(&victim, &path).unwrap();
    log.push(&line(0));
    log.flush();
    log.reopen();
    assert_eq!(fs::read(&victim).unwrap(), b"precious\n");
    assert_eq!(numbers(&moved), [0]);
}

#[test]
fn what_is_not_a_file_is_refused_at_once() {
    let disk = Disk::private(64);
    let pipe = disk.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    for path in [Path::new("/dev/null"), &pipe] {
        let error = format!("{:#}", LogFile::open(path).unwrap_err());
        assert!(error.contains("not a file"), "{error}");
    }
}

#[test]
fn a_torn_end_of_another_run_gets_its_newline_first() {
    let disk = Disk::private(64);
    let path = disk.join("log");
    fs::write(&path, "whole\nkilled in the mid").unwrap();
    let mut log = LogFile::open(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"whole\nkilled in the mid", "nothing to write yet");
    log.push(b"next\n");
    log.flush();
    assert_eq!(fs::read(&path).unwrap(), b"whole\nkilled in the mid\nnext\n");
    assert_eq!(log.written(), 1);
}

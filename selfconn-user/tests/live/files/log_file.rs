//! The log file alone: on a full disk, and while it is rotated.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use selfconn::output::log_file::LogFile;

use crate::support::disk::Disk;

/// A line of 600 bytes; a page is not a multiple of that.
fn line(number: usize) -> Vec<u8> {
    format!("{number:0599}\n").into_bytes()
}

/// The numbers in the lines of a file. Checks that each line is complete.
#[track_caller]
fn numbers(path: &Path) -> Vec<usize> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{} ends with a partial line", path.display());
    let number = |line: &str| {
        assert_eq!(line.len(), 599, "{} has a partial line", path.display());
        line.parse().unwrap()
    };
    text.lines().map(number).collect()
}

/// A log of ten lines on a disk with room for only some of them.
struct FullDiskLog {
    disk: Disk,
    path: PathBuf,
    log: LogFile,
    filler: PathBuf,
}

impl FullDiskLog {
    fn new() -> Self {
        let disk = Disk::mount_private(64);
        let path = disk.join("log");
        let mut log = LogFile::open(&path).unwrap();
        let filler = disk.fill_except(1);
        for number in 0..10 {
            log.push(&line(number));
        }
        log.flush();
        assert!(log.has_pending() && log.is_failing());
        assert_eq!(log.errors(), 1);
        let written = fs::read(&path).unwrap();
        assert_eq!(written.len(), 4_096, "six lines and a partial one");
        assert_eq!(log.written(), 6);
        Self { disk, path, log, filler }
    }

    /// Makes room and checks that everything is written.
    fn make_room(&mut self) {
        fs::remove_file(&self.filler).unwrap();
        self.log.flush();
        assert!(!self.log.has_pending() && !self.log.is_failing());
        assert_eq!((self.log.written(), self.log.lost()), (10, 0));
    }
}

#[test]
fn a_line_cut_by_a_full_disk_is_completed_when_there_is_room() {
    let mut full = FullDiskLog::new();
    full.log.flush();
    assert_eq!(full.log.errors(), 2, "each attempt is counted");
    full.make_room();
    assert_eq!(numbers(&full.path), (0..10).collect::<Vec<_>>());
}

#[test]
fn a_partial_line_is_completed_in_the_moved_file_and_the_next_line_goes_to_the_new_file() {
    let mut full = FullDiskLog::new();
    let moved = full.disk.join("log.1");
    fs::rename(&full.path, &moved).unwrap();
    full.log.flush();
    assert_eq!(fs::read(&full.path).unwrap(), b"", "no partial line goes there");
    assert_eq!(fs::read(&moved).unwrap().len(), 4_096);
    full.make_room();
    assert_eq!(numbers(&moved), (0..7).collect::<Vec<_>>());
    assert_eq!(numbers(&full.path), (7..10).collect::<Vec<_>>());
}

#[test]
fn a_line_whose_start_was_removed_is_written_whole_to_the_new_file() {
    let mut full = FullDiskLog::new();
    fs::remove_file(&full.path).unwrap();
    full.make_room();
    assert_eq!(numbers(&full.path), (6..10).collect::<Vec<_>>());
}

#[test]
fn a_line_whose_start_was_truncated_is_written_whole() {
    let mut full = FullDiskLog::new();
    fs::OpenOptions::new().write(true).open(&full.path).unwrap().set_len(0).unwrap();
    full.make_room();
    assert_eq!(numbers(&full.path), (6..10).collect::<Vec<_>>());
}

#[test]
fn a_new_file_on_another_disk_does_not_wait_for_the_full_one() {
    let mut full = FullDiskLog::new();
    full.disk.mount_over(64);
    full.log.flush();
    assert!(!full.log.has_pending());
    assert_eq!(numbers(&full.path), (6..10).collect::<Vec<_>>());
}

#[test]
fn lines_are_queued_while_the_directory_is_missing() {
    let disk = Disk::mount_private(64);
    let folder = disk.join("folder");
    fs::create_dir(&folder).unwrap();
    let path = folder.join("log");
    let mut log = LogFile::open(&path).unwrap();
    log.push(&line(0));
    log.flush();
    fs::remove_dir_all(&folder).unwrap();
    log.push(&line(1));
    log.flush();
    assert!(log.has_pending() && log.is_failing(), "lines written to a removed file would be lost");
    fs::create_dir(&folder).unwrap();
    log.flush();
    assert_eq!(numbers(&path), [1]);
}

#[test]
fn a_log_in_a_moved_directory_keeps_getting_lines() {
    let disk = Disk::mount_private(64);
    let (folder, moved) = (disk.join("folder"), disk.join("moved"));
    fs::create_dir(&folder).unwrap();
    let path = folder.join("log");
    let mut log = LogFile::open(&path).unwrap();
    fs::rename(&folder, &moved).unwrap();
    for number in 0..2 {
        log.push(&line(number));
        log.flush();
    }
    assert_eq!(log.errors(), 1, "reported and counted once");
    assert_eq!(numbers(&moved.join("log")), [0, 1]);
    fs::create_dir(&folder).unwrap();
    log.push(&line(2));
    log.flush();
    assert_eq!(numbers(&path), [2]);
}

#[test]
fn a_symbolic_link_at_the_path_is_never_followed() {
    let disk = Disk::mount_private(64);
    let (path, link_target) = (disk.join("log"), disk.join("link_target"));
    fs::write(&link_target, "precious\n").unwrap();
    symlink(&link_target, &path).unwrap();
    let error = format!("{:#}", LogFile::open(&path).unwrap_err());
    assert!(error.contains("symbolic link") && error.contains("points to"), "{error}");
    fs::remove_file(&path).unwrap();
    let mut log = LogFile::open(&path).unwrap();
    // The link appears while the log is open.
    let moved = disk.join("moved");
    fs::rename(&path, &moved).unwrap();
    symlink(&link_target, &path).unwrap();
    log.push(&line(0));
    log.flush();
    log.reopen();
    assert_eq!(fs::read(&link_target).unwrap(), b"precious\n");
    assert_eq!(numbers(&moved), [0]);
}

#[test]
fn a_path_that_is_not_a_regular_file_is_refused() {
    let disk = Disk::mount_private(64);
    let pipe = disk.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    for path in [Path::new("/dev/null"), &pipe] {
        let error = format!("{:#}", LogFile::open(path).unwrap_err());
        assert!(error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn a_partial_line_of_an_earlier_run_gets_its_newline_first() {
    let disk = Disk::mount_private(64);
    let path = disk.join("log");
    fs::write(&path, "whole\nkilled in the mid").unwrap();
    let mut log = LogFile::open(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"whole\nkilled in the mid", "nothing to write yet");
    log.push(b"next\n");
    log.flush();
    assert_eq!(fs::read(&path).unwrap(), b"whole\nkilled in the mid\nnext\n");
    assert_eq!(log.written(), 1);
}

#[test]
fn a_file_never_grows_beyond_its_limit_and_lines_wait_for_the_rotation() {
    let disk = Disk::mount_private(1_024);
    let (path, moved) = (disk.join("log"), disk.join("log.1"));
    // A limit of five lines and a half, and a file of two from an earlier run.
    fs::write(&path, [line(0), line(1)].concat()).unwrap();
    let mut log = LogFile::open(&path).unwrap().with_limit(Some(5 * 600 + 300));
    for number in 2..10 {
        log.push(&line(number));
        log.flush();
    }
    assert_eq!(numbers(&path), (0..5).collect::<Vec<_>>(), "whole lines only");
    assert!(log.has_pending() && log.is_failing());
    assert_eq!((log.written(), log.lost()), (3, 0));
    fs::rename(&path, &moved).unwrap();
    log.reopen();
    assert_eq!((numbers(&moved), numbers(&path)), ((0..5).collect(), (5..10).collect()));
    assert!(!log.has_pending() && !log.is_failing());
    // Someone else truncates it, as copytruncate does.
    log.push(&line(10));
    log.flush();
    assert!(log.has_pending());
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    log.flush();
    assert_eq!(numbers(&path), [10]);
    assert_eq!((log.written(), log.lost()), (9, 0));
}

#[test]
fn a_line_that_fills_the_limit_exactly_is_written() {
    let disk = Disk::mount_private(64);
    let path = disk.join("log");
    let mut log = LogFile::open(&path).unwrap().with_limit(Some(2 * 600));
    log.push(&line(0));
    log.push(&line(1));
    log.flush();
    assert!(!log.has_pending());
    log.push(&line(2));
    log.flush();
    assert!(log.has_pending());
    assert_eq!(numbers(&path), [0, 1]);
}

//! One open file of the event log: how it is opened, and whether it is still the file at its path. Also the
//! hints for errors of opening it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use rustix::fs::OFlags;

#[derive(Debug)]
pub(super) struct OpenLogFile {
    pub(super) file: File,
    dev: u64,
    ino: u64,
    /// The last line has no newline, because its writer was killed or the disk was full.
    pub(super) has_partial_last_line: bool,
}

impl OpenLogFile {
    /// Opens the file for appending. Creates it if it does not exist, readable by owner and group.
    ///
    /// A symbolic link at the path is not followed, and only a regular file is accepted. Otherwise a user
    /// with write permission for the directory could choose a file of root that gets our lines, or block us
    /// with a pipe that nobody reads.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let open = |read| {
            let mut options = OpenOptions::new();
            options.read(read).append(true).create(true).mode(0o640);
            options.custom_flags(flags.bits().cast_signed()).open(path)
        };
        // With write-only permission, the last byte cannot be checked.
        let (file, can_read) = match open(true) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => (open(false)?, false),
            opened => (opened?, true),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            let kind = metadata.file_type();
            let what = if kind.is_fifo() {
                "a pipe, "
            } else if kind.is_char_device() {
                "a device, "
            } else {
                ""
            };
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("it is {what}not a regular file"),
            ));
        }
        let mut last = [b'\n'];
        if can_read && metadata.len() > 0 {
            file.read_exact_at(&mut last, metadata.len() - 1)?;
        }
        Ok(Self { file, dev: metadata.dev(), ino: metadata.ino(), has_partial_last_line: last != [b'\n'] })
    }

    /// The length of this file if it is still at the path. Costs one system call.
    pub(super) fn len_at(&self, path: &Path) -> Option<u64> {
        let found = path.symlink_metadata().ok()?;
        ((found.dev(), found.ino()) == (self.dev, self.ino)).then_some(found.len())
    }

    /// True if the file has no path any more, so that its content is lost when it is closed.
    pub(super) fn is_deleted(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
    }

    /// True if both files are on the same filesystem and therefore share its free space.
    pub(super) fn shares_filesystem(&self, other: &Self) -> bool {
        self.dev == other.dev
    }

    pub(super) fn len(&self) -> Option<u64> {
        self.file.metadata().ok().map(|metadata| metadata.len())
    }
}

/// Hint for an error of opening the log, if there is one.
pub(super) fn hint(path: &Path, error: &io::Error) -> Option<String> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    match (rustix::io::Errno::from_io_error(error)?, parent) {
        (rustix::io::Errno::NOENT, Some(parent)) if !parent.exists() => {
            Some(format!("create its directory: mkdir -p -m 750 {}", parent.display()))
        }
        // /dev/stdout and its like lead to /proc/self/fd.
        (rustix::io::Errno::LOOP, _) if path.read_link().is_ok_and(|target| target.starts_with("/proc")) => {
            Some(
                "events go to stdout without --log: give --json for JSON lines, as in the log file"
                    .to_owned(),
            )
        }
        (rustix::io::Errno::LOOP, _) if path.is_symlink() => {
            Some("it is a symbolic link, which is not followed: name the file that it points to".to_owned())
        }
        (rustix::io::Errno::ROFS, _) => Some("choose a writable directory".to_owned()),
        (rustix::io::Errno::ISDIR, _) => Some("name a file in it".to_owned()),
        _ => None,
    }
}

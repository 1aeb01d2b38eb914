//! A file of the log: how it is opened, and whether it is still the one that its path leads to.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use rustix::fs::OFlags;

/// An open file of the log.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) file: File,
    dev: u64,
    ino: u64,
    /// Its last line has no end: whoever wrote it was killed, or had no room.
    pub(super) has_torn_end: bool,
}

impl Place {
    /// Opens it for appending, or makes it, readable for its owner and group.
    ///
    /// A symbolic link at the path is not followed, and only a regular file will do: who can write to the directory
    /// must not choose which file of root's gets our lines, or hold us up with a pipe that nobody reads.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let open = |read| {
            let mut options = OpenOptions::new();
            options.read(read).append(true).create(true).mode(0o640);
            options.custom_flags(flags.bits().cast_signed()).open(path)
        };
        // Who may only write it can't see how it ends.
        let (file, can_read) = match open(true) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => (open(false)?, false),
            opened => (opened?, true),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            let kind = metadata.file_type();
            let what = if kind.is_fifo() {
                "a pipe"
            } else if kind.is_char_device() {
                "a device"
            } else {
                "no regular file"
            };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {what}, not a file")));
        }
        let mut last = [b'\n'];
        if can_read && metadata.len() > 0 {
            file.read_exact_at(&mut last, metadata.len() - 1)?;
        }
        Ok(Self { file, dev: metadata.dev(), ino: metadata.ino(), has_torn_end: last != [b'\n'] })
    }

    /// Whether the path still leads here. Costs one system call.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        path.symlink_metadata().is_ok_and(|found| (found.dev(), found.ino()) == (self.dev, self.ino))
    }

    /// Whether no path leads here any more, so that what is written is gone when it is closed.
    pub(super) fn is_deleted(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
    }

    /// Whether both are in one filesystem, and so short of the same room.
    pub(super) fn shares_filesystem(&self, other: &Self) -> bool {
        self.dev == other.dev
    }

    pub(super) fn len(&self) -> Option<u64> {
        self.file.metadata().ok().map(|metadata| metadata.len())
    }
}

/// What to do about an error of opening it, where that is known.
pub(super) fn cure(path: &Path, error: &io::Error) -> Option<String> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    match (rustix::io::Errno::from_io_error(error)?, parent) {
        (rustix::io::Errno::NOENT, Some(parent)) if !parent.exists() => {
            Some(format!("make its directory: mkdir -p -m 750 {}", parent.display()))
        }
        (rustix::io::Errno::LOOP, _) if path.is_symlink() => {
            Some("it is a symbolic link, which is not followed: name the file that it points to".to_owned())
        }
        (rustix::io::Errno::ROFS, _) => Some("choose a place that can be written".to_owned()),
        (rustix::io::Errno::ISDIR, _) => Some("name a file in it".to_owned()),
        _ => None,
    }
}

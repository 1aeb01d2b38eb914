//! Waits for a log file to change, with inotify on its directory, which also reports a new file at the same
//! path. In addition polls every second, because some filesystems, such as network filesystems, do not report
//! changes.

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
    io::Errno,
};

const POLL_INTERVAL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The inotify descriptor, if inotify is available.
#[derive(Debug)]
pub(super) struct FileWatch(Option<OwnedFd>);

impl FileWatch {
    /// Watches the directory of a file. Without inotify, only polling remains.
    pub(super) fn on(file: &Path) -> Self {
        let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let watch = || {
            let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            let mask =
                inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
            inotify::add_watch(&watch, parent, mask)?;
            Ok::<_, Errno>(watch)
        };
        Self(watch().ok())
    }

    /// Waits until the file may have changed.
    ///
    /// # Errors
    /// A broken pipe if nobody reads stdout any more.
    pub(super) fn wait(&self) -> io::Result<()> {
        let stdout = io::stdout();
        // With no requested events, poll reports only errors and hang-up.
        let mut fds = vec![PollFd::new(&stdout, PollFlags::empty())];
        fds.extend(self.0.as_ref().map(|watch| PollFd::new(watch, PollFlags::IN)));
        match poll(&mut fds, Some(&POLL_INTERVAL)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if let Some(watch) = &self.0 {
            // Discard the inotify events: the caller checks the file itself.
            let mut events = [0_u8; 4_096];
            while rustix::io::read(watch, &mut events).is_ok_and(|count| count > 0) {}
        }
        Ok(())
    }
}

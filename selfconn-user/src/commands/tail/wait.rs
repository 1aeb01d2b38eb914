//! Waits for a file to change, without asking it all the time: inotify on its directory, which also sees a new file
//! take its place. A look every second is for filesystems that don't tell, such as network ones.

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
    io::Errno,
};

const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// What wakes us.
#[derive(Debug)]
pub(super) struct Wait(Option<OwnedFd>);

impl Wait {
    /// Watches the directory of a file; where that can't be, there is still the look.
    pub(super) fn on(file: &Path) -> Self {
        let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let watch = || {
            let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            let what =
                inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
            inotify::add_watch(&watch, parent, what)?;
            Ok::<_, Errno>(watch)
        };
        Self(watch().ok())
    }

    /// Until something may have changed.
    ///
    /// # Errors
    /// A broken pipe, when nobody reads stdout any more.
    pub(super) fn wait(&self) -> io::Result<()> {
        let stdout = io::stdout();
        // Asked for nothing, it tells only of its end.
        let mut fds = vec![PollFd::new(&stdout, PollFlags::empty())];
        fds.extend(self.0.as_ref().map(|watch| PollFd::new(watch, PollFlags::IN)));
        match poll(&mut fds, Some(&LOOK)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if let Some(watch) = &self.0 {
            // What happened is seen in the file itself.
            let mut events = [0_u8; 4_096];
            while rustix::io::read(watch, &mut events).is_ok_and(|count| count > 0) {}
        }
        Ok(())
    }
}

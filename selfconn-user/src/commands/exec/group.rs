//! The control group of a command: every process that it starts is in it, whoever its parent is by then.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    process,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::system::cgroup::{self, OwnGroup, WatchedGroup};

/// The names of these groups begin with this, and end with the pid of `selfconn exec`.
const PREFIX: &str = "selfconn-exec-";

/// How long a group is waited for whose last process has just exited.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(2);

/// The control group of a command, below that of `selfconn exec`, so that its limits hold for the command. It is
/// removed at the end.
#[derive(Debug)]
pub(super) struct CommandGroup {
    directory: PathBuf,
    parent: PathBuf,
    watched: WatchedGroup,
}

impl CommandGroup {
    /// # Errors
    /// If there is no unified hierarchy here, or it can't be written.
    pub(super) fn create() -> Result<Self> {
        let OwnGroup { directory: parent, path } =
            cgroup::own_group().context("no control group can be made")?;
        remove_abandoned(&parent);
        let name = format!("{PREFIX}{}", process::id());
        let directory = parent.join(&name);
        let make = || {
            fs::create_dir(&directory)?;
            fs::metadata(&directory)
        };
        let id =
            make().with_context(|| format!("no control group can be made in {}", parent.display()))?.ino();
        let path = format!("{}/{name}", path.trim_end_matches('/')).into();
        Ok(Self { directory, parent, watched: WatchedGroup { id, path } })
    }

    pub(super) fn watched(&self) -> &WatchedGroup {
        &self.watched
    }

    /// The file that takes the pids of processes, opened for writing. A process that writes `0` is in the group.
    ///
    /// # Errors
    /// If it can't be opened.
    pub(super) fn open_members(&self) -> io::Result<fs::File> {
        fs::File::options().write(true).open(self.directory.join(MEMBERS))
    }

    /// Removes the group. What still runs in it goes back to the group above. Returns the number of these processes.
    ///
    /// # Errors
    /// If the group can't be removed.
    pub(super) fn remove(self) -> io::Result<usize> {
        let until = Instant::now() + REMOVE_TIMEOUT;
        let mut moved = 0;
        loop {
            let members = fs::read_to_string(self.directory.join(MEMBERS))?;
            for member in members.lines() {
                // It may have exited meanwhile.
                moved += usize::from(fs::write(self.parent.join(MEMBERS), member).is_ok());
            }
            match remove_tree(&self.directory) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < until => {
                    sleep(Duration::from_millis(5));
                }
                outcome => return outcome.map(|()| moved),
            }
        }
    }
}

const MEMBERS: &str = "cgroup.procs";

/// Removes a group and the groups that the command has made below it.
fn remove_tree(directory: &std::path::Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
        outcome => return outcome,
    }
    for entry in fs::read_dir(directory)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// Removes the groups of runs that were killed. One that has processes stays.
fn remove_abandoned(parent: &std::path::Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !fs::exists(format!("/proc/{pid}")).unwrap_or(true)) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

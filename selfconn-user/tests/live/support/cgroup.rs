//! A control group for one test, in the unified hierarchy.

use std::{
    fs::{self, File},
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use super::helper_process::UNPRIVILEGED;

/// A directory below the root of the unified hierarchy. Dropping it removes it and everything below; its
/// processes must have ended.
pub(crate) struct TestCgroup(PathBuf);

impl TestCgroup {
    /// Makes a directory of root's. An error: no hierarchy of cgroup v2 is mounted here, or it cannot be written.
    pub(crate) fn create(name: &str) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let point = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find_map(|fields| (fields[2] == "cgroup2").then(|| fields[1].to_owned()))
            .ok_or("cgroup v2 is not mounted")?;
        let directory =
            Path::new(&point).join(format!("selfconn-test-{}.slice", std::process::id())).join(name);
        fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        Ok(Self(directory))
    }

    /// Gives the directory to the unprivileged user, as systemd does with a `Delegate=yes` unit.
    pub(crate) fn delegate(&self) {
        self.delegate_to(UNPRIVILEGED);
    }

    pub(crate) fn delegate_to(&self, uid: u32) {
        delegate(&self.0, uid);
    }

    /// Makes a directory below, and gives it to that user.
    pub(crate) fn delegate_below(&self, name: &str) {
        let below = self.0.join(name);
        fs::create_dir_all(&below).unwrap();
        delegate(&below, UNPRIVILEGED);
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// `cgroup.procs` for writing: a process that writes 0 to it moves into the group.
    pub(crate) fn procs(&self) -> File {
        File::options().write(true).open(self.0.join("cgroup.procs")).unwrap()
    }
}

fn delegate(directory: &Path, uid: u32) {
    for path in ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
        chown(directory.join(path), Some(uid), Some(uid)).unwrap();
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        fn remove(directory: &Path) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    remove(&entry.path());
                }
            }
            let _ = fs::remove_dir(directory);
        }
        remove(&self.0);
        // The groups above are removed if no other test has one there.
        let above = self.0.ancestors().skip(1);
        let _ = above.take_while(|directory| fs::remove_dir(directory).is_ok()).count();
    }
}

//! A small file system for one test.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};

/// A tmpfs that only the calling thread and its child processes can see.
#[derive(Debug)]
pub(crate) struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    /// Mounts a tmpfs of this many KiB. The calling thread gets a mount namespace of its own.
    pub(crate) fn mount_private(kib: u32) -> Self {
        // SAFETY: only the flag FILES could take descriptors away from other threads, and it is not set.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.expect("a namespace: run as root");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let this = Self { folder };
        this.mount_over(kib);
        this
    }

    /// Mounts another tmpfs at the same path. The one below can no longer be reached by its path.
    pub(crate) fn mount_over(&self, kib: u32) {
        let size = std::ffi::CString::new(format!("size={kib}k,mode=755")).unwrap();
        mount("tmpfs", self.path(), "tmpfs", MountFlags::empty(), size.as_c_str()).unwrap();
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Fills the disk except for this many pages. Returns the file that takes the space; remove it to make
    /// room.
    pub(crate) fn fill_except(&self, pages: usize) -> PathBuf {
        let filler = self.join("filler");
        let mut file = fs::File::create(&filler).unwrap();
        // Writes until the disk is full.
        while file.write_all(&[0; 1 << 16]).is_ok() {}
        let taken = file.metadata().unwrap().len();
        file.set_len(taken.saturating_sub(pages as u64 * 4_096)).unwrap();
        filler
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The folder can be removed only when nothing is mounted on it.
        while unmount(self.path(), UnmountFlags::DETACH).is_ok() {}
    }
}

//! A directory tree in the making, as it will be on the disk of whoever unpacks it.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::tool;
use crate::environment::plain;

/// A tree. Modes are set whatever the umask.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) root: PathBuf,
}

impl Tree {
    /// An empty one in place of whatever was there.
    pub(super) fn empty(root: &Path) -> Result<Self> {
        match fs::remove_dir_all(root) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", root.display()));
            }
            _ => {}
        }
        let this = Self { root: root.to_owned() };
        this.directory(root)?;
        Ok(this)
    }

    /// A file with this content. The path is relative to the root.
    pub(super) fn write(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let path = self.root.join(path);
        let parent = path.parent().context("a file has a directory")?;
        self.directory(parent)?;
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("write {}", path.display()))
    }

    /// A copy of this file.
    pub(super) fn copy(&self, path: &str, mode: u32, source: &Path) -> Result<()> {
        let content = fs::read(source).with_context(|| format!("read {}", source.display()))?;
        self.write(path, mode, &content)
    }

    /// This content, compressed as Debian's policy wants it.
    pub(super) fn write_gz(&self, path: &str, content: &[u8]) -> Result<()> {
        let mut gzip = plain("gzip");
        gzip.args(["-9n"]);
        self.write(path, 0o644, &tool::filter(gzip, content)?)
    }

    /// All files, relative to the root, sorted.
    pub(super) fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        let mut directories = vec![self.root.clone()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    directories.push(entry.path());
                } else if let Ok(path) = entry.path().strip_prefix(&self.root) {
                    files.push(path.to_owned());
                }
            }
        }
        files.sort();
        Ok(files)
    }

    fn directory(&self, path: &Path) -> Result<()> {
        fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
        for directory in path.ancestors().take_while(|directory| directory.starts_with(&self.root)) {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
                .with_context(|| format!("set the mode of {}", directory.display()))?;
        }
        Ok(())
    }
}

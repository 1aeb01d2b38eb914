//! A directory tree that becomes a package or an archive.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{environment::plain, run};

/// A tree. It sets all modes itself, so that the umask does not matter.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) root: PathBuf,
}

impl Tree {
    /// An empty tree. Everything that was there is removed.
    pub(crate) fn empty(root: &Path) -> Result<Self> {
        match fs::remove_dir_all(root) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", root.display()));
            }
            _ => {}
        }
        let tree = Self { root: root.to_owned() };
        tree.create_directory(root)?;
        Ok(tree)
    }

    /// Writes a file. The path is relative to the root.
    pub(crate) fn write(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let path = self.root.join(path);
        self.create_directory(path.parent().context("a file has a directory")?)?;
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("write {}", path.display()))
    }

    /// Copies a file to this path.
    pub(crate) fn copy(&self, path: &str, mode: u32, source: &Path) -> Result<()> {
        let content = fs::read(source).with_context(|| format!("read {}", source.display()))?;
        self.write(path, mode, &content)
    }

    /// Writes a file compressed, as Debian's policy requires.
    pub(super) fn write_gz(&self, path: &str, content: &[u8]) -> Result<()> {
        self.write(path, 0o644, &run::filter(plain("gzip").arg("-9n"), content)?)
    }

    fn create_directory(&self, path: &Path) -> Result<()> {
        fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
        for directory in path.ancestors().take_while(|directory| directory.starts_with(&self.root)) {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
                .with_context(|| format!("set the mode of {}", directory.display()))?;
        }
        Ok(())
    }
}

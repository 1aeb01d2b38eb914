//! Where the sources and the target directory are, and how files in them are written.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{environment, run};

/// The clone that we work in.
pub(crate) struct Workspace {
    /// The directory of the workspace's Cargo.toml.
    pub(crate) root: PathBuf,
    /// Cargo's target directory, wherever the user has it.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn find() -> Result<Self> {
        let manifest_dir =
            env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let mut cargo = environment::cargo();
        cargo.args(["metadata", "--no-deps", "--format-version", "1"]).current_dir(&manifest_dir);
        let metadata: serde_json::Value =
            serde_json::from_str(&run::output(&mut cargo)?).context("parse the output of cargo metadata")?;
        let path = |key: &str| {
            let path = metadata[key].as_str().map(PathBuf::from);
            path.with_context(|| format!("cargo metadata has no {key}: its format has changed"))
        };
        Ok(Self { root: path("workspace_root")?, target: path("target_directory")? })
    }

    /// An eBPF object. The build script of selfconn-user looks for `bpf/` above its own output directory.
    pub(crate) fn object(&self, name: &str) -> PathBuf {
        self.target.join("bpf").join(name)
    }

    /// The release build of the daemon.
    pub(crate) fn daemon(&self) -> PathBuf {
        self.target.join("release/selfconn")
    }
}

/// A path as a user would type it in this directory.
pub(crate) fn here(path: &Path) -> String {
    let short = env::current_dir().ok().and_then(|dir| path.strip_prefix(dir).ok().map(Path::to_owned));
    short.as_deref().unwrap_or(path).display().to_string()
}

/// Writes a file atomically, and only if its content changes, so that cargo does not rebuild what depends on
/// it.
pub(crate) fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let dir = path.parent().context("a file has a directory")?;
    let write = || {
        fs::create_dir_all(dir)?;
        let new = path.with_extension(format!("new-{}", std::process::id()));
        fs::write(&new, content)?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Replaces the text between the markers `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a document.
pub(crate) fn rewrite_section(file: &Path, name: &str, write: impl FnOnce(&str) -> String) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let new = with_section(&text, name, write)
        .with_context(|| format!("{}: no markers {name}:begin and {name}:end", file.display()))?;
    write_if_changed(file, new.as_bytes())
}

fn with_section(text: &str, name: &str, write: impl FnOnce(&str) -> String) -> Option<String> {
    let (begin, end) = (format!("<!-- {name}:begin -->\n"), format!("<!-- {name}:end -->"));
    let (before, rest) = text.split_once(&begin)?;
    let (old, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}{}{end}{after}", write(old)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_section_is_rewritten() {
        let text = "before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n";
        let new = with_section(text, "a", |old| format!("{old}new\n")).unwrap();
        assert_eq!(new, "before\n<!-- a:begin -->\nold\nnew\n<!-- a:end -->\nafter\n");
        assert_eq!(with_section(&new, "a", |_| "old\n".to_owned()).unwrap(), text);
        assert_eq!(with_section(text, "b", str::to_owned), None);
    }
}

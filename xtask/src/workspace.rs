//! Where things are: the sources, the target directory, and what we put there for others to find.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::environment;

/// The clone we work in.
pub(crate) struct Workspace {
    /// Of the workspace's Cargo.toml.
    pub(crate) root: PathBuf,
    /// Cargo's target directory, wherever it was told to put it.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn find() -> Result<Self> {
        let manifest_dir =
            env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let output = environment::cargo()
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .current_dir(&manifest_dir)
            .output()
            .context("run cargo metadata: is cargo in PATH?")?;
        if !output.status.success() {
            bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let metadata: serde_json::Value =
            serde_json::from_slice(&output.stdout).context("read what cargo metadata says")?;
        let path = |key: &str| {
            let path = metadata[key].as_str().map(PathBuf::from);
            path.with_context(|| format!("cargo metadata says no {key}: its format has changed"))
        };
        Ok(Self { root: path("workspace_root")?, target: path("target_directory")? })
    }

    /// An eBPF object. The build script of user space looks for `bpf/` above its own output.
    pub(crate) fn object(&self, name: &str) -> PathBuf {
        self.target.join("bpf").join(name)
    }

    /// The daemon as it is released.
    pub(crate) fn daemon(&self) -> PathBuf {
        self.target.join("release/selfconn")
    }
}

/// A path as a person would type it here.
pub(crate) fn here(path: &Path) -> String {
    let short = env::current_dir().ok().and_then(|dir| path.strip_prefix(dir).ok().map(Path::to_owned));
    short.as_deref().unwrap_or(path).display().to_string()
}

/// Writes a file at once or not at all, and not when it is there already: what is built from it stays fresh.
pub(crate) fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|there| there == content) {
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

/// Puts what `write` makes of it in the place of what a document has between two marks of this name.
pub(crate) fn rewrite_section(file: &Path, name: &str, write: impl FnOnce(&str) -> String) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let new = with_section(&text, name, write)
        .with_context(|| format!("{}: no marks {name}:begin and {name}:end", file.display()))?;
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
    fn a_section_is_rewritten_and_nothing_else() {
        let text = "before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n";
        let new = with_section(text, "a", |old| format!("{old}new\n")).unwrap();
        assert_eq!(new, "before\n<!-- a:begin -->\nold\nnew\n<!-- a:end -->\nafter\n");
        assert_eq!(with_section(&new, "a", |_| "old\n".to_owned()).unwrap(), text);
        assert_eq!(with_section(text, "b", str::to_owned), None);
    }
}

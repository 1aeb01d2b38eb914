//! Tells whether an eBPF object was made from the sources at hand. Shared with selfconn-user's build script, which
//! includes this file, so it may use nothing else of xtask.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// What the object is made from, below the workspace's root. The root's Cargo.toml has the profile and the versions
/// asked for. Cargo.lock is left out: it changes with every dependency of user space, and `build-ebpf` leaves it to
/// cargo to notice the few lines that matter here.
pub(crate) const SOURCES: [&str; 3] = ["Cargo.toml", "selfconn-ebpf/Cargo.toml", "selfconn-ebpf/src"];

/// A fingerprint of all [`SOURCES`]: names and contents.
pub(crate) fn of_sources(root: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(root, Path::new(source), &mut files)?;
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let content = fs::read(root.join(&file)).map_err(|error| with_path(&error, &file))?;
        // Lengths keep a name and a content from running into each other.
        for part in [file.as_os_str().as_encoded_bytes(), &content] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
    }
    Ok(hex(&hash.finalize()))
}

/// SHA-256, as `sha256sum` prints it.
pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn collect(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    let path = root.join(below);
    if !path.is_dir() {
        files.push(below.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(&path).map_err(|error| with_path(&error, below))? {
        collect(root, &below.join(entry?.file_name()), files)?;
    }
    Ok(())
}

fn with_path(error: &io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("read {}: {error}", path.display()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What happens to a source, and whether the object is stale after it.
    #[test]
    fn any_source_counts_by_name_and_content() {
        let root = std::env::temp_dir().join(format!("selfconn-fingerprint-{}", std::process::id()));
        let write = |name: &str, content: &str| {
            let path = root.join(name);
            fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
            fs::write(path, content).expect("a file");
        };
        for source in ["Cargo.toml", "selfconn-ebpf/Cargo.toml", "selfconn-ebpf/src/main.rs"] {
            write(source, "one");
        }
        let fingerprint = || of_sources(&root).expect("a fingerprint");
        let before = fingerprint();

        write("selfconn-user/src/main.rs", "user space");
        assert_eq!(fingerprint(), before);
        write("selfconn-ebpf/src/main.rs", "two");
        assert_ne!(fingerprint(), before, "another content");
        write("selfconn-ebpf/src/main.rs", "one");
        assert_eq!(fingerprint(), before, "as it was");
        write("selfconn-ebpf/src/deep/new.rs", "");
        assert_ne!(fingerprint(), before, "a new file");
        fs::remove_dir_all(&root).expect("removed");
        let error = of_sources(&root).expect_err("no sources");
        assert!(error.to_string().starts_with("read Cargo.toml: "), "{error}");
    }

    #[test]
    fn hashes_are_as_sha256sum_prints_them() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(of_bytes(b""), empty);
    }
}

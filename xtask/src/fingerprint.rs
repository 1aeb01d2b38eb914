//! A hash of the eBPF sources, to see whether an object was built from them. selfconn-user's build script
//! includes this file, so it may use nothing else of xtask.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// The object's sources, relative to the workspace's root. The root's Cargo.toml has the profile and the
/// requested versions. Cargo.lock is left out, because it changes with every dependency of user space;
/// `build-ebpf` runs cargo, which notices the few lines that matter here.
pub(crate) const SOURCES: [&str; 3] = ["Cargo.toml", "selfconn-ebpf/Cargo.toml", "selfconn-ebpf/src"];

/// A hash of the names and contents of all [`SOURCES`].
pub(crate) fn of_sources(root: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(root, Path::new(source), &mut files)?;
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let content = fs::read(root.join(&file)).map_err(|error| with_path(&error, &file))?;
        // The lengths separate names from contents.
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

/// Adds the files below a path, all relative to the root.
pub(crate) fn collect(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
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

    #[test]
    fn the_fingerprint_depends_on_names_and_contents_of_the_sources() {
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
    fn hashes_have_the_format_of_sha256sum() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(of_bytes(b""), empty);
    }
}

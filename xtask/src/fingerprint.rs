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

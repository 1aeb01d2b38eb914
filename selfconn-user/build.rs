//! Embeds the eBPF objects, and sets the commit and the object hash that the binary prints.
//!
//! `cargo xtask build-ebpf` builds the objects, because they need another compiler. This script only finds
//! them, and fails if they were not built from the current sources.

#[path = "../xtask/src/fingerprint.rs"]
mod fingerprint;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    if let Err(error) = embed() {
        // This line makes cargo fail, and cargo shows only this line. After a non-zero exit code cargo would
        // show the whole output.
        println!("cargo::error={error}");
    }
}

fn embed() -> Result<(), String> {
    let directory =
        |key| env::var_os(key).map(PathBuf::from).ok_or_else(|| format!("cargo did not set {key}"));
    let (out_dir, package) = (directory("OUT_DIR")?, directory("CARGO_MANIFEST_DIR")?);
    let root = package.parent().ok_or("the package is not in a workspace")?;
    for source in fingerprint::SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    println!("cargo::rerun-if-changed={}", root.join("xtask/src/fingerprint.rs").display());

    const BUILD: &str = "run `cargo xtask build-ebpf`";
    // The objects are in a directory above OUT_DIR, whatever the names of the target directory, target and
    // profile are.
    let objects = out_dir.ancestors().map(|dir| dir.join("bpf")).find(|dir| dir.join("source").exists());
    let objects = objects.ok_or_else(|| format!("the eBPF object is missing: {BUILD}"))?;
    let fingerprint_file = objects.join("source");
    println!("cargo::rerun-if-changed={}", fingerprint_file.display());
    let object_fingerprint = fs::read_to_string(fingerprint_file).unwrap_or_default();
    let source_fingerprint = fingerprint::of_sources(root).map_err(|error| error.to_string())?;
    if object_fingerprint.trim() != source_fingerprint {
        return Err(format!("the eBPF object is older than its sources: {BUILD}"));
    }

    let embed = |name: &str| -> Result<Vec<u8>, String> {
        let (object, embedded) = (objects.join(name), out_dir.join(name));
        println!("cargo::rerun-if-changed={}", object.display());
        let bytes = fs::read(&object).map_err(|error| format!("read {}: {error}", object.display()))?;
        fs::write(&embedded, &bytes).map_err(|error| format!("write {}: {error}", embedded.display()))?;
        Ok(bytes)
    };
    // Programs for tests and benchmarks.
    embed("selfconn-test-programs")?;
    let bytes = embed("selfconn-hooks")?;
    println!("cargo::rustc-env=SELFCONN_OBJECT={}", &fingerprint::of_bytes(&bytes)[..12]);
    println!("cargo::rustc-env=SELFCONN_COMMIT={}", commit(root)?);
    Ok(())
}

/// The commit of the sources: from git, else from the `.commit` file of a git archive, else `unknown`.
fn commit(root: &Path) -> Result<String, String> {
    let commit_file = root.join(".commit");
    println!("cargo::rerun-if-changed={}", commit_file.display());
    if let Some(commit) = git_commit(root) {
        return Ok(commit);
    }
    let text = fs::read_to_string(&commit_file)
        .map_err(|error| format!("read {}: {error}", commit_file.display()))?;
    let commit = text.split(' ').next().unwrap_or_default();
    // Outside of an archive the file has only a placeholder: see .gitattributes.
    let is_commit = commit.len() >= COMMIT_DIGITS && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    Ok(if is_commit { commit[..COMMIT_DIGITS].to_owned() } else { "unknown".to_owned() })
}

/// Number of digits of the commit that the binary prints.
const COMMIT_DIGITS: usize = 12;

/// The commit that is checked out. `None`: no git repository, or the sources are unpacked inside another
/// repository.
fn git_commit(root: &Path) -> Option<String> {
    let git = |arguments: &[&str]| -> Option<String> {
        let output = Command::new("git").args(arguments).current_dir(root).output().ok()?;
        let stdout = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| stdout.trim().to_owned())
    };
    let is_root = |path: &str| -> io::Result<bool> { Ok(fs::canonicalize(path)? == fs::canonicalize(root)?) };
    if !is_root(&git(&["rev-parse", "--show-toplevel"])?).ok()? {
        return None;
    }
    // HEAD changes with the branch. The log of HEAD changes with each commit.
    for file in ["HEAD", "logs/HEAD"] {
        let path = root.join(git(&["rev-parse", "--git-path", file])?);
        if path.exists() {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    git(&["rev-parse", "HEAD"])?.get(..COMMIT_DIGITS).map(str::to_owned)
}

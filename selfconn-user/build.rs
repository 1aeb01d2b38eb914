//! Embeds the eBPF object, and says which commit and which object a binary has.
//!
//! The object is made by `cargo xtask build-ebpf`, for that needs another compiler than this one; here it is only
//! found, and refused when it was not made from the sources at hand.

#[path = "../xtask/src/fingerprint.rs"]
mod fingerprint;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    if let Err(error) = embed() {
        // cargo fails for this line, and shows it alone; for an exit code it would show all that was printed.
        println!("cargo::error={error}");
    }
}

fn embed() -> Result<(), String> {
    let directory =
        |key| env::var_os(key).map(PathBuf::from).ok_or_else(|| format!("cargo did not set {key}"));
    let (out_dir, package) = (directory("OUT_DIR")?, directory("CARGO_MANIFEST_DIR")?);
    let root = package.parent().ok_or("the package is in no workspace")?;
    for source in fingerprint::SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    println!("cargo::rerun-if-changed={}", root.join("xtask/src/fingerprint.rs").display());

    const BUILD: &str = "run `cargo xtask build-ebpf`";
    // Whatever the target directory, the target and the profile are called, the object is above our output.
    let objects = out_dir.ancestors().map(|dir| dir.join("bpf")).find(|dir| dir.join("source").exists());
    let objects = objects.ok_or_else(|| format!("there is no eBPF object yet: {BUILD}"))?;
    let made_from = objects.join("source");
    println!("cargo::rerun-if-changed={}", made_from.display());
    let made_from = fs::read_to_string(made_from).unwrap_or_default();
    let sources = fingerprint::of_sources(root).map_err(|error| error.to_string())?;
    if made_from.trim() != sources {
        return Err(format!("the eBPF object is older than its sources: {BUILD}"));
    }

    let embed = |name: &str| -> Result<Vec<u8>, String> {
        let (object, embedded) = (objects.join(name), out_dir.join(name));
        println!("cargo::rerun-if-changed={}", object.display());
        let bytes = fs::read(&object).map_err(|error| format!("read {}: {error}", object.display()))?;
        fs::write(&embedded, &bytes).map_err(|error| format!("write {}: {error}", embedded.display()))?;
        Ok(bytes)
    };
    // For tests and measurements.
    embed("selfconn-others")?;
    let bytes = embed("selfconn-hooks")?;
    println!("cargo::rustc-env=SELFCONN_OBJECT={}", &fingerprint::of_bytes(&bytes)[..12]);
    println!("cargo::rustc-env=SELFCONN_COMMIT={}", commit(root)?);
    Ok(())
}

/// The commit of the sources: by git, else as noted in an archive that git made, else unknown.
fn commit(root: &Path) -> Result<String, String> {
    let noted = root.join(".commit");
    println!("cargo::rerun-if-changed={}", noted.display());
    if let Some(commit) = checked_out(root) {
        return Ok(commit);
    }
    let text = fs::read_to_string(&noted).map_err(|error| format!("read {}: {error}", noted.display()))?;
    let commit = text.split(' ').next().unwrap_or_default();
    // Outside of an archive it is the placeholder: .gitattributes.
    let is_commit = commit.len() >= SHORT && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    Ok(if is_commit { commit[..SHORT].to_owned() } else { "unknown".to_owned() })
}

/// As many digits of a commit as we show.
const SHORT: usize = 12;

/// The commit that is checked out. None outside of git, also when the sources lie unpacked in another repository.
fn checked_out(root: &Path) -> Option<String> {
    let git = |arguments: &[&str]| -> Option<String> {
        let output = Command::new("git").args(arguments).current_dir(root).output().ok()?;
        let said = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| said.trim().to_owned())
    };
    let same = |path: &str| -> io::Result<bool> { Ok(fs::canonicalize(path)? == fs::canonicalize(root)?) };
    if !same(&git(&["rev-parse", "--show-toplevel"])?).ok()? {
        return None;
    }
    // HEAD changes with the branch, its log with each commit.
    for file in ["HEAD", "logs/HEAD"] {
        let path = root.join(git(&["rev-parse", "--git-path", file])?);
        if path.exists() {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    git(&["rev-parse", "HEAD"])?.get(..SHORT).map(str::to_owned)
}

//! Parses the output of rustc, rustup and apt. Pure: `probe.rs` runs these programs.

use std::{fmt, str::FromStr};

/// A version of Rust on any channel: `1.97` of `1.97.0-nightly`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RustVersion(pub(crate) u32, pub(crate) u32);

impl fmt::Display for RustVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl FromStr for RustVersion {
    type Err = ();

    /// Takes the first two numbers of `1.97.0-nightly` or of Debian's `1.96.0+dfsg1-1`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut numbers = text.split(|letter: char| !letter.is_ascii_digit()).map(|part| part.parse().ok());
        match (numbers.next().flatten(), numbers.next().flatten()) {
            (Some(major), Some(minor)) => Ok(Self(major, minor)),
            _ => Err(()),
        }
    }
}

/// The version and the LLVM in the output of `rustc -vV`.
pub(super) fn rustc(output: &str) -> Option<(RustVersion, u32)> {
    let field = |name| output.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    Some((field("release:")?.parse().ok()?, leading_number(field("LLVM version:")?)?))
}

/// The names and directories in the output of `rustup toolchain list -v`. A directory may have several names;
/// the first one is used.
pub(super) fn rustup_toolchains(output: &str) -> Vec<(&str, &str)> {
    let mut toolchains: Vec<(&str, &str)> = Vec::new();
    for line in output.lines() {
        // `stable-x86_64-unknown-linux-gnu (active, default) /home/me/.rustup/toolchains/stable-…`
        let (Some(name), Some(start)) =
            (line.split_whitespace().next(), line.find(" /").or(line.find("\t/")))
        else {
            continue;
        };
        let path = line[start..].trim();
        if toolchains.iter().all(|(_, known)| *known != path) {
            toolchains.push((name, path));
        }
    }
    toolchains
}

/// The packages that can be installed, and their versions, in the output of `apt-cache policy NAME…`.
pub(super) fn apt_candidates(output: &str) -> Vec<(&str, &str)> {
    let mut name = None;
    let mut candidates = Vec::new();
    for line in output.lines() {
        if let Some(package) = line.strip_suffix(':').filter(|line| !line.starts_with(' ')) {
            name = Some(package);
        } else if let (Some(name), Some(version)) = (name, line.trim().strip_prefix("Candidate:")) {
            candidates.push((name, version.trim()));
        }
    }
    candidates.retain(|(_, version)| *version != "(none)");
    candidates
}

/// The LLVMs with development files in the output of `apt-cache pkgnames llvm-`.
pub(super) fn llvm_dev_packages(output: &str) -> Vec<u32> {
    let number = |line: &str| line.trim().strip_prefix("llvm-")?.strip_suffix("-dev")?.parse().ok();
    output.lines().filter_map(number).collect()
}

/// The LLVM of a packaged compiler in the output of `apt-cache depends --recurse rustc…`.
pub(super) fn llvm_library(output: &str) -> Option<u32> {
    output.lines().find_map(|line| leading_number(line.trim().strip_prefix("libllvm")?))
}

fn leading_number(text: &str) -> Option<u32> {
    text.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rustc_prints_its_version_and_llvm() {
        let nightly = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                       release: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        assert_eq!(rustc(nightly), Some((RustVersion(1, 97), 22)));
        assert_eq!(rustc("release: 1.63.0\nLLVM version: 14.0\n"), Some((RustVersion(1, 63), 14)));
        assert_eq!(rustc("release: 1.96.0\n"), None, "a compiler with another backend");
        assert_eq!(rustc(""), None);
    }

    #[test]
    fn versions_compare_by_number() {
        let parse = |text: &str| text.parse::<RustVersion>();
        assert_eq!(parse("1.96.0+dfsg1-1~deb12u2"), Ok(RustVersion(1, 96)));
        assert_eq!(parse("1.93"), Ok(RustVersion(1, 93)));
        assert_eq!(parse("nightly"), Err(()));
        assert!(RustVersion(1, 100) > RustVersion(1, 93));
    }

    #[test]
    fn each_directory_of_rustup_is_listed_once() {
        let output = "stable-x86_64-unknown-linux-gnu (active, default) /r/toolchains/stable-x86_64-unknown-linux-gnu\n\
                      nightly-x86_64-unknown-linux-gnu /r/toolchains/nightly-x86_64-unknown-linux-gnu\n\
                      1.95.0-x86_64-unknown-linux-gnu\t/r/toolchains/stable-x86_64-unknown-linux-gnu\n";
        assert_eq!(
            rustup_toolchains(output),
            [
                ("stable-x86_64-unknown-linux-gnu", "/r/toolchains/stable-x86_64-unknown-linux-gnu"),
                ("nightly-x86_64-unknown-linux-gnu", "/r/toolchains/nightly-x86_64-unknown-linux-gnu"),
            ]
        );
        assert!(rustup_toolchains("no installed toolchains\n").is_empty());
    }

    #[test]
    fn apt_lists_what_it_can_install() {
        let output = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n     \
                      1.96.0+dfsg1-1~deb12u2 500\n        500 file:/x bookworm-security/main amd64 Packages\n\
                      rustc:\n  Installed: (none)\n  Candidate: (none)\n  Version table:\n";
        assert_eq!(apt_candidates(output), [("rustc-web", "1.96.0+dfsg1-1~deb12u2")]);
        assert!(apt_candidates("").is_empty());
        assert_eq!(llvm_dev_packages("llvm-22-dev\nllvm-14-dev\nllvm-22\nllvm-dev\nllvm-22-doc\n"), [22, 14]);
        assert_eq!(llvm_library("rustc-web\n  Depends: libc6\nlibllvm22\n  Depends: libc6\n"), Some(22));
        assert_eq!(llvm_library("rustc-web\n  Depends: libc6\n"), None);
    }
}

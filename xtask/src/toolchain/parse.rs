//! What other programs say about themselves, read. Pure: the asking is in `probe.rs`.

use std::{fmt, str::FromStr};

/// A Rust release: `1.97.0`, whichever channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Release(pub(crate) u32, pub(crate) u32);

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl FromStr for Release {
    type Err = ();

    /// Takes `1.97.0-nightly` and Debian's `1.96.0+dfsg1-1` alike: what counts are the first two numbers.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut numbers = text.split(|letter: char| !letter.is_ascii_digit()).map(|part| part.parse().ok());
        match (numbers.next().flatten(), numbers.next().flatten()) {
            (Some(major), Some(minor)) => Ok(Self(major, minor)),
            _ => Err(()),
        }
    }
}

/// `rustc -vV`: the release, and the LLVM that writes the bitcode bpf-linker has to read.
pub(super) fn rustc(output: &str) -> Option<(Release, u32)> {
    let field = |name| output.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    Some((field("release:")?.parse().ok()?, leading_number(field("LLVM version:")?)?))
}

/// `rustup toolchain list -v`: names and directories. A directory may have several names; the first counts.
pub(super) fn rustup_toolchains(output: &str) -> Vec<(&str, &str)> {
    let mut toolchains: Vec<(&str, &str)> = Vec::new();
    for line in output.lines() {
        // `stable-x86_64-unknown-linux-gnu (active, default) /home/me/.rustup/toolchains/stable-…`
        let Some((name, rest)) = line.trim().split_once(char::is_whitespace) else { continue };
        let Some(path) = rest.find('/').map(|start| rest[start..].trim()) else { continue };
        if toolchains.iter().all(|(_, known)| *known != path) {
            toolchains.push((name, path));
        }
    }
    toolchains
}

/// `ldd bpf-linker`: the LLVM it is linked with. None when it carries LLVM inside, or loads it later.
pub(super) fn linked_llvm(output: &str) -> Option<u32> {
    // `libLLVM.so.22.1 => /usr/lib/…`, `libLLVM-19.so.1 => …`
    let rest = output.lines().find_map(|line| line.trim().strip_prefix("libLLVM"))?;
    leading_number(rest.trim_start_matches(".so.").trim_start_matches('-'))
}

/// `cargo info bpf-linker`: its version, and the LLVMs it can be built for.
pub(super) fn linker_crate(output: &str) -> Option<(String, Vec<u32>)> {
    let version = output.lines().find_map(|line| line.strip_prefix("version:"))?.split_whitespace().next()?;
    let features = output.lines().skip_while(|line| !line.starts_with("features:"));
    let mut llvms: Vec<u32> = features
        .filter_map(|line| {
            line.split('=').next()?.trim().trim_start_matches('+').strip_prefix("llvm-")?.parse().ok()
        })
        .collect();
    llvms.sort_unstable();
    Some((version.to_owned(), llvms))
}

/// `apt-cache policy NAME…`: what can be installed, and its version.
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

/// `apt-cache pkgnames llvm-`: the LLVMs with development files.
pub(super) fn llvm_dev_packages(output: &str) -> Vec<u32> {
    let number = |line: &str| line.trim().strip_prefix("llvm-")?.strip_suffix("-dev")?.parse().ok();
    let mut llvms: Vec<u32> = output.lines().filter_map(number).collect();
    llvms.sort_unstable();
    llvms
}

/// `apt-cache depends --recurse rustc…`: the LLVM that this compiler uses.
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
    fn rustc_tells_its_release_and_llvm() {
        let nightly = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                       release: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        assert_eq!(rustc(nightly), Some((Release(1, 97), 22)));
        assert_eq!(rustc("release: 1.63.0\nLLVM version: 14.0\n"), Some((Release(1, 63), 14)));
        assert_eq!(rustc("release: 1.96.0\n"), None, "a compiler with another backend");
        assert_eq!(rustc(""), None);
    }

    #[test]
    fn releases_compare_by_number() {
        let parse = |text: &str| text.parse::<Release>();
        assert_eq!(parse("1.96.0+dfsg1-1~deb12u2"), Ok(Release(1, 96)));
        assert_eq!(parse("1.93"), Ok(Release(1, 93)));
        assert_eq!(parse("nightly"), Err(()));
        assert!(Release(1, 100) > Release(1, 93));
    }

    #[test]
    fn rustup_lists_a_directory_once() {
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
    fn a_linker_is_as_new_as_the_llvm_it_loads() {
        for (output, llvm) in [
            ("\tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x0)\n\tlibc.so.6 => …\n", Some(22)),
            ("\tlibLLVM-19.so.1 => /usr/lib/x86_64-linux-gnu/libLLVM-19.so.1 (0x0)\n", Some(19)),
            ("\tlibLLVM.so.23.0-rust-1.99.0-nightly => not found\n", Some(23)),
            ("\tlibLLVM-21-rust-1.91.0-stable.so => not found\n", Some(21)),
            ("\tstatically linked\n", None),
            ("\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x0)\n", None),
        ] {
            assert_eq!(linked_llvm(output), llvm, "{output}");
        }
    }

    #[test]
    fn the_linkers_features_name_its_llvms() {
        let output = "bpf-linker #BPF #eBPF\nBPF static linker\nversion: 0.13.0\nlicense: MIT\nfeatures:\n \
                      +default          = [llvm-23]\n  llvm-23          = [dep:llvm-sys-23]\n  llvm-21          = \
                      [dep:llvm-sys-21]\n  llvm-link-static = []\n  no-llvm-linking  = []\n";
        assert_eq!(linker_crate(output), Some(("0.13.0".to_owned(), vec![21, 23])));
        assert_eq!(linker_crate("version: 0.13.0 (latest 0.14.0)\n"), Some(("0.13.0".to_owned(), vec![])));
        assert_eq!(linker_crate("error: could not find `bpf-linker`\n"), None);
    }

    #[test]
    fn apt_tells_what_it_can_install() {
        let output = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n     \
                      1.96.0+dfsg1-1~deb12u2 500\n        500 file:/x bookworm-security/main amd64 Packages\n\
                      rustc:\n  Installed: (none)\n  Candidate: (none)\n  Version table:\n";
        assert_eq!(apt_candidates(output), [("rustc-web", "1.96.0+dfsg1-1~deb12u2")]);
        assert!(apt_candidates("").is_empty());
        assert_eq!(llvm_dev_packages("llvm-22-dev\nllvm-14-dev\nllvm-22\nllvm-dev\nllvm-22-doc\n"), [14, 22]);
        assert_eq!(llvm_library("rustc-web\n  Depends: libc6\nlibllvm22\n  Depends: libc6\n"), Some(22));
        assert_eq!(llvm_library("rustc-web\n  Depends: libc6\n"), None);
    }
}

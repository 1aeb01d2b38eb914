//! The fingerprint of the key that signs a release. A user takes it from `SECURITY.md` of the repository, because
//! whoever can replace the downloads can replace a key beside them.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{run::say, workspace::Workspace};

/// Says so if there is no fingerprint yet.
pub(super) fn check(workspace: &Workspace) -> Result<()> {
    let text = fs::read_to_string(workspace.root.join("SECURITY.md")).context("read SECURITY.md")?;
    if !has_fingerprint(&text) {
        say(
            "SECURITY.md has no fingerprint of a signing key, so nobody can verify these files: do not publish them \
             (CONTRIBUTING.md, A release)",
        );
    }
    Ok(())
}

/// True if a line has 40 hexadecimal digits as `gpg --fingerprint` prints them, with or without spaces.
fn has_fingerprint(text: &str) -> bool {
    const DIGITS: usize = 40;
    let is_digit = |letter: char| matches!(letter, '0'..='9' | 'A'..='F');
    text.lines().any(|line| {
        let line: String = line.split_whitespace().collect();
        line.split(|letter| !is_digit(letter)).any(|digits| digits.len() == DIGITS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_found_as_gpg_prints_it() {
        for (text, is_one) in [
            ("key: `BD6A 2C5C 0F9B 1D21 8E4A  7F3C 9E55 0A17 43D2 66B8`", true),
            ("\n      BD6A2C5C0F9B1D218E4A7F3C9E550A1743D266B8\n", true),
            ("the key BD6A 2C5C 0F9B 1D21 8E4A  7F3C 9E55 0A17 43D2", false),
            // Two lines, a commit, a checksum.
            ("BD6A 2C5C 0F9B 1D21 8E4A\n7F3C 9E55 0A17 43D2 66B8", false),
            ("bd6a2c5c0f9b1d218e4a7f3c9e550a1743d266b8", false),
            ("BD6A2C5C0F9B1D218E4A7F3C9E550A1743D266B8BD6A2C5C0F9B1D218E4A7F3C", false),
            ("", false),
        ] {
            assert_eq!(has_fingerprint(text), is_one, "{text:?}");
        }
    }
}

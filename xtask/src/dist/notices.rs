//! The notices of others: what their licences ask to be passed on with a binary that their code is in.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::crates::{Crate, Crates};

/// Each crate and its licence, and the text of each licence once, with the crates that came with it.
pub(super) fn of(crates: &Crates) -> Result<String> {
    let mut text = String::from(
        "The binary holds code of others. First each crate with its licence, then the text of each\n\
         licence as it came with the crates that are named before it.\n\n",
    );
    // By text: hundreds of crates share a few.
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for one in crates.foreign() {
        let licence = one.licence.as_deref().with_context(|| format!("{} names no licence", one.name))?;
        // Writing to a string can't fail.
        let _ = writeln!(text, "{} {}: {licence}", one.name, one.version);
        for file in files(one)? {
            let content = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
            let content = String::from_utf8_lossy(&content).trim().replace('\r', "");
            texts.entry(content).or_default().push(format!("{} {}", one.name, one.version));
        }
    }
    ensure!(!texts.is_empty(), "no crate came with its licence");
    let mut texts: Vec<_> = texts.into_iter().collect();
    texts.sort_by(|a, b| a.1.cmp(&b.1).then_with(|| a.0.cmp(&b.0)));
    for (content, mut names) in texts {
        names.dedup();
        let _ = write!(text, "\n{}\n{}:\n\n{content}\n", "-".repeat(72), names.join(", "));
    }
    Ok(text)
}

/// The files in which a crate says what it asks for.
fn files(one: &Crate) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(&one.directory).with_context(|| format!("list {}", one.directory.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_ascii_uppercase();
        let is_notice = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"]
            .iter()
            .any(|start| name.starts_with(start));
        if is_notice && entry.file_type()?.is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

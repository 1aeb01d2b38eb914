//! Reads commands and queries from the pages of docs/, so that a check runs what users are advised to run.

use std::fs;

use anyhow::{Context as _, Result};

use crate::workspace::Workspace;

/// A page of docs/.
pub(super) struct Document {
    name: &'static str,
    text: String,
}

impl Document {
    pub(super) fn read(workspace: &Workspace, name: &'static str) -> Result<Self> {
        let text = fs::read_to_string(workspace.root.join("docs").join(name));
        Ok(Self { name, text: text.with_context(|| format!("read docs/{name}"))? })
    }

    /// A section of the third level, up to the next heading.
    pub(super) fn section(&self, heading: &str) -> Result<Self> {
        let rest = self.text.split_once(&format!("\n### {heading}\n")).map(|(_, rest)| rest);
        let rest = rest.with_context(|| format!("docs/{} has no {heading}", self.name))?;
        Ok(Self { name: self.name, text: rest.split("\n#").next().unwrap_or_default().to_owned() })
    }

    /// The fenced blocks of this language.
    pub(super) fn blocks(&self, language: &str) -> Vec<&str> {
        let begin = format!("\n```{language}\n");
        self.text.split(&begin).skip(1).filter_map(|rest| rest.split("\n```").next()).collect()
    }

    /// The first of them.
    pub(super) fn block(&self, language: &str) -> Result<&str> {
        let block = self.blocks(language).into_iter().next();
        block.with_context(|| format!("docs/{} has no block of {language}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_by_language_and_section() {
        let text =
            "\n```sh\na\nb\n```\n### Here\nx\n```sh\nc\n```\n```sql\nd\n```\n### There\n```sh\ne\n```\n";
        let page = Document { name: "page.md", text: text.to_owned() };
        assert_eq!((page.blocks("sh"), page.block("sh").unwrap()), (vec!["a\nb", "c", "e"], "a\nb"));
        assert_eq!(page.section("Here").unwrap().blocks("sh"), ["c"]);
        assert!(page.section("Nowhere").is_err() && page.block("yaml").is_err());
    }
}

//! Which network namespaces a command looks at: the argument of `--netns`.

use std::{fs, io, os::unix::fs::MetadataExt as _, path::PathBuf};

/// The network namespace of the calling thread.
pub const CURRENT_NETNS: &str = "/proc/thread-self/ns/net";

/// The network namespaces to look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NamespaceSelection {
    /// The network namespace of the calling thread.
    Current,
    /// The network namespace that this file refers to.
    At(PathBuf),
    /// The network namespace with this inode.
    Inode(u32),
    /// All network namespaces that can be found and entered.
    #[default]
    All,
}

impl NamespaceSelection {
    /// Parses the argument of `--netns`: `self`, `all`, an inode, or a path.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match (text, text.parse()) {
            ("self", _) => Self::Current,
            ("all", _) => Self::All,
            (_, Ok(inode)) => Self::Inode(inode),
            (path, Err(_)) => Self::At(path.into()),
        }
    }

    /// The inode of the selected namespace. `None`: all are selected.
    ///
    /// # Errors
    /// If the file can't be read.
    pub fn inode(&self) -> io::Result<Option<u64>> {
        match self {
            Self::Current => Ok(Some(fs::metadata(CURRENT_NETNS)?.ino())),
            Self::At(path) => Ok(Some(fs::metadata(path)?.ino())),
            Self::Inode(inode) => Ok(Some(u64::from(*inode))),
            Self::All => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_is_a_word_an_inode_or_a_path() {
        for (text, selection) in [
            ("self", NamespaceSelection::Current),
            ("all", NamespaceSelection::All),
            ("4026531833", NamespaceSelection::Inode(4_026_531_833)),
            ("/run/netns/blue", NamespaceSelection::At("/run/netns/blue".into())),
            ("4294967296", NamespaceSelection::At("4294967296".into())),
        ] {
            assert_eq!(NamespaceSelection::parse(text), selection, "{text}");
        }
    }
}

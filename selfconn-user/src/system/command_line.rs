//! The arguments of a process, as they are kept: one buffer for all of them. 2,000 arguments of one letter are 4 KB
//! here, and 100 KB as so many strings.

use serde::{Serialize, Serializer};

/// The arguments of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// Each argument, with a NUL behind it.
    text: Box<str>,
    /// True if the process has more than these.
    pub is_cut: bool,
}

impl CommandLine {
    /// The arguments in the bytes of `/proc/PID/cmdline`. `None`: a kernel thread, or an exiting process.
    #[must_use]
    pub fn parse(bytes: &[u8], is_cut: bool) -> Option<Self> {
        let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
        if bytes.is_empty() {
            return None;
        }
        let mut text = String::from_utf8_lossy(bytes).into_owned();
        text.push('\0');
        Some(Self { text: text.into_boxed_str(), is_cut })
    }

    pub fn arguments(&self) -> impl Iterator<Item = &str> {
        self.text.split_terminator('\0')
    }

    /// The bytes that are kept.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        self.text.len()
    }

    /// The part before this byte, which must be the first one of a character.
    #[must_use]
    pub fn cut_at(&self, at: usize) -> Self {
        let mut text = self.text[..at].to_owned();
        if !text.is_empty() && !text.ends_with('\0') {
            text.push('\0');
        }
        Self { text: text.into_boxed_str(), is_cut: true }
    }
}

impl<'a> FromIterator<&'a str> for CommandLine {
    fn from_iter<I: IntoIterator<Item = &'a str>>(arguments: I) -> Self {
        let text: String = arguments.into_iter().flat_map(|argument| [argument, "\0"]).collect();
        Self { text: text.into_boxed_str(), is_cut: false }
    }
}

impl Serialize for CommandLine {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.arguments())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_separated_by_nuls() {
        for (bytes, expected) in [
            (&b""[..], None),
            (b"\0", None),
            (b"sh\0-c\0a b\0", Some(vec!["sh", "-c", "a b"])),
            (b"sh\0\0x\0", Some(vec!["sh", "", "x"])),
            (b"sh\0\0", Some(vec!["sh", ""])),
            (b"renamed by itself", Some(vec!["renamed by itself"])),
            (b"\xff\n\0", Some(vec!["\u{fffd}\n"])),
        ] {
            let parsed = CommandLine::parse(bytes, false);
            let arguments = parsed.as_ref().map(|parsed| parsed.arguments().collect::<Vec<_>>());
            assert_eq!(arguments, expected);
            assert_eq!(parsed, expected.map(CommandLine::from_iter));
        }
    }

    #[test]
    fn a_part_of_an_argument_is_an_argument() {
        let cmdline: CommandLine = ["sh", "", "xyz"].into_iter().collect();
        for (at, expected) in
            [(0, &[][..]), (1, &["s"]), (3, &["sh"]), (4, &["sh", ""]), (5, &["sh", "", "x"])]
        {
            let cut = cmdline.cut_at(at);
            assert_eq!((cut.arguments().collect::<Vec<_>>(), cut.is_cut), (expected.to_vec(), true));
        }
        assert_eq!(serde_json::to_string(&cmdline).unwrap(), r#"["sh","","xyz"]"#);
    }
}

//! How much of a command line an event has, counted in bytes as they are written: as JSON.

use std::{str::FromStr, sync::Arc};

use crate::system::command_line::CommandLine;

/// The limit of a command line without an option.
pub const DEFAULT_BYTES: usize = 1_024;

/// The part of a command line that events have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CmdlineLimit {
    /// All that was read.
    Full,
    /// The first argument, at most [`DEFAULT_BYTES`] of it.
    Name,
    Off,
    /// As many bytes of the JSON array.
    Bytes(usize),
}

impl FromStr for CmdlineLimit {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "full" => Ok(Self::Full),
            "name" => Ok(Self::Name),
            "off" => Ok(Self::Off),
            _ => match text.parse() {
                Ok(bytes @ 16..=65_536) => Ok(Self::Bytes(bytes)),
                _ => Err("must be full, name, off, or a number of bytes from 16 to 65536"),
            },
        }
    }
}

impl CmdlineLimit {
    /// Cuts the command line of an event. Returns true if something was left out.
    pub fn apply(self, cmdline: &mut Option<Arc<CommandLine>>) -> bool {
        let Some(whole) = cmdline else { return false };
        if self == Self::Off {
            *cmdline = None;
            return true;
        }
        let Some(end) = self.end(whole) else { return false };
        *whole = Arc::new(whole.cut_at(end));
        true
    }

    /// What is kept of a command line that was read: no more than events have.
    #[must_use]
    pub fn keep(self, cmdline: CommandLine) -> CommandLine {
        match self.end(&cmdline) {
            Some(end) => cmdline.cut_at(end),
            None => cmdline,
        }
    }

    /// The byte at which the command line is cut. `None`: all of it is within the limit.
    fn end(self, cmdline: &CommandLine) -> Option<usize> {
        match self {
            Self::Full => None,
            Self::Off => Some(0),
            Self::Name => {
                let name = cmdline.arguments().next()?;
                let name_end = name.len() + 1;
                let has_more = name_end < cmdline.kept_bytes();
                end_within([name].into_iter(), DEFAULT_BYTES).or(has_more.then_some(name_end))
            }
            Self::Bytes(bytes) => end_within(cmdline.arguments(), bytes),
        }
    }
}

/// The byte at which these arguments must be cut so that their JSON array has at most `limit` bytes. `None`: nowhere.
fn end_within<'a>(arguments: impl Iterator<Item = &'a str>, limit: usize) -> Option<usize> {
    // The brackets, less the comma that the first argument does not have.
    let mut used = 1;
    let mut start = 0;
    for argument in arguments {
        // Two quotes and a comma.
        used += 3;
        for (index, character) in argument.char_indices() {
            used += encoded_len(character);
            if used > limit {
                return Some(start + index);
            }
        }
        if used > limit {
            return Some(start);
        }
        start += argument.len() + 1;
    }
    None
}

/// Bytes of a character in a JSON string as `serde_json` writes it.
fn encoded_len(character: char) -> usize {
    match character {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        '\0'..='\u{1f}' => 6,
        _ => character.len_utf8(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(limit: &str, arguments: &[&str]) -> (Option<CommandLine>, bool) {
        let limit: CmdlineLimit = limit.parse().unwrap();
        let whole: CommandLine = arguments.iter().copied().collect();
        let mut cmdline = Some(Arc::new(whole.clone()));
        let is_cut = limit.apply(&mut cmdline);
        let kept = limit.keep(whole);
        assert_eq!(kept.is_cut, is_cut);
        let mut again = Some(Arc::new(kept));
        limit.apply(&mut again);
        assert_eq!(again, cmdline, "what is kept has all that an event has");
        (cmdline.map(Arc::unwrap_or_clone), is_cut)
    }

    #[test]
    fn the_array_as_json_fits_into_the_limit_and_nothing_that_fits_is_cut() {
        let control: String = (1..0x80_u8).map(char::from).collect();
        for arguments in [
            vec!["a"; 2_040],
            vec![""; 2_040],
            vec!["\u{1}"; 2_040],
            vec!["\u{1}\"\\\n\u{7f}\u{85}\u{2028}ä\u{1f980}"; 300],
            vec![&control; 30],
            vec!["a".repeat(4_096).leak()],
        ] {
            let whole = serde_json::to_string(&arguments).unwrap().len();
            for limit in [16, 17, 18, 19, 20, 23, 64, 1_024, 4_096] {
                let (cmdline, is_cut) = applied(&limit.to_string(), &arguments);
                let encoded = serde_json::to_string(&cmdline).unwrap().len();
                assert!(is_cut && encoded <= limit, "{encoded} of {limit}: {cmdline:?}");
                // The next character, with quotes and comma, has at most nine bytes.
                assert!(encoded + 9 > limit, "{encoded} of {limit}: {cmdline:?}");
            }
            let (cmdline, is_cut) = applied(&whole.to_string(), &arguments);
            assert_eq!((cmdline.unwrap().arguments().count(), is_cut), (arguments.len(), false));
        }
    }

    #[test]
    fn a_limit_is_a_word_or_a_number_of_bytes() {
        let cut_to = |arguments: &[&str], is_cut| {
            let mut cmdline: CommandLine = arguments.iter().copied().collect();
            cmdline.is_cut = is_cut;
            (Some(cmdline), is_cut)
        };
        let arguments = ["java", "-jar", "a.jar"];
        assert_eq!(applied("full", &arguments), cut_to(&arguments, false));
        assert_eq!(applied("name", &arguments), cut_to(&["java"], true));
        assert_eq!(applied("name", &arguments[..1]), cut_to(&["java"], false));
        assert_eq!(applied("off", &arguments), (None, true));
        assert_eq!(applied("16", &arguments), cut_to(&["java", "-jar"], true));
        assert!(!CmdlineLimit::Off.apply(&mut None), "an unknown command line is not cut");
        for text in ["", "0", "15", "65537", "-1", "1k", "all"] {
            assert!(text.parse::<CmdlineLimit>().is_err(), "{text}");
        }
    }
}

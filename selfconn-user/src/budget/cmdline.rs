//! How much of a command line an event has, counted in bytes as they are written: as JSON.

use std::str::FromStr;

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
    /// Cuts a command line. Returns true if something was left out.
    pub fn apply(self, cmdline: &mut Option<Vec<String>>) -> bool {
        let Some(arguments) = cmdline else { return false };
        match self {
            Self::Full => false,
            Self::Off => {
                *cmdline = None;
                true
            }
            Self::Name => {
                let had_more = arguments.len() > 1;
                arguments.truncate(1);
                cut(arguments, DEFAULT_BYTES) || had_more
            }
            Self::Bytes(bytes) => cut(arguments, bytes),
        }
    }
}

/// Cuts the arguments so that their JSON array has at most `limit` bytes.
fn cut(arguments: &mut Vec<String>, limit: usize) -> bool {
    // The brackets, less the comma that the first argument does not have.
    let mut used = 1;
    for at in 0..arguments.len() {
        // Two quotes and a comma.
        used += 3;
        for (index, character) in arguments[at].char_indices() {
            used += encoded_len(character);
            if used > limit {
                arguments[at].truncate(index);
                arguments.truncate(if index == 0 { at } else { at + 1 });
                return true;
            }
        }
        if used > limit {
            arguments.truncate(at);
            return true;
        }
    }
    false
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

    fn applied(limit: &str, arguments: &[&str]) -> (Option<Vec<String>>, bool) {
        let mut cmdline = Some(arguments.iter().map(|&argument| argument.to_owned()).collect());
        let is_cut = limit.parse::<CmdlineLimit>().unwrap().apply(&mut cmdline);
        (cmdline, is_cut)
    }

    #[test]
    fn the_array_as_json_fits_into_the_limit_and_nothing_that_fits_is_cut() {
        let control: String = (0..0x80_u8).map(char::from).collect();
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
            assert_eq!((cmdline.unwrap().len(), is_cut), (arguments.len(), false));
        }
    }

    #[test]
    fn a_limit_is_a_word_or_a_number_of_bytes() {
        let owned = |arguments: &[&str]| Some(arguments.iter().map(|&a| a.to_owned()).collect::<Vec<_>>());
        let arguments = ["java", "-jar", "a.jar"];
        assert_eq!(applied("full", &arguments), (owned(&arguments), false));
        assert_eq!(applied("name", &arguments), (owned(&["java"]), true));
        assert_eq!(applied("name", &arguments[..1]), (owned(&["java"]), false));
        assert_eq!(applied("off", &arguments), (None, true));
        assert_eq!(applied("16", &arguments), (owned(&["java", "-jar"]), true));
        assert!(!CmdlineLimit::Off.apply(&mut None), "an unknown command line is not cut");
        for text in ["", "0", "15", "65537", "-1", "1k", "all"] {
            assert!(text.parse::<CmdlineLimit>().is_err(), "{text}");
        }
    }
}

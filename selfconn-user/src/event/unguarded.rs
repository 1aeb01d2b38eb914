//! The event `unguarded`: in a network namespace the guard refuses nothing, or no longer for certain.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;

use super::text::{EventFormat, LogRecord, Severity, escape};

/// `unguarded`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Unguarded {
    /// Inode of the network namespace.
    pub netns: u32,
    /// Why the guard refuses nothing there.
    pub why: String,
}

pub(super) const FORMAT: EventFormat = EventFormat {
    event: "unguarded",
    label: "UNGUARDED",
    severity: Severity::Warning,
    message,
    details: None,
};

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    match record.number("netns") {
        Some(netns) => write!(out, "network namespace {netns}")?,
        None => write!(out, "a network namespace")?,
    }
    match record.text("why") {
        Some(why) => write!(out, ": {}", escape(why)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::event::tests::assert_rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[
            (
                r#"{"event":"unguarded","netns":4026532281,"why":"the program a\u001b runs first"}"#,
                "UNGUARDED    network namespace 4026532281: the program a\\u{1b} runs first",
            ),
            (r#"{"event":"unguarded"}"#, "UNGUARDED    a network namespace"),
        ]);
    }
}

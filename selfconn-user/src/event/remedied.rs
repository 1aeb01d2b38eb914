//! The event `remedied`: the action of `--remedy` on a self-connection, or the action that a dry run skipped.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;

use super::connection::ConnectionFields;
use super::text::{EventFormat, LogRecord, Severity, escape, subject};

/// `remedied`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Remedied {
    /// The self-connection.
    #[serde(flatten)]
    pub connection: ConnectionFields,
    /// `dry-run` or `destroy`.
    pub mode: &'static str,
    /// Outcome of the remedy, such as `destroyed` or `would_destroy`.
    pub result: &'static str,
    /// Reason of the result, if the result alone does not explain it.
    pub why: Option<String>,
    /// True if a server can bind the port immediately.
    pub port_freed: Option<bool>,
}

pub(super) const FORMAT: EventFormat =
    EventFormat { event: "remedied", label: "remedied", severity: Severity::Notice, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    match record.text("result") {
        Some("destroyed") => write!(out, ": destroyed")?,
        Some("would_destroy") => write!(out, ": would be destroyed")?,
        Some("excepted") => write!(out, ": excluded")?,
        Some("rate_limited") => write!(out, ": delayed by the rate limit")?,
        Some("gone") => write!(out, ": already closed")?,
        Some("failed") => write!(out, ": could not be destroyed")?,
        Some(result) => write!(out, ": {}", escape(result))?,
        None => {}
    }
    if let Some(why) = record.text("why") {
        write!(out, " ({})", escape(why))?;
    }
    match record.flag("port_freed") {
        Some(true) => write!(out, "; its port is free"),
        Some(false) => write!(out, "; it keeps its port until it is closed"),
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
                r#"{"event":"remedied","addr":"127.0.0.1","port":80,"comm":"a\nb","pid":7,"mode":"destroy",
                    "result":"destroyed","why":null,"port_freed":true}"#,
                "remedied     127.0.0.1:80          a\\nb[7]: destroyed; its port is free",
            ),
            (
                r#"{"event":"remedied","addr":"127.0.0.1","port":80,"pid":7,"mode":"dry-run",
                    "result":"excepted","why":"except comm=\u001b*","port_freed":null}"#,
                "remedied     127.0.0.1:80          [7]: excluded (except comm=\\u{1b}*)",
            ),
            (
                r#"{"event":"remedied","addr":"127.0.0.1","port":80,"pid":7,"result":"would_destroy",
                    "port_freed":false}"#,
                "remedied     127.0.0.1:80          [7]: would be destroyed; it keeps its port until it is closed",
            ),
        ]);
    }
}

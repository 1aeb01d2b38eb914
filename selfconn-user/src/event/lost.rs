//! The event `lost`: something was not observed or not written. Also the totals of all losses.

use std::fmt::Write as _;

use serde::Serialize;

use super::text::{EventFormat, LogRecord, Severity, escape};

/// `lost`.
#[derive(Debug, Serialize)]
pub struct Lost {
    /// `ring`, `missed`, `log`, `stdout`, `journal`, `refused_table` or `hooks`.
    pub r#where: &'static str,
    /// Number lost since the previous `lost` event with the same `where`.
    pub count: u64,
    /// With `hooks`: the method that no longer observes connections.
    pub method: Option<&'static str>,
}

/// Totals of the losses of a run, by the place where they happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Losses {
    /// Transitions for which the ring buffer had no room.
    pub ring: u64,
    /// Self-connections that the hooks missed and the socket table contained.
    pub missed: u64,
    /// Events that could not be written to the log file.
    pub log: u64,
    /// Events that the reader of stdout did not read in time.
    pub stdout: u64,
    /// Events that the journal did not accept.
    pub journal: u64,
    /// Refused connects that were not counted by destination because the table was full.
    pub refused_table: u64,
    /// Methods that no longer observed connections.
    pub hooks: u64,
}

impl Losses {
    /// The sum, field by field.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            ring: self.ring + other.ring,
            missed: self.missed + other.missed,
            log: self.log + other.log,
            stdout: self.stdout + other.stdout,
            journal: self.journal + other.journal,
            refused_table: self.refused_table + other.refused_table,
            hooks: self.hooks + other.hooks,
        }
    }
}

pub(super) const FORMAT: EventFormat =
    EventFormat { event: "lost", label: "LOST", severity: Severity::Error, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    if let Some(method) = record.text("method") {
        return write!(out, "{} no longer observes connections (hooks)", escape(method));
    }
    match record.number("count") {
        Some(count) => write!(out, "{count}")?,
        None => write!(out, "an unknown number")?,
    }
    write!(out, " ({})", escape(record.text("where").unwrap_or("unknown place")))
}

#[cfg(test)]
mod tests {
    use crate::event::tests::rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        for (json, line) in [
            (r#"{"event":"lost","where":"ring","count":7}"#, "LOST         7 (ring)"),
            (
                r#"{"event":"lost","where":"hooks","count":1,"method":"perf"}"#,
                "LOST         perf no longer observes connections (hooks)",
            ),
        ] {
            assert_eq!(rendered(json), line);
        }
    }
}

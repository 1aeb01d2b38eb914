//! The event `stopped`: the run ends. The totals of the run.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;

use super::{
    loss::Losses,
    text::{EventFormat, LogRecord, Severity, escape},
};

/// `stopped`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Stopped {
    /// Events emitted in this run, this one included.
    pub made: u64,
    /// Events written to the log file, this one included. Null without a log file.
    pub written: Option<u64>,
    /// Records and events lost, by cause.
    pub lost: Losses,
    /// Self-connections that are still open.
    pub open: u64,
    /// Counters of the eBPF programs.
    #[serde(flatten)]
    pub programs: ProgramCounters,
}

/// Counters of the eBPF programs over a run. `matched` = `delivered` + `lost.ring`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ProgramCounters {
    /// Records that the programs wanted to send through the ring buffer.
    pub matched: u64,
    /// Records that the daemon read from the ring buffer.
    pub delivered: u64,
    /// Number of times the kernel skipped a program of a hook. `None` if the kernel does not count it.
    pub not_examined: Option<u64>,
    /// The same for the programs of failed binds. `None` also if there are none.
    pub binds_not_examined: Option<u64>,
    /// Connection attempts that were not inserted because the connect table was full. `lost` events have them
    /// as the facts of `opener_table`.
    pub not_remembered: u64,
}

pub(super) const FORMAT: EventFormat =
    EventFormat { event: "stopped", label: "stopped", severity: Severity::Notice, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    write!(out, "{} events", record.number("made").unwrap_or(0))?;
    if let Some(written) = record.number("written") {
        write!(out, ", {written} in the log")?;
    }
    let losses: Vec<_> = record
        .object("lost")
        .into_iter()
        .flat_map(LogRecord::fields)
        .filter_map(|(place, count)| Some((place, count.as_u64().filter(|count| *count > 0)?)))
        .map(|(place, count)| format!("{} {count}", escape(place)))
        .collect();
    match &losses[..] {
        [] => write!(out, ", nothing lost")?,
        losses => write!(out, ", lost: {}", losses.join(", "))?,
    }
    write!(out, "; {} still open", record.number("open").unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use crate::event::tests::assert_rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[
            (
                r#"{"event":"stopped","made":9,"written":8,"lost":{"ring":1,"missed":2,"log":3},"open":4}"#,
                "stopped      9 events, 8 in the log, lost: log 3, missed 2, ring 1; 4 still open",
            ),
            (
                r#"{"event":"stopped","made":9,"written":null,"lost":{"ring":0,"missed":0},"open":0}"#,
                "stopped      9 events, nothing lost; 0 still open",
            ),
        ]);
    }
}

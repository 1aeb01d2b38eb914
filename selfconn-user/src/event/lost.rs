//! The event `lost`: something was not observed, not kept or not written.

use std::fmt::Write as _;

use serde::Serialize;

use super::{
    loss::{LossCause, LossKind},
    text::{EventFormat, LogRecord, Severity, escape},
};

/// `lost`.
#[derive(Debug, Serialize)]
pub struct Lost {
    /// Why something was lost.
    pub r#where: LossCause,
    /// `record`, `event` or `fact`.
    pub kind: LossKind,
    /// Number lost since the previous `lost` event with the same `where`.
    pub count: u64,
    /// With `hooks`: the method that no longer observes connections.
    pub method: Option<&'static str>,
}

impl Lost {
    #[must_use]
    pub fn new(cause: LossCause, count: u64, method: Option<&'static str>) -> Self {
        Self { r#where: cause, kind: cause.kind(), count, method }
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

//! The event `lost`: something was not observed, not kept or not written.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;

use super::{
    loss::{LossCause, LossKind},
    text::{EventFormat, LogRecord, Severity, escape},
};
use crate::budget::log::SuppressedEvents;

/// `lost`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Lost {
    /// Why something was lost.
    pub r#where: LossCause,
    /// `record`, `event` or `fact`.
    pub kind: LossKind,
    /// Number lost since the previous `lost` event with the same `where`.
    pub count: u64,
    /// With `hooks`: the method that no longer observes connections.
    pub method: Option<&'static str>,
    /// With `suppressed`, `opener_table`, `refused_table`, `binds` and `untracked`, and with `log` if the owner's share
    /// of the file was full: the owner's user. Null: several owners, or an unknown one.
    pub uid: Option<u32>,
    /// With `suppressed`: the owner's control group.
    pub cgroup: Option<String>,
    /// With `suppressed`: the program, if there is only one.
    pub program: Option<String>,
    /// With `suppressed`: the lowest port.
    pub first_port: Option<u16>,
    /// With `suppressed`: the highest port.
    pub last_port: Option<u16>,
}

impl Lost {
    #[must_use]
    pub fn new(cause: LossCause, count: u64, method: Option<&'static str>) -> Self {
        Self {
            r#where: cause,
            kind: cause.kind(),
            count,
            method,
            uid: None,
            cgroup: None,
            program: None,
            first_port: None,
            last_port: None,
        }
    }

    /// What an owner has lost.
    #[must_use]
    pub fn of_user(cause: LossCause, count: u64, uid: u32) -> Self {
        Self { uid: Some(uid), ..Self::new(cause, count, None) }
    }

    /// Events of an owner that were beyond its rate.
    #[must_use]
    pub fn suppressed(events: SuppressedEvents) -> Self {
        Self {
            uid: events.owner.uid,
            cgroup: events.owner.cgroup.map(|cgroup| cgroup.to_string()),
            program: events.program,
            first_port: Some(events.first_port),
            last_port: Some(events.last_port),
            ..Self::new(LossCause::Suppressed, events.count, None)
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
    write!(out, " ({})", escape(record.text("where").unwrap_or("unknown place")))?;
    if let Some(uid) = record.number("uid") {
        write!(out, " of uid {uid}")?;
    }
    if let Some(cgroup) = record.text("cgroup") {
        write!(out, " in {}", escape(cgroup))?;
    }
    if let Some(program) = record.text("program") {
        write!(out, ": {}", escape(program))?;
    }
    match (record.number("first_port"), record.number("last_port")) {
        (Some(first), Some(last)) if first == last => write!(out, ", port {first}"),
        (Some(first), Some(last)) => write!(out, ", ports {first} to {last}"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::event::tests::assert_rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[
            (r#"{"event":"lost","where":"ring","count":7}"#, "LOST         7 (ring)"),
            (
                r#"{"event":"lost","where":"suppressed","count":7,"uid":1000,"cgroup":"/docker/a\u001b",
                    "program":"/usr/bin/curl","first_port":80,"last_port":90}"#,
                "LOST         7 (suppressed) of uid 1000 in /docker/a\\u{1b}: /usr/bin/curl, ports 80 to 90",
            ),
            (
                r#"{"event":"lost","where":"suppressed","count":7,"uid":null,"cgroup":null,"program":null,
                    "first_port":80,"last_port":80}"#,
                "LOST         7 (suppressed), port 80",
            ),
            (
                r#"{"event":"lost","where":"hooks","count":1,"method":"perf"}"#,
                "LOST         perf no longer observes connections (hooks)",
            ),
        ]);
    }
}

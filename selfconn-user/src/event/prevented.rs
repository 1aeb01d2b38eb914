//! The event `prevented`: the guard refused connects of a process to itself, or would have.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;

use super::connection::ConnectionFields;
use super::envelope;
use super::text::{EventFormat, LogRecord, Severity, subject};

/// `prevented`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Prevented {
    /// The newest attempt. What is null of it is unknown; if everything is, the records of these attempts are lost.
    #[serde(flatten)]
    pub connection: PreventedFields,
    /// `refuse` or `dry-run`.
    pub mode: &'static str,
    /// Attempts of this process at this port since the last such event.
    pub count: u64,
}

/// The fields of the attempt.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum PreventedFields {
    Known(Box<ConnectionFields>),
    Unknown(UnknownAttempt),
}

/// The fields of a connection of which nothing is known.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct UnknownAttempt {
    /// Identifier of the event.
    id: String,
    cookie: (),
    source: (),
    family: (),
    addr: (),
    ifindex: (),
    device: (),
    port: (),
    netns: (),
    cause: (),
    refused_before: (),
    pid: (),
    tid: (),
    comm: (),
    thread_comm: (),
    exe: (),
    cmdline: (),
    cmdline_truncated: bool,
    uid: (),
    cgroup: (),
    unit: (),
    container: (),
    pod: (),
    owner: (),
    kernel_socket: (),
    holders: (),
    isn: (),
    peer_isn: (),
}

impl Prevented {
    /// `number` counts these events in a run. `fields`: those of the newest attempt, if it is known.
    #[must_use]
    pub fn new(
        run: u64,
        number: u64,
        fields: Option<ConnectionFields>,
        mode: &'static str,
        count: u64,
    ) -> Self {
        let id = envelope::id(run, "p", number);
        let connection = match fields {
            Some(fields) => PreventedFields::Known(Box::new(ConnectionFields { id: Some(id), ..fields })),
            None => PreventedFields::Unknown(UnknownAttempt { id, ..UnknownAttempt::default() }),
        };
        Self { connection, mode, count }
    }
}

pub(super) const FORMAT: EventFormat = EventFormat {
    event: "prevented",
    label: "prevented",
    severity: Severity::Warning,
    message,
    details: None,
};

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    if record.number("port").is_some() {
        subject::write(record, out)?;
    } else {
        write!(out, "unknown processes")?;
    }
    let verb = if record.text("mode") == Some("dry-run") { "would be refused" } else { "refused" };
    write!(out, ": a connect to itself, {verb}")?;
    match record.number("count") {
        Some(count) if count > 1 => write!(out, "; {count} times"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::tests::assert_rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[
            (
                r#"{"event":"prevented","addr":"127.0.0.1","port":40000,"comm":"java","pid":7,"mode":"refuse","count":1}"#,
                "prevented    127.0.0.1:40000       java[7]: a connect to itself, refused",
            ),
            (
                r#"{"event":"prevented","addr":"::1","port":80,"comm":"a\u001b","pid":7,"mode":"dry-run","count":12}"#,
                "prevented    [::1]:80              a\\u{1b}[7]: a connect to itself, would be refused; 12 times",
            ),
            (
                r#"{"event":"prevented","addr":null,"port":null,"pid":null,"mode":"refuse","count":3}"#,
                "prevented    unknown processes: a connect to itself, refused; 3 times",
            ),
        ]);
    }

    #[test]
    fn an_unknown_attempt_has_the_fields_of_a_connection() {
        let keys = |value: serde_json::Value| -> Vec<String> {
            value.as_object().unwrap().keys().cloned().collect()
        };
        let unknown = PreventedFields::Unknown(UnknownAttempt::default());
        let known = PreventedFields::Known(Box::new(ConnectionFields::sample()));
        assert_eq!(keys(serde_json::to_value(unknown).unwrap()), keys(serde_json::to_value(known).unwrap()));
    }
}

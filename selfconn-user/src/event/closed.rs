//! The event `closed`: the socket of a self-connection is gone.

use std::fmt::Write as _;

use jiff::Timestamp;
use schemars::JsonSchema;
use selfconn_ebpf::Task;
use serde::Serialize;

use super::connection::{ConnectionFields, process_name};
use super::text::{self, EventFormat, LogRecord, Severity, duration, escape, subject, utc_time};
use crate::{
    detect::connection::{CloseReason, ConnectionEnd},
    system::{clock::Offset, process::Holder},
};

/// `closed`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Closed {
    /// The self-connection.
    #[serde(flatten)]
    pub connection: ConnectionFields,
    /// Time from ESTABLISHED to the end.
    pub duration_ns: Option<u64>,
    /// Payload bytes sent, without SYN, FIN and retransmissions.
    pub bytes_sent: Option<u64>,
    /// Payload bytes received.
    pub bytes_received: Option<u64>,
    /// How the connection ended: `fin`, `rst` or `destroyed`.
    pub how: Option<&'static str>,
    /// The process that closed the connection, if it is known.
    pub closer: Option<Holder>,
    /// Time at which TIME_WAIT ends and a server can bind the port again.
    #[serde(serialize_with = "text::optional_rfc3339")]
    #[schemars(with = "Option<String>")]
    pub port_blocked_until: Option<Timestamp>,
}

impl Closed {
    #[must_use]
    pub fn new(
        connection: ConnectionFields,
        closer: Option<&Task>,
        end: &ConnectionEnd,
        clock: Offset,
    ) -> Self {
        Self {
            connection,
            duration_ns: end.duration_ns,
            bytes_sent: end.bytes_sent,
            bytes_received: end.bytes_received,
            how: end.reason.map(|how| match how {
                CloseReason::Fin => "fin",
                CloseReason::Rst => "rst",
                CloseReason::Destroyed => "destroyed",
            }),
            closer: closer.map(|task| Holder { pid: task.pid, comm: process_name(task), start_ticks: None }),
            port_blocked_until: end.port_blocked_until_ns.map(|at_ns| clock.wall(at_ns)),
        }
    }
}

pub(super) const FORMAT: EventFormat =
    EventFormat { event: "closed", label: "closed", severity: Severity::Notice, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    match record.number("duration_ns") {
        Some(ns) => write!(out, " after {}", duration(ns))?,
        None => write!(out, " after an unknown time")?,
    }
    if let (Some(sent), Some(received)) = (record.number("bytes_sent"), record.number("bytes_received")) {
        write!(out, ", {sent} B sent, {received} B received")?;
    }
    match record.text("how") {
        Some("fin") => write!(out, ", by FIN")?,
        Some("rst") => write!(out, ", by RST")?,
        Some(how) => write!(out, ", {}", escape(how))?,
        None => {}
    }
    match record.timestamp("port_blocked_until") {
        Some(until) => write!(out, "; TIME_WAIT holds the port until {}", utc_time(until)),
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
                r#"{"event":"closed","addr":"127.0.0.1","port":80,"pid":7,"duration_ns":5000000,"bytes_sent":24,
                    "bytes_received":24,"how":"fin","port_blocked_until":"2026-11-22T23:10:58.584252Z"}"#,
                "closed       127.0.0.1:80          [7] after 5.0ms, 24 B sent, 24 B received, by FIN; TIME_WAIT holds \
                 the port until 23:10:58.584252Z",
            ),
            (
                r#"{"event":"closed","addr":"127.0.0.1","port":80,"pid":7,"duration_ns":null,"how":"rst"}"#,
                "closed       127.0.0.1:80          [7] after an unknown time, by RST",
            ),
        ]);
    }
}

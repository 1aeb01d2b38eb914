//! Message of `established`.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, subject};

pub(crate) const FORMAT: EventFormat = EventFormat {
    event: "established",
    label: "ESTABLISHED",
    severity: Severity::Warning,
    message,
    details: None,
};

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    write!(out, " is connected to itself")?;
    match record.text("cause") {
        Some("ephemeral") => write!(out, "; connect() chose its port")?,
        Some("bound") => write!(out, "; its port was bound before connect()")?,
        _ => {}
    }
    match (record.number("isn"), record.number("peer_isn")) {
        (Some(isn), Some(peer)) if isn == peer => write!(out, "; both ISNs {isn}"),
        (Some(isn), Some(peer)) => write!(out, "; ISNs {isn} and {peer}"),
        _ => Ok(()),
    }
}

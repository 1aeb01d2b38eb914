//! `established`.

use std::fmt::Write as _;

use super::{Kind, Record, Severity, subject};

pub(super) const KIND: Kind =
    Kind { event: "established", word: "ESTABLISHED", severity: Severity::Warning, sentence, details: None };

fn sentence(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    write!(out, " is connected to itself")?;
    match record.text("cause") {
        Some("ephemeral") => write!(out, "; connect() chose its port")?,
        Some("bound") => write!(out, "; it had bound its port")?,
        _ => {}
    }
    match (record.number("isn"), record.number("peer_isn")) {
        (Some(isn), Some(peer)) if isn == peer => write!(out, "; one ISN, {isn}"),
        (Some(isn), Some(peer)) => write!(out, "; ISNs {isn} and {peer}"),
        _ => Ok(()),
    }
}

//! `lost`.

use std::fmt::Write as _;

use super::{Kind, Record, Severity, escape};

pub(super) const KIND: Kind =
    Kind { event: "lost", word: "LOST", severity: Severity::Error, sentence, details: None };

fn sentence(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    if let Some(method) = record.text("method") {
        return write!(out, "{} sees nothing any more (hooks)", escape(method));
    }
    match record.number("count") {
        Some(count) => write!(out, "{count}")?,
        None => write!(out, "an unknown number")?,
    }
    write!(out, " ({})", escape(record.text("where").unwrap_or("somewhere")))
}

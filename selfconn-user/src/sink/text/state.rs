//! `state`.

use std::fmt::Write as _;

use super::{Kind, Record, Severity, escape, subject};

pub(super) const KIND: Kind =
    Kind { event: "state", word: "state", severity: Severity::Info, sentence, details: None };

fn sentence(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    let name = |key| escape(record.text(key).unwrap_or("?"));
    subject::write(record, out)?;
    write!(out, " {} -> {}", name("from"), name("to"))
}

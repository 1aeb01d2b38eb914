//! The self-connection that an event is about: where, and whose.

use std::fmt::Write as _;

use super::{Record, escape};

/// `127.0.0.1:38160 nginx[26152]`, with a tab where a new column begins.
pub(super) fn write(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    endpoint(record, out)?;
    out.push('\t');
    process(record, out)
}

/// `127.0.0.1:38160`, `[::1]:38160`.
pub(super) fn endpoint(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    let addr = escape(record.text("addr").unwrap_or("?"));
    let (open, close) = if addr.contains(':') { ("[", "]") } else { ("", "") };
    write!(out, "{open}{addr}{close}:")?;
    match record.number("port") {
        Some(port) => write!(out, "{port}"),
        None => write!(out, "?"),
    }
}

/// `nginx[26152]`.
pub(super) fn process(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    match (record.text("comm"), record.number("pid")) {
        (Some(comm), Some(pid)) => write!(out, "{}[{pid}]", escape(comm)),
        (None, Some(pid)) => write!(out, "[{pid}]"),
        _ => write!(out, "an unknown process"),
    }
}

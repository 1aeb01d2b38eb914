//! The connection and the process that an event is about.

use std::fmt::Write as _;

use super::{LogRecord, escape};

/// Endpoint and process, such as `127.0.0.1:38160 nginx[26152]`. A tab separates the two columns.
pub(in crate::event) fn write(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    endpoint(record, out)?;
    out.push('\t');
    process(record, out)
}

/// Address and port, such as `127.0.0.1:38160` or `[fe80::1%eth0]:38160`.
pub(in crate::event) fn endpoint(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    let addr = escape(record.text("addr").unwrap_or("?"));
    let (open, close) = if addr.contains(':') { ("[", "]") } else { ("", "") };
    write!(out, "{open}{addr}")?;
    if let Some(device) = record.text("device") {
        write!(out, "%{}", escape(device))?;
    }
    write!(out, "{close}:")?;
    match record.number("port") {
        Some(port) => write!(out, "{port}"),
        None => write!(out, "?"),
    }
}

/// Name and pid, such as `nginx[26152]`.
pub(in crate::event) fn process(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    if record.flag("kernel_socket") == Some(true) {
        out.push_str("the kernel, by ");
    }
    match (record.text("comm"), record.number("pid")) {
        (Some(comm), Some(pid)) => write!(out, "{}[{pid}]", escape(comm)),
        (None, Some(pid)) => write!(out, "[{pid}]"),
        _ => write!(out, "an unknown process"),
    }
}

//! `remedied`.

use std::fmt::Write as _;

use super::{Kind, Record, Severity, escape, subject};

pub(super) const KIND: Kind =
    Kind { event: "remedied", word: "remedied", severity: Severity::Notice, sentence, details: None };

fn sentence(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    match record.text("result") {
        Some("destroyed") => write!(out, ": destroyed")?,
        Some("would_destroy") => write!(out, ": would be destroyed")?,
        Some("excepted") => write!(out, ": left alone")?,
        Some("rate_limited") => write!(out, ": has to wait for its turn")?,
        Some("gone") => write!(out, ": had ended by itself")?,
        Some("failed") => write!(out, ": could not be destroyed")?,
        Some(result) => write!(out, ": {}", escape(result))?,
        None => {}
    }
    if let Some(why) = record.text("why") {
        write!(out, " ({})", escape(why))?;
    }
    match record.flag("port_freed") {
        Some(true) => write!(out, "; its port is free"),
        Some(false) => write!(out, "; it keeps its port until it is closed"),
        None => Ok(()),
    }
}

//! Message of `started`: version, kernel, attached hooks and limits.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, escape};

pub(crate) const FORMAT: EventFormat = EventFormat {
    event: "started",
    label: "started",
    severity: Severity::Notice,
    message,
    details: Some(details),
};

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    write!(out, "selfconn {}", escape(record.text("version").unwrap_or("?")))?;
    if let Some(pid) = record.number("pid") {
        write!(out, " [{pid}]")?;
    }
    write!(out, " on kernel {}", escape(record.text("kernel").unwrap_or("?")))
}

fn details(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    let hooks: Vec<_> = record.objects("hooks").collect();
    for statuses in hooks.chunk_by(|one, next| one.text("hook") == next.text("hook")) {
        let live: Vec<_> = statuses.iter().filter_map(|status| status.text("method")).collect();
        let how = match &live[..] {
            [] => "not attached".to_owned(),
            live => format!("attached by {}", escape(&live.join(" and "))),
        };
        write!(out, "\n    {}: {how}", escape(statuses[0].text("hook").unwrap_or("?")))?;
        for refused in statuses.iter().flat_map(|status| status.objects("refused")) {
            let text = |key| escape(refused.text(key).unwrap_or("?"));
            write!(out, "\n        {} {}", text("method"), text("why"))?;
        }
    }
    if let Some(binds) = record.object("binds") {
        match binds.text("method") {
            Some(method) => write!(out, "\n    failed binds: observed by {}", escape(method))?,
            None => write!(out, "\n    failed binds: not observed")?,
        }
        for refused in binds.objects("refused") {
            let text = |key| escape(refused.text(key).unwrap_or("?"));
            write!(out, "\n        {} {}", text("method"), text("why"))?;
        }
    }
    for limit in record.texts("limits") {
        write!(out, "\n    limit: {}", escape(limit))?;
    }
    Ok(())
}

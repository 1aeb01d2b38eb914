//! Events as people read them: one line each, and nothing in it that moves a cursor or turns text around.

use std::{fmt::Write as _, time::Duration};

use jiff::Timestamp;

use crate::event::{Ended, Event, Losses, Lost, Moved, Started, Stopped, Subject, What};

/// Appends an event as a line for people; `started` may take several.
pub fn line(event: &Event, out: &mut Vec<u8>) {
    let mut text = String::with_capacity(160);
    let written = render(event, &mut text);
    debug_assert!(written.is_ok(), "writing to a String does not fail");
    out.extend_from_slice(text.as_bytes());
    out.push(b'\n');
}

fn render(event: &Event, out: &mut String) -> std::fmt::Result {
    write!(out, "{}  ", clock(event.time))?;
    match &event.what {
        What::Started(started) => render_started(started, out),
        What::Established(subject) => {
            write!(out, "ESTABLISHED  ")?;
            render_subject(subject, out)?;
            write!(out, " is connected to itself")?;
            match subject.cause {
                Some("ephemeral") => write!(out, "; connect() chose its port")?,
                Some(_) => write!(out, "; it had bound its port")?,
                None => {}
            }
            match (subject.isn, subject.peer_isn) {
                (Some(isn), Some(peer)) if isn == peer => write!(out, "; one ISN, {isn}")?,
                (Some(isn), Some(peer)) => write!(out, "; ISNs {isn} and {peer}")?,
                _ => {}
            }
            Ok(())
        }
        What::State(moved) => {
            let Moved { subject, from, to } = &**moved;
            write!(out, "state        ")?;
            render_subject(subject, out)?;
            write!(out, " {from} -> {to}")
        }
        What::Closed(ended) => render_closed(ended, out),
        What::Lost(Lost { r#where, count }) => {
            write!(out, "LOST         {count} ({where})", r#where = r#where)
        }
        What::Stopped(stopped) => render_stopped(stopped, out),
    }
}

fn render_started(started: &Started, out: &mut String) -> std::fmt::Result {
    write!(
        out,
        "started      selfconn {} [{}] on kernel {}",
        started.version,
        started.pid,
        escape(&started.kernel)
    )?;
    for statuses in started.hooks.chunk_by(|one, next| one.hook == next.hook) {
        let live: Vec<_> = statuses.iter().filter_map(|status| status.method).collect();
        let how = if live.is_empty() {
            "not attached".to_owned()
        } else {
            format!("live by {}", live.join(" and "))
        };
        write!(out, "\n    {}: {how}", statuses[0].hook)?;
        for refused in statuses.iter().flat_map(|status| &status.refused) {
            write!(out, "\n        {} {}", refused.method, escape(&refused.why))?;
        }
    }
    for limit in &started.limits {
        write!(out, "\n    limit: {}", escape(limit))?;
    }
    Ok(())
}

fn render_closed(ended: &Ended, out: &mut String) -> std::fmt::Result {
    write!(out, "closed       ")?;
    render_subject(&ended.subject, out)?;
    match ended.duration_ns {
        Some(ns) => write!(out, " after {}", duration(ns))?,
        None => write!(out, " after an unknown time")?,
    }
    if let (Some(sent), Some(received)) = (ended.bytes_sent, ended.bytes_received) {
        write!(out, ", {sent} B sent, {received} B received")?;
    }
    match ended.how {
        Some("fin") => write!(out, ", in order")?,
        Some("rst") => write!(out, ", by a reset")?,
        Some(how) => write!(out, ", {how}")?,
        None => {}
    }
    match ended.port_blocked_until {
        Some(until) => write!(out, "; TIME_WAIT holds the port until {}", clock(until)),
        None => Ok(()),
    }
}

fn render_stopped(stopped: &Stopped, out: &mut String) -> std::fmt::Result {
    write!(out, "stopped      {} events", stopped.made)?;
    if let Some(written) = stopped.written {
        write!(out, ", {written} in the log")?;
    }
    let Losses { ring, missed, log } = stopped.lost;
    write!(out, ", lost {ring} transitions and {log} events, missed {missed}; {} still open", stopped.open)
}

fn render_subject(subject: &Subject, out: &mut String) -> std::fmt::Result {
    let Subject { addr, port, .. } = subject;
    let (open, close) = if addr.contains(':') { ("[", "]") } else { ("", "") };
    write!(out, "{open}{addr}{close}:{port} ")?;
    match (&subject.comm, subject.pid) {
        (Some(comm), Some(pid)) => write!(out, "{}[{pid}]", escape(comm)),
        (None, Some(pid)) => write!(out, "[{pid}]"),
        _ => write!(out, "an unknown process"),
    }
}

/// Seconds of UTC; the date is in the JSON.
fn clock(time: Timestamp) -> String {
    jiff::tz::TimeZone::UTC.to_datetime(time).strftime("%H:%M:%S.%6fZ").to_string()
}

/// A length of time in the two units that matter.
#[must_use]
pub fn duration(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    match seconds {
        0..60 => format!("{:.1?}", Duration::from_nanos(ns)),
        60..3_600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

/// Makes control and format characters visible, and a backslash unambiguous.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\'' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_moves_the_cursor_or_turns_text_reaches_a_terminal() {
        for (raw, safe) in [
            ("nginx", "nginx"),
            ("a b", "a b"),
            ("\n{\"event\":\"fake\"}", "\\n{\"event\":\"fake\"}"),
            ("\u{1b}[31mred", "\\u{1b}[31mred"),
            ("\u{202e}txt.exe", "\\u{202e}txt.exe"),
            ("\u{200b}", "\\u{200b}"),
            ("\u{feff}", "\\u{feff}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("back\\slash", "back\\\\slash"),
            ("größe 大", "größe 大"),
        ] {
            assert_eq!(escape(raw), safe);
        }
    }

    #[test]
    fn durations_have_the_units_that_matter() {
        for (ns, text) in [
            (1_500, "1.5µs"),
            (2_000_000, "2.0ms"),
            (1_200_000_000, "1.2s"),
            (61_000_000_000, "1m1s"),
            (11_520_000_000_000, "3h12m"),
            (90_000_000_000_000, "1d1h"),
        ] {
            assert_eq!(duration(ns), text);
        }
    }
}

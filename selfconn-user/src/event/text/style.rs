//! An event as one line of a terminal: in columns, and in colour if the terminal supports it.

use std::{fmt::Write as _, io::IsTerminal};

use anstyle::AnsiColor;
use jiff::tz::TimeZone;

use super::{EventFormat, LogRecord, Severity};

/// Width of the first column of a message: an IPv4 address and a port.
const COLUMN: usize = 21;

/// Styling of event lines.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    pub colour: bool,
}

impl Style {
    /// Colour on a terminal that supports it, unless NO_COLOR is set (<https://no-color.org>).
    pub fn for_output(out: &impl IsTerminal) -> Self {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { colour: out.is_terminal() && !is_set("NO_COLOR") && !is_dumb }
    }

    /// Appends an event without a newline. `label` replaces the usual label of the event.
    pub fn line(self, format: &EventFormat, record: LogRecord<'_>, label: Option<&str>, out: &mut String) {
        let written = self.write(format, record, label, out);
        debug_assert!(written.is_ok(), "writing to a String does not fail");
    }

    fn write(
        self,
        format: &EventFormat,
        record: LogRecord<'_>,
        label: Option<&str>,
        out: &mut String,
    ) -> std::fmt::Result {
        let (dim, emphasis) =
            (self.apply(anstyle::Style::new().dimmed()), self.apply(severity_style(format.severity)));
        match record.time() {
            Some(time) => {
                let time = TimeZone::UTC.to_datetime(time).strftime("%Y-%m-%d %H:%M:%S.%3fZ");
                write!(out, "{dim}{time}{dim:#}  ")?;
            }
            // Same width as a time.
            None => write!(out, "{dim}{:24}{dim:#}  ", "?")?,
        }
        write!(out, "{emphasis}{:<12}{emphasis:#} ", label.unwrap_or(format.label))?;
        align_columns(&format.message(record), out);
        Ok(())
    }

    fn apply(self, style: anstyle::Style) -> anstyle::Style {
        if self.colour { style } else { anstyle::Style::new() }
    }
}

fn severity_style(severity: Severity) -> anstyle::Style {
    match severity {
        Severity::Error => AnsiColor::Red.on_default().bold(),
        Severity::Warning => AnsiColor::Yellow.on_default().bold(),
        Severity::Notice => anstyle::Style::new(),
        Severity::Info => anstyle::Style::new().dimmed(),
    }
}

/// Replaces the tab of a message, if it has one, with padding up to the second column. A tab in a process
/// name is already escaped.
pub(in crate::event) fn align_columns(message: &str, out: &mut String) {
    match message.split_once('\t') {
        Some((first, rest)) => {
            out.push_str(first);
            out.extend(std::iter::repeat_n(' ', COLUMN.saturating_sub(first.chars().count()) + 1));
            out.push_str(rest);
        }
        None => out.push_str(message),
    }
}

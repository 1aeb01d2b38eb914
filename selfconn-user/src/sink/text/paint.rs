//! An event as one line of a terminal: in columns, and in colour where that is wanted.

use std::{fmt::Write as _, io::IsTerminal};

use anstyle::{AnsiColor, Style};
use jiff::tz::TimeZone;

use super::{Record, Severity, kind_of};

/// How wide the first column of a sentence is: an IPv4 address and a port.
const COLUMN: usize = 21;

/// Makes lines.
#[derive(Clone, Copy, Debug)]
pub struct Painter {
    /// In colour.
    pub colour: bool,
}

impl Painter {
    /// Colour on a terminal that can show it, unless the user wants none (<https://no-color.org>).
    pub fn of(out: &impl IsTerminal) -> Self {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { colour: out.is_terminal() && !is_set("NO_COLOR") && !is_dumb }
    }

    /// Appends an event, without a newline. `word` stands for the word of its kind where that is not the right one.
    pub fn line(self, record: Record<'_>, word: Option<&str>, out: &mut String) {
        let written = self.write(record, word, out);
        debug_assert!(written.is_ok(), "writing to a String does not fail");
    }

    fn write(self, record: Record<'_>, word: Option<&str>, out: &mut String) -> std::fmt::Result {
        let kind = kind_of(record);
        let (dim, loud) = (self.style(Style::new().dimmed()), self.style(style(kind.severity)));
        match record.time() {
            Some(time) => {
                let time = TimeZone::UTC.to_datetime(time).strftime("%Y-%m-%d %H:%M:%S.%3fZ");
                write!(out, "{dim}{time}{dim:#}  ")?;
            }
            // As wide.
            None => write!(out, "{dim}{:24}{dim:#}  ", "?")?,
        }
        write!(out, "{loud}{:<12}{loud:#} ", word.unwrap_or(kind.word))?;
        let mut sentence = String::with_capacity(120);
        (kind.sentence)(record, &mut sentence)?;
        in_columns(&sentence, out);
        Ok(())
    }

    fn style(self, style: Style) -> Style {
        if self.colour { style } else { Style::new() }
    }
}

fn style(severity: Severity) -> Style {
    match severity {
        Severity::Error => AnsiColor::Red.on_default().bold(),
        Severity::Warning => AnsiColor::Yellow.on_default().bold(),
        Severity::Notice => Style::new(),
        Severity::Info => Style::new().dimmed(),
    }
}

/// Pads the part of a sentence before its tab, if it has one. A tab of a process's name has been escaped.
pub(super) fn in_columns(sentence: &str, out: &mut String) {
    match sentence.split_once('\t') {
        Some((first, rest)) => {
            out.push_str(first);
            out.extend(std::iter::repeat_n(' ', COLUMN.saturating_sub(first.chars().count()) + 1));
            out.push_str(rest);
        }
        None => out.push_str(sentence),
    }
}

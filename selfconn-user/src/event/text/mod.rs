//! What the texts of all events share: access to the JSON object of an event, escaping, units, columns and
//! colour. Text that a process chose is escaped, so that it cannot move the cursor or reverse the text
//! direction. Nothing here knows a particular event.

mod escape;
mod record;
mod style;
pub(super) mod subject;
mod units;

pub use escape::escape;
pub use record::{JsonFields, LogRecord, parse};
pub use style::Style;
pub(super) use style::align_columns;
pub(crate) use units::group_thousands;
pub use units::{duration, optional_rfc3339, rfc3339, utc_time};

/// How the events of one name are rendered as text.
#[derive(Debug)]
pub struct EventFormat {
    /// The name in the field `event`.
    pub event: &'static str,
    /// Shown before the message, at most 12 characters. In capitals if an operator should look at the event.
    pub label: &'static str,
    pub severity: Severity,
    /// Appends the rest of the line. A tab ends the first column. Must escape text that a process chose, and
    /// must not mention an unknown field.
    pub message: fn(LogRecord<'_>, &mut String) -> std::fmt::Result,
    /// Appends further lines for outputs that allow them. Each begins with a line break and four spaces.
    pub details: Option<fn(LogRecord<'_>, &mut String) -> std::fmt::Result>,
}

/// Severities with their syslog numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something is broken or was lost.
    Error = 3,
    /// An operator should look at it.
    Warning = 4,
    /// Normal but significant.
    Notice = 5,
    Info = 6,
}

impl Severity {
    /// The name in the field `severity`, which has three levels, as alerts have.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "critical",
            Self::Warning => "warning",
            Self::Notice | Self::Info => "info",
        }
    }
}

impl EventFormat {
    /// The message, with a tab after its first column if it has columns.
    #[must_use]
    pub fn message(&self, record: LogRecord<'_>) -> String {
        let mut message = String::with_capacity(120);
        let written = (self.message)(record, &mut message);
        debug_assert!(written.is_ok(), "writing to a String does not fail");
        message
    }
}

//! The event `state`: a self-connection changed its TCP state.

use std::fmt::Write as _;

use schemars::JsonSchema;
use selfconn_ebpf::state;
use serde::Serialize;

use super::connection::ConnectionFields;
use super::text::{EventFormat, LogRecord, Severity, escape, subject};

/// `state`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct StateChange {
    /// The self-connection.
    #[serde(flatten)]
    pub connection: ConnectionFields,
    /// Kernel name of the previous state.
    pub from: &'static str,
    /// Kernel name of the new state.
    pub to: &'static str,
}

impl StateChange {
    /// `from` and `to` are the kernel's state numbers.
    #[must_use]
    pub fn new(connection: ConnectionFields, from: u8, to: u8) -> Self {
        Self { connection, from: state::name(from), to: state::name(to) }
    }
}

pub(super) const FORMAT: EventFormat =
    EventFormat { event: "state", label: "state", severity: Severity::Info, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    let name = |key| escape(record.text(key).unwrap_or("?"));
    subject::write(record, out)?;
    write!(out, " {} -> {}", name("from"), name("to"))
}

#[cfg(test)]
mod tests {
    use crate::event::tests::assert_rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[(
            r#"{"event":"state","addr":"127.0.0.1","port":80,"pid":7,"from":"SYN_SENT","to":"SYN_RECV"}"#,
            "state        127.0.0.1:80          [7] SYN_SENT -> SYN_RECV",
        )]);
    }
}

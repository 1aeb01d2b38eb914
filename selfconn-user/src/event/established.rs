//! The event `established`: a self-connection is ESTABLISHED. Its fields are the fields of the connection.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, subject};

pub(super) const FORMAT: EventFormat = EventFormat {
    event: "established",
    label: "ESTABLISHED",
    severity: Severity::Warning,
    message,
    details: None,
};

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    write!(out, " is connected to itself")?;
    match record.text("cause") {
        Some("ephemeral") => write!(out, "; connect() chose its port")?,
        Some("bound") => write!(out, "; its port was bound before connect()")?,
        _ => {}
    }
    match (record.number("isn"), record.number("peer_isn")) {
        (Some(isn), Some(peer)) if isn == peer => write!(out, "; both ISNs {isn}"),
        (Some(isn), Some(peer)) => write!(out, "; ISNs {isn} and {peer}"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::event::tests::assert_rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[
            (
                r#"{"time":"2026-11-22T23:09:58.5793Z","event":"established","addr":"127.0.0.1","port":38160,
                    "comm":"nginx","pid":7,"cause":"ephemeral","isn":5,"peer_isn":5}"#,
                "23:09:58.579300Z  ESTABLISHED  127.0.0.1:38160       nginx[7] is connected to itself; connect() \
                 chose its port; both ISNs 5",
            ),
            (
                r#"{"event":"established","addr":"::1","port":80,"comm":null,"pid":null,"cause":null}"#,
                "ESTABLISHED  [::1]:80              an unknown process is connected to itself",
            ),
            (
                r#"{"event":"established","addr":"127.0.0.1","port":80,"pid":7,"cause":"bound","isn":1,"peer_isn":2}"#,
                "ESTABLISHED  127.0.0.1:80          [7] is connected to itself; its port was bound before connect(); ISNs 1 and 2",
            ),
            (
                r#"{"event":"established","addr":"fe80::1","device":"br\n0","port":2049,"pid":7,"comm":"kworker/1:1",
                    "kernel_socket":true}"#,
                "ESTABLISHED  [fe80::1%br\\n0]:2049  the kernel, by kworker/1:1[7] is connected to itself",
            ),
        ]);
    }
}

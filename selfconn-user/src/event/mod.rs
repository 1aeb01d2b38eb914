//! The public event schema: the JSON object of one line of the event log. Every field is documented in
//! docs/events.md, and fields are only ever added. An unknown value is `null`, never a guess.
//!
//! Each event has a file with its schema, which converts internal state, and its text. The text is made only
//! from the JSON object of the event. Therefore an event of this run, an event from a log, and an event of a
//! newer version take the same path, and `run` and `tail` show the same text. `text` has what the texts
//! share and knows no event. Writing events is the business of `output`.

use std::fmt::Write as _;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

pub use at_risk::{AtRisk, AtRiskOver};
pub use blocked::{Blocked, CurrentHolder, blocked_id};
pub use closed::Closed;
pub use connection::{ConnectionFields, connection_id};
pub use envelope::{Envelope, EventNumber};
pub use loss::{LossCause, LossKind, Losses};
pub use lost::Lost;
pub use prevented::{Prevented, PreventedFields};
pub use remedied::Remedied;
pub use started::{GuardStatus, HookStatus, MethodStatus, RefusedMethod, Started};
pub use state::StateChange;
pub use stopped::{ProgramCounters, Stopped};
use text::{EventFormat, JsonFields, LogRecord};
pub use unguarded::Unguarded;

use crate::budget::{
    cmdline::CmdlineLimit,
    log::{LogRequest, Phase},
};

mod at_risk;
mod blocked;
mod closed;
mod connection;
pub mod envelope;
mod established;
pub mod loss;
mod lost;
mod prevented;
mod remedied;
mod started;
mod state;
mod stopped;
pub mod text;
mod unguarded;
mod unknown;

/// One event, which is one line of the event log.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Event {
    /// Time of the event, UTC.
    #[serde(serialize_with = "text::rfc3339")]
    #[schemars(with = "String")]
    pub time: Timestamp,
    /// Its number in the run, from 1.
    #[serde(skip)]
    pub seq: u64,
    /// The event's name and its other fields.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// The kinds of events. The variant's name in snake case is the JSON field `event`.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// The hooks are attached.
    Started(Started),
    /// A self-connection is ESTABLISHED.
    Established(Box<ConnectionFields>),
    /// A self-connection changed its TCP state. Only with `--states`.
    State(Box<StateChange>),
    /// The socket of a self-connection is gone.
    Closed(Box<Closed>),
    /// `--remedy` acted on a self-connection, or would have acted on it.
    Remedied(Box<Remedied>),
    /// A process keeps connecting to a closed local port, and such an attempt can become a self-connection.
    AtRisk(Box<AtRisk>),
    /// The attempts stopped, or they can no longer become a self-connection.
    AtRiskOver(Box<AtRiskOver>),
    /// A server could not bind a port because a self-connection holds it.
    Blocked(Box<Blocked>),
    /// The guard refused connects of a process to itself, or would have.
    Prevented(Box<Prevented>),
    /// In a network namespace the guard refuses nothing, or not for certain.
    Unguarded(Unguarded),
    /// Something was not observed or not written.
    Lost(Lost),
    /// The run ends.
    Stopped(Stopped),
}

impl EventKind {
    /// Whose share of the log the event takes, and what it is to the connection or the port that it is about. `None`:
    /// events whose number has another bound.
    #[must_use]
    pub fn log_request(&self) -> Option<LogRequest<'_>> {
        let (fields, phase) = match self {
            Self::Blocked(blocked) => return Some(blocked.log_request()),
            Self::AtRisk(at_risk) => return Some(at_risk.connects.log_request(Phase::AtRisk)),
            Self::AtRiskOver(over) => return Some(over.connects.log_request(Phase::AtRiskOver)),
            Self::Prevented(prevented) => (prevented.connection.known()?, Phase::Alone),
            Self::Established(fields) => (&**fields, Phase::Established),
            Self::State(change) => {
                let ends = change.to == selfconn_ebpf::state::name(selfconn_ebpf::state::CLOSE);
                (&change.connection, Phase::State { ends })
            }
            Self::Closed(closed) => (&closed.connection, Phase::Closed),
            Self::Remedied(remedied) => {
                let is_final = !matches!(remedied.result, "excepted" | "rate_limited");
                (&remedied.connection, Phase::Remedied { is_final })
            }
            _ => return None,
        };
        Some(LogRequest {
            id: fields.id.as_deref()?,
            owner: fields.share_owner(),
            other_owner: None,
            payer: fields.payer(),
            program: fields.exe.as_deref().or(fields.comm.as_deref()),
            port: fields.port,
            phase,
        })
    }

    fn format(&self) -> &'static EventFormat {
        match self {
            Self::Started(_) => &started::FORMAT,
            Self::Established(_) => &established::FORMAT,
            Self::State(_) => &state::FORMAT,
            Self::Closed(_) => &closed::FORMAT,
            Self::Remedied(_) => &remedied::FORMAT,
            Self::AtRisk(_) => &at_risk::FORMAT,
            Self::AtRiskOver(_) => &at_risk::OVER_FORMAT,
            Self::Blocked(_) => &blocked::FORMAT,
            Self::Prevented(_) => &prevented::FORMAT,
            Self::Unguarded(_) => &unguarded::FORMAT,
            Self::Lost(_) => &lost::FORMAT,
            Self::Stopped(_) => &stopped::FORMAT,
        }
    }

    /// Cuts the command line that the event has.
    pub fn limit_cmdline(&mut self, limit: CmdlineLimit) {
        let fields = match self {
            Self::Established(fields) => &mut **fields,
            Self::State(change) => &mut change.connection,
            Self::Closed(closed) => &mut closed.connection,
            Self::Remedied(remedied) => &mut remedied.connection,
            Self::Blocked(blocked) => {
                for process in blocked.processes_mut() {
                    process.cmdline_truncated |= limit.apply(&mut process.cmdline);
                }
                return;
            }
            Self::Prevented(prevented) => match &mut prevented.connection {
                PreventedFields::Known(fields) => fields,
                PreventedFields::Unknown(_) => return,
            },
            _ => return,
        };
        fields.cmdline_truncated |= limit.apply(&mut fields.cmdline);
    }
}

/// The formats of all events that this version knows.
pub const FORMATS: [&EventFormat; 12] = [
    &started::FORMAT,
    &established::FORMAT,
    &state::FORMAT,
    &closed::FORMAT,
    &remedied::FORMAT,
    &at_risk::FORMAT,
    &at_risk::OVER_FORMAT,
    &blocked::FORMAT,
    &prevented::FORMAT,
    &unguarded::FORMAT,
    &lost::FORMAT,
    &stopped::FORMAT,
];

/// The format for this event. An event of a newer version is rendered as a list of its fields.
#[must_use]
pub fn format_of(record: LogRecord<'_>) -> &'static EventFormat {
    FORMATS.into_iter().find(|format| format.event == record.event()).unwrap_or(&unknown::FORMAT)
}

impl Event {
    /// Appends the event as one JSON line.
    pub fn write_json_line(&self, envelope: &Envelope, out: &mut Vec<u8>) {
        let start = out.len();
        let written = serde_json::to_writer(&mut *out, self);
        match (written, out.pop()) {
            (Ok(()), Some(b'}')) => envelope.end_line(self.number(), out),
            // Impossible with a schema of strings and numbers. A partial line must never remain in the output.
            (outcome, _) => {
                out.truncate(start);
                log::error!("cannot serialize an event as a JSON object: {outcome:?}");
            }
        }
    }

    /// The JSON object that a reader of the log gets.
    #[must_use]
    pub fn to_json_fields(&self, envelope: &Envelope) -> JsonFields {
        let mut fields = json_fields(self);
        envelope.extend(self.number(), &mut fields);
        fields
    }

    fn number(&self) -> EventNumber {
        EventNumber { seq: self.seq, severity: self.kind.format().severity }
    }
}

fn json_fields(object: &impl Serialize) -> JsonFields {
    match serde_json::to_value(object) {
        Ok(Value::Object(fields)) => fields,
        // Impossible with a schema of strings and numbers.
        _ => JsonFields::new(),
    }
}

/// Renders an event as text with its detail lines.
#[must_use]
pub fn render(record: LogRecord<'_>) -> String {
    let format = format_of(record);
    let mut out = String::with_capacity(160);
    if let Some(time) = record.time() {
        out.push_str(&text::utc_time(time));
        out.push_str("  ");
    }
    let written = write!(out, "{:<12} ", format.label).and_then(|()| {
        text::align_columns(&format.message(record), &mut out);
        format.details.map_or(Ok(()), |details| details(record, &mut out))
    });
    debug_assert!(written.is_ok(), "writing to a String does not fail");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::system::identity::Identity;

    /// Compares JSON events with their rendered lines.
    pub(super) fn assert_rendered(lines: &[(&str, &str)]) {
        for (json, line) in lines {
            assert_eq!(render(LogRecord::new(&text::parse(json.as_bytes()).unwrap())), *line);
        }
    }

    #[test]
    fn every_output_has_the_same_envelope_and_it_ends_the_line() {
        let identity = Identity {
            host: "a\"b\u{7f}\n".to_owned(),
            machine_id: Some("0f".to_owned()),
            boot_id: None,
            run: 0x1a,
        };
        let envelope = Envelope::new(&identity);
        for (kind, severity) in [
            (EventKind::Established(Box::new(ConnectionFields::sample())), "warning"),
            (EventKind::Lost(Lost::new(LossCause::Ring, 1, None)), "critical"),
        ] {
            let event = Event { time: Timestamp::UNIX_EPOCH, seq: 7, kind };
            let mut line = b"before\n".to_vec();
            event.write_json_line(&envelope, &mut line);
            let line = String::from_utf8(line).unwrap();
            let end = format!(
                r#","severity":"{severity}","seq":7,"schema":"selfconn/1","host":"a\"b{}\n","machine_id":"0f","boot_id":null,"run":"1a"}}"#,
                '\u{7f}'
            );
            assert!(line.starts_with("before\n{\"time\":") && line.ends_with(&(end + "\n")), "{line}");
            let read_back = text::parse(line.lines().nth(1).unwrap().as_bytes()).unwrap();
            assert_eq!(read_back, event.to_json_fields(&envelope));
            assert!(envelope::KEYS.iter().all(|key| read_back.contains_key(*key)));
            let names = line.matches("\":").count();
            assert_eq!(names, read_back.len(), "no field twice, and no object inside: {line}");
        }
    }

    #[test]
    fn every_documented_event_has_a_format() {
        let page = include_str!("../../../docs/events.md");
        let table = page.split("| `event` | when |").nth(1).unwrap();
        let rows = table.lines().skip(2).take_while(|row| row.starts_with("| ["));
        let documented: Vec<_> = rows.filter_map(|row| row.split('`').nth(1)).collect();
        assert_eq!(FORMATS.map(|format| format.event)[..], documented[..]);
    }

    #[test]
    fn a_field_of_an_unexpected_type_is_unknown() {
        assert_rendered(&[(
            r#"{"time":7,"event":"lost","where":["ring"],"count":"many"}"#,
            "LOST         an unknown number (unknown place)",
        )]);
    }
}

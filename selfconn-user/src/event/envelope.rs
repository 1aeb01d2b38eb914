//! What every event has beside its own fields: where it is from, its number in the run, and its severity. The part
//! that is the same in all events of a run is made once, as the end of a JSON line. No event's file has to know of it.

use std::io::Write as _;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::text::{JsonFields, Severity};
use crate::system::identity::Identity;

/// Name and version of the schema. The version changes only if a field changes its meaning or goes.
pub const SCHEMA: &str = "selfconn/1";

/// The names of these fields, in the order of a line.
pub const KEYS: [&str; 7] = ["severity", "seq", "schema", "host", "machine_id", "boot_id", "run"];

/// The fields that all events of a run share.
#[derive(Debug, Serialize, JsonSchema)]
struct RunFields<'a> {
    /// Name and version of the schema.
    schema: &'static str,
    /// Name of the host.
    host: &'a str,
    /// Id of the machine, for this application.
    machine_id: Option<&'a str>,
    /// Id of the boot, as the journal writes it.
    boot_id: Option<&'a str>,
    /// Identifies the run of the daemon on this boot.
    run: String,
}

/// A line as its readers see it. It is written in two parts, and this describes both.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub struct EventLine<'a> {
    #[schemars(flatten)]
    event: super::Event,
    /// `critical`: something was lost or is broken. `warning`: somebody should look at it.
    severity: SeverityName,
    /// Number of the event in its run, from 1. An event that is lost has a number, too.
    seq: u64,
    #[schemars(flatten)]
    run: RunFields<'a>,
}

#[derive(JsonSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its schema is used")]
enum SeverityName {
    Info,
    Warning,
    Critical,
}

/// The envelope of the events of a run.
#[derive(Debug)]
pub struct Envelope {
    run: u64,
    fields: JsonFields,
    /// The same as the end of a line.
    line_end: Vec<u8>,
}

/// The number of an event in its run, and its severity.
#[derive(Clone, Copy, Debug)]
pub struct EventNumber {
    /// 1 for the first event. An event that is lost has a number, too, so that a gap shows.
    pub seq: u64,
    pub severity: Severity,
}

impl Envelope {
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let fields = RunFields {
            schema: SCHEMA,
            host: &identity.host,
            machine_id: identity.machine_id.as_deref(),
            boot_id: identity.boot_id.as_deref(),
            run: format!("{:x}", identity.run),
        };
        // Neither can fail with strings.
        let json = serde_json::to_vec(&fields).unwrap_or_default();
        let line_end = [b",", json.strip_prefix(b"{").unwrap_or_default(), b"\n"].concat();
        let fields = super::json_fields(&fields);
        Self { run: identity.run, fields, line_end }
    }

    /// Identifies the run.
    #[must_use]
    pub fn run(&self) -> u64 {
        self.run
    }

    /// Completes a JSON object, from which the last brace is taken off, to a line.
    pub(super) fn end_line(&self, number: EventNumber, out: &mut Vec<u8>) {
        let EventNumber { seq, severity } = number;
        let written = write!(out, r#","severity":"{}","seq":{seq}"#, severity.name());
        debug_assert!(written.is_ok(), "writing to a Vec does not fail");
        out.extend_from_slice(&self.line_end);
    }

    /// Adds the same to the fields of an event.
    pub(super) fn extend(&self, number: EventNumber, fields: &mut JsonFields) {
        fields.insert("severity".to_owned(), number.severity.name().into());
        fields.insert("seq".to_owned(), Value::from(number.seq));
        fields.extend(self.fields.clone());
    }
}

/// The id of something that events are about: unique on this boot. `kind` is empty for a connection.
pub(super) fn id(run: u64, kind: &str, number: u64) -> String {
    format!("{run:x}-{kind}{number:x}")
}

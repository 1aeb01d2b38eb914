//! The event `prevented`: the guard refused connects of a process to itself, or would have.

use std::{borrow::Cow, fmt::Write as _, sync::LazyLock};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::connection::ConnectionFields;
use super::envelope;
use super::text::{EventFormat, LogRecord, Severity, subject};

/// `prevented`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Prevented {
    /// The newest attempt. What is null of it is unknown; if everything is, the records of these attempts are lost.
    #[serde(flatten)]
    pub connection: PreventedFields,
    /// `refuse` or `dry-run`.
    pub mode: &'static str,
    /// Attempts of this process at this port since the last such event.
    pub count: u64,
}

/// The fields of the attempt.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum PreventedFields {
    Known(Box<ConnectionFields>),
    Unknown(UnknownAttempt),
}

impl PreventedFields {
    /// Without them, the number of events has another bound: one each time the programs' counters are read.
    pub(super) fn known(&self) -> Option<&ConnectionFields> {
        match self {
            Self::Known(fields) => Some(fields),
            Self::Unknown(_) => None,
        }
    }
}

/// The fields of a connection of which nothing is known: those of [`ConnectionFields`], by its schema. A boolean is
/// false, the rest is null.
#[derive(Debug)]
pub struct UnknownAttempt {
    /// Identifier of the event.
    id: String,
}

/// The names and the schemas of the fields of [`ConnectionFields`].
static CONNECTION_PROPERTIES: LazyLock<Map<String, Value>> = LazyLock::new(|| {
    let mut schema = SchemaGenerator::default().into_root_schema_for::<ConnectionFields>();
    match schema.remove("properties") {
        Some(Value::Object(properties)) => properties,
        _ => Map::new(),
    }
});

fn is_boolean(property: &Value) -> bool {
    property.get("type").is_some_and(|name| name == "boolean")
}

impl Serialize for UnknownAttempt {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(CONNECTION_PROPERTIES.iter().map(|(name, property)| {
            let value = match name.as_str() {
                "id" => Value::from(self.id.as_str()),
                _ if is_boolean(property) => Value::Bool(false),
                _ => Value::Null,
            };
            (name, value)
        }))
    }
}

impl JsonSchema for UnknownAttempt {
    fn schema_name() -> Cow<'static, str> {
        "UnknownAttempt".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let properties: Map<_, _> = CONNECTION_PROPERTIES
            .iter()
            .map(|(name, property)| {
                let schema = match name.as_str() {
                    "id" => json!({ "type": "string", "description": "Identifier of the event." }),
                    _ if is_boolean(property) => json!({ "const": false }),
                    _ => json!({ "type": "null" }),
                };
                (name.clone(), schema)
            })
            .collect();
        let required: Vec<_> = properties.keys().cloned().collect();
        json_schema!({
            "description": "The fields of a connection of which nothing is known.",
            "type": "object",
            "properties": properties,
            "required": required,
        })
    }
}

impl Prevented {
    /// `number` counts these events in a run. `fields`: those of the newest attempt, if it is known.
    #[must_use]
    pub fn new(
        run: u64,
        number: u64,
        fields: Option<ConnectionFields>,
        mode: &'static str,
        count: u64,
    ) -> Self {
        let id = envelope::id(run, "p", number);
        let connection = match fields {
            Some(fields) => PreventedFields::Known(Box::new(ConnectionFields { id: Some(id), ..fields })),
            None => PreventedFields::Unknown(UnknownAttempt { id }),
        };
        Self { connection, mode, count }
    }
}

pub(super) const FORMAT: EventFormat = EventFormat {
    event: "prevented",
    label: "prevented",
    severity: Severity::Warning,
    message,
    details: None,
};

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    if record.number("port").is_some() {
        subject::write(record, out)?;
    } else {
        write!(out, "unknown processes")?;
    }
    let verb = if record.text("mode") == Some("dry-run") { "would be refused" } else { "refused" };
    write!(out, ": a connect to itself, {verb}")?;
    match record.number("count") {
        Some(count) if count > 1 => write!(out, "; {count} times"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::tests::assert_rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[
            (
                r#"{"event":"prevented","addr":"127.0.0.1","port":40000,"comm":"java","pid":7,"mode":"refuse","count":1}"#,
                "prevented    127.0.0.1:40000       java[7]: a connect to itself, refused",
            ),
            (
                r#"{"event":"prevented","addr":"::1","port":80,"comm":"a\u001b","pid":7,"mode":"dry-run","count":12}"#,
                "prevented    [::1]:80              a\\u{1b}[7]: a connect to itself, would be refused; 12 times",
            ),
            (
                r#"{"event":"prevented","addr":null,"port":null,"pid":null,"mode":"refuse","count":3}"#,
                "prevented    unknown processes: a connect to itself, refused; 3 times",
            ),
        ]);
    }

    #[test]
    fn an_unknown_attempt_has_the_fields_of_a_connection() {
        let keys = |value: Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
        let unknown = PreventedFields::Unknown(UnknownAttempt { id: String::new() });
        let known = PreventedFields::Known(Box::new(ConnectionFields::sample()));
        assert_eq!(keys(serde_json::to_value(unknown).unwrap()), keys(serde_json::to_value(known).unwrap()));
    }
}

//! Typed access to the JSON object of an event. The object may come from a newer version or from a damaged
//! log. A field that is missing, null or of an unexpected type is unknown.

use jiff::Timestamp;
use serde_json::{Map, Value};

/// A JSON object: the fields of an event by their names.
pub type JsonFields = Map<String, Value>;

/// The fields of an event, or of an object inside an event.
#[derive(Clone, Copy, Debug)]
pub struct LogRecord<'a>(&'a JsonFields);

/// Parses a line of a log. `None` if it is not a JSON object.
#[must_use]
pub fn parse(line: &[u8]) -> Option<JsonFields> {
    serde_json::from_slice(line).ok()
}

impl<'a> LogRecord<'a> {
    #[must_use]
    pub fn new(fields: &'a JsonFields) -> Self {
        Self(fields)
    }

    /// The name of the event. Empty if it has none.
    #[must_use]
    pub fn event(self) -> &'a str {
        self.text("event").unwrap_or_default()
    }

    #[must_use]
    pub fn time(self) -> Option<Timestamp> {
        self.timestamp("time")
    }

    /// A string, unescaped. It must be escaped with [`escape`](super::escape) before it is shown.
    #[must_use]
    pub fn text(self, key: &str) -> Option<&'a str> {
        self.0.get(key)?.as_str()
    }

    #[must_use]
    pub fn number(self, key: &str) -> Option<u64> {
        self.0.get(key)?.as_u64()
    }

    #[must_use]
    pub fn flag(self, key: &str) -> Option<bool> {
        self.0.get(key)?.as_bool()
    }

    #[must_use]
    pub fn timestamp(self, key: &str) -> Option<Timestamp> {
        self.text(key)?.parse().ok()
    }

    #[must_use]
    pub fn object(self, key: &str) -> Option<Self> {
        self.0.get(key)?.as_object().map(Self)
    }

    /// The objects in a list. Empty if the field is null.
    pub fn objects(self, key: &str) -> impl Iterator<Item = Self> {
        self.list(key).filter_map(Value::as_object).map(Self)
    }

    /// The strings in a list. Empty if the field is null.
    pub fn texts(self, key: &str) -> impl Iterator<Item = &'a str> {
        self.list(key).filter_map(Value::as_str)
    }

    /// All objects directly inside this object or inside one of its lists.
    pub fn nested_objects(self) -> impl Iterator<Item = Self> {
        let of = |value: &'a Value| match value {
            Value::Array(list) => list.as_slice(),
            other => std::slice::from_ref(other),
        };
        self.0.values().flat_map(of).filter_map(Value::as_object).map(Self)
    }

    fn list(self, key: &str) -> impl Iterator<Item = &'a Value> {
        self.0.get(key).and_then(Value::as_array).into_iter().flatten()
    }

    /// All fields with their names.
    pub fn fields(self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }
}

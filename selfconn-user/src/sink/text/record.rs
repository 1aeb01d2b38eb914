//! An event as it stands in a log: a JSON object, perhaps of a newer version, perhaps damaged. A field that is missing,
//! null or of another type is simply not known.

use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::event::Event;

/// The fields of an event, or of an object inside one.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a>(&'a Map<String, Value>);

/// What a line of a log says, if it is an object.
#[must_use]
pub fn parse(line: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(line).ok()
}

/// An event of our own, as it would be read back.
#[must_use]
pub fn reread(event: &Event) -> Map<String, Value> {
    match serde_json::to_value(event) {
        Ok(Value::Object(fields)) => fields,
        // Can't happen with a schema of strings and numbers.
        _ => Map::new(),
    }
}

impl<'a> Record<'a> {
    /// Looks at an object.
    #[must_use]
    pub fn new(fields: &'a Map<String, Value>) -> Self {
        Self(fields)
    }

    /// The event's name; empty where it has none.
    #[must_use]
    pub fn event(self) -> &'a str {
        self.text("event").unwrap_or_default()
    }

    /// When it happened.
    #[must_use]
    pub fn time(self) -> Option<Timestamp> {
        self.moment("time")
    }

    /// A string, as its process or kernel wrote it: not to be shown without [`escape`](super::escape).
    #[must_use]
    pub fn text(self, key: &str) -> Option<&'a str> {
        self.0.get(key)?.as_str()
    }

    /// A number.
    #[must_use]
    pub fn number(self, key: &str) -> Option<u64> {
        self.0.get(key)?.as_u64()
    }

    /// Yes or no.
    #[must_use]
    pub fn flag(self, key: &str) -> Option<bool> {
        self.0.get(key)?.as_bool()
    }

    /// A number that need not be whole.
    #[must_use]
    pub fn fraction(self, key: &str) -> Option<f64> {
        self.0.get(key)?.as_f64()
    }

    /// A point in time.
    #[must_use]
    pub fn moment(self, key: &str) -> Option<Timestamp> {
        self.text(key)?.parse().ok()
    }

    /// An object inside.
    #[must_use]
    pub fn object(self, key: &str) -> Option<Self> {
        self.0.get(key)?.as_object().map(Self)
    }

    /// The objects of a list; none where it is null.
    pub fn objects(self, key: &str) -> impl Iterator<Item = Self> {
        self.list(key).filter_map(Value::as_object).map(Self)
    }

    /// The strings of a list.
    pub fn texts(self, key: &str) -> impl Iterator<Item = &'a str> {
        self.list(key).filter_map(Value::as_str)
    }

    /// Every object inside, one by itself or in a list.
    pub fn parts(self) -> impl Iterator<Item = Self> {
        let of = |value: &'a Value| match value {
            Value::Array(list) => list.as_slice(),
            other => std::slice::from_ref(other),
        };
        self.0.values().flat_map(of).filter_map(Value::as_object).map(Self)
    }

    fn list(self, key: &str) -> impl Iterator<Item = &'a Value> {
        self.0.get(key).and_then(Value::as_array).into_iter().flatten()
    }

    /// Every field, by name.
    pub fn fields(self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }
}

//! Checks JSON against what `selfconn schema` prints. Stricter than a validator: a field that the schema does not have
//! is an error, and so is a keyword that this file does not know. The validators that are kept bring regular
//! expressions and Unicode tables, for a dozen keywords.

use std::{
    collections::{BTreeSet, HashMap},
    process::Command,
    sync::{Mutex, OnceLock},
};

use serde_json::{Map, Value};

use super::daemon::selfconn;

/// Panics unless the value is as the schema of `of` has it.
#[track_caller]
pub(crate) fn assert_valid(of: &'static str, value: &Value) {
    let root = schema(of);
    if let Err(error) = check(root, root, value) {
        panic!("{of}: {error}: {value}");
    }
}

/// Parses lines and checks each.
#[track_caller]
pub(crate) fn parse_line(of: &'static str, line: &str) -> Value {
    let value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert_valid(of, &value);
    value
}

/// The schema, as the binary prints it.
fn schema(of: &'static str) -> &'static Value {
    static SCHEMAS: OnceLock<Mutex<HashMap<&str, &'static Value>>> = OnceLock::new();
    let print = || {
        let output = Command::new(selfconn()).args(["schema", of]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        &*Box::leak(Box::new(serde_json::from_slice(&output.stdout).unwrap()))
    };
    SCHEMAS.get_or_init(Mutex::default).lock().unwrap().entry(of).or_insert_with(print)
}

/// Checks a value, and that each of its fields is described.
fn check(root: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let described = describe(root, schema, value)?;
    let unknown = value.as_object().into_iter().flat_map(Map::keys).find(|key| !described.contains(*key));
    unknown.map_or(Ok(()), |key| Err(format!("{key} is not in the schema")))
}

/// Checks a value. Returns the fields that this part of the schema describes.
fn describe(root: &Value, schema: &Value, value: &Value) -> Result<BTreeSet<String>, String> {
    let mut described = BTreeSet::new();
    // References come last, because most alternatives differ in a constant.
    for (keyword, argument) in schema.as_object().ok_or("a schema is an object")?.iter().rev() {
        match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "format" => {}
            "$ref" => {
                let path = argument.as_str().unwrap().trim_start_matches('#');
                described.append(&mut describe(root, root.pointer(path).ok_or("no such reference")?, value)?);
            }
            "type" => {
                let is_one = |name: &Value| name == type_name(value);
                if !argument.as_array().map_or_else(|| is_one(argument), |names| names.iter().any(is_one)) {
                    return Err(format!("{value} is not {argument}"));
                }
            }
            "const" if argument == value => {}
            "enum" if argument.as_array().unwrap().contains(value) => {}
            "minimum" if value.is_null() || value.as_u64() >= argument.as_u64() => {}
            "maximum" if value.as_u64() <= argument.as_u64() => {}
            "const" | "enum" | "minimum" | "maximum" => return Err(format!("{value}: {keyword} {argument}")),
            "required" => {
                let is_missing = |key: &&Value| value.get(key.as_str().unwrap()).is_none();
                if let Some(key) = argument.as_array().unwrap().iter().find(is_missing) {
                    return Err(format!("{key} is missing"));
                }
            }
            "properties" => {
                for (key, property) in argument.as_object().unwrap() {
                    described.insert(key.clone());
                    if let Some(value) = value.get(key) {
                        check(root, property, value).map_err(|error| format!("{key}: {error}"))?;
                    }
                }
            }
            "items" => {
                for item in value.as_array().into_iter().flatten() {
                    check(root, argument, item)?;
                }
            }
            "oneOf" | "anyOf" => {
                let choices = argument.as_array().unwrap().iter().map(|choice| describe(root, choice, value));
                let (fit, other): (Vec<_>, Vec<_>) = choices.partition(Result::is_ok);
                if fit.is_empty() || keyword == "oneOf" && fit.len() > 1 {
                    return Err(format!("{} of {keyword}: {other:?}", fit.len()));
                }
                fit.into_iter().flatten().for_each(|mut fields| described.append(&mut fields));
            }
            _ => return Err(format!("keyword {keyword}")),
        }
    }
    Ok(described)
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_u64() || number.is_i64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

//! docs/events.md has each field of the schema, with its type, and says when it is null.

use std::collections::BTreeMap;

use serde_json::Value;

use super::*;

/// Type and whether it can be null, by the field's name.
type Fields = BTreeMap<String, (String, bool)>;

const PAGE: &str = include_str!("../../../../docs/events.md");
const README: &str = include_str!("../../../../README.md");

/// The section of the page with this heading.
fn section(heading: &str) -> &'static str {
    let begin = PAGE.split(&format!("\n## {heading}\n")).nth(1).unwrap_or_else(|| panic!("no {heading}"));
    begin.split("\n## ").next().unwrap()
}

/// The names in backticks.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The fields in the first table of fields in this text.
fn documented(text: &str) -> Fields {
    let rows = text.lines().skip_while(|line| !line.starts_with("| field |"));
    let rows: Vec<Vec<&str>> = rows
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    let has_null_column = rows[0].last() == Some(&"null");
    let mut fields = Fields::new();
    for row in &rows[2..] {
        let type_name = row[1].trim_matches('`').split([',', ' ']).next().unwrap();
        let type_name = if type_name.starts_with('{') { "object" } else { type_name };
        let null = if has_null_column {
            !row.last().unwrap().starts_with("never")
        } else {
            row[1].ends_with("null")
        };
        for name in names(row[0]) {
            assert!(fields.insert(name.to_owned(), (type_name.to_owned(), null)).is_none(), "{name} twice");
        }
    }
    fields
}

/// The schema behind a reference.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(path) => root.pointer(path.trim_start_matches('#')).unwrap(),
        None => schema,
    }
}

/// Name of a type as the page has it, and whether it can be null.
fn type_of(root: &Value, schema: &Value) -> (String, bool) {
    if let Some(choices) = schema["anyOf"].as_array() {
        let (null, other): (Vec<_>, Vec<_>) = choices.iter().partition(|choice| choice["type"] == "null");
        return (type_of(root, other[0]).0, !null.is_empty());
    }
    let schema = resolve(root, schema);
    // The variants of an enum.
    if let Some(choices) = schema["oneOf"].as_array() {
        return type_of(root, &choices[0]);
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        one => one.as_str().into_iter().collect(),
    };
    let name = match (types[0], schema["format"].as_str()) {
        ("integer", Some(format)) => format.replace("uint", "u"),
        ("boolean", _) => "bool".to_owned(),
        (name, _) => name.to_owned(),
    };
    (name, types.contains(&"null"))
}

/// The properties of an object, those behind references included. With `nested`, also those of the objects in it.
fn described(root: &Value, schema: &Value, prefix: &str, nested: bool, fields: &mut Fields) {
    for part in [schema, resolve(root, schema)] {
        for (name, property) in part["properties"].as_object().into_iter().flatten() {
            let path = format!("{prefix}{name}");
            fields.insert(path.clone(), type_of(root, property));
            if nested {
                described(root, property, &format!("{path}."), true, fields);
                described(root, &property["items"], &format!("{path}[]."), true, fields);
            }
        }
    }
}

fn schema_of(of: Described) -> Value {
    schema(of).to_value()
}

fn object(root: &Value, schema: &Value, nested: bool) -> Fields {
    let mut fields = Fields::new();
    described(root, schema, "", nested, &mut fields);
    fields
}

fn connection() -> Fields {
    documented(section("established"))
}

#[test]
fn every_field_of_each_event_is_in_its_table_with_its_type() {
    let root = schema_of(Described::Events);
    let common = documented(PAGE.split("Every event has").nth(1).unwrap());
    let mut of_every_event = object(&root, &root, false);
    for variant in root["oneOf"].as_array().unwrap() {
        let name = variant["properties"]["event"]["const"].as_str().unwrap();
        let text = section(name);
        let mut expected = documented(text);
        if text.contains("connection's fields, and:")
            || text.contains("connection's\nfields, and:")
            || name == "remedied"
        {
            expected.extend(connection());
        }
        if text.contains("The fields of `at_risk` up to `window_ns`, and:") {
            let mut shared = documented(section("at_risk"));
            let later =
                ["expected_dials", "eta_seconds", "may_be_bound", "range_unknown", "own_range", "guard"];
            shared.retain(|name, _| !later.contains(&&**name));
            expected.extend(shared);
        }
        // What is in an object is compared where the table names a part of it.
        let described = object(&root, variant, true);
        let is_documented = |path: &str| !path.contains('.') || expected.contains_key(path);
        let mut described: Fields = described.into_iter().filter(|(path, _)| is_documented(path)).collect();
        of_every_event.insert("event".to_owned(), described.remove("event").unwrap());
        assert_eq!(described, expected, "{name}");
    }
    assert_eq!(of_every_event, common);
}

#[test]
fn the_examples_have_every_field_of_a_closed() {
    let mut expected = connection();
    expected.extend(documented(section("closed")));
    expected.extend(documented(PAGE.split("Every event has").nth(1).unwrap()));
    let expected: Vec<_> = expected.into_keys().filter(|name| !name.contains('.')).collect();
    for (page, begin, fold) in [(PAGE, "```json\n{", "  "), (README, "```\n{", "")] {
        let example = page.split(begin).last().unwrap().split("\n```").next().unwrap();
        let example = format!("{{{}", example.replace(&format!("\n{fold}"), ""));
        let event: serde_json::Map<String, Value> = serde_json::from_str(&example).unwrap();
        assert_eq!(event["event"], "closed");
        assert_eq!(event.into_iter().map(|(name, _)| name).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn the_holder_in_blocked_has_the_documented_fields_of_a_connection() {
    let root = schema_of(Described::Events);
    let text = section("blocked");
    let list = text.split("also has these fields of a connection:").nth(1).unwrap();
    let listed: Vec<&str> = names(list.split("`cause`.").next().unwrap()).chain(["cause"]).collect();
    let mut expected: Fields =
        connection().into_iter().filter(|(name, _)| listed.contains(&&**name)).collect();
    assert_eq!(expected.len(), listed.len(), "{listed:?}");
    expected.get_mut("id").unwrap().1 = true;
    for (path, of) in documented(text) {
        if let Some(name) = path.strip_prefix("holder.") {
            expected.insert(name.to_owned(), of);
        }
    }
    let holder = object(&root, &root["$defs"]["BlockingConnection"], false);
    assert_eq!(holder, expected);
}

#[test]
fn a_line_of_scan_and_of_audit_has_the_documented_fields() {
    let scan = schema_of(Described::Scan);
    let mut expected = documented(section("scan --json"));
    expected.extend(connection());
    assert_eq!(object(&scan, &scan["$defs"]["ScanEntry"], false), expected);
    let audit = schema_of(Described::Audit);
    assert_eq!(object(&audit, &audit["$defs"]["JsonPort"], false), documented(section("audit --json")));
}

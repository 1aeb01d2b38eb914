//! What is measured: numbers by name, and facts. One JSON line each, for whoever judges.

use serde::Serialize;

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Line<'a> {
    Sample { name: &'a str, round: usize, value: f64 },
    Fact { name: &'a str, text: &'a str },
    Skipped { name: &'a str, why: &'a str },
    Step { name: &'a str },
}

fn say(line: &Line<'_>) {
    match serde_json::to_string(line) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("{error}"),
    }
}

/// A number of this round.
pub(crate) fn sample(name: &str, round: usize, value: f64) {
    say(&Line::Sample { name, round, value });
}

/// Something that is no number.
pub(crate) fn fact(name: &str, text: &str) {
    say(&Line::Fact { name, text });
}

/// Something that can't be measured here.
pub(crate) fn skipped(name: &str, why: &str) {
    say(&Line::Skipped { name, why });
}

/// What is under way.
pub(crate) fn step(name: &str) {
    say(&Line::Step { name });
}

//! Facts about a kernel in the guest's output: stated by the guest and by tests, a line each, and found by `selfconn
//! doctor`, a line of JSON.

use serde_json::Value;

use super::plan::FACT;

/// A key and its value. What stands before a dot in the key is the table the fact belongs to.
pub(super) type Fact = (String, String);

/// The facts that `doctor` finds about the methods of the hooks.
pub(super) const HOOKS: &str = "hooks.";

/// What the load tests state: a mode and a condition, and what was lost.
pub(super) const LOSS: &str = "loss.";

/// Reads all of them.
pub(super) fn parse(output: &str) -> Vec<Fact> {
    output
        .lines()
        .flat_map(|line| stated(line).map_or_else(|| found_by_doctor(line), |fact| vec![fact]))
        .collect()
}

/// A fact stated on a line, also on that where a test's name stands and its verdict not yet.
fn stated(line: &str) -> Option<Fact> {
    let line = line.strip_prefix("test ").and_then(|line| line.split_once(" ... ")).map_or(line, |cut| cut.1);
    let (key, value) = line.strip_prefix(FACT)?.split_once('=')?;
    Some((key.trim().to_owned(), value.trim().to_owned()))
}

/// For each method its verdict, with the reason and a mark where it would be attached.
fn found_by_doctor(line: &str) -> Vec<Fact> {
    let Some(report) = line.strip_prefix('{').and_then(|_| serde_json::from_str::<Value>(line).ok()) else {
        return Vec::new();
    };
    let mut facts = Vec::new();
    for hook in report["hooks"].as_array().into_iter().flatten() {
        for method in hook["methods"].as_array().into_iter().flatten() {
            let text = |key: &str| method[key].as_str().unwrap_or_default();
            let chosen = if method["would_attach"] == true { " *" } else { "" };
            let why = if text("why").is_empty() { String::new() } else { format!(": {}", text("why")) };
            let hook = hook["hook"].as_str().unwrap_or_default();
            facts.push((
                format!("{HOOKS}{hook} {}", text("method")),
                format!("{}{chosen}{why}", text("verdict")),
            ));
        }
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_stated_and_what_doctor_finds() {
        let output = "selfconn-guest: start doctor\nFACT cpus=2\n\
            {\"hooks\":[{\"hook\":\"h\",\"methods\":[{\"method\":\"a\",\"verdict\":\"ok\",\"why\":null,\"would_attach\":true},\
            {\"method\":\"b\",\"verdict\":\"refused\",\"why\":\"EPERM\",\"would_attach\":false}]}]}\n\
            test x ... FACT loss.rps=3 of 7\nok\n{ not json\nnot a FACT a=b\n";
        let expected =
            [("cpus", "2"), ("hooks.h a", "ok *"), ("hooks.h b", "refused: EPERM"), ("loss.rps", "3 of 7")];
        assert_eq!(parse(output), expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }
}

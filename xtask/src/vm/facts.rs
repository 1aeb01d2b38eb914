//! Facts about a kernel in the guest's output: lines `FACT key=value` of the guest and of tests, and the JSON
//! line of `selfconn doctor`.

use serde_json::Value;

/// The beginning of a line with a fact.
const FACT: &str = "FACT ";

/// A key and its value.
pub(super) type Fact = (String, String);

/// The prefix of facts from `doctor` about the methods of the hooks.
pub(super) const HOOKS: &str = "hooks.";

/// The same about the methods that observe failed binds.
pub(super) const BINDS: &str = "binds.";

/// The prefixes of all facts about methods. What follows is the object and the method.
pub(super) const METHODS: [&str; 4] = [HOOKS, BINDS, "descriptors.", "namespaces."];

/// The prefix of facts from the load tests: a mode and a condition, and how much was lost.
pub(super) const LOSS: &str = "loss.";

/// All facts in the output.
pub(super) fn parse(output: &str) -> Vec<Fact> {
    output
        .lines()
        .flat_map(|line| fact_line(line).map_or_else(|| doctor_facts(line), |fact| vec![fact]))
        .collect()
}

/// The fact of a line. A test's name may precede it.
fn fact_line(line: &str) -> Option<Fact> {
    let line = line.strip_prefix("test ").and_then(|line| line.split_once(" ... ")).map_or(line, |cut| cut.1);
    let (key, value) = line.strip_prefix(FACT)?.split_once('=')?;
    Some((key.trim().to_owned(), value.trim().to_owned()))
}

/// The verdict on each method, with a star if it would be attached, and the reason.
fn doctor_facts(line: &str) -> Vec<Fact> {
    let Some(report) = line.strip_prefix('{').and_then(|_| serde_json::from_str::<Value>(line).ok()) else {
        return Vec::new();
    };
    let list = |of: &Value| of.as_array().cloned().unwrap_or_default();
    let mut facts = Vec::new();
    for hook in list(&report["hooks"]) {
        let name = hook["hook"].as_str().unwrap_or_default();
        facts.extend(
            list(&hook["methods"]).iter().map(|method| method_fact(&format!("{HOOKS}{name}"), method)),
        );
    }
    for prefix in &METHODS[1..] {
        let name = prefix.trim_end_matches('.');
        facts
            .extend(list(&report[name]).iter().map(|method| method_fact(&format!("{prefix}{name}"), method)));
    }
    facts
}

fn method_fact(of: &str, method: &Value) -> Fact {
    let text = |key: &str| method[key].as_str().unwrap_or_default();
    let chosen = if method["would_attach"] == true { " *" } else { "" };
    let why = if text("why").is_empty() { String::new() } else { format!(": {}", text("why")) };
    (format!("{of} {}", text("method")), format!("{}{chosen}{why}", text("verdict")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_from_lines_and_from_doctor() {
        let output = "selfconn-guest: start doctor\nFACT cpus=2\n\
            {\"hooks\":[{\"hook\":\"h\",\"methods\":[{\"method\":\"a\",\"verdict\":\"ok\",\"why\":null,\"would_attach\":true},\
            {\"method\":\"b\",\"verdict\":\"refused\",\"why\":\"EPERM\",\"would_attach\":false}]}],\
            \"binds\":[{\"method\":\"c\",\"verdict\":\"ok\",\"why\":null,\"would_attach\":true}]}\n\
            test x ... FACT loss.rps=3 of 7\nok\n{ not json\nnot a FACT a=b\n";
        let expected = [
            ("cpus", "2"),
            ("hooks.h a", "ok *"),
            ("hooks.h b", "refused: EPERM"),
            ("binds.binds c", "ok *"),
            ("loss.rps", "3 of 7"),
        ];
        assert_eq!(parse(output), expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }
}

//! The report for GitHub Actions: annotations of the run, and a job summary. The form of the commands: "Workflow
//! commands for GitHub Actions", docs.github.com; what is escaped: `actions/toolkit`, packages/core/src/command.ts.
//! Pure.

use std::fmt::Write as _;

use super::{
    findings::Findings,
    report::{cause, endpoint, fixes, groups, program},
};

/// Environment variable with the file of the job summary.
pub(super) const SUMMARY_VARIABLE: &str = "GITHUB_STEP_SUMMARY";

/// A line for each self-connection, each server that one kept out, and each port at risk.
pub(super) fn annotations(findings: &Findings) -> String {
    let mut out = String::new();
    for group in groups(findings) {
        let record = group.first.established;
        let mut message = format!("{} connected to itself at {}", program(record), endpoint(record));
        if let Some(cause) = cause(record) {
            let _ = write!(message, ": {cause}");
        }
        if let Some(fix) = fixes(record, !group.first.blocked.is_empty(), None).first() {
            let _ = write!(message, "\nFix: {fix}");
        }
        annotate("error", "TCP self-connection", &message, &mut out);
        for blocked in &group.first.blocked {
            let message = format!(
                "{} could not bind {}: a self-connection has it",
                program(*blocked),
                endpoint(*blocked)
            );
            annotate("error", "Port held by a TCP self-connection", &message, &mut out);
        }
    }
    for blocked in findings.blocked_by_others() {
        let message = format!(
            "{} could not bind {}: a self-connection that is not in this report has it",
            program(blocked),
            endpoint(blocked)
        );
        annotate("error", "Port held by a TCP self-connection", &message, &mut out);
    }
    for risk in findings.came_close() {
        let message = format!("{} came close to a self-connection at {}", program(risk), endpoint(risk));
        annotate("warning", "Port at risk of a TCP self-connection", &message, &mut out);
    }
    out
}

fn annotate(level: &str, title: &str, message: &str, out: &mut String) {
    let _ = writeln!(out, "::{level} title={}::{}", property(title), data(message));
}

fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

/// The job summary: Markdown.
pub(super) fn summary(report: &str, findings: &Findings) -> String {
    let title =
        if findings.has_found() { "TCP self-connections were found" } else { "No TCP self-connections" };
    // Indented, because a process may have a name that ends a fence.
    let lines: String = report.lines().map(|line| format!("    {line}\n")).collect();
    format!("### {title}\n\n{lines}\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::report::tests::{established, findings, stopped},
        *,
    };

    #[test]
    fn an_annotation_is_one_line_whatever_a_process_calls_itself() {
        let mut event = established("1", 0);
        event["cmdline"] = json!(["a%\n::set-output name=x::", "b"]);
        let text = annotations(&findings(&[event, stopped(&json!({}))]));
        assert_eq!(text.lines().count(), 1, "{text}");
        let start = "::error title=TCP self-connection::a%25\\n::set-output name=x:: b (pid 9) connected to itself at 127.0.0.1:40124: ";
        assert!(text.starts_with(start), "{text}");
        assert!(text.contains("%0AFix: keep the port"), "{text}");
    }

    #[test]
    fn a_property_has_no_separator() {
        assert_eq!(property("a: b, c%\r\n"), "a%3A b%2C c%25%0D%0A");
    }

    #[test]
    fn the_summary_says_in_its_title_whether_something_was_found() {
        let nothing = summary("report\n", &findings(&[]));
        assert_eq!(nothing, "### No TCP self-connections\n\n    report\n\n");
        assert!(
            summary("", &findings(&[established("1", 0)]))
                .starts_with("### TCP self-connections were found\n")
        );
    }
}

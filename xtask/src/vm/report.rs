//! What came of each row, a kernel in a variant: reads libtest's output, and renders tables.

use std::{collections::BTreeSet, fmt::Write as _, path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use serde::Serialize;

use super::{
    boot::Ending,
    facts::{Fact, HOOKS},
    plan::VOICE,
};

/// A test's verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Verdict {
    /// ok
    Passed,
    /// FAILED
    Failed,
    /// ignored
    Ignored,
    /// Begun, and never ended.
    Unfinished,
}

impl Verdict {
    /// Reads libtest's word for it; a reason may follow.
    fn parse(word: &str) -> Option<Self> {
        match word.split([',', ' ']).next()? {
            "ok" => Some(Self::Passed),
            "FAILED" => Some(Self::Failed),
            "ignored" => Some(Self::Ignored),
            _ => None,
        }
    }
}

/// A test and its verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Test {
    pub(crate) name: String,
    pub(crate) verdict: Verdict,
}

/// A kernel in a variant, and what came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) kernel: String,
    pub(crate) variant: String,
    pub(super) ending: Ending,
    pub(crate) tests: Vec<Test>,
    /// What else is wrong: programs that failed without a test to blame, and methods that broke.
    pub(crate) faults: Vec<String>,
    /// In the order in which they were stated.
    pub(super) facts: Vec<Fact>,
    /// What the kernel complained of.
    pub(crate) complaints: Vec<String>,
    pub(crate) took: Duration,
    /// The guest's output; the kernel's console is beside it.
    pub(crate) log: PathBuf,
}

impl Row {
    /// Whether everything passed, and there was something to pass.
    pub(crate) fn passed(&self) -> bool {
        let bad = self.count(Verdict::Failed) + self.count(Verdict::Unfinished) + self.faults.len();
        self.ending == Ending::Passed && self.count(Verdict::Passed) > 0 && bad == 0
    }

    /// The value stated last under this key.
    pub(crate) fn fact(&self, key: &str) -> Option<&str> {
        self.facts.iter().rfind(|(stated, _)| stated == key).map(|(_, value)| value.as_str())
    }

    /// In a few words.
    pub(crate) fn summary(&self) -> String {
        let mut words: Vec<String> = [
            (Verdict::Passed, "passed"),
            (Verdict::Failed, "failed"),
            (Verdict::Ignored, "ignored"),
            (Verdict::Unfinished, "unfinished"),
        ]
        .into_iter()
        .map(|(verdict, word)| (self.count(verdict), word))
        .filter(|(count, _)| *count > 0)
        .map(|(count, word)| format!("{count} {word}"))
        .collect();
        match &self.ending {
            Ending::Passed | Ending::Failed if words.is_empty() => words.push("no tests ran".into()),
            Ending::Passed | Ending::Failed => {}
            Ending::Panicked(message) => words.push(format!("the kernel died: {message}")),
            Ending::Hung(line) => words.push(format!("hung after: {line}")),
            Ending::NotRun(why) => words.push(format!("the emulator failed: {why}")),
            Ending::Silent(line) => words.push(format!("no verdict after: {line}")),
        }
        words.extend_from_slice(&self.faults);
        words.join(", ")
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.tests.iter().filter(|test| test.verdict == verdict).count()
    }
}

/// A run's rows, and what it could not do.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) rows: Vec<Row>,
    /// What was asked for, and why it can't be had.
    pub(crate) skipped: Vec<(String, String)>,
}

impl Report {
    /// An error, if a row did not pass.
    pub(crate) fn must_have_passed(&self) -> Result<()> {
        let failed = self.rows.iter().filter(|row| !row.passed()).count();
        ensure!(failed == 0, "{failed} of {} rows did not pass", self.rows.len());
        Ok(())
    }

    /// Kernels down, variants across, and how many tests passed; below it what did not, and what was skipped.
    pub(crate) fn verdicts(&self) -> String {
        let (kernels, variants) = (self.each(|row| &row.kernel), self.each(|row| &row.variant));
        let mut table = table(
            &["kernel"].into_iter().chain(variants.iter().copied()).map(str::to_owned).collect::<Vec<_>>(),
            kernels.iter().map(|kernel| {
                let cell = |variant: &&str| self.row(kernel, variant).map_or_else(String::new, Row::summary);
                [(*kernel).to_owned()].into_iter().chain(variants.iter().map(cell)).collect()
            }),
        );
        for row in &self.rows {
            let bad = |test: &&Test| matches!(test.verdict, Verdict::Failed | Verdict::Unfinished);
            let bad: Vec<&str> = row.tests.iter().filter(bad).map(|test| test.name.as_str()).collect();
            for (what, names) in
                [("not passed", bad.join(", ")), ("the kernel complained", row.complaints.join("; "))]
            {
                if !names.is_empty() {
                    // Writing to a string can't fail.
                    let _ = write!(table, "\n{} {}, {what}: {names}\n", row.kernel, row.variant);
                }
            }
        }
        for (what, why) in &self.skipped {
            let _ = write!(table, "\n{what}, skipped: {why}\n");
        }
        table
    }

    /// For each group of facts a table, facts down, rows across.
    pub(crate) fn facts(&self) -> String {
        let keys: BTreeSet<&str> =
            self.rows.iter().flat_map(|row| &row.facts).map(|(key, _)| key.as_str()).collect();
        let groups: BTreeSet<&str> = keys.iter().map(|key| split(key).0).collect();
        let columns = self.rows.iter().map(|row| format!("{} {}", row.kernel, row.variant));
        let head: Vec<String> = ["fact".to_owned()].into_iter().chain(columns).collect();
        groups
            .into_iter()
            .map(|group| {
                let keys = keys.iter().filter(|key| split(key).0 == group);
                let rows = keys.map(|key| {
                    let cell = |row: &Row| row.fact(key).unwrap_or_default().to_owned();
                    [split(key).1.to_owned()].into_iter().chain(self.rows.iter().map(cell)).collect()
                });
                format!("\n{}\n", table(&head, rows))
            })
            .collect()
    }

    fn row(&self, kernel: &str, variant: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.kernel == kernel && row.variant == variant)
    }

    /// The different values, in the order of their first row.
    fn each<'a>(&'a self, value: impl Fn(&'a Row) -> &'a str) -> Vec<&'a str> {
        let mut seen = Vec::new();
        for value in self.rows.iter().map(value) {
            if !seen.contains(&value) {
                seen.push(value);
            }
        }
        seen
    }
}

/// The group of a fact's key, and the rest.
fn split(key: &str) -> (&str, &str) {
    key.split_once('.').unwrap_or(("", key))
}

/// A line of a Markdown table.
pub(super) fn line(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    format!("| {} |\n", cells.join(" | "))
}

/// A Markdown table.
fn table(head: &[String], rows: impl Iterator<Item = Vec<String>>) -> String {
    let rule = "|---".repeat(head.len()) + "|\n";
    [line(head), rule].into_iter().chain(rows.map(|row| line(&row))).collect()
}

/// Reads the tests out of libtest's output. A test that prints past libtest's capture has its verdict on a later line.
pub(super) fn parse_tests(output: &str) -> Vec<Test> {
    let mut tests: Vec<Test> = Vec::new();
    let mut running = false;
    for line in output.lines() {
        if let Some((name, rest)) = line.strip_prefix("test ").and_then(|line| line.split_once(" ...")) {
            let verdict = Verdict::parse(rest.trim());
            running = verdict.is_none();
            tests.push(Test { name: name.to_owned(), verdict: verdict.unwrap_or(Verdict::Unfinished) });
        } else if line.starts_with(VOICE) || line == "failures:" || line == "successes:" {
            // What follows is what tests printed, word for word.
            running = false;
        } else if let (true, Some(verdict), Some(test)) = (running, Verdict::parse(line), tests.last_mut()) {
            test.verdict = verdict;
            running = false;
        }
    }
    tests
}

/// Reads what the guest said of programs that failed, where none of the failed tests explains it, and finds what
/// `doctor` takes for a fault of ours.
pub(super) fn faults(output: &str, tests: &[Test], facts: &[Fact]) -> Vec<String> {
    let explained = tests.iter().any(|test| test.verdict == Verdict::Failed);
    let programs = output
        .lines()
        .filter_map(|line| line.strip_prefix(VOICE))
        .filter(|line| line.contains(": failed") && !explained)
        .map(str::to_owned);
    let methods = facts
        .iter()
        .filter(|(key, value)| key.starts_with(HOOKS) && value.starts_with("broken"))
        .map(|(key, value)| format!("{}: {value}", split(key).1));
    programs.chain(methods).collect()
}

/// A row of a boot that said this and ended well, for tests.
#[cfg(test)]
pub(super) fn row_of(kernel: &str, output: &str) -> Row {
    let (tests, facts) = (parse_tests(output), super::facts::parse(output));
    Row {
        kernel: kernel.into(),
        variant: "default".into(),
        ending: Ending::Passed,
        faults: faults(output, &tests, &facts),
        tests,
        facts,
        complaints: Vec::new(),
        took: Duration::ZERO,
        log: PathBuf::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_libtest_prints() {
        let output = "\nrunning 6 tests\ntest live::a ... ok\ntest live::b - should panic ... ok\n\
                      test c ... ignored, needs netem\ntest d ... FAILED\n\
                      test e ... FACT hook=tp_btf\nnoise of test 3\nok\ntest f ... \n\n\
                      failures:\n\n---- d stdout ----\nFACT loss=3 of 7\nok\n\ntest result: FAILED. 3 passed; 1 failed\n";
        let expected = [
            ("live::a", Verdict::Passed),
            ("live::b - should panic", Verdict::Passed),
            ("c", Verdict::Ignored),
            ("d", Verdict::Failed),
            ("e", Verdict::Passed),
            ("f", Verdict::Unfinished),
        ];
        assert_eq!(
            parse_tests(output),
            expected.map(|(name, verdict)| Test { name: name.to_owned(), verdict })
        );
    }

    #[test]
    fn a_test_without_a_verdict_is_unfinished() {
        let tests =
            parse_tests("test a ... ok\ntest b ... \nselfconn-guest: live: failed, signal: 9 (SIGKILL)\n");
        assert_eq!(tests[1], Test { name: "b".into(), verdict: Verdict::Unfinished });
    }

    fn row(kernel: &str, variant: &str, ending: Ending, output: &str) -> Row {
        Row { ending, variant: variant.into(), ..row_of(kernel, output) }
    }

    #[test]
    fn a_row_passes_when_all_ended_and_something_ran() {
        for (ending, output, passed, summary) in [
            (Ending::Passed, "test a ... ok\ntest b ... ignored\n", true, "1 passed, 1 ignored"),
            (Ending::Passed, "test b ... ignored\n", false, "1 ignored"),
            (Ending::Passed, "", false, "no tests ran"),
            (Ending::Failed, "test a ... ok\ntest b ... FAILED\n", false, "1 passed, 1 failed"),
            (Ending::Failed, "selfconn-guest: x: failed, 2\ntest a ... FAILED\n", false, "1 failed"),
            (
                Ending::Failed,
                "selfconn-guest: x: failed, 2\ntest a ... ok\n",
                false,
                "1 passed, x: failed, 2",
            ),
            (Ending::Passed, "FACT hooks.h a=broken: x\ntest a ... ok\n", false, "1 passed, h a: broken: x"),
            (Ending::Panicked("BUG: x".into()), "test a ...", false, "1 unfinished, the kernel died: BUG: x"),
            (Ending::Hung("x".into()), "", false, "hung after: x"),
            (
                Ending::NotRun("exit status: 1: no".into()),
                "",
                false,
                "the emulator failed: exit status: 1: no",
            ),
            (Ending::Silent("y".into()), "test a ... ok", false, "1 passed, no verdict after: y"),
        ] {
            let row = row("6.1", "default", ending, output);
            assert_eq!((row.passed(), row.summary().as_str()), (passed, summary), "{output:?}");
        }
    }

    #[test]
    fn renders_tables() {
        let report = Report {
            rows: vec![
                row("5.10.1", "default", Ending::Passed, "test a ... ok\nFACT hook.tp=works\n"),
                row("5.10.1", "kprobe", Ending::Failed, "test a ... FAILED\nFACT hook.fn=refused: a | b\n"),
                row("7.3.4", "default", Ending::Passed, "test a ... ok\nFACT other=1\n"),
            ],
            skipped: vec![("6.1".into(), "no such".into())],
        };
        assert_eq!(
            report.verdicts(),
            "| kernel | default | kprobe |\n|---|---|---|\n| 5.10.1 | 1 passed | 1 failed |\n\
             | 7.3.4 | 1 passed |  |\n\n5.10.1 kprobe, not passed: a\n\n6.1, skipped: no such\n"
        );
        assert_eq!(
            report.facts(),
            "\n| fact | 5.10.1 default | 5.10.1 kprobe | 7.3.4 default |\n|---|---|---|---|\n\
             | other |  |  | 1 |\n\n\
             \n| fact | 5.10.1 default | 5.10.1 kprobe | 7.3.4 default |\n|---|---|---|---|\n\
             | fn |  | refused: a \\| b |  |\n| tp | works |  |  |\n\n"
        );
    }
}

//! The result of each row of the matrix, a kernel in a variant: parses libtest's output, and renders the
//! table.

use std::{fmt::Write as _, path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    boot::{Ending, GUEST_PREFIX, KernelWarnings},
    facts::{Fact, METHODS},
};

/// The result of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum TestOutcome {
    Passed,
    Failed,
    Ignored,
    /// It started, and never ended.
    Unfinished,
}

impl TestOutcome {
    /// Parses libtest's word for it, which a reason may follow.
    fn parse(word: &str) -> Option<Self> {
        match word.split([',', ' ']).next()? {
            "ok" => Some(Self::Passed),
            "FAILED" => Some(Self::Failed),
            "ignored" => Some(Self::Ignored),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TestResult {
    pub(super) name: String,
    pub(super) outcome: TestOutcome,
}

/// A kernel in a variant, and its result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct MatrixRow {
    pub(super) kernel: String,
    pub(super) variant: String,
    pub(super) ending: Ending,
    pub(super) tests: Vec<TestResult>,
    /// Other failures: programs that failed without a failed test, and broken methods.
    pub(super) faults: Vec<String>,
    /// In the order of the output.
    pub(super) facts: Vec<Fact>,
    /// How often a test was repeated, because the program of a forced method was preempted.
    pub(super) retries: usize,
    /// The beginning of each panic.
    pub(super) panics: String,
    pub(super) warnings: KernelWarnings,
    pub(super) duration: Duration,
    /// The file with the guest's output. The kernel's console is beside it.
    pub(super) log: PathBuf,
}

impl MatrixRow {
    /// True if everything passed, and at least one test ran.
    pub(super) fn passed(&self) -> bool {
        self.ending == Ending::Passed && self.has_passed_tests() && self.faults.is_empty()
    }

    /// True if no test failed, and at least one passed.
    pub(super) fn has_passed_tests(&self) -> bool {
        let bad = self.count(TestOutcome::Failed) + self.count(TestOutcome::Unfinished);
        self.count(TestOutcome::Passed) > 0 && bad == 0
    }

    /// The last value of this fact.
    pub(super) fn fact(&self, key: &str) -> Option<&str> {
        self.facts.iter().rfind(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// For a cell of the table.
    pub(super) fn summary(&self) -> String {
        let mut words: Vec<String> = [
            (TestOutcome::Passed, "passed"),
            (TestOutcome::Failed, "failed"),
            (TestOutcome::Ignored, "ignored"),
            (TestOutcome::Unfinished, "unfinished"),
        ]
        .into_iter()
        .map(|(outcome, word)| (self.count(outcome), word))
        .filter(|(count, _)| *count > 0)
        .map(|(count, word)| format!("{count} {word}"))
        .collect();
        match &self.ending {
            Ending::Passed | Ending::Failed if words.is_empty() => words.push("no tests ran".into()),
            Ending::Passed | Ending::Failed => {}
            Ending::Panicked(message) => words.push(format!("the kernel crashed: {message}")),
            Ending::Hung(line) => words.push(format!("the deadline passed during: {line}")),
            Ending::EmulatorFailed(why) => words.push(format!("the emulator failed: {why}")),
            Ending::NoVerdict(line) => words.push(format!("no verdict after: {line}")),
        }
        if self.retries > 0 {
            words.push(format!("{} repeated", self.retries));
        }
        words.extend_from_slice(&self.faults);
        words.join(", ")
    }

    fn count(&self, outcome: TestOutcome) -> usize {
        self.tests.iter().filter(|test| test.outcome == outcome).count()
    }
}

/// The rows of a run, and what was skipped.
#[derive(Debug, Default, Serialize)]
pub(super) struct VmReport {
    pub(super) rows: Vec<MatrixRow>,
    /// Kernels that can't be had, and why.
    pub(super) skipped: Vec<(String, String)>,
}

impl VmReport {
    /// An error if a row did not pass.
    pub(super) fn check(&self) -> Result<()> {
        let failed = self.rows.iter().filter(|row| !row.passed()).count();
        ensure!(failed == 0, "{failed} of {} rows did not pass", self.rows.len());
        Ok(())
    }

    /// An error if a kernel could not be had.
    pub(super) fn check_complete(&self) -> Result<()> {
        let skipped: Vec<&str> = self.skipped.iter().map(|(kernel, _)| kernel.as_str()).collect();
        ensure!(skipped.is_empty(), "kernels could not be had: {}", skipped.join(", "));
        Ok(())
    }

    /// The table of kernels and variants, then the failed tests and what was skipped.
    pub(super) fn render(&self) -> String {
        let (kernels, variants) = (self.each(|row| &row.kernel), self.each(|row| &row.variant));
        let mut table = table(
            &["kernel"].into_iter().chain(variants.iter().copied()).map(str::to_owned).collect::<Vec<_>>(),
            kernels.iter().map(|kernel| {
                let cell =
                    |variant: &&str| self.row(kernel, variant).map_or_else(String::new, MatrixRow::summary);
                [(*kernel).to_owned()].into_iter().chain(variants.iter().map(cell)).collect()
            }),
        );
        for row in &self.rows {
            let is_bad =
                |test: &&TestResult| matches!(test.outcome, TestOutcome::Failed | TestOutcome::Unfinished);
            let failed: Vec<&str> = row.tests.iter().filter(is_bad).map(|test| test.name.as_str()).collect();
            for (what, names) in
                [("not passed", failed.join(", ")), ("the kernel warned", row.warnings.messages.join("; "))]
            {
                if !names.is_empty() {
                    // Writing to a string can't fail.
                    let _ = write!(table, "\n{} {}, {what}: {names}\n", row.kernel, row.variant);
                }
            }
            if !row.passed() {
                table.push_str(&row.panics);
            }
            if !row.passed() && !row.warnings.first.is_empty() {
                let lines = row.warnings.first.join("\n");
                let _ = write!(table, "\n{} {}, the first warning:\n{lines}\n", row.kernel, row.variant);
            }
        }
        for (what, why) in &self.skipped {
            let _ = write!(table, "\n{what}, skipped: {why}\n");
        }
        table
    }

    fn row(&self, kernel: &str, variant: &str) -> Option<&MatrixRow> {
        self.rows.iter().find(|row| row.kernel == kernel && row.variant == variant)
    }

    /// The different values, in the order of their first row.
    fn each<'a>(&'a self, value: impl Fn(&'a MatrixRow) -> &'a str) -> Vec<&'a str> {
        let mut seen = Vec::new();
        for value in self.rows.iter().map(value) {
            if !seen.contains(&value) {
                seen.push(value);
            }
        }
        seen
    }
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

/// Counts the retries that the tests print.
pub(super) fn count_retries(output: &str) -> usize {
    output.matches("RETRY test=").count()
}

/// Parses libtest's output. If a test prints past libtest's capture, its outcome is on a later line.
pub(super) fn parse_tests(output: &str) -> Vec<TestResult> {
    let mut tests: Vec<TestResult> = Vec::new();
    let mut running = false;
    for line in output.lines() {
        if let Some((name, rest)) = line.strip_prefix("test ").and_then(|line| line.split_once(" ...")) {
            let outcome = TestOutcome::parse(rest.trim());
            running = outcome.is_none();
            tests.push(TestResult {
                name: name.to_owned(),
                outcome: outcome.unwrap_or(TestOutcome::Unfinished),
            });
        } else if line.starts_with(GUEST_PREFIX) || line == "failures:" || line == "successes:" {
            // Output of tests follows.
            running = false;
        } else if let (true, Some(outcome), Some(test)) =
            (running, TestOutcome::parse(line), tests.last_mut())
        {
            test.outcome = outcome;
            running = false;
        }
    }
    tests
}

/// The programs that failed although no test failed, and the methods that `doctor` calls broken.
pub(super) fn faults(output: &str, tests: &[TestResult], facts: &[Fact]) -> Vec<String> {
    let is_explained = tests.iter().any(|test| test.outcome == TestOutcome::Failed);
    let programs = output
        .lines()
        .filter_map(|line| line.strip_prefix(GUEST_PREFIX))
        .filter(|line| line.contains(": failed") && !is_explained)
        .map(str::to_owned);
    let methods = facts.iter().filter(|(_, value)| value.starts_with("broken")).filter_map(|(key, value)| {
        let name = METHODS.iter().find_map(|prefix| key.strip_prefix(prefix))?;
        Some(format!("{name}: {value}"))
    });
    programs.chain(methods).collect()
}

/// What should have run and did not: the parts of names by which these arguments of libtest select tests, if no test
/// with such a name passed or failed.
pub(super) fn without_tests<'a>(args: impl Iterator<Item = &'a str>, tests: &[TestResult]) -> Vec<String> {
    let has_run = |part: &str| {
        let ran = |test: &&TestResult| matches!(test.outcome, TestOutcome::Passed | TestOutcome::Failed);
        tests.iter().filter(ran).any(|test| test.name.contains(part))
    };
    // The argument after one of these is its value.
    const WITH_VALUE: [&str; 5] = ["--skip", "--test-threads", "--format", "--color", "--shuffle-seed"];
    let mut is_value = false;
    let parts = args
        .filter(|arg| !std::mem::replace(&mut is_value, WITH_VALUE.contains(arg)) && !arg.starts_with('-'));
    parts.filter(|part| !has_run(part)).map(|part| format!("no test {part} ran")).collect()
}

/// The row of a boot that printed this and ended well.
#[cfg(test)]
pub(super) fn row_of(kernel: &str, output: &str) -> MatrixRow {
    let (tests, facts) = (parse_tests(output), super::facts::parse(output));
    MatrixRow {
        kernel: kernel.into(),
        variant: "default".into(),
        ending: Ending::Passed,
        faults: faults(output, &tests, &facts),
        tests,
        facts,
        retries: count_retries(output),
        panics: crate::libtest::panics(output),
        warnings: KernelWarnings::default(),
        duration: Duration::ZERO,
        log: PathBuf::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_counted_and_shown() {
        let output = "test a ... RETRY test=a method=perf attempt=1 reason=\"r\" missed=\"m\"\nok\n";
        assert!(row("6.1", "default", Ending::Passed, output).summary().ends_with("1 passed, 1 repeated"));
        assert_eq!(row("6.1", "default", Ending::Passed, "test a ... ok\n").summary(), "1 passed");
    }

    #[test]
    fn each_part_of_names_must_have_run_a_test() {
        let tests = parse_tests("test kernel::a ... ok\ntest load::b ... ignored\ntest load::c ... FAILED\n");
        let without = |args: &[&str]| without_tests(args.iter().copied(), &tests);
        assert!(without(&["--nocapture", "kernel::", "load::"]).is_empty());
        assert!(without(&["--skip", "rest::", "kernel::", "--test-threads", "1"]).is_empty());
        assert_eq!(
            without(&["kernel::", "load::b", "rest::"]),
            ["no test load::b ran", "no test rest:: ran"]
        );
    }

    #[test]
    fn outcomes_are_read_from_libtests_output() {
        let output = "\nrunning 6 tests\ntest live::a ... ok\ntest live::b - should panic ... ok\n\
                      test c ... ignored, needs netem\ntest d ... FAILED\n\
                      test e ... FACT hook=tp_btf\nnoise of test 3\nok\ntest f ... \n\n\
                      failures:\n\n---- d stdout ----\nFACT loss=3 of 7\nok\n\ntest result: FAILED. 3 passed; 1 failed\n";
        let expected = [
            ("live::a", TestOutcome::Passed),
            ("live::b - should panic", TestOutcome::Passed),
            ("c", TestOutcome::Ignored),
            ("d", TestOutcome::Failed),
            ("e", TestOutcome::Passed),
            ("f", TestOutcome::Unfinished),
        ];
        assert_eq!(
            parse_tests(output),
            expected.map(|(name, outcome)| TestResult { name: name.to_owned(), outcome })
        );
    }

    #[test]
    fn a_test_without_an_outcome_is_unfinished() {
        let tests =
            parse_tests("test a ... ok\ntest b ... \nselfconn-guest: live: failed, signal: 9 (SIGKILL)\n");
        assert_eq!(tests[1], TestResult { name: "b".into(), outcome: TestOutcome::Unfinished });
    }

    fn row(kernel: &str, variant: &str, ending: Ending, output: &str) -> MatrixRow {
        MatrixRow { ending, variant: variant.into(), ..row_of(kernel, output) }
    }

    #[test]
    fn a_row_passes_if_all_passed_and_a_test_ran() {
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
            (
                Ending::Passed,
                "FACT binds.bind perf=broken: x\ntest a ... ok\n",
                false,
                "1 passed, bind perf: broken: x",
            ),
            (Ending::Passed, "FACT binds.bind perf=refused: x\ntest a ... ok\n", true, "1 passed"),
            (Ending::Passed, "FACT other=broken\ntest a ... ok\n", true, "1 passed"),
            (
                Ending::Panicked("BUG: x".into()),
                "test a ...",
                false,
                "1 unfinished, the kernel crashed: BUG: x",
            ),
            (Ending::Hung("x".into()), "", false, "the deadline passed during: x"),
            (
                Ending::EmulatorFailed("exit status: 1: no".into()),
                "",
                false,
                "the emulator failed: exit status: 1: no",
            ),
            (Ending::NoVerdict("y".into()), "test a ... ok", false, "1 passed, no verdict after: y"),
        ] {
            let row = row("6.1", "default", ending, output);
            assert_eq!((row.passed(), row.summary().as_str()), (passed, summary), "{output:?}");
        }
    }

    #[test]
    fn a_kernel_that_could_not_be_had_makes_the_whole_matrix_fail() {
        let rows = || vec![row("6.1", "default", Ending::Passed, "test a ... ok\n")];
        let report = |skipped| VmReport { rows: rows(), skipped };
        assert!(report(Vec::new()).check_complete().is_ok());
        let missing = report(vec![("7".into(), "no such".into())]);
        assert!(missing.check().is_ok());
        let error = missing.check_complete().unwrap_err().to_string();
        assert_eq!(error, "kernels could not be had: 7");
    }

    #[test]
    fn the_trace_of_the_first_warning_is_shown_for_a_row_that_did_not_pass() {
        for (ending, is_shown) in [(Ending::Passed, false), (Ending::Failed, true)] {
            let mut row = row("6.1", "default", ending, "test a ... ok\n");
            row.warnings = KernelWarnings::parse("WARNING: CPU: 0\nRIP: 0010:spin\n");
            let text = VmReport { rows: vec![row], skipped: Vec::new() }.render();
            assert!(text.contains("the kernel warned: WARNING: CPU: 0\n"), "{text}");
            assert_eq!(text.contains("RIP: 0010:spin"), is_shown, "{text}");
        }
    }

    #[test]
    fn the_table_has_kernels_down_and_variants_across() {
        let report = VmReport {
            rows: vec![
                row("5.10.1", "default", Ending::Passed, "test a ... ok\nFACT hook.tp=works\n"),
                row(
                    "5.10.1",
                    "kprobe",
                    Ending::Failed,
                    "test a ... FACT hook.fn=refused: a | b\nthread 'a' (7) panicked at a.rs:1:2:\nwhy\nFAILED\n",
                ),
                row("7.3.4", "default", Ending::Passed, "test a ... ok\nFACT other=1\n"),
            ],
            skipped: vec![("6.1".into(), "no such".into())],
        };
        assert_eq!(
            report.render(),
            "| kernel | default | kprobe |\n|---|---|---|\n| 5.10.1 | 1 passed | 1 failed |\n\
             | 7.3.4 | 1 passed |  |\n\n5.10.1 kprobe, not passed: a\n\
             thread 'a' (7) panicked at a.rs:1:2:\nwhy\nFAILED\n\n6.1, skipped: no such\n"
        );
    }
}

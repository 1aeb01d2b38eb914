//! The tables in docs/kernels.md: which methods load on which kernel, and which transitions are lost. A run
//! replaces its own rows and leaves the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::Result;

use super::{
    facts::{BINDS, HOOKS, LOSS},
    report::{MatrixRow, TestOutcome, line},
    stock::series_of,
};
use crate::{environment::plain, run, workspace::rewrite_section};

/// The columns of the first table.
const METHODS: [&str; 4] = ["tp_btf", "perf", "fentry", "kprobe"];

/// The columns of the second table; pairs in the order of preference.
const MODES: [&str; 10] = [
    "tp_btf",
    "perf",
    "fentry",
    "kprobe",
    "tp_btf+kprobe",
    "perf+fentry",
    "tp_btf+perf",
    "fentry+kprobe",
    "tp_btf+fentry",
    "perf+kprobe",
];

/// The conditions of the load tests, and their letters in the table.
const CONDITIONS: [(&str, &str); 4] = [("plain", "p"), ("steered", "s"), ("delayed", "d"), ("beside", "b")];

const LOADS: &str = "\
Which methods load: each was forced, and the live tests passed with it. *Attached* is the default pair; *binds* is the
method that observes failed binds. `?`: the row is older than the column.
";

const LOSSES: &str = "\
Lost transitions per 1,000, while four workers make as many as they can: `p` plain; `s` with packets of `lo` steered
to both CPUs (RPS); `d` with each packet delayed by a millisecond (netem); `b` beside the busy tracepoint program of
another agent, with RPS where there are two CPUs. 0: none is lost under any condition. The next snapshot of the
socket table finds a lost connection that still exists and counts it as `missed`. No opener was wrong; the last column
is the number of unknown openers.
";

/// The beginning of the line about the last run of the whole matrix.
const WHOLE_RUN: &str = "The last whole run, `cargo xtask vm --all`, ended on ";

/// Writes the rows of a run into the file.
pub(super) fn update<'a>(file: &Path, today: &str, rows: impl Iterator<Item = &'a MatrixRow>) -> Result<()> {
    let rows: Vec<_> = rows.collect();
    rewrite_section(file, "kernels", |old| section(old, today, &rows))
}

/// Writes above the tables when the whole matrix ran. Each row has the date of its own boot, so this stays true when
/// rows are replaced.
pub(super) fn note_whole_run(file: &Path, today: &str, summary: &str) -> Result<()> {
    rewrite_section(file, "kernels", |old| with_whole_run(old, today, summary))
}

fn with_whole_run(old: &str, today: &str, summary: &str) -> String {
    let tables = old.lines().filter(|line| !line.starts_with(WHOLE_RUN)).map(|line| format!("{line}\n"));
    let tables: String = tables.collect();
    format!("\n{WHOLE_RUN}{today}: {summary}.\n\n{}", tables.trim_start_matches('\n'))
}

/// The date in UTC.
pub(super) fn today() -> Result<String> {
    Ok(run::output(plain("date").args(["--utc", "+%F"]))?.trim().to_owned())
}

fn section(old: &str, today: &str, rows: &[&MatrixRow]) -> String {
    let loads = KernelTable::new(
        ["kernel", "lockdown"],
        METHODS.map(code).into_iter().chain(["attached", "binds", "why not", "date"].map(str::to_owned)),
    );
    let losses = KernelTable::new(
        ["kernel", "CPUs"],
        MODES.map(code).into_iter().chain(["unnamed", "date"].map(str::to_owned)),
    );
    let whole_run = old.lines().find(|line| line.starts_with(WHOLE_RUN));
    let whole_run = whole_run.map(|line| format!("\n{line}\n")).unwrap_or_default();
    let tables = [(loads, LOADS, loading_row as fn(&MatrixRow) -> _), (losses, LOSSES, loss_row)];
    let tables = tables.into_iter().map(|(mut table, legend, of)| {
        table.read(old);
        for mut cells in rows.iter().filter(|row| row.passed()).filter_map(|row| of(row)) {
            cells.push(today.to_owned());
            table.insert(cells);
        }
        format!("\n{legend}\n{}\n", table.render())
    });
    whole_run + &tables.collect::<String>()
}

fn code(name: &str) -> String {
    format!("`{}`", name.replace('+', "` + `"))
}

/// A row of the first table, if tests forced the methods.
fn loading_row(row: &MatrixRow) -> Option<Vec<String>> {
    let is_forced =
        row.tests.iter().any(|test| test.name.contains("methods::") && test.outcome == TestOutcome::Passed);
    let lockdown = row.fact("lockdown").filter(|_| is_forced)?;
    let verdicts = METHODS.map(|method| {
        let of = |key: &str| key.strip_prefix(HOOKS).is_some_and(|key| key.split(' ').nth(1) == Some(method));
        let fact = row.facts.iter().rfind(|(key, _)| of(key));
        fact.map_or("", |(_, verdict)| verdict.as_str())
    });
    let word = |verdict: &str| match verdict.split([' ', ':']).next().unwrap_or_default() {
        "ok" => "works".to_owned(),
        other => other.to_owned(),
    };
    let attached: Vec<String> = METHODS
        .iter()
        .zip(verdicts)
        .filter(|(_, verdict)| verdict.starts_with("ok *"))
        .map(|(method, _)| code(method))
        .collect();
    let reasons: BTreeSet<&str> =
        verdicts.into_iter().filter_map(|verdict| Some(verdict.split_once(": ")?.1)).collect();
    let mut cells = vec![row.kernel.clone(), lockdown.to_owned()];
    cells.extend(verdicts.map(word));
    cells.push(attached.join(" + "));
    cells.push(bind_method(row));
    cells.push(reasons.into_iter().collect::<Vec<_>>().join("; "));
    Some(cells)
}

/// The method that would observe failed binds.
fn bind_method(row: &MatrixRow) -> String {
    let of_binds = |(key, verdict): &(String, String)| {
        let method = key.strip_prefix(BINDS)?.split(' ').nth(1)?.to_owned();
        verdict.starts_with("ok *").then(|| code(&method))
    };
    row.facts.iter().rev().find_map(of_binds).unwrap_or_else(|| "none".to_owned())
}

/// A row of the second table, if the load tests ran.
fn loss_row(row: &MatrixRow) -> Option<Vec<String>> {
    let mut cells = vec![row.kernel.clone(), row.fact("cpus")?.to_owned()];
    let mut unnamed = Vec::new();
    let mut is_known = false;
    for mode in MODES {
        let (mut cell, mut unknown, mut is_measured) = (Vec::new(), 0, false);
        for (condition, letter) in CONDITIONS {
            let Some(loss) = row.fact(&format!("{LOSS}{mode} {condition}")).and_then(Loss::parse) else {
                continue;
            };
            is_measured = true;
            unknown += loss.unknown;
            if loss.lost > 0 {
                cell.push(format!("{letter} {}", per_mille(loss.lost, loss.made)));
            }
        }
        is_known |= is_measured;
        cells.push(match (is_measured, cell.is_empty()) {
            (false, _) => String::new(),
            (true, true) => "0".to_owned(),
            (true, false) => cell.join(", "),
        });
        if unknown > 0 {
            unnamed.push(format!("{} {unknown}", code(mode)));
        }
    }
    cells.push(if unnamed.is_empty() { "0".to_owned() } else { unnamed.join(", ") });
    is_known.then_some(cells)
}

fn per_mille(lost: u64, made: u64) -> String {
    // A float is exact for numbers of this size.
    let share = lost as f64 * 1000.0 / made.max(1) as f64;
    if share < 0.1 { "<0.1".to_owned() } else { format!("{share:.1}") }
}

/// The result of a load test.
struct Loss {
    lost: u64,
    made: u64,
    unknown: u64,
}

impl Loss {
    /// Parses `24 lost of 28800, …, 3 unknown`.
    fn parse(text: &str) -> Option<Self> {
        let before = |word: &str| text.split_once(word)?.0.split(' ').next_back()?.parse().ok();
        let (_, of) = text.split_once(" lost of ")?;
        Some(Self {
            lost: before(" lost of ")?,
            made: of.split(',').next()?.parse().ok()?,
            unknown: before(" unknown")?,
        })
    }
}

/// A table whose key is the first two cells: a kernel's architecture and flavour, its series, and the lockdown or the
/// number of CPUs.
struct KernelTable {
    head: Vec<String>,
    rows: BTreeMap<(String, Vec<u32>, usize, String), Vec<String>>,
}

impl KernelTable {
    fn new(key: [&str; 2], columns: impl Iterator<Item = String>) -> Self {
        Self { head: key.into_iter().map(str::to_owned).chain(columns).collect(), rows: BTreeMap::new() }
    }

    /// Reads the rows below this head in a text.
    fn read(&mut self, text: &str) {
        let head = line(&self.head);
        let Some((_, below)) = text.split_once(&head) else { return };
        for row in below.lines().skip(1).map_while(|row| row.strip_prefix("| ")?.strip_suffix(" |")) {
            let cells: Vec<String> = row.split(" | ").map(|cell| cell.trim().replace("\\|", "|")).collect();
            if cells.len() == self.head.len() {
                self.insert(cells);
            }
        }
    }

    fn insert(&mut self, cells: Vec<String>) {
        let [kernel, second, ..] = cells.as_slice() else { return };
        // The order of lockdowns; numbers of CPUs are ordered as text.
        let rank = ["none", "integrity", "confidentiality"].iter().position(|lockdown| lockdown == second);
        let flavour = kernel.split_once('-').map_or("", |(_, flavour)| flavour).to_owned();
        let key = (flavour, series_of(kernel), rank.unwrap_or(0), second.clone());
        self.rows.insert(key, cells);
    }

    fn render(&self) -> String {
        let rule = "|---".repeat(self.head.len()) + "|\n";
        [line(&self.head), rule].into_iter().chain(self.rows.values().map(|row| line(row))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::report::row_of, *};

    fn output(verdict: &str, lockdown: &str, lost: u32, cpus: u32) -> String {
        let method = |name: &str, verdict: &str, attached: bool| {
            let why = if verdict == "ok" { "" } else { "the | policy" };
            format!(
                "{{\"method\":\"{name}\",\"verdict\":\"{verdict}\",\"why\":\"{why}\",\"would_attach\":{attached}}}"
            )
        };
        format!(
            "{{\"hooks\":[{{\"hook\":\"t\",\"methods\":[{},{}]}}],\"binds\":[{},{}]}}\n\
             FACT lockdown={lockdown}\nFACT cpus={cpus}\ntest methods::a ... ok\n\
             FACT loss.tp_btf plain=0 lost of 400, 1 of 1 reported, 0 of 1 found, owners 2 right 0 wrong 0 unknown\n\
             FACT loss.tp_btf steered={lost} lost of 400, 1 of 1 reported, 0 of 1 found, owners 0 right 0 wrong 2 unknown\n",
            method("tp_btf", "ok", true),
            method("perf", verdict, false),
            method("fexit", "unsupported", false),
            method("perf", verdict, verdict == "ok")
        )
    }

    #[test]
    fn a_run_replaces_only_its_own_rows() {
        let text =
            |old: &str, rows: &[MatrixRow]| section(old, "2026-11-28", &rows.iter().collect::<Vec<_>>());
        let first = text(
            "",
            &[
                row_of("7.1.4", &output("refused", "confidentiality", 3, 1)),
                row_of("7.1.4", &output("ok", "none", 3, 1)),
                row_of("5.10.9", &output("ok", "none", 0, 2)),
            ],
        );
        let loads: Vec<&str> = first.lines().filter(|line| line.contains("works")).collect();
        assert_eq!(
            loads,
            [
                "| 5.10.9 | none | works | works |  |  | `tp_btf` | `perf` |  | 2026-11-28 |",
                "| 7.1.4 | none | works | works |  |  | `tp_btf` | `perf` |  | 2026-11-28 |",
                "| 7.1.4 | confidentiality | works | refused |  |  | `tp_btf` | none | the \\| policy | 2026-11-28 |",
            ]
        );
        assert!(first.contains("\n| 5.10.9 | 2 | 0 |"), "{first}");
        assert!(first.contains("\n| 7.1.4 | 1 | s 7.5 |"), "{first}");
        assert!(first.contains("|  | `tp_btf` 2 |"), "{first}");
        // An empty run changes nothing. A newer kernel of the series replaces the old one.
        assert_eq!(text(&first, &[]), first);
        let second = text(&first, &[row_of("7.2.0", &output("ok", "none", 0, 1))]);
        assert_eq!(second.lines().count(), first.lines().count());
        assert!(second.contains("\n| 7.2.0 | none |") && !second.contains("\n| 7.1.4 | none |"), "{second}");
        assert!(second.contains("\n| 7.1.4 | confidentiality |"), "{second}");
        // Another architecture or flavour has rows of its own.
        let arm64 = text(&second, &[row_of("7.2.0-arm64", &output("ok", "none", 0, 2))]);
        assert!(
            arm64.contains("\n| 7.2.0 | none |") && arm64.contains("\n| 7.2.0-arm64 | none |"),
            "{arm64}"
        );
    }

    #[test]
    fn a_run_without_rows_leaves_the_tables_as_they_are() {
        let text = include_str!("../../../docs/kernels.md");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        update(file.path(), "2026-11-28", [].into_iter()).unwrap();
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), text);
    }

    #[test]
    fn a_failed_run_or_one_without_forced_methods_makes_no_row() {
        let forced = output("ok", "none", 1, 2);
        for bad in [forced.replace("methods::", "other::"), forced.replace("... ok", "... FAILED")] {
            let new = section("", "2026-11-28", &[&row_of("6.1.1", &bad)]);
            assert!(!new.contains("| 6.1.1 | none"), "{new}");
        }
    }

    #[test]
    fn a_row_has_the_date_of_its_boot_and_the_whole_run_its_own() {
        let row = row_of("6.1.1", &output("ok", "none", 0, 2));
        let first =
            with_whole_run(&section("", "2026-11-01", &[&row]), "2026-11-01", "31 rows in 107 minutes");
        let line =
            "\nThe last whole run, `cargo xtask vm --all`, ended on 2026-11-01: 31 rows in 107 minutes.\n";
        assert_eq!(first.matches(line).count(), 1, "{first}");
        let other = row_of("6.12.1", &output("ok", "none", 0, 2));
        let second = section(&first, "2026-11-02", &[&other]);
        assert_eq!(second.matches(line).count(), 1, "a run of single rows claims no whole run: {second}");
        let dates = |kernel: &str| {
            let rows = second.lines().filter(|row| row.starts_with(&format!("| {kernel} |")));
            rows.map(|row| row.rsplit(" | ").next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(dates("6.1.1"), ["2026-11-01 |", "2026-11-01 |"], "{second}");
        assert_eq!(dates("6.12.1"), ["2026-11-02 |", "2026-11-02 |"], "{second}");
        let third = with_whole_run(&second, "2026-11-03", "32 rows in 9 minutes");
        assert!(!third.contains(line) && third.contains("2026-11-03: 32 rows in 9 minutes."), "{third}");
        assert_eq!(section(&third, "2026-11-04", &[]), third, "nothing new changes nothing");
    }
}

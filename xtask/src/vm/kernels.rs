//! The tables in ARCHITECTURE.md of what loads where and what is lost: renders the rows of a run, and leaves those rows
//! as they are that it did not run.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::Result;

use super::{
    archive::numbers,
    facts::{HOOKS, LOSS},
    report::{Row, Verdict, line},
    stock::series_of,
};
use crate::workspace::rewrite_section;

/// The columns of the methods in the first table.
const METHODS: [&str; 4] = ["tp_btf", "perf", "fentry", "kprobe"];

/// Those of the second, pairs in the order of preference.
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

/// What makes a kernel lose transitions, and its letter in the table.
const CONDITIONS: [(&str, &str); 4] = [("plain", "p"), ("steered", "s"), ("delayed", "d"), ("beside", "b")];

const LOADS: &str = "\
What loads: each method was forced, and the live tests passed with it. *Attached* is the default pair.
";

const LOSES: &str = "\
Transitions lost, of each 1,000 that four workers bring about as fast as they can: `p` plain; `s` with packets of
`lo` steered to both CPUs; `d` with each packet delayed by a millisecond (netem); `b` beside another agent's busy
tracepoint program, and steered where there are two CPUs. 0: in none of these. Whatever was lost of a connection
that lived on was found by the next reading of the socket table and counted as `missed`, and no opener was wrong;
how many could not be named stands in the last column.
";

/// Puts the rows of a run into the file.
pub(super) fn update(file: &Path, rows: &[Row]) -> Result<()> {
    rewrite_section(file, "kernels", |old| section(old, rows))
}

fn section(old: &str, rows: &[Row]) -> String {
    let loads = Table::new(
        ["kernel", "lockdown"],
        METHODS.map(code).into_iter().chain(["attached", "why not"].map(str::to_owned)),
    );
    let loses = Table::new(["kernel", "CPUs"], MODES.map(code).into_iter().chain(["unnamed".to_owned()]));
    [(loads, LOADS, what_loads as fn(&Row) -> _), (loses, LOSES, what_is_lost)]
        .into_iter()
        .map(|(mut table, legend, of)| {
            table.read(old);
            rows.iter().filter(|row| row.passed()).filter_map(of).for_each(|cells| table.insert(cells));
            format!("\n{legend}\n{}\n", table.render())
        })
        .collect()
}

fn code(name: &str) -> String {
    format!("`{}`", name.replace('+', "` + `"))
}

/// A row of the first table. Only where the methods were forced, and not merely found by `doctor`.
fn what_loads(row: &Row) -> Option<Vec<String>> {
    let is_forced =
        row.tests.iter().any(|test| test.name.starts_with("methods::") && test.verdict == Verdict::Passed);
    let lockdown = row.fact("lockdown").filter(|_| is_forced)?;
    let verdicts = METHODS.map(|method| {
        let of = |key: &str| key.strip_prefix(HOOKS).is_some_and(|key| key.split(' ').nth(1) == Some(method));
        let fact = row.facts.iter().rfind(|(key, _)| of(key));
        fact.map_or("", |(_, verdict)| verdict.as_str())
    });
    let told = |verdict: &str| match verdict.split([' ', ':']).next().unwrap_or_default() {
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
    cells.extend(verdicts.map(told));
    cells.push(attached.join(" + "));
    cells.push(reasons.into_iter().collect::<Vec<_>>().join("; "));
    Some(cells)
}

/// A row of the second table.
fn what_is_lost(row: &Row) -> Option<Vec<String>> {
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
    // Numbers of transitions are far below what a float holds exactly.
    let share = lost as f64 * 1000.0 / made.max(1) as f64;
    if share < 0.1 { "<0.1".to_owned() } else { format!("{share:.1}") }
}

/// What a test stated of a mode and a condition.
struct Loss {
    lost: u64,
    made: u64,
    unknown: u64,
}

impl Loss {
    /// Reads `24 lost of 28800, …, 3 unknown`.
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

/// A table whose rows are known by their first two cells: a kernel's series, and one thing more.
struct Table {
    head: Vec<String>,
    rows: BTreeMap<(Vec<u32>, usize, String), Vec<String>>,
}

impl Table {
    fn new(key: [&str; 2], columns: impl Iterator<Item = String>) -> Self {
        Self { head: key.into_iter().map(str::to_owned).chain(columns).collect(), rows: BTreeMap::new() }
    }

    /// Takes in the rows that stand in a text below just this head.
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
        // None comes before both lockdowns, and two CPUs after one.
        let rank = ["none", "integrity", "confidentiality"].iter().position(|lockdown| lockdown == second);
        let key = (numbers(&series_of(kernel)), rank.unwrap_or(0), second.clone());
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
            "{{\"hooks\":[{{\"hook\":\"t\",\"methods\":[{},{}]}}]}}\n\
             FACT lockdown={lockdown}\nFACT cpus={cpus}\ntest methods::a ... ok\n\
             FACT loss.tp_btf plain=0 lost of 400, 1 of 1 told, 0 of 1 found, owners 2 right 0 wrong 0 unknown\n\
             FACT loss.tp_btf steered={lost} lost of 400, 1 of 1 told, 0 of 1 found, owners 0 right 0 wrong 2 unknown\n",
            method("tp_btf", "ok", true),
            method("perf", verdict, false)
        )
    }

    #[test]
    fn a_run_replaces_the_rows_that_it_ran_and_no_others() {
        let text = section;
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
                "| 5.10.9 | none | works | works |  |  | `tp_btf` |  |",
                "| 7.1.4 | none | works | works |  |  | `tp_btf` |  |",
                "| 7.1.4 | confidentiality | works | refused |  |  | `tp_btf` | the \\| policy |",
            ]
        );
        assert!(first.contains("\n| 5.10.9 | 2 | 0 |"), "{first}");
        assert!(first.contains("\n| 7.1.4 | 1 | s 7.5 |"), "{first}");
        assert!(first.contains("|  | `tp_btf` 2 |"), "{first}");
        // The same again, and nothing, change nothing; a newer kernel of the series takes the place of the old.
        assert_eq!(text(&first, &[]), first);
        let second = text(&first, &[row_of("7.2.0", &output("ok", "none", 0, 1))]);
        assert_eq!(second.lines().count(), first.lines().count());
        assert!(second.contains("\n| 7.2.0 | none |") && !second.contains("\n| 7.1.4 | none |"), "{second}");
        assert!(second.contains("\n| 7.1.4 | confidentiality |"), "{second}");
    }

    #[test]
    fn what_was_not_forced_or_failed_makes_no_row() {
        let forced = output("ok", "none", 1, 2);
        for bad in [forced.replace("methods::", "other::"), forced.replace("... ok", "... FAILED")] {
            let new = section("", &[row_of("6.1.1", &bad)]);
            assert!(!new.contains("| 6.1.1 | none"), "{new}");
        }
    }
}

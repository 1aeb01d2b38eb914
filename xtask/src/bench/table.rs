//! The table for people: Markdown, which reads as text, too.

use std::fmt::Write as _;

use super::rows::{Row, Samples, Unit};

pub(super) fn markdown(machine: &str, samples: &Samples, rows: &[Row]) -> String {
    let mut out =
        format!("Measured on {machine}. Medians, in brackets where they lie with 95 % confidence.\n\n");
    let cells: Vec<[String; 5]> = rows.iter().map(cells).collect();
    let heads = ["", "what", "measured", "target", "verdict"].map(str::to_owned);
    let widths: Vec<usize> = (0..heads.len())
        .map(|at| cells.iter().chain([&heads]).map(|row| row[at].chars().count()).max().unwrap_or(0))
        .collect();
    let mut line = |row: &[String]| {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(out, "| {cell:width$} ");
        }
        out.push_str("|\n");
    };
    line(&heads);
    line(&widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>());
    for row in &cells {
        line(row);
    }
    for (name, text) in &samples.facts {
        if let Some(method) = name.strip_prefix("program.") {
            let _ = write!(out, "\n{method}: {text}.");
        }
    }
    for (name, why) in &samples.skipped {
        let _ = write!(out, "\nSkipped: {}: {why}.", name.rsplit('.').next().unwrap_or(name));
    }
    out.push('\n');
    out
}

fn cells(row: &Row) -> [String; 5] {
    let Row { group, what, unit, target, estimate, verdict, .. } = row;
    let measured = estimate.map_or(String::new(), |estimate| {
        let value = unit.text(estimate.value);
        if estimate.low == estimate.high {
            return value;
        }
        let bare = |value: f64| match unit {
            Unit::Times => format!("{value:.3}"),
            _ => unit.text(value).split(' ').next().unwrap_or_default().to_owned(),
        };
        format!("{value} [{}, {}]", bare(estimate.low), bare(estimate.high))
    });
    [(*group).to_owned(), what.clone(), measured, target.text(*unit), verdict.name().to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        rows::{Target, Verdict},
        stats::Estimate,
    };

    #[test]
    fn every_row_says_what_was_measured_and_how_it_came_out() {
        let row = Row {
            group: "churn",
            what: "selfconn, to empty programs".to_owned(),
            unit: Unit::Times,
            target: Target::AtLeast(0.98),
            estimate: Some(Estimate { value: 0.991, low: 0.984, high: 1.002 }),
            verdict: Verdict::Met,
            why: None,
        };
        let skipped = Row { estimate: None, verdict: Verdict::Skipped, ..row.clone() };
        let text = markdown("a machine", &Samples::default(), &[row, skipped]);
        assert!(text.contains("| 0.991 × [0.984, 1.002] | ≥ 0.980 × | met     |"), "{text}");
        assert!(text.contains("| skipped |"), "{text}");
        let lines: Vec<usize> =
            text.lines().filter(|line| line.starts_with('|')).map(|line| line.chars().count()).collect();
        assert!(lines.iter().all(|length| *length == lines[0]), "{text}");
    }
}

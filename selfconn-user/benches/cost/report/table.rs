//! The table in Markdown, with aligned columns.

use std::fmt::Write as _;

use super::{CostRow, CostUnit, Samples};

pub(crate) fn markdown(machine: &str, samples: &Samples, rows: &[CostRow]) -> String {
    let mut out = format!("Measured on {machine}. Medians, with 95 % confidence intervals.\n\n");
    let cells: Vec<[String; 5]> = rows.iter().map(cells).collect();
    let heads = ["", "what", "measured", "target", "outcome"].map(str::to_owned);
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

fn cells(row: &CostRow) -> [String; 5] {
    let CostRow { group, what, unit, target, estimate, outcome, .. } = row;
    let measured = estimate.map_or(String::new(), |estimate| {
        let value = unit.text(estimate.value);
        if estimate.low == estimate.high {
            return value;
        }
        let bare = |value: f64| match unit {
            CostUnit::Ratio => format!("{value:.3}"),
            _ => unit.text(value).split(' ').next().unwrap_or_default().to_owned(),
        };
        format!("{value} [{}, {}]", bare(estimate.low), bare(estimate.high))
    });
    [(*group).to_owned(), what.clone(), measured, target.text(*unit), outcome.name().to_owned()]
}

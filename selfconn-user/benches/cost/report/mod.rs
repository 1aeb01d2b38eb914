//! From samples to a report: rows with a target and an outcome, the table, and the chart. Pure, so it has
//! unit tests: `report_tests.rs`.

mod chart;
mod rows;
pub(crate) mod stats;
mod table;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use stats::Estimate;

pub(crate) use self::{chart::svg, rows::rows_of, table::markdown};

/// The groups of connections of an address to itself, to a port that connect() can't choose, and to one that it can.
pub(crate) const OUTSIDE: &str = "churn outside";
pub(crate) const INSIDE: &str = "churn inside";

/// All measurements, by name.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Samples {
    // The first field: `cargo xtask bench` finds the samples of a virtual machine by it.
    pub(crate) values: BTreeMap<String, Vec<f64>>,
    pub(crate) facts: BTreeMap<String, String>,
    /// What could not be measured, and why.
    pub(crate) skipped: BTreeMap<String, String>,
}

impl Samples {
    pub(crate) fn add(&mut self, name: &str, value: f64) {
        self.values.entry(name.to_owned()).or_default().push(value);
    }

    pub(crate) fn get(&self, name: &str) -> &[f64] {
        self.values.get(name).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn median(&self, name: &str) -> Option<Estimate> {
        stats::of(self.get(name))
    }

    pub(crate) fn ratio(&self, above: &str, below: &str) -> Option<Estimate> {
        stats::of_ratios(self.get(above), self.get(below))
    }

    /// The first value of this name.
    pub(crate) fn first(&self, name: &str) -> Option<f64> {
        self.get(name).first().copied()
    }
}

/// The target of a row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Threshold {
    AtMost(f64),
    AtLeast(f64),
    /// The row has no target.
    None,
}

/// How the measurement compares with the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TargetOutcome {
    Met,
    NotMet,
    /// The target is within the confidence interval.
    Undecided,
    NoTarget,
    /// It can't be measured here.
    Skipped,
}

impl TargetOutcome {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::NotMet => "not met",
            Self::Undecided => "undecided",
            Self::NoTarget => "",
            Self::Skipped => "skipped",
        }
    }
}

impl Threshold {
    /// The whole confidence interval must be on one side of the target.
    pub(crate) fn compare(self, estimate: Estimate) -> TargetOutcome {
        let (is_met, is_missed) = match self {
            Self::None => return TargetOutcome::NoTarget,
            Self::AtMost(limit) => (estimate.high <= limit, estimate.low > limit),
            Self::AtLeast(limit) => (estimate.low >= limit, estimate.high < limit),
        };
        match (is_met, is_missed) {
            (true, _) => TargetOutcome::Met,
            (_, true) => TargetOutcome::NotMet,
            _ => TargetOutcome::Undecided,
        }
    }

    pub(crate) fn text(self, unit: CostUnit) -> String {
        match self {
            Self::AtMost(limit) => format!("≤ {}", unit.text(limit)),
            Self::AtLeast(limit) => format!("≥ {}", unit.text(limit)),
            Self::None => String::new(),
        }
    }
}

/// The unit of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CostUnit {
    Ratio,
    Nanoseconds,
    Microseconds,
    Milliseconds,
    Bytes,
    Cores,
    Count,
}

impl CostUnit {
    pub(crate) fn text(self, value: f64) -> String {
        match self {
            Self::Ratio => format!("{value:.3} ×"),
            Self::Nanoseconds => format!("{value:.0} ns"),
            Self::Microseconds => format!("{value:.0} µs"),
            Self::Milliseconds => format!("{value:.1} ms"),
            Self::Bytes => format!("{:.1} MiB", value / f64::from(1 << 20)),
            Self::Cores => format!("{value:.2} cores"),
            Self::Count => format!("{value:.0}"),
        }
    }
}

/// A row of the table.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct CostRow {
    pub(crate) group: &'static str,
    pub(crate) what: String,
    pub(crate) unit: CostUnit,
    pub(crate) target: Threshold,
    pub(crate) estimate: Option<Estimate>,
    pub(crate) outcome: TargetOutcome,
    /// Why it was skipped.
    pub(crate) why: Option<String>,
}

/// A kernel's version as tables show it: without the suffix of a local build.
pub(crate) fn short_version(release: &str) -> &str {
    release.split('-').next().unwrap_or(release)
}

/// Replaces the text between the markers `<!-- cost:begin -->` and `<!-- cost:end -->` of a document.
pub(crate) fn with_section(text: &str, section: &str) -> Option<String> {
    let (begin, end) = ("<!-- cost:begin -->\n", "<!-- cost:end -->");
    let (before, rest) = text.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}{section}{end}{after}"))
}

//! The groups of rows, and the function that measures each. Measurements that are compared alternate, and differ in
//! nothing else.

use anyhow::{Context as _, Result};

use crate::{bind, churn, guard, load, measure::Measurement, pairs, run_time, scan};

type Group = fn(&mut Measurement) -> Result<()>;

/// The groups of rows, in the order in which they are measured.
pub(crate) const GROUPS: [(&str, Group); 10] = [
    ("idle", load::idle),
    ("transition", run_time::transition),
    ("bind", bind::measure),
    ("churn", churn::churn),
    ("pairs", pairs::measure),
    ("latency", load::latency),
    ("scan", scan::scan),
    ("flood", load::flood),
    ("exec", churn::exec),
    ("guard", guard::measure),
];

/// Measures these groups, or all.
pub(crate) fn measure(measurement: &mut Measurement, only: &[String]) -> Result<()> {
    for (name, group) in GROUPS {
        if only.is_empty() || only.iter().any(|only| only == name) {
            eprintln!("cost: measuring {name}");
            group(measurement).with_context(|| format!("measure {name}"))?;
        }
    }
    Ok(())
}

//! The rows: what of the samples is judged by which target. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use super::stats::{self, Estimate};

/// What a target asks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// It is told, and not judged.
    Told,
}

/// How it came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    Met,
    NotMet,
    /// The interval straddles the target.
    Undecided,
    Told,
    /// Could not be measured here.
    Skipped,
}

impl Verdict {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::NotMet => "not met",
            Self::Undecided => "undecided",
            Self::Told => "",
            Self::Skipped => "skipped",
        }
    }
}

impl Target {
    fn judge(self, estimate: Estimate) -> Verdict {
        let (is_met, is_missed) = match self {
            Self::Told => return Verdict::Told,
            Self::AtMost(limit) => (estimate.high <= limit, estimate.low > limit),
            Self::AtLeast(limit) => (estimate.low >= limit, estimate.high < limit),
        };
        match (is_met, is_missed) {
            (true, _) => Verdict::Met,
            (_, true) => Verdict::NotMet,
            _ => Verdict::Undecided,
        }
    }

    pub(super) fn text(self, unit: Unit) -> String {
        match self {
            Self::AtMost(limit) => format!("≤ {}", unit.text(limit)),
            Self::AtLeast(limit) => format!("≥ {}", unit.text(limit)),
            Self::Told => String::new(),
        }
    }
}

/// What a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unit {
    Times,
    Nanoseconds,
    Microseconds,
    Milliseconds,
    Bytes,
    Cores,
    Count,
}

impl Unit {
    pub(super) fn text(self, value: f64) -> String {
        match self {
            Self::Times => format!("{value:.3} ×"),
            Self::Nanoseconds => format!("{value:.0} ns"),
            Self::Microseconds => format!("{value:.0} µs"),
            Self::Milliseconds => format!("{value:.1} ms"),
            Self::Bytes => format!("{:.1} MiB", value / f64::from(1 << 20)),
            Self::Cores => format!("{value:.2} cores"),
            Self::Count => format!("{value:.0}"),
        }
    }
}

/// A line of the table.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) group: &'static str,
    pub(super) what: String,
    pub(super) unit: Unit,
    pub(super) target: Target,
    pub(super) estimate: Option<Estimate>,
    pub(super) verdict: Verdict,
    /// Why it could not be measured.
    pub(super) why: Option<String>,
}

/// All that was measured, by name.
#[derive(Debug, Default)]
pub(super) struct Samples {
    pub(super) values: BTreeMap<String, Vec<f64>>,
    pub(super) facts: BTreeMap<String, String>,
    pub(super) skipped: BTreeMap<String, String>,
}

impl Samples {
    fn get(&self, name: &str) -> &[f64] {
        self.values.get(name).map_or(&[], Vec::as_slice)
    }

    fn median(&self, name: &str) -> Option<Estimate> {
        stats::of(self.get(name))
    }

    fn ratio(&self, above: &str, below: &str) -> Option<Estimate> {
        stats::of_ratios(self.get(above), self.get(below))
    }

    /// The one number of this name.
    fn one(&self, name: &str) -> Option<f64> {
        self.get(name).first().copied()
    }
}

/// Judges what was measured in a virtual machine on this kernel.
pub(super) fn of_guest(kernel: &str, samples: &Samples) -> Vec<Row> {
    let mut rows: Vec<Row> = of(samples)
        .into_iter()
        // How long something takes in an emulator, or beside tools that are not there, says nothing.
        .filter(|row| row.unit == Unit::Times && row.verdict != Verdict::Skipped)
        .collect();
    for row in &mut rows {
        row.group = "pair of hooks";
        row.what = format!("on {kernel}, emulated: {}", row.what);
    }
    rows
}

/// Judges. Groups that were not measured have no rows.
pub(super) fn of(samples: &Samples) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |group, what: &str, unit, target: Target, estimate: Option<Estimate>| {
        let verdict = estimate.map_or(Verdict::Skipped, |estimate| target.judge(estimate));
        rows.push(Row { group, what: what.to_owned(), unit, target, estimate, verdict, why: None });
    };
    use Target::{AtLeast, AtMost, Told};
    let exact = |name: &str| samples.one(name).map(Estimate::exact);

    let group = "transition";
    for method in ["tp_btf", "perf", "fentry", "kprobe"] {
        let (ours, empty) = (format!("transition.ours.{method}"), format!("transition.empty.{method}"));
        if let Some(estimate) = samples.ratio(&ours, &empty) {
            let what = format!("{method}: a transition of two addresses, to an empty program's");
            row(group, &what, Unit::Times, AtMost(1.10), Some(estimate));
            row(
                group,
                &format!("{method}: an empty program"),
                Unit::Nanoseconds,
                Told,
                samples.median(&empty),
            );
        }
    }
    for (what, name, target) in [
        ("a connection of an address to itself: the opener's memory", "memory.opener", AtMost(150.0)),
        ("a refused dial of an address to itself", "memory.refused", Told),
        ("a self-connection, told", "memory.self", Told),
    ] {
        if let Some(estimate) = samples.median(name) {
            row(group, what, Unit::Nanoseconds, target, Some(estimate));
        }
    }

    let group = "churn";
    if let Some(estimate) = samples.ratio("churn.close.ours", "churn.close.empty") {
        row(group, "selfconn, to empty programs", Unit::Times, AtLeast(0.98), Some(estimate));
        row(group, "selfconn, to untraced", Unit::Times, Told, samples.ratio("churn.ours", "churn.none"));
        row(
            group,
            "empty programs, to untraced",
            Unit::Times,
            Told,
            samples.ratio("churn.empty", "churn.none"),
        );
        row(
            group,
            "selfconn, to tcpstates",
            Unit::Times,
            AtLeast(3.0),
            samples.ratio("churn.ours", "churn.tcpstates"),
        );
        for peer in ["tcpstates", "tcplife", "bpftrace", "ss_polling"] {
            let estimate = samples.ratio(&format!("churn.{peer}"), "churn.none");
            row(group, &format!("{peer}, to untraced"), Unit::Times, Told, estimate);
        }
    }

    let group = "flood";
    for (name, what) in [
        ("one", "one generator, 45,000 a second"),
        ("two", "two generators, as fast as they go"),
        ("refused", "refused dials, 60,000 a second"),
    ] {
        let one = |part: &str| samples.one(&format!("flood.{name}.{part}"));
        let (Some(made), Some(established), Some(lost)) = (one("made"), one("established"), one("lost"))
        else {
            continue;
        };
        let rate: f64 = samples.get(&format!("flood.{name}.rate")).iter().sum();
        row(group, &format!("{what}: made a second"), Unit::Count, Told, Some(Estimate::exact(rate)));
        row(
            group,
            &format!("{what}: wrong"),
            Unit::Count,
            AtMost(0.0),
            exact(&format!("flood.{name}.wrong")),
        );
        if name != "two" {
            row(group, &format!("{what}: lost"), Unit::Count, AtMost(0.0), Some(Estimate::exact(lost)));
        } else {
            row(group, &format!("{what}: lost"), Unit::Count, Told, Some(Estimate::exact(lost)));
        }
        // What is neither told nor counted as lost, what the last event says beside what the log has, and its own sums.
        let told = if name == "refused" { one("refused").unwrap_or(0.0) } else { established };
        let made_up = if name == "refused" { established } else { 0.0 };
        let silent = (made - told).abs() + made_up - lost;
        let unwritten = (one("lines").unwrap_or(0.0) - one("written").unwrap_or(f64::NAN)).abs();
        let uneven = one("uneven").unwrap_or(f64::NAN);
        row(
            group,
            &format!("{what}: lost in silence"),
            Unit::Count,
            AtMost(0.0),
            Some(Estimate::exact(silent.max(0.0) + unwritten + uneven)),
        );
        row(
            group,
            &format!("{what}: daemon"),
            Unit::Cores,
            AtMost(1.0),
            exact(&format!("flood.{name}.cores")),
        );
        row(
            group,
            &format!("{what}: resident, less the ring"),
            Unit::Bytes,
            AtMost(16.0 * f64::from(1 << 20)),
            exact(&format!("flood.{name}.rss")),
        );
        row(
            group,
            &format!("{what}: resident, late to early"),
            Unit::Times,
            AtMost(1.05),
            exact(&format!("flood.{name}.rss_grown")),
        );
    }

    let group = "latency";
    let latency = samples.get("latency");
    if !latency.is_empty() {
        let what = "connect() to the line in the log";
        row(group, &format!("{what}: p50"), Unit::Microseconds, Told, stats::of_quantile(latency, 0.5));
        row(
            group,
            &format!("{what}: p99"),
            Unit::Microseconds,
            AtMost(1_000.0),
            stats::of_quantile(latency, 0.99),
        );
    }

    let group = "idle";
    if !samples.get("start").is_empty() {
        let mib = |count: f64| count * f64::from(1 << 20);
        row(group, "wake-ups a minute", Unit::Count, AtMost(10.0), exact("idle.wakeups"));
        row(group, "time on a CPU, a minute", Unit::Microseconds, Told, exact("idle.cpu_us"));
        row(group, "resident, less the ring", Unit::Bytes, AtMost(mib(10.0)), exact("idle.rss"));
        row(group, "start to hooks live", Unit::Milliseconds, AtMost(200.0), samples.median("start"));
        row(group, "binary", Unit::Bytes, AtMost(mib(6.0)), exact("binary"));
    }

    let group = "scan";
    let per = |name: &str, from: u32, to: u32| {
        let (few, many) = (format!("scan.{name}.{from}"), format!("scan.{name}.{to}"));
        samples.ratio(&many, &few)
    };
    if !samples.get("scan.sockets.100000").is_empty() {
        let of_ss = samples.ratio("scan.sockets.100000", "scan.ss.100000");
        row(group, "100,000 sockets, to `ss -tanH`", Unit::Times, AtMost(0.5), of_ss);
        row(group, "100,000 sockets", Unit::Milliseconds, Told, samples.median("scan.sockets.100000"));
        // Linear or better: ten times the sockets take at most ten times as long.
        for (from, to) in [(1_000, 10_000), (10_000, 100_000)] {
            row(
                group,
                &format!("{from} to {to} sockets"),
                Unit::Times,
                AtMost(10.0),
                per("sockets", from, to),
            );
        }
        for (from, to) in [(1, 10), (10, 100)] {
            row(
                group,
                &format!("{from} to {to} namespaces"),
                Unit::Times,
                AtMost(10.0),
                per("namespaces", from, to),
            );
        }
    }
    for (what, name) in [
        ("a reading of 1,000 sockets, of a processor", "reading.sockets.1000"),
        ("a reading of 100,000 sockets, of a processor", "reading.sockets.100000"),
        ("a reading of 100 namespaces, of a processor", "reading.namespaces.100"),
    ] {
        if let Some(estimate) = samples.median(name) {
            row(group, what, Unit::Milliseconds, Told, Some(estimate));
        }
    }
    for row in &mut rows {
        if row.verdict == Verdict::Skipped {
            let named = samples
                .skipped
                .iter()
                .find(|(name, _)| name.rsplit('.').next().is_some_and(|last| row.what.contains(last)));
            row.why = named.map(|(_, why)| why.clone());
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_or_missed_only_by_the_whole_interval() {
        let estimate = |low, value, high| Estimate { value, low, high };
        for (target, estimate, verdict) in [
            (Target::AtMost(1.1), estimate(1.0, 1.05, 1.1), Verdict::Met),
            (Target::AtMost(1.1), estimate(1.0, 1.05, 1.11), Verdict::Undecided),
            (Target::AtMost(1.1), estimate(1.11, 1.2, 1.3), Verdict::NotMet),
            (Target::AtLeast(0.98), estimate(0.98, 1.0, 1.1), Verdict::Met),
            (Target::AtLeast(0.98), estimate(0.97, 1.0, 1.1), Verdict::Undecided),
            (Target::AtLeast(0.98), estimate(0.9, 0.95, 0.97), Verdict::NotMet),
            (Target::Told, estimate(0.0, 1.0, 9.0), Verdict::Told),
            (Target::AtMost(0.0), Estimate::exact(0.0), Verdict::Met),
            (Target::AtMost(0.0), Estimate::exact(1.0), Verdict::NotMet),
        ] {
            assert_eq!(target.judge(estimate), verdict, "{target:?} {estimate:?}");
        }
    }

    #[test]
    fn what_is_lost_in_silence_is_what_nobody_counted() {
        let flood = |made: f64, established: f64, lost: f64, lines: f64, written: f64, uneven: f64| {
            let mut samples = Samples::default();
            for (name, value) in [
                ("made", made),
                ("established", established),
                ("lost", lost),
                ("lines", lines),
                ("written", written),
                ("wrong", 0.0),
                ("uneven", uneven),
            ] {
                samples.values.insert(format!("flood.two.{name}"), vec![value]);
            }
            let silent = of(&samples).into_iter().find(|row| row.what.ends_with("lost in silence")).unwrap();
            silent.verdict
        };
        assert_eq!(flood(100.0, 100.0, 0.0, 202.0, 202.0, 0.0), Verdict::Met);
        assert_eq!(flood(100.0, 90.0, 10.0, 182.0, 182.0, 0.0), Verdict::Met);
        assert_eq!(flood(100.0, 90.0, 9.0, 182.0, 182.0, 0.0), Verdict::NotMet);
        assert_eq!(flood(100.0, 101.0, 0.0, 204.0, 204.0, 0.0), Verdict::NotMet, "one was made up");
        assert_eq!(flood(100.0, 100.0, 0.0, 201.0, 202.0, 0.0), Verdict::NotMet, "a line is missing");
        assert_eq!(flood(100.0, 100.0, 0.0, 202.0, 202.0, 1.0), Verdict::NotMet, "a sum does not hold");
    }

    #[test]
    fn refused_dials_are_counted_and_make_no_connection() {
        for (refused, established, verdict) in
            [(100.0, 0.0, Verdict::Met), (99.0, 0.0, Verdict::NotMet), (100.0, 1.0, Verdict::NotMet)]
        {
            let mut samples = Samples::default();
            for (name, value) in [
                ("made", 100.0),
                ("refused", refused),
                ("established", established),
                ("lost", 0.0),
                ("lines", 2.0),
                ("written", 2.0),
                ("uneven", 0.0),
            ] {
                samples.values.insert(format!("flood.refused.{name}"), vec![value]);
            }
            let silent = of(&samples).into_iter().find(|row| row.what.ends_with("lost in silence")).unwrap();
            assert_eq!(silent.verdict, verdict, "{refused} counted, {established} established");
        }
    }

    #[test]
    fn a_peer_that_does_not_load_is_named_with_its_reason() {
        let mut samples = Samples::default();
        for name in ["churn.close.ours", "churn.close.empty", "churn.ours", "churn.none", "churn.empty"] {
            samples.values.insert(name.to_owned(), vec![1.0, 1.0]);
        }
        samples.skipped.insert("churn.bpftrace".to_owned(), "no tracefs".to_owned());
        let rows = of(&samples);
        let row = rows.iter().find(|row| row.what.starts_with("bpftrace")).unwrap();
        assert_eq!((row.verdict, row.why.as_deref()), (Verdict::Skipped, Some("no tracefs")));
    }
}

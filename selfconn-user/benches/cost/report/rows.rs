//! The rows of the table: which samples are compared with which target.

use super::{CostRow, CostUnit, INSIDE, OUTSIDE, Samples, TargetOutcome, Threshold, stats, stats::Estimate};

use CostUnit::{Bytes, Cores, Count, Microseconds, Milliseconds, Nanoseconds, Ratio};
use Threshold::{AtLeast, AtMost, None as NoTarget};

const MIB: f64 = (1 << 20) as f64;

/// Collects rows.
struct RowBuilder<'a> {
    samples: &'a Samples,
    group: &'static str,
    rows: Vec<CostRow>,
}

impl RowBuilder<'_> {
    /// Adds a row. Without an estimate it is skipped.
    fn row(&mut self, what: &str, unit: CostUnit, target: Threshold, estimate: Option<Estimate>) {
        let outcome = estimate.map_or(TargetOutcome::Skipped, |estimate| target.compare(estimate));
        let (group, what) = (self.group, what.to_owned());
        self.rows.push(CostRow { group, what, unit, target, estimate, outcome, why: None });
    }

    /// Adds a row if it was measured.
    fn measured(&mut self, what: &str, unit: CostUnit, target: Threshold, estimate: Option<Estimate>) {
        if estimate.is_some() {
            self.row(what, unit, target, estimate);
        }
    }

    /// The first value of this name, without an interval.
    fn exact(&self, name: &str) -> Option<Estimate> {
        self.samples.first(name).map(Estimate::exact)
    }
}

/// The rows of this host, then those of a virtual machine. Groups that were not measured have no rows.
pub(crate) fn rows_of(samples: &Samples, vm: Option<&Samples>) -> Vec<CostRow> {
    let mut rows = rows_of_host(samples);
    if let Some(vm) = vm {
        let kernel = vm.facts.get("kernel").map_or("?", String::as_str);
        // Absolute times in an emulator, and tools that are not there, say nothing.
        let comparable = |row: &CostRow| row.unit == Ratio && row.outcome != TargetOutcome::Skipped;
        rows.extend(rows_of_host(vm).into_iter().filter(comparable).map(|row| CostRow {
            group: "pair of hooks",
            what: format!("on {kernel}, emulated: {}: {}", row.group, row.what),
            ..row
        }));
    }
    rows
}

fn rows_of_host(samples: &Samples) -> Vec<CostRow> {
    let mut builder = RowBuilder { samples, group: "", rows: Vec::new() };
    for (group, add) in [
        ("transition", transition as fn(&mut RowBuilder<'_>)),
        ("bind", bind),
        ("churn", churn),
        (OUTSIDE, churn),
        (INSIDE, churn),
        ("pairs", pairs),
        ("flood", flood),
        ("latency", latency),
        ("idle", idle),
        ("scan", scan),
        ("exec", exec),
        ("guard", guard),
    ] {
        builder.group = group;
        add(&mut builder);
    }
    let mut rows = builder.rows;
    for row in rows.iter_mut().filter(|row| row.outcome == TargetOutcome::Skipped) {
        let is_about_row =
            |name: &&String| name.rsplit('.').next().is_some_and(|last| row.what.contains(last));
        row.why = samples.skipped.keys().find(is_about_row).map(|name| samples.skipped[name].clone());
    }
    rows
}

fn transition(builder: &mut RowBuilder<'_>) {
    let samples = builder.samples;
    for method in ["tp_btf", "perf", "fentry", "kprobe"] {
        let (ours, empty) = (format!("transition.ours.{method}"), format!("transition.empty.{method}"));
        let what = format!("{method}: a transition between two addresses, to an empty program");
        builder.measured(&what, Ratio, AtMost(1.10), samples.ratio(&ours, &empty));
        let what = format!("{method}: an empty program");
        let is_measured = !samples.get(&ours).is_empty();
        builder.measured(&what, Nanoseconds, NoTarget, samples.median(&empty).filter(|_| is_measured));
    }
    for (what, name, target) in [
        (
            "a connection of an address to itself, port outside the range",
            "self_addressed.outside",
            AtMost(60.0),
        ),
        (
            "a connection of an address to itself, port inside the range",
            "self_addressed.connect",
            AtMost(250.0),
        ),
        ("a refused connect of an address to itself", "self_addressed.refused", NoTarget),
        ("a self-connection, reported", "self_addressed.self", NoTarget),
    ] {
        builder.measured(what, Nanoseconds, target, samples.median(name));
    }
}

fn bind(builder: &mut RowBuilder<'_>) {
    let samples = builder.samples;
    let is_skipped = samples.skipped.contains_key("bind.bind()");
    let ratio = samples.ratio("bind.ours", "bind.empty");
    if ratio.is_some() || is_skipped {
        builder.row("bind(), to empty programs", Ratio, AtMost(1.10), ratio);
    }
    builder.measured("bind(): empty programs", Nanoseconds, NoTarget, samples.median("bind.empty"));
    for (what, name) in [("selfconn, to untraced", "ours"), ("empty programs, to untraced", "empty")] {
        let ratio = samples.ratio(&format!("bind.rate.{name}"), "bind.rate.none");
        builder.measured(what, Ratio, NoTarget, ratio);
    }
}

/// The rows of one destination: the name of the group is that of its samples.
fn churn(builder: &mut RowBuilder<'_>) {
    let (samples, group) = (builder.samples, builder.group);
    let ratio =
        |above: &str, below: &str| samples.ratio(&format!("{group}.{above}"), &format!("{group}.{below}"));
    let close = ratio("close.ours", "close.empty");
    if close.is_none() {
        return;
    }
    // Inside the range the cost has a target in nanoseconds.
    let to_empty = if group == INSIDE { NoTarget } else { AtLeast(0.98) };
    builder.row("selfconn, to empty programs", Ratio, to_empty, close);
    builder.row("selfconn, to untraced", Ratio, NoTarget, ratio("ours", "none"));
    builder.row("empty programs, to untraced", Ratio, NoTarget, ratio("empty", "none"));
    builder.row("selfconn, to tcpstates", Ratio, AtLeast(3.0), ratio("ours", "tcpstates"));
    for peer in ["tcpstates", "tcplife", "bpftrace", "ss_polling"] {
        builder.row(&format!("{peer}, to untraced"), Ratio, NoTarget, ratio(peer, "none"));
    }
}

/// Each single method and pair, to untraced.
fn pairs(builder: &mut RowBuilder<'_>) {
    let samples = builder.samples;
    for name in samples.values.keys().filter_map(|name| name.strip_prefix("pairs.")) {
        if name != "none" {
            let ratio = samples.ratio(&format!("pairs.{name}"), "pairs.none");
            builder.row(&format!("{name} attached, to untraced"), Ratio, NoTarget, ratio);
        }
    }
}

fn flood(builder: &mut RowBuilder<'_>) {
    let samples = builder.samples;
    for (name, what) in [
        ("one", "one generator, at most 45,000 a second"),
        ("two", "two generators, as fast as they can"),
        ("refused", "refused connects, 60,000 a second"),
    ] {
        let first = |part: &str| samples.first(&format!("flood.{name}.{part}"));
        let (Some(made), Some(established), Some(lost)) =
            (first("made"), first("established"), first("lost"))
        else {
            continue;
        };
        // Neither reported nor counted as lost; a difference between the log and the last event; and in its
        // own sums.
        let reported = if name == "refused" { first("refused").unwrap_or(0.0) } else { established };
        let invented = if name == "refused" { established } else { 0.0 };
        let uncounted = ((made - reported).abs() + invented - lost).max(0.0)
            + (first("lines").unwrap_or(0.0) - first("written").unwrap_or(f64::NAN)).abs()
            + first("sum_error").unwrap_or(f64::NAN);
        let rate = samples.get(&format!("flood.{name}.rate")).iter().sum();
        let may_lose = if name == "two" { NoTarget } else { AtMost(0.0) };
        let max_cores = if name == "one" { 0.35 } else { 1.0 };
        let exact = |part: &str| first(part).map(Estimate::exact);
        for (part, unit, target, estimate) in [
            ("made a second", Count, NoTarget, Some(Estimate::exact(rate))),
            ("wrong process", Count, AtMost(0.0), exact("wrong")),
            ("lost", Count, may_lose, Some(Estimate::exact(lost))),
            ("lost and not counted", Count, AtMost(0.0), Some(Estimate::exact(uncounted))),
            ("daemon", Cores, AtMost(max_cores), exact("cores")),
            ("resident, less the ring", Bytes, AtMost(16.0 * MIB), exact("rss")),
            ("resident, late to early", Ratio, AtMost(1.05), exact("rss_growth")),
        ] {
            builder.row(&format!("{what}: {part}"), unit, target, estimate);
        }
    }
}

fn latency(builder: &mut RowBuilder<'_>) {
    let latency = builder.samples.get("latency");
    let what = "connect() to the line in the log";
    let (median, p99) = (stats::of_quantile(latency, 0.5), stats::of_quantile(latency, 0.99));
    builder.measured(&format!("{what}: p50"), Microseconds, NoTarget, median);
    builder.measured(&format!("{what}: p99"), Microseconds, AtMost(1_000.0), p99);
}

fn idle(builder: &mut RowBuilder<'_>) {
    let start = builder.samples.median("start");
    if start.is_none() {
        return;
    }
    builder.row("wake-ups a minute", Count, AtMost(10.0), builder.exact("idle.wakeups"));
    builder.row("time on a CPU, a minute", Microseconds, NoTarget, builder.exact("idle.cpu_us"));
    builder.row("resident, less the ring", Bytes, AtMost(10.0 * MIB), builder.exact("idle.rss"));
    builder.row("start to hooks live", Milliseconds, AtMost(200.0), start);
    builder.row("binary", Bytes, AtMost(6.0 * MIB), builder.exact("binary"));
}

fn scan(builder: &mut RowBuilder<'_>) {
    let samples = builder.samples;
    let growth = |name: &str, from: u32, to: u32| {
        samples.ratio(&format!("scan.{name}.{to}"), &format!("scan.{name}.{from}"))
    };
    if !samples.get("scan.sockets.100000").is_empty() {
        let to_ss = samples.ratio("scan.sockets.100000", "scan.ss.100000");
        builder.row("100,000 sockets, to `ss -tanH`", Ratio, AtMost(0.5), to_ss);
        builder.row("100,000 sockets", Milliseconds, NoTarget, samples.median("scan.sockets.100000"));
        // Linear or better: ten times the sockets take at most ten times as long.
        for (what, from, to) in [
            ("sockets", 1_000, 10_000),
            ("sockets", 10_000, 100_000),
            ("namespaces", 1, 10),
            ("namespaces", 10, 100),
        ] {
            let name = format!("{from} to {to} {what}");
            builder.row(&name, Ratio, AtMost(10.0), growth(what, from, to));
        }
    }
    for (what, name) in [
        ("CPU time of a snapshot of 1,000 sockets", "snapshot.sockets.1000"),
        ("CPU time of a snapshot of 100,000 sockets", "snapshot.sockets.100000"),
        ("CPU time of a snapshot of 100 namespaces", "snapshot.namespaces.100"),
    ] {
        builder.measured(what, Milliseconds, NoTarget, samples.median(name));
    }
}

fn exec(builder: &mut RowBuilder<'_>) {
    let samples = builder.samples;
    builder.measured(
        "selfconn exec true, from start to end",
        Milliseconds,
        AtMost(1_000.0),
        samples.median("exec.true"),
    );
    let ratio = samples.ratio("exec.with", "exec.without");
    builder.measured("connections of a command to its own address, to without exec", Ratio, NoTarget, ratio);
}

fn guard(builder: &mut RowBuilder<'_>) {
    let samples = builder.samples;
    if samples.skipped.contains_key("guard.packet") {
        builder.row("a packet on lo, to an empty program", Ratio, NoTarget, None);
    }
    for (what, unit, estimate) in [
        (
            "a packet on lo, to an empty program",
            Ratio,
            samples.ratio("guard.packet.ours", "guard.packet.empty"),
        ),
        ("a packet on lo: an empty program", Nanoseconds, samples.median("guard.packet.empty")),
        (
            "round trips on loopback, to without guard",
            Ratio,
            samples.ratio("guard.round-trips.with", "guard.round-trips.without"),
        ),
        (
            "throughput on loopback, to without guard",
            Ratio,
            samples.ratio("guard.bulk.with", "guard.bulk.without"),
        ),
        (
            "a bound client that connects to itself and is refused, to one at a closed port",
            Ratio,
            samples.ratio("guard.refused.itself", "guard.refused.closed"),
        ),
        (
            "a bound client at a closed port, from socket() to close()",
            Nanoseconds,
            samples.median("guard.refused.closed"),
        ),
        (
            "start until all of the host's and 1 more namespace are guarded",
            Milliseconds,
            samples.median("guard.attach.1"),
        ),
        (
            "start until all of the host's and 200 more namespaces are guarded",
            Milliseconds,
            samples.median("guard.attach.200"),
        ),
    ] {
        builder.measured(what, unit, NoTarget, estimate);
    }
}

//! What `audit` found, for people and as JSON lines.

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use super::{
    boot::Disagreement,
    fix::{self, Fix},
    grade::{Risk, Row},
    look::Seen,
};
use crate::sink::text::escape;

/// A namespace and what was found there.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) seen: Seen,
    pub(super) rows: Vec<Row>,
    /// What the next boot makes otherwise; empty where that is no question.
    pub(super) disagreements: Vec<Disagreement>,
}

/// How many ports are at which risk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    pub(super) high: usize,
    pub(super) low: usize,
    pub(super) none: usize,
}

impl Counts {
    pub(super) fn of(reports: &[Report]) -> Self {
        let count =
            |risk| reports.iter().flat_map(|report| &report.rows).filter(|row| row.risk == risk).count();
        Self { high: count(Risk::High), low: count(Risk::Low), none: count(Risk::None) }
    }
}

#[derive(Serialize)]
struct JsonRow<'a> {
    netns: u32,
    addr: Option<String>,
    ifindex: Option<u32>,
    port: u16,
    risk: &'static str,
    why: &'a str,
    listener: Option<JsonListener<'a>>,
    expected_dials: Option<u32>,
    fix: Option<&'a str>,
    fix_lasting: Option<&'a str>,
}

#[derive(Serialize)]
struct JsonListener<'a> {
    pid: Option<u32>,
    comm: Option<&'a str>,
    unit: Option<&'a str>,
    container: Option<&'a str>,
}

#[derive(Serialize)]
struct Summary<'a> {
    event: &'static str,
    #[serde(flatten)]
    counts: Counts,
    namespaces: Vec<JsonNamespace<'a>>,
    unseen: &'a [String],
}

#[derive(Serialize)]
struct JsonNamespace<'a> {
    netns: u32,
    /// By which file it was entered; null: it is the one that audit runs in.
    path: Option<String>,
    range: String,
    reserved: String,
    disagreements: &'a [Disagreement],
}

/// An object for each port, and the summary.
pub(super) fn json(reports: &[Report], unseen: &[String]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for Report { seen, rows, .. } in reports {
        let fix = fix::fix(seen, rows);
        for row in rows {
            let fix = fix.as_ref().filter(|_| row.risk != Risk::None);
            let row = JsonRow {
                netns: row.netns,
                addr: row.addr.map(|addr| addr.to_string()),
                ifindex: row.ifindex,
                port: row.port,
                risk: row.risk.name(),
                why: &row.why,
                listener: row.listener.as_ref().map(|who| JsonListener {
                    pid: who.pid,
                    comm: who.comm.as_deref(),
                    unit: who.unit.as_deref(),
                    container: who.container.as_deref(),
                }),
                expected_dials: row.expected_dials,
                fix: fix.map(|fix| fix.now.as_str()),
                fix_lasting: fix.and_then(|fix| fix.lasting.as_deref()),
            };
            line(&row, &mut out)?;
        }
    }
    let summary = Summary {
        event: "summary",
        counts: Counts::of(reports),
        namespaces: reports.iter().map(JsonNamespace::of).collect(),
        unseen,
    };
    line(&summary, &mut out)?;
    Ok(out)
}

fn line(object: &impl Serialize, out: &mut Vec<u8>) -> Result<()> {
    serde_json::to_writer(&mut *out, object)?;
    out.push(b'\n');
    Ok(())
}

impl<'a> JsonNamespace<'a> {
    fn of(report: &'a Report) -> Self {
        let Seen { namespace, ports, .. } = &report.seen;
        Self {
            netns: namespace.inode,
            path: (!namespace.is_own).then(|| namespace.path.display().to_string()),
            range: ports.range.to_string(),
            reserved: ports.reserved.to_string(),
            disagreements: &report.disagreements,
        }
    }
}

/// A line for each namespace; below it, grouped by what holds for them, the ports at risk and those that were asked
/// for, and the cures.
pub(super) fn text(reports: &[Report]) -> String {
    let mut out = String::new();
    for Report { seen, rows, disagreements } in reports {
        heading(seen, rows, &mut out);
        let mut told: Vec<_> = rows.iter().filter(|row| row.risk != Risk::None || row.is_asked).collect();
        told.sort_by_key(|row| (row.risk, &row.why));
        let width = told.iter().map(|row| row.end().len()).max().unwrap_or(0);
        let mut before = None;
        for row in &told {
            let reason = (row.risk, &row.why);
            if before != Some(reason) {
                let _ = writeln!(out, "  {}: {}", row.risk.name(), escape(&row.why));
                before = Some(reason);
            }
            let line = format!("    {:<width$}  {}", row.end(), escape(&row.who()));
            let _ = writeln!(out, "{}", line.trim_end());
        }
        if let Some(Fix { now, lasting }) = fix::fix(seen, rows) {
            let _ = writeln!(out, "  now:     {}", escape(&now));
            if let Some(lasting) = lasting {
                let _ = writeln!(out, "  lasting: {}", escape(&lasting));
            }
        }
        for Disagreement { key, file, at_boot, running } in disagreements {
            let value =
                |value: &str| if value.is_empty() { "nothing".to_owned() } else { format!("{value:?}") };
            let file = file.as_deref().unwrap_or("no file sets it, so the kernel's default");
            let (at_boot, running) = (value(at_boot), value(running));
            let line = format!("{key} is {running} now, and {at_boot} after the next boot ({file})");
            let _ = writeln!(out, "  boot:    {}", escape(&line));
        }
    }
    let counts = Counts::of(reports);
    let namespaces = match reports.len() {
        1 => "1 network namespace".to_owned(),
        count => format!("{count} network namespaces"),
    };
    let _ = match counts {
        Counts { high: 0, low: 0, none } => {
            writeln!(out, "nothing at risk in {namespaces}; {none} {} looked at", ports(none))
        }
        Counts { high, low, none } => {
            writeln!(out, "at risk in {namespaces}: {high} high, {low} low; {none} {} not", ports(none))
        }
    };
    out
}

fn heading(seen: &Seen, rows: &[Row], out: &mut String) {
    let Seen { namespace, ports, .. } = seen;
    let which = match namespace.is_own {
        true => "this one".to_owned(),
        false => escape(&namespace.path.display().to_string()),
    };
    let reserved = match ports.reserved.is_empty() {
        true => "nothing reserved".to_owned(),
        false => format!("reserved {}", ports.reserved),
    };
    let calm = rows.iter().filter(|row| row.risk == Risk::None).count();
    let calm = match calm == rows.len() {
        true => format!("; {calm} {}, nothing at risk", self::ports(calm)),
        false => String::new(),
    };
    let _ =
        writeln!(out, "netns {} ({which}): source ports {}, {reserved}{calm}", namespace.inode, ports.range);
}

fn ports(count: usize) -> &'static str {
    if count == 1 { "port" } else { "ports" }
}

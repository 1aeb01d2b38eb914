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

/// A line for each namespace; below it the ports at risk and those that were asked for, and the cures.
pub(super) fn text(reports: &[Report]) -> String {
    let mut out = String::new();
    for Report { seen, rows, disagreements } in reports {
        heading(seen, rows, &mut out);
        let told: Vec<_> = rows.iter().filter(|row| row.risk != Risk::None || row.is_asked).collect();
        let who = |row: &Row| match row.listener {
            Some(_) => escape(&row.who()),
            None => "nobody listens".to_owned(),
        };
        let told: Vec<_> = told.into_iter().map(|row| (row.end(), who(row), row)).collect();
        let width = |len: fn(&(String, String, &Row)) -> usize| told.iter().map(len).max().unwrap_or(0);
        let (ends, whos) = (width(|(end, ..)| end.len()), width(|(_, who, _)| who.len()));
        for (end, who, row) in &told {
            let risk = row.risk.name();
            let _ = writeln!(out, "  {risk:<4}  {end:<ends$}  {who:<whos$}  {}", escape(&row.brief));
        }
        if let Some(Fix { now, lasting }) = fix::fix(seen, rows) {
            let _ = writeln!(out, "  now    {}", escape(&now));
            if let Some(lasting) = lasting {
                let _ = writeln!(out, "  keep   {}", escape(&lasting));
            }
        }
        for Disagreement { key, file, at_boot, running } in disagreements {
            let value =
                |value: &str| if value.is_empty() { "nothing".to_owned() } else { format!("{value:?}") };
            let file = file.as_deref().unwrap_or("no file sets it, so the kernel's default");
            let (at_boot, running) = (value(at_boot), value(running));
            let line = format!("{key} is {running} now, and {at_boot} after the next boot ({file})");
            let _ = writeln!(out, "  boot   {}", escape(&line));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        commands::audit::{
            fix::Lasts,
            grade::grade,
            look::{Leaves, Target, Who},
        },
        ports::LocalPorts,
        sockets::Namespace,
    };

    fn reports() -> Vec<Report> {
        let target = |addr: &str, port, listener| Target {
            addr: addr.parse().ok(),
            ifindex: None,
            port,
            leaves: Leaves::Itself,
            inode: 0,
            listener,
            is_asked: addr.is_empty(),
        };
        let nginx = Who {
            pid: Some(812),
            comm: Some("a\nb".to_owned()),
            unit: Some("x.service".to_owned()),
            ..Who::default()
        };
        let seen = Seen {
            namespace: Namespace { inode: 7, path: "/run/netns/blue".into(), is_own: true },
            ports: LocalPorts::parse("32768 60999", "8080").unwrap(),
            lasts: Some(Lasts::SysctlD),
            targets: vec![
                target("127.0.0.1", 44_446, Some(nginx)),
                target("::", 50_051, Some(Who::default())),
                target("", 61_616, None),
                target("127.0.0.1", 22, Some(Who::default())),
            ],
        };
        let calm = Seen {
            namespace: Namespace { inode: 8, path: "/run/netns/blue".into(), is_own: false },
            ports: LocalPorts::parse("32768 60999", "").unwrap(),
            lasts: None,
            targets: vec![target("127.0.0.1", 22, Some(Who::default()))],
        };
        let disagreement = Disagreement {
            key: fix::RESERVED,
            file: None,
            at_boot: String::new(),
            running: "8080".to_owned(),
        };
        let report = |seen: Seen, disagreements| Report { rows: grade(&seen), seen, disagreements };
        vec![report(seen, vec![disagreement]), report(calm, vec![])]
    }

    #[test]
    fn people_get_a_line_for_each_port_that_matters_and_the_cures() {
        assert_eq!(
            text(&reports()),
            "\
netns 7 (this one): source ports 32768-60999, reserved 8080
  high  127.0.0.1:44446  a\\nb[812] x.service  even: one dial in 14,116 hits itself once it is down
  low   [::]:50051       an unknown process   odd: one dial in 14,116, only for a client that binds port 0 first
  none  *:61616          nobody listens       outside the range
  now    sysctl -w net.ipv4.ip_local_reserved_ports=8080,44446,50051
  keep   selfconn audit --netns self --sysctl > /etc/sysctl.d/90-selfconn.conf
  boot   net.ipv4.ip_local_reserved_ports is \"8080\" now, and nothing after the next boot (no file sets it, so the \
kernel's default)
netns 8 (/run/netns/blue): source ports 32768-60999, nothing reserved; 1 port, nothing at risk
at risk in 2 network namespaces: 1 high, 1 low; 3 ports not
"
        );
    }

    #[test]
    fn json_has_an_object_for_each_port_and_null_for_the_unknown() {
        let bytes = json(&reports(), &["something".to_owned()]).unwrap();
        let rows: Vec<serde_json::Value> =
            str::from_utf8(&bytes).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len(), 6);
        assert_eq!(rows[0]["listener"]["comm"], "a\nb");
        assert_eq!(rows[0]["listener"]["unit"], "x.service");
        assert_eq!(rows[0]["expected_dials"], 14_116);
        assert!(rows[1]["listener"]["pid"].is_null() && rows[1]["listener"].is_object(), "{}", rows[1]);
        for absent in ["fix", "fix_lasting", "expected_dials", "listener", "addr", "ifindex"] {
            assert_eq!(rows[3].get(absent), Some(&serde_json::Value::Null), "{absent}: {}", rows[3]);
        }
        let summary = &rows[5];
        assert_eq!((&summary["high"], &summary["low"], &summary["none"]), (&1.into(), &1.into(), &3.into()));
        assert_eq!(summary["namespaces"][0]["path"], serde_json::Value::Null);
        assert_eq!(summary["namespaces"][1]["path"], "/run/netns/blue");
        assert_eq!(summary["namespaces"][0]["disagreements"][0]["file"], serde_json::Value::Null);
        assert_eq!(summary["unseen"][0], "something");
    }
}

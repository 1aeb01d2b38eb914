//! Prints the result of `audit`, as text for people and as JSON lines.

use std::fmt::Write as _;

use anyhow::Result;
use schemars::JsonSchema;
use serde::Serialize;

use super::{
    assess::{PortAssessment, Risk},
    boot::Disagreement,
    collect::NamespaceInfo,
    fix::Fix,
    groups::{PortGroup, group},
};
use crate::{
    event::text::{escape, group_thousands},
    guard::GuardMode,
};

/// A network namespace and its assessment.
#[derive(Debug)]
pub(super) struct NamespaceReport {
    pub(super) namespace_info: NamespaceInfo,
    pub(super) assessments: Vec<PortAssessment>,
    /// `None`: nothing is at risk.
    pub(super) fix: Option<Fix>,
    /// Settings that the next boot changes. Empty for a namespace to which sysctl.d does not apply.
    pub(super) disagreements: Vec<Disagreement>,
}

/// The number of ports of each risk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct RiskCounts {
    pub(super) high: usize,
    pub(super) low: usize,
    pub(super) none: usize,
}

impl RiskCounts {
    pub(super) fn of(reports: &[NamespaceReport]) -> Self {
        let count = |risk| {
            reports.iter().flat_map(|report| &report.assessments).filter(|row| row.risk == risk).count()
        };
        Self { high: count(Risk::High), low: count(Risk::Low), none: count(Risk::None) }
    }
}

/// A line of `audit --json`.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
pub(in crate::commands) enum AuditLine<'a> {
    Port(JsonPort<'a>),
    /// The last line.
    Summary(AuditSummary<'a>),
}

#[derive(Serialize, JsonSchema)]
pub(in crate::commands) struct JsonPort<'a> {
    netns: u32,
    addr: Option<String>,
    ifindex: Option<u32>,
    port: u16,
    risk: &'static str,
    why: &'a str,
    listener: Option<JsonListener<'a>>,
    expected_dials: Option<u32>,
    /// What a guard does in the network namespace. Null: unknown.
    guard: Option<&'static str>,
}

#[derive(Serialize, JsonSchema)]
struct JsonListener<'a> {
    pid: Option<u32>,
    comm: Option<&'a str>,
    unit: Option<&'a str>,
    container: Option<&'a str>,
}

#[derive(Serialize, JsonSchema)]
pub(in crate::commands) struct AuditSummary<'a> {
    event: &'static str,
    #[serde(flatten)]
    counts: RiskCounts,
    namespaces: Vec<JsonNamespace<'a>>,
    unseen: &'a [String],
}

#[derive(Serialize, JsonSchema)]
struct JsonNamespace<'a> {
    netns: u32,
    /// The file through which audit entered the namespace. Null: the namespace that audit runs in.
    path: Option<String>,
    range: String,
    reserved: String,
    fix: Option<&'a str>,
    fix_lasting: Option<&'a str>,
    fix_note: Option<&'a str>,
    disagreements: &'a [Disagreement],
}

/// One JSON object for each port, and the summary.
pub(super) fn json(reports: &[NamespaceReport], unseen: &[String]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for NamespaceReport { assessments, namespace_info, .. } in reports {
        for row in assessments {
            let row = JsonPort {
                netns: row.netns,
                addr: row.addr.map(|addr| addr.to_string()),
                ifindex: row.ifindex,
                port: row.port,
                risk: row.risk.name(),
                why: &row.why,
                listener: row.listener.as_ref().map(|process| JsonListener {
                    pid: process.pid,
                    comm: process.comm.as_deref(),
                    unit: process.unit.as_deref(),
                    container: process.container.as_deref(),
                }),
                expected_dials: row.expected_dials,
                guard: namespace_info.guard.map(GuardMode::name),
            };
            write_line(&AuditLine::Port(row), &mut out)?;
        }
    }
    let summary = AuditSummary {
        event: "summary",
        counts: RiskCounts::of(reports),
        namespaces: reports.iter().map(JsonNamespace::of).collect(),
        unseen,
    };
    write_line(&AuditLine::Summary(summary), &mut out)?;
    Ok(out)
}

fn write_line(object: &AuditLine<'_>, out: &mut Vec<u8>) -> Result<()> {
    serde_json::to_writer(&mut *out, object)?;
    out.push(b'\n');
    Ok(())
}

impl<'a> JsonNamespace<'a> {
    fn of(report: &'a NamespaceReport) -> Self {
        let NamespaceInfo { namespace, local_ports, .. } = &report.namespace_info;
        Self {
            netns: namespace.id.inode,
            path: (!namespace.is_current).then(|| namespace.path.display().to_string()),
            range: local_ports.range.to_string(),
            reserved: local_ports.reserved.to_string(),
            fix: report.fix.as_ref().map(|fix| fix.immediate.as_str()),
            fix_lasting: report.fix.as_ref().and_then(|fix| fix.persistent.as_deref()),
            fix_note: report.fix.as_ref().and_then(|fix| fix.note.as_deref()),
            disagreements: &report.disagreements,
        }
    }
}

/// A line for each namespace. Below it the ports at risk, the requested ports, and the fixes.
pub(super) fn text(reports: &[NamespaceReport]) -> String {
    let mut out = String::new();
    for NamespaceReport { namespace_info, assessments, fix, disagreements } in reports {
        write_heading(namespace_info, assessments, &mut out);
        let listener = |row: &PortAssessment| match row.listener {
            Some(_) => escape(&row.listener_text()),
            None => "nobody listens".to_owned(),
        };
        let shown: Vec<_> = group(assessments)
            .into_iter()
            .filter(|group| group.first.risk != Risk::None || group.first.is_requested)
            .map(|group| (group.endpoint_text(), listener(group.first), group))
            .collect();
        let width =
            |len: fn(&(String, String, PortGroup<'_>)) -> usize| shown.iter().map(len).max().unwrap_or(0);
        let endpoint_width = width(|(endpoint, ..)| endpoint.len());
        let listener_width = width(|(_, listener, _)| listener.len());
        for (endpoint, listener, PortGroup { first, count, .. }) in &shown {
            let (risk, brief) = (first.risk.name(), escape(&first.brief));
            let ports = match count {
                1 => String::new(),
                count => format!("{} ports, ", group_thousands(*count as u64)),
            };
            let _ = writeln!(
                out,
                "  {risk:<4}  {endpoint:<endpoint_width$}  {listener:<listener_width$}  {ports}{brief}"
            );
        }
        if let Some(Fix { immediate, persistent, note }) = fix {
            let _ = writeln!(out, "  now    {}", escape(immediate));
            if let Some(persistent) = persistent {
                let _ = writeln!(out, "  keep   {}", escape(persistent));
            }
            if let Some(note) = note {
                let _ = writeln!(out, "  note   {note}");
            }
        }
        let guard = match namespace_info.guard {
            Some(GuardMode::Refuse) => {
                "refuses a connect to itself while its daemon runs, unless the client is exempt"
            }
            Some(GuardMode::DryRun) => "reports what it would refuse, and refuses nothing (dry run)",
            Some(GuardMode::Off) | None => "",
        };
        if !guard.is_empty() {
            let _ = writeln!(out, "  guard  {guard}");
        }
        for Disagreement { key, file, at_boot, running } in disagreements {
            let value =
                |value: &str| if value.is_empty() { "nothing".to_owned() } else { format!("{value:?}") };
            let file = file.as_deref().unwrap_or("no file sets it, so the default of the kernel");
            let (at_boot, running) = (value(at_boot), value(running));
            let line = format!("{key} is {running} now, and {at_boot} after the next boot ({file})");
            let _ = writeln!(out, "  boot   {}", escape(&line));
        }
    }
    let counts = RiskCounts::of(reports);
    let namespaces = match reports.len() {
        1 => "1 network namespace".to_owned(),
        count => format!("{count} network namespaces"),
    };
    let _ = match counts {
        RiskCounts { high: 0, low: 0, none } => {
            writeln!(out, "nothing at risk in {namespaces}; {none} {} checked", port_noun(none))
        }
        RiskCounts { high, low, none } => {
            writeln!(
                out,
                "at risk in {namespaces}: {high} high, {low} low; {none} {} not at risk",
                port_noun(none)
            )
        }
    };
    out
}

fn write_heading(info: &NamespaceInfo, assessments: &[PortAssessment], out: &mut String) {
    let NamespaceInfo { namespace, local_ports, .. } = info;
    let location = match namespace.is_current {
        true => "this one".to_owned(),
        false => escape(&namespace.path.display().to_string()),
    };
    let reserved = match local_ports.reserved.is_empty() {
        true => "nothing reserved".to_owned(),
        false => format!("reserved {}", local_ports.reserved),
    };
    let without_risk = assessments.iter().filter(|row| row.risk == Risk::None).count();
    let summary = match without_risk == assessments.len() {
        true => format!("; {without_risk} {}, nothing at risk", port_noun(without_risk)),
        false => String::new(),
    };
    let (inode, range) = (namespace.id.inode, local_ports.range);
    let _ = writeln!(out, "netns {inode} ({location}): source ports {range}, {reserved}{summary}");
}

fn port_noun(count: usize) -> &'static str {
    if count == 1 { "port" } else { "ports" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        commands::audit::{
            assess::assess,
            collect::{AuditedPort, ListenerProcess, Persistence, RouteSource},
            fix::fix,
        },
        ports::{LocalPorts, sysctl::RESERVED_KEY},
        sockets::{Namespace, NetnsId},
    };

    fn reports() -> Vec<NamespaceReport> {
        let audited = |addr: &str, port, listener| AuditedPort {
            addr: addr.parse().ok(),
            ifindex: None,
            port,
            route_source: RouteSource::Same,
            inode: 0,
            listener,
            is_requested: addr.is_empty(),
        };
        let nginx = ListenerProcess {
            pid: Some(812),
            comm: Some("a\nb".to_owned()),
            unit: Some("x.service".into()),
            ..ListenerProcess::default()
        };
        let with_risk = NamespaceInfo {
            namespace: Namespace {
                id: NetnsId { inode: 7, cookie: 0 },
                path: "/run/netns/blue".into(),
                is_current: true,
            },
            local_ports: LocalPorts::parse("32768 60999", "8080").unwrap(),
            persistence: Some(Persistence::SysctlD),
            guard: Some(GuardMode::Refuse),
            audited_ports: vec![
                audited("127.0.0.1", 44_446, Some(nginx)),
                audited("::", 50_051, Some(ListenerProcess::default())),
                audited("", 61_616, None),
                audited("127.0.0.1", 22, Some(ListenerProcess::default())),
            ],
        };
        let without_risk = NamespaceInfo {
            namespace: Namespace {
                id: NetnsId { inode: 8, cookie: 0 },
                path: "/run/netns/blue".into(),
                is_current: false,
            },
            local_ports: LocalPorts::parse("32768 60999", "").unwrap(),
            persistence: None,
            guard: None,
            audited_ports: vec![audited("127.0.0.1", 22, Some(ListenerProcess::default()))],
        };
        let disagreement = Disagreement {
            key: RESERVED_KEY,
            file: None,
            at_boot: String::new(),
            running: "8080".to_owned(),
        };
        let report = |namespace_info: NamespaceInfo, disagreements| {
            let assessments = assess(&namespace_info);
            let fix = fix(&namespace_info, &assessments, "");
            NamespaceReport { namespace_info, assessments, fix, disagreements }
        };
        vec![report(with_risk, vec![disagreement]), report(without_risk, vec![])]
    }

    #[test]
    fn text_has_a_line_for_each_port_at_risk_and_the_fixes() {
        assert_eq!(
            text(&reports()),
            "\
netns 7 (this one): source ports 32768-60999, reserved 8080
  high  127.0.0.1:44446  a\\nb[812] x.service  even: one attempt in 14,116 connects to itself while it is down
  low   [::]:50051       an unknown process   odd: one attempt in 14,116, only for a client that binds port 0 first
  none  *:61616          nobody listens       outside the range
  now    sysctl -w net.ipv4.ip_local_reserved_ports=8080,44446,50051
  keep   selfconn audit --netns self --sysctl > /etc/sysctl.d/90-selfconn.conf
  guard  refuses a connect to itself while its daemon runs, unless the client is exempt
  boot   net.ipv4.ip_local_reserved_ports is \"8080\" now, and nothing after the next boot (no file sets it, so the \
default of the kernel)
netns 8 (/run/netns/blue): source ports 32768-60999, nothing reserved; 1 port, nothing at risk
at risk in 2 network namespaces: 1 high, 1 low; 3 ports not at risk
"
        );
    }

    #[test]
    fn json_has_an_object_for_each_port_and_null_for_unknown_values() {
        let bytes = json(&reports(), &["something".to_owned()]).unwrap();
        let rows: Vec<serde_json::Value> =
            str::from_utf8(&bytes).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len(), 6);
        assert_eq!(rows[0]["listener"]["comm"], "a\nb");
        assert_eq!(rows[0]["listener"]["unit"], "x.service");
        assert_eq!(rows[0]["expected_dials"], 14_116);
        assert_eq!(
            (&rows[0]["guard"], rows[4].get("guard")),
            (&"refuse".into(), Some(&serde_json::Value::Null))
        );
        assert!(rows[1]["listener"]["pid"].is_null() && rows[1]["listener"].is_object(), "{}", rows[1]);
        for field in ["expected_dials", "listener", "addr", "ifindex"] {
            assert_eq!(rows[3].get(field), Some(&serde_json::Value::Null), "{field}: {}", rows[3]);
        }
        let summary = &rows[5];
        assert_eq!((&summary["high"], &summary["low"], &summary["none"]), (&1.into(), &1.into(), &3.into()));
        assert_eq!(summary["namespaces"][0]["path"], serde_json::Value::Null);
        let fix = "sysctl -w net.ipv4.ip_local_reserved_ports=8080,44446,50051";
        assert_eq!(summary["namespaces"][0]["fix"], fix);
        for field in ["fix", "fix_lasting", "fix_note"] {
            assert_eq!(summary["namespaces"][1].get(field), Some(&serde_json::Value::Null), "{summary}");
        }
        assert_eq!(summary["namespaces"][1]["path"], "/run/netns/blue");
        assert_eq!(summary["namespaces"][0]["disagreements"][0]["file"], serde_json::Value::Null);
        assert_eq!(summary["unseen"][0], "something");
    }
}

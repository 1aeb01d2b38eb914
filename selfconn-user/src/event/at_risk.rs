//! The events `at_risk` and `at_risk_over`: connects to a closed local port that can become a
//! self-connection.

use std::{fmt::Write as _, sync::Arc};

use schemars::JsonSchema;
use selfconn_ebpf::Owner;
use serde::Serialize;

use super::connection::{Charged, process_name};
use super::envelope;
use super::text::{EventFormat, LogRecord, Severity, duration, escape, subject};
use crate::{
    budget::log::{LogRequest, Phase},
    detect::port_risk::{Chance, PortAtRisk, RefusedConnects, RiskEndReason},
    system::process::ProcessInfo,
};

/// Refused connects of one address to one of its own ports: the destination, the newest process, and the
/// counts.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RefusedConnectFields {
    /// Identifier of the risk: the same until it is over, unique on this boot.
    pub id: String,
    /// Source and destination address.
    pub addr: String,
    /// Destination port.
    pub port: u16,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    /// The process that connected last, in the initial pid namespace.
    pub pid: Option<u32>,
    /// Name of the process.
    pub comm: Option<String>,
    /// Path of the executable.
    pub exe: Option<Arc<str>>,
    /// systemd unit of the process.
    pub unit: Option<Arc<str>>,
    /// Id of the container.
    pub container: Option<Arc<str>>,
    /// Number of distinct pids that connected; a lower bound.
    pub dialers: u32,
    /// Refused connects in `window_ns`.
    pub refused: u64,
    /// Time from the first of these connects to the newest.
    pub window_ns: u64,
    /// The process that connected last pays for the event.
    #[serde(skip)]
    pub charged: Charged,
    /// Who connected first.
    #[serde(skip)]
    pub first_owner: Option<Owner>,
}

/// `at_risk`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct AtRisk {
    /// The refused connects.
    #[serde(flatten)]
    pub connects: RefusedConnectFields,
    /// Mean number of connects until one becomes a self-connection.
    pub expected_dials: Option<u32>,
    /// Expected time until a self-connection at this rate of connects.
    pub eta_seconds: Option<u64>,
    /// True if a socket that can't be seen may be bound to the port, so that no connect becomes a self-connection.
    pub may_be_bound: bool,
    /// Why `expected_dials` and `eta_seconds` are unknown.
    pub range_unknown: Option<String>,
    /// The port range that the newest client with one of its own set for its socket (`IP_LOCAL_PORT_RANGE`).
    pub own_range: Option<String>,
    /// What the guard of this run does with a connect to itself in this network namespace: `off`, `dry-run` or
    /// `refuse`.
    pub guard: &'static str,
}

/// `at_risk_over`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct AtRiskOver {
    /// The refused connects.
    #[serde(flatten)]
    pub connects: RefusedConnectFields,
    /// `silence` if the connects stopped, `unreachable` if `connect()` can no longer choose the port, or
    /// `netns_ended` if its network namespace has ended.
    pub why: &'static str,
}

impl RefusedConnectFields {
    /// Combines the counts of the eBPF programs with the information that `/proc` has about the newest
    /// process. `run` identifies this run.
    #[must_use]
    pub fn new(connects: &RefusedConnects, run: u64, process: &ProcessInfo) -> Self {
        let is_seen = connects.newest.at_ns != 0;
        Self {
            id: envelope::id(run, "r", connects.risk),
            addr: connects.endpoint.ip().to_string(),
            port: connects.endpoint.port,
            netns: connects.endpoint.known_netns(),
            pid: is_seen.then_some(connects.newest.task.pid),
            comm: process_name(&connects.newest.task).filter(|_| is_seen).or_else(|| process.comm.clone()),
            exe: process.exe.clone(),
            unit: process.unit.clone(),
            container: process.container.clone(),
            dialers: connects.dialers,
            refused: connects.refused,
            window_ns: connects.window_ns,
            charged: Charged::new(connects.newest.owner, process),
            first_owner: (connects.owner != connects.newest.owner).then_some(connects.owner),
        }
    }

    /// Any user can connect to another's port, first or last. So that nobody suppresses an event about another's port
    /// by his own storm, one of both pays.
    pub(super) fn log_request(&self, phase: Phase) -> LogRequest<'_> {
        LogRequest {
            id: &self.id,
            owner: self.charged.owner,
            other_owner: self.first_owner,
            payer: self.charged.payer.clone(),
            program: self.exe.as_deref().or(self.comm.as_deref()),
            port: self.port,
            phase,
        }
    }
}

impl AtRisk {
    #[must_use]
    pub fn new(at_risk: &PortAtRisk, run: u64, process: &ProcessInfo) -> Self {
        let PortAtRisk { connects, chance, may_be_bound, guard } = at_risk;
        let (expected_dials, range_unknown) = match chance {
            Chance::OneIn(expected) => (Some(*expected), None),
            Chance::Unknown(why) => (None, Some(why.clone())),
        };
        Self {
            connects: RefusedConnectFields::new(connects, run, process),
            expected_dials,
            eta_seconds: connects.eta_seconds(chance),
            may_be_bound: *may_be_bound,
            range_unknown,
            own_range: connects.choices.own_range.map(|range| range.to_string()),
            guard: guard.name(),
        }
    }
}

impl AtRiskOver {
    #[must_use]
    pub fn new(connects: &RefusedConnects, why: RiskEndReason, run: u64, process: &ProcessInfo) -> Self {
        let why = match why {
            RiskEndReason::Silence => "silence",
            RiskEndReason::Unreachable => "unreachable",
            RiskEndReason::NetnsEnded => "netns_ended",
        };
        Self { connects: RefusedConnectFields::new(connects, run, process), why }
    }
}

pub(super) const FORMAT: EventFormat =
    EventFormat { event: "at_risk", label: "AT RISK", severity: Severity::Warning, message, details: None };

pub(super) const OVER_FORMAT: EventFormat = EventFormat {
    event: "at_risk_over",
    label: "risk over",
    severity: Severity::Notice,
    message: over_message,
    details: None,
};

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    write!(out, " connects to a port without a listener: ")?;
    refused_counts(record, out)?;
    match record.number("expected_dials") {
        Some(expected) => write!(out, "; one connect in {expected} becomes a self-connection")?,
        None => write!(out, "; the chance of a self-connection is unknown")?,
    }
    if let Some(seconds) = record.number("eta_seconds") {
        write!(out, ", at this rate within about {}", duration(seconds.saturating_mul(1_000_000_000)))?;
    }
    if let Some(why) = record.text("range_unknown") {
        write!(out, ": {}", escape(why))?;
    }
    if let Some(range) = record.text("own_range") {
        write!(out, " (a client's socket has the port range {})", escape(range))?;
    }
    if record.flag("may_be_bound") == Some(true) {
        write!(out, ", if nobody has bound it")?;
    }
    match record.text("guard") {
        Some("refuse") => write!(out, "; the guard refuses it, unless it is exempt"),
        Some("dry-run") => write!(out, "; the guard would report it (dry run)"),
        _ => Ok(()),
    }
}

fn over_message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::endpoint(record, out)?;
    match record.text("why") {
        Some("silence") => write!(out, ": connects have stopped")?,
        Some("unreachable") => write!(out, ": connect() can no longer choose this port")?,
        Some("netns_ended") => write!(out, ": its network namespace has ended")?,
        _ => write!(out, ": no longer at risk")?,
    }
    write!(out, "; ")?;
    refused_counts(record, out)?;
    write!(out, ", the last by ")?;
    subject::process(record, out)
}

/// Counts such as `240 refused in 1m35s by 3 processes`.
fn refused_counts(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    match record.number("refused") {
        Some(refused) => write!(out, "{refused} refused")?,
        None => write!(out, "an unknown number refused")?,
    }
    if let Some(ns) = record.number("window_ns") {
        write!(out, " in {}", duration(ns))?;
    }
    match record.number("dialers") {
        Some(dialers) if dialers > 1 => write!(out, " by {dialers} processes"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::event::tests::assert_rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[
            (
                r#"{"event":"at_risk","addr":"::1","port":40000,"comm":"curl","pid":7,"dialers":20,"refused":20,
                    "window_ns":19000000000,"expected_dials":14116,"eta_seconds":14116,"range_unknown":null}"#,
                "AT RISK      [::1]:40000           curl[7] connects to a port without a listener: 20 refused in 19.0s by 20 \
                 processes; one connect in 14116 becomes a self-connection, at this rate within about 3h55m",
            ),
            (
                r#"{"event":"at_risk","addr":"::1","port":80,"comm":"curl","pid":7,"dialers":1,"refused":20,
                    "window_ns":19000000000,"expected_dials":null,"eta_seconds":null,"range_unknown":"no way"}"#,
                "AT RISK      [::1]:80              curl[7] connects to a port without a listener: 20 refused in 19.0s; the \
                 chance of a self-connection is unknown: no way",
            ),
            (
                r#"{"event":"at_risk","addr":"::1","port":40000,"comm":"curl","pid":7,"dialers":1,"refused":20,
                    "window_ns":19000000000,"expected_dials":9,"eta_seconds":9,"may_be_bound":true}"#,
                "AT RISK      [::1]:40000           curl[7] connects to a port without a listener: 20 refused in 19.0s; \
                 one connect in 9 becomes a self-connection, at this rate within about 9.0s, if nobody has bound it",
            ),
            (
                r#"{"event":"at_risk","addr":"::1","port":40000,"comm":"curl","pid":7,"dialers":1,"refused":20,
                    "window_ns":19000000000,"expected_dials":9,"eta_seconds":9,"guard":"refuse"}"#,
                "AT RISK      [::1]:40000           curl[7] connects to a port without a listener: 20 refused in 19.0s; \
                 one connect in 9 becomes a self-connection, at this rate within about 9.0s; the guard refuses it, unless \
                 it is exempt",
            ),
            (
                r#"{"event":"at_risk","addr":"::1","port":40001,"comm":"curl","pid":7,"dialers":1,"refused":20,
                    "window_ns":19000000000,"expected_dials":9,"eta_seconds":9,"own_range":"40001-40009"}"#,
                "AT RISK      [::1]:40001           curl[7] connects to a port without a listener: 20 refused in 19.0s; \
                 one connect in 9 becomes a self-connection, at this rate within about 9.0s (a client's socket has the \
                 port range 40001-40009)",
            ),
            (
                r#"{"event":"at_risk_over","addr":"::1","port":80,"comm":"curl","pid":7,"dialers":1,"refused":240,
                    "window_ns":95000000000,"why":"silence"}"#,
                "risk over    [::1]:80: connects have stopped; 240 refused in 1m35s, the last by curl[7]",
            ),
            (
                r#"{"event":"at_risk_over","addr":"::1","port":80,"comm":"curl","pid":7,"dialers":2,"refused":240,
                    "window_ns":95000000000,"why":"unreachable"}"#,
                "risk over    [::1]:80: connect() can no longer choose this port; 240 refused in 1m35s by 2 processes, \
                 the last by curl[7]",
            ),
        ]);
    }
}

//! The events `at_risk` and `at_risk_over`: connects to a closed local port that can become a
//! self-connection.

use serde::Serialize;

use super::process_name;
use crate::{
    detect::port_risk::{Chance, RefusedConnects, RiskEndReason},
    system::process::ProcessInfo,
};

/// Refused connects of one address to one of its own ports: the destination, the newest process, and the
/// counts.
#[derive(Clone, Debug, Serialize)]
pub struct RefusedConnectFields {
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
    pub exe: Option<String>,
    /// systemd unit of the process.
    pub unit: Option<String>,
    /// Id of the container.
    pub container: Option<String>,
    /// Number of distinct pids that connected; a lower bound.
    pub dialers: u32,
    /// Refused connects in `window_ns`.
    pub refused: u64,
    /// Time from the first of these connects to the newest.
    pub window_ns: u64,
}

/// `at_risk`.
#[derive(Debug, Serialize)]
pub struct AtRisk {
    /// The refused connects.
    #[serde(flatten)]
    pub connects: RefusedConnectFields,
    /// Mean number of connects until one becomes a self-connection.
    pub expected_dials: Option<u32>,
    /// Expected time until a self-connection at this rate of connects.
    pub eta_seconds: Option<u64>,
    /// Why `expected_dials` and `eta_seconds` are unknown.
    pub range_unknown: Option<String>,
}

/// `at_risk_over`.
#[derive(Debug, Serialize)]
pub struct AtRiskOver {
    /// The refused connects.
    #[serde(flatten)]
    pub connects: RefusedConnectFields,
    /// `silence` if the connects stopped, or `unreachable` if `connect()` can no longer choose the port.
    pub why: &'static str,
}

impl RefusedConnectFields {
    /// Combines the counts of the eBPF programs with the information that `/proc` has about the newest
    /// process.
    #[must_use]
    pub fn new(connects: &RefusedConnects, process: &ProcessInfo) -> Self {
        let is_seen = connects.newest.at_ns != 0;
        Self {
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
        }
    }
}

impl AtRisk {
    #[must_use]
    pub fn new(connects: &RefusedConnects, chance: &Chance, process: &ProcessInfo) -> Self {
        let (expected_dials, range_unknown) = match chance {
            Chance::OneIn(expected) => (Some(*expected), None),
            Chance::Unknown(why) => (None, Some(why.clone())),
        };
        Self {
            connects: RefusedConnectFields::new(connects, process),
            expected_dials,
            eta_seconds: connects.eta_seconds(chance),
            range_unknown,
        }
    }
}

impl AtRiskOver {
    #[must_use]
    pub fn new(connects: &RefusedConnects, why: RiskEndReason, process: &ProcessInfo) -> Self {
        let why = match why {
            RiskEndReason::Silence => "silence",
            RiskEndReason::Unreachable => "unreachable",
        };
        Self { connects: RefusedConnectFields::new(connects, process), why }
    }
}

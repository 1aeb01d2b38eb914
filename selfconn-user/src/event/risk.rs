//! `at_risk` and `at_risk_over`.

use serde::Serialize;

use super::process_name;
use crate::{
    process::Facts,
    risk::{Chance, Dials, Why},
};

/// Who dials what, how often.
#[derive(Clone, Debug, Serialize)]
pub struct Dialled {
    /// Source and destination address.
    pub addr: String,
    /// Destination port.
    pub port: u16,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    /// The newest dialler, in the initial pid namespace.
    pub pid: Option<u32>,
    /// The process's name.
    pub comm: Option<String>,
    /// Path of its program.
    pub exe: Option<String>,
    /// Its systemd unit.
    pub unit: Option<String>,
    /// Its container's id.
    pub container: Option<String>,
    /// How many pids dialled, at least.
    pub dialers: u32,
    /// Refused dials in `window_ns`.
    pub refused: u64,
    /// From the first of them to the newest.
    pub window_ns: u64,
}

/// `at_risk`.
#[derive(Debug, Serialize)]
pub struct AtRisk {
    /// What is dialled.
    #[serde(flatten)]
    pub dialled: Dialled,
    /// One dial in so many hits.
    pub expected_dials: Option<u32>,
    /// When a hit is to be expected at this pace.
    pub eta_seconds: Option<u64>,
    /// Why the two above are unknown.
    pub range_unknown: Option<String>,
}

/// `at_risk_over`.
#[derive(Debug, Serialize)]
pub struct AtRiskOver {
    /// What was dialled.
    #[serde(flatten)]
    pub dialled: Dialled,
    /// `silence`, or `unreachable` where `connect()` can't choose the port any more.
    pub why: &'static str,
}

impl Dialled {
    /// What the programs counted, and what `/proc` knows of the newest dialler.
    #[must_use]
    pub fn new(dials: &Dials, facts: &Facts) -> Self {
        let is_seen = dials.newest.at_ns != 0;
        Self {
            addr: dials.addr.to_string(),
            port: dials.port,
            netns: (dials.netns != 0).then_some(dials.netns),
            pid: is_seen.then_some(dials.newest.task.pid),
            comm: process_name(&dials.newest.task).filter(|_| is_seen).or_else(|| facts.comm.clone()),
            exe: facts.exe.clone(),
            unit: facts.unit.clone(),
            container: facts.container.clone(),
            dialers: dials.dialers,
            refused: dials.refused,
            window_ns: dials.window_ns,
        }
    }
}

impl AtRisk {
    /// With what a hit takes.
    #[must_use]
    pub fn new(dials: &Dials, chance: &Chance, facts: &Facts) -> Self {
        let (expected_dials, range_unknown) = match chance {
            Chance::OneIn(dials) => (Some(*dials), None),
            Chance::Unknown(why) => (None, Some(why.clone())),
        };
        Self {
            dialled: Dialled::new(dials, facts),
            expected_dials,
            eta_seconds: dials.eta_seconds(chance),
            range_unknown,
        }
    }
}

impl AtRiskOver {
    /// With why it is over.
    #[must_use]
    pub fn new(dials: &Dials, why: Why, facts: &Facts) -> Self {
        let why = match why {
            Why::Silence => "silence",
            Why::Unreachable => "unreachable",
        };
        Self { dialled: Dialled::new(dials, facts), why }
    }
}

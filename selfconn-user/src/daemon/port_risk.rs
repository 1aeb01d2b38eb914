//! Early warning of self-connections: a probe reports a port with many refused connects, the worker reads the
//! port range of its namespace, and `crate::detect::port_risk` decides which event to emit. No timer runs while there is
//! no such port.

use std::{collections::HashMap, io, rc::Rc, time::Duration};

use selfconn_ebpf::Endpoint;
use tokio::time::Instant;

use super::port_ranges::{self, PortRangeResponse, PortRangeWorker};
use crate::{
    bpf::loader::RefusedCounts,
    detect::port_risk::{PortRiskEvent, PortRisks, RefusedConnects},
    event::{AtRisk, AtRiskOver, EventKind},
    output::Outputs,
    sockets::NetnsId,
    system::{
        clock::{self, Offset},
        process::{ObservedTask, Processes},
    },
};

/// The ports with many refused connects, and the worker that reads port ranges.
pub(super) struct PortRiskMonitor {
    risks: PortRisks,
    port_range_worker: PortRangeWorker,
    /// The ports that wait for the worker's response.
    awaiting_ranges: Vec<Endpoint>,
}

/// What is needed to emit an event.
pub(super) struct RiskReporter<'a> {
    pub(super) processes: &'a mut Processes,
    pub(super) out: &'a mut Outputs,
}

impl PortRiskMonitor {
    pub(super) fn start() -> io::Result<Self> {
        Ok(Self {
            risks: PortRisks::default(),
            port_range_worker: port_ranges::start()?,
            awaiting_ranges: Vec::new(),
        })
    }

    /// A probe reported that the count of this port crossed a threshold.
    pub(super) fn on_threshold(&mut self, destination: Endpoint) {
        self.risks.on_threshold(destination);
    }

    /// Number of ports at risk now.
    pub(super) fn at_risk(&self) -> usize {
        self.risks.at_risk()
    }

    /// Time of the next check (`CLOCK_BOOTTIME`, nanoseconds). `None`: no check before the next record or
    /// response.
    fn next_check_ns(&self) -> Option<u64> {
        self.risks.next_check_ns().filter(|_| self.awaiting_ranges.is_empty())
    }

    /// Time of the next check.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let until_check_ns = self.next_check_ns()?.saturating_sub(clock::boot_ns());
        Some(Instant::now() + Duration::from_nanos(until_check_ns))
    }

    /// If a check is due, stops tracking ports without recent attempts, and requests the port ranges for the
    /// ports that are due.
    pub(super) fn check_due_ports(
        &mut self,
        refused_counts: &mut RefusedCounts,
        mut reporter: RiskReporter<'_>,
    ) {
        let now_ns = clock::boot_ns();
        if self.next_check_ns().is_none_or(|check_ns| check_ns > now_ns) {
            return;
        }
        let mut request = HashMap::new();
        for destination in self.risks.due(now_ns) {
            let count = refused_counts.get(&destination);
            match (self.risks.expire(&destination, count.as_ref(), now_ns), count) {
                (None, Some(count)) => {
                    request.insert(NetnsId::from(&destination), count.last_opener.task.pid);
                    self.awaiting_ranges.push(destination);
                }
                (expired, _) => {
                    refused_counts.remove(&destination);
                    if let Some(event) = expired.flatten() {
                        reporter.emit(&event, now_ns);
                    }
                }
            }
        }
        if !request.is_empty() {
            self.port_range_worker.send(request);
        }
    }

    /// Waits for the worker's next response.
    pub(super) async fn response(&mut self) -> PortRangeResponse {
        self.port_range_worker.response().await
    }

    /// Checks the ports that waited for this response. `is_taken` returns true if a self-connection holds the
    /// port.
    pub(super) fn evaluate(
        &mut self,
        response: &PortRangeResponse,
        refused_counts: &RefusedCounts,
        is_taken: impl Fn(&Endpoint) -> bool,
        mut reporter: RiskReporter<'_>,
    ) {
        let now_ns = clock::boot_ns();
        for destination in std::mem::take(&mut self.awaiting_ranges) {
            let (Some(count), Some(ports)) =
                (refused_counts.get(&destination), response.get(&NetnsId::from(&destination)))
            else {
                continue;
            };
            if let Err(why) = ports {
                log::info!("whether connect() can choose port {} is unknown: {why}", destination.port);
            }
            let connects = RefusedConnects::new(&destination, &count);
            let is_taken = is_taken(&connects.endpoint);
            if let Some(event) = self.risks.check(&destination, &count, ports, is_taken, now_ns) {
                reporter.emit(&event, now_ns);
            }
        }
        log::debug!("ports at risk: {}", self.at_risk());
    }

    /// Removes expired counts of ports that never crossed a threshold.
    pub(super) fn remove_expired_counts(&self, refused_counts: &mut RefusedCounts) {
        refused_counts.remove_expired(clock::boot_ns(), |destination| self.risks.is_tracked(destination));
    }
}

impl RiskReporter<'_> {
    fn emit(&mut self, event: &PortRiskEvent, now_ns: u64) {
        let (PortRiskEvent::AtRisk(connects, _) | PortRiskEvent::Over(connects, _)) = event;
        // If two CPUs wrote to the count at the same time, the task may be mixed from two attempts. Only a
        // matching start time proves that it is not.
        let newest = ObservedTask::from_opener(&connects.newest);
        let process = match newest.start_ns {
            0 => Rc::default(),
            _ => self.processes.look_up(&newest, now_ns),
        };
        let kind = match event {
            PortRiskEvent::AtRisk(connects, chance) => {
                EventKind::AtRisk(Box::new(AtRisk::new(connects, chance, &process)))
            }
            PortRiskEvent::Over(connects, why) => {
                EventKind::AtRiskOver(Box::new(AtRiskOver::new(connects, *why, &process)))
            }
        };
        self.out.emit_at(Offset::now().wall(now_ns), kind);
    }
}

//! Early warning of self-connections: a probe reports a port with many refused connects, the worker reads the
//! port range of its namespace, and `crate::detect::port_risk` decides which event to emit. No timer runs
//! while there is no such port.

use std::{io, time::Duration};

use selfconn_ebpf::Endpoint;
use tokio::time::Instant;

use super::port_ranges::{self, PortRangeRequest, PortRangeResponse, PortRangeWorker};
use crate::{
    bpf::loader::RefusedCounts,
    detect::port_risk::{PortLook, PortRiskEvent, PortRisks},
    event::{AtRisk, AtRiskOver, EventKind},
    guard::GuardMode,
    sockets::NetnsId,
    system::{clock, process::ProcessInfo},
};

/// The ports with many refused connects, and the worker that reads port ranges.
pub(super) struct PortRiskMonitor {
    risks: PortRisks,
    port_range_worker: PortRangeWorker,
    /// The ports that wait for the worker's response.
    awaiting_ranges: Vec<Endpoint>,
    /// True if the socket table shows sockets that are bound and idle.
    shows_idle: bool,
}

impl PortRiskMonitor {
    pub(super) fn start(shows_idle: bool) -> io::Result<Self> {
        Ok(Self {
            risks: PortRisks::default(),
            port_range_worker: port_ranges::start()?,
            awaiting_ranges: Vec::new(),
            shows_idle,
        })
    }

    /// A probe reported that the count of this port crossed a threshold.
    pub(super) fn on_threshold(&mut self, destination: Endpoint) {
        self.risks.on_threshold(destination);
    }

    /// A listener was closed at this port, at any address.
    pub(super) fn on_listener_closed(&mut self, endpoint: &Endpoint) {
        self.risks.on_listener_closed(endpoint);
    }

    /// The ports with many refused connects: the end of a listener there matters.
    pub(super) fn tracked(&self) -> impl Iterator<Item = &Endpoint> {
        self.risks.tracked()
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
    /// ports that are due. `report` gets the events. False: nothing was due.
    pub(super) fn check_due_ports(
        &mut self,
        refused_counts: &mut RefusedCounts,
        now_ns: u64,
        mut report: impl FnMut(PortRiskEvent),
    ) -> bool {
        if self.next_check_ns().is_none_or(|check_ns| check_ns > now_ns) {
            return false;
        }
        let mut request = PortRangeRequest::new();
        for destination in self.risks.begin_check(now_ns) {
            let count = refused_counts.get(&destination);
            match (self.risks.expire(&destination, count.as_ref(), now_ns), count) {
                (None, Some(count)) => {
                    let in_netns = request.entry(NetnsId::from(&destination)).or_default();
                    in_netns.0 = count.last_opener.task.pid;
                    in_netns.1.push(destination);
                    self.awaiting_ranges.push(destination);
                }
                (expired, _) => {
                    refused_counts.remove(&destination);
                    expired.flatten().into_iter().for_each(&mut report);
                }
            }
        }
        if !request.is_empty() {
            self.port_range_worker.send(request);
        }
        true
    }

    /// Waits until the worker has a response. Cancel safe.
    pub(super) async fn ready(&mut self) {
        self.port_range_worker.ready().await;
    }

    /// The worker's next response, if it is there.
    pub(super) fn try_response(&mut self) -> Option<PortRangeResponse> {
        self.port_range_worker.try_response()
    }

    /// The name of the worker if a panic has ended it.
    pub(super) fn ended_worker(&self) -> Option<&'static str> {
        self.port_range_worker.ended()
    }

    /// Checks the ports that waited for this response. `is_taken` returns true if a self-connection holds the
    /// port, `guard_in` what the guard does in a network namespace. `report` gets the events.
    pub(super) fn evaluate(
        &mut self,
        response: &PortRangeResponse,
        refused_counts: &RefusedCounts,
        is_taken: impl Fn(&Endpoint) -> bool,
        guard_in: impl Fn(NetnsId) -> GuardMode,
        now_ns: u64,
        mut report: impl FnMut(PortRiskEvent),
    ) {
        for destination in std::mem::take(&mut self.awaiting_ranges) {
            let netns = NetnsId::from(&destination);
            let (Some(count), Some(ports)) = (refused_counts.get(&destination), response.get(&netns)) else {
                continue;
            };
            let look = match ports {
                Ok(seen) => PortLook {
                    ports: Ok(&seen.ports),
                    port_use: seen.uses.get(&destination).copied(),
                    shows_idle: self.shows_idle,
                    guard: guard_in(netns),
                },
                Err(why) => {
                    log::info!("whether connect() can choose port {} is unknown: {why}", destination.port);
                    PortLook { ports: Err(why), port_use: None, shows_idle: false, guard: guard_in(netns) }
                }
            };
            let event = self.risks.check(&destination, &count, &look, is_taken(&destination), now_ns);
            event.into_iter().for_each(&mut report);
        }
        log::debug!("ports at risk: {}", self.at_risk());
    }

    /// Removes expired counts of ports that never crossed a threshold.
    pub(super) fn remove_expired_counts(&self, refused_counts: &mut RefusedCounts) {
        refused_counts.remove_expired(clock::boot_ns(), |destination| self.risks.is_tracked(destination));
    }

    /// Removes the counts for which `has_ended` is true of the destination and the time of the newest attempt, because
    /// their network namespace has ended. Walks the whole table.
    pub(super) fn remove_ended(
        &mut self,
        refused_counts: &mut RefusedCounts,
        has_ended: impl Fn(&Endpoint, u64) -> bool,
        mut report: impl FnMut(PortRiskEvent),
    ) {
        let ended = refused_counts.remove_where(|destination, count| has_ended(destination, count.last_ns));
        for (destination, count) in ended {
            self.risks.end(&destination, &count).into_iter().for_each(&mut report);
        }
    }
}

/// The event to emit. `process` is the newest connecting one.
pub(super) fn event_kind(event: &PortRiskEvent, run: u64, process: &ProcessInfo) -> EventKind {
    match event {
        PortRiskEvent::AtRisk(at_risk) => EventKind::AtRisk(Box::new(AtRisk::new(at_risk, run, process))),
        PortRiskEvent::Over(connects, why) => {
            EventKind::AtRiskOver(Box::new(AtRiskOver::new(connects, *why, run, process)))
        }
    }
}

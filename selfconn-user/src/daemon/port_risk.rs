//! Early warning of self-connections: a probe reports a port with many refused connects, the worker reads the
//! port range of its namespace, and `crate::detect::port_risk` decides which event to emit. No timer runs
//! while there is no such port. The worker looks at a few ports of one owner at a time, and owners take turns: to
//! find a namespace may take long, and an owner may have many.

use std::{
    collections::{HashMap, HashSet},
    io,
    time::Duration,
};

use selfconn_ebpf::{Endpoint, Owner};
use tokio::time::Instant;

use super::{
    port_ranges::{self, PortRangeRequest, PortRangeWorker},
    reporting::{Reporting, Waiter},
};
use crate::{
    bpf::loader::{RefusedCounts, Tracer},
    budget::FairQueue,
    detect::{
        connection::Connections,
        port_risk::{PortAtRisk, PortLook, PortRiskEvent, PortRisks},
    },
    event::{AtRisk, AtRiskOver, EventKind},
    guard::GuardMode,
    lookup::LookupTarget,
    sockets::{NetnsId, SocketSnapshot},
    system::{
        busy::ThreadProblem,
        clock::{self, Offset},
        process::{ObservedTask, ProcessInfo},
    },
};

/// Maximum number of ports that are checked together, in one turn of the loop. Each may need a simulation of the
/// kernel's walk over the ports.
const MAX_TOGETHER: usize = 8;

/// The ports with many refused connects, and the worker that reads port ranges.
pub(super) struct PortRiskMonitor {
    risks: PortRisks,
    port_range_worker: PortRangeWorker,
    /// The ports that the worker must look at, a few of one namespace in each request.
    waiting: FairQueue<PortRangeRequest>,
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
            waiting: FairQueue::default(),
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

    /// Number of ports at risk now.
    pub(super) fn at_risk(&self) -> usize {
        self.risks.at_risk()
    }

    /// Time of the next check. `None`: no check before the next record or response.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let until_check_ns = self.risks.next_check_ns()?.saturating_sub(clock::boot_ns());
        Some(Instant::now() + Duration::from_nanos(until_check_ns))
    }

    /// If a check is due, stops tracking ports without recent attempts, and requests the port ranges for the
    /// ports that are due.
    pub(super) fn check_due_ports(&mut self, tracer: &mut Tracer, reporting: &mut Reporting) {
        let now_ns = clock::boot_ns();
        if self.risks.next_check_ns().is_none_or(|check_ns| check_ns > now_ns) {
            return;
        }
        let refused_counts = tracer.refused_counts();
        let mut due: HashMap<(Owner, NetnsId), PortRangeRequest> = HashMap::new();
        for destination in self.risks.begin_check(now_ns) {
            let count = refused_counts.get(&destination);
            match (self.risks.expire(&destination, count.as_ref(), now_ns), count) {
                (None, Some(count)) => {
                    // The owner of the entry pays, because any other user can make the last attempt.
                    let (owner, hint) = (count.owner, count.last_opener.task.pid);
                    let netns = NetnsId::from(&destination);
                    let new = || PortRangeRequest { netns, hint, destinations: Vec::new() };
                    let request = due.entry((owner, netns)).or_insert_with(new);
                    request.destinations.push(destination);
                    if request.destinations.len() == MAX_TOGETHER {
                        self.waiting.push(owner, std::mem::replace(request, new()));
                    }
                }
                (expired, _) => {
                    refused_counts.remove(&destination);
                    if let Some(event) = expired.flatten() {
                        report(event, now_ns, reporting);
                    }
                }
            }
        }
        for ((owner, _), request) in due {
            if !request.destinations.is_empty() {
                self.waiting.push(owner, request);
            }
        }
        self.send_next();
        tracer.update_watched_ports(self.risks.tracked());
    }

    /// Gives the worker the next ports, if it has none.
    fn send_next(&mut self) {
        if self.awaiting_ranges.is_empty()
            && let Some((_, request)) = self.waiting.pop()
        {
            self.awaiting_ranges.clone_from(&request.destinations);
            self.port_range_worker.send(request);
        }
    }

    /// Waits until the worker has a response. Cancel safe.
    pub(super) async fn ready(&mut self) {
        self.port_range_worker.ready().await;
    }

    /// The name of the worker, and what is wrong with it.
    pub(super) fn worker_problem(&self) -> Option<(&'static str, ThreadProblem)> {
        self.port_range_worker.problem()
    }

    /// Checks the ports that waited for the worker's response, if it is there. `guard_in`: what the guard does in a
    /// network namespace.
    pub(super) fn serve_response(
        &mut self,
        refused_counts: &RefusedCounts,
        connections: &Connections,
        guard_in: impl Fn(NetnsId) -> GuardMode,
        reporting: &mut Reporting,
    ) {
        let Some(response) = self.port_range_worker.try_response() else { return };
        let now_ns = clock::boot_ns();
        let destinations = std::mem::take(&mut self.awaiting_ranges);
        // A self-connection holds the port. A connect of either family can have this destination.
        let keys: HashSet<Endpoint> = destinations.iter().map(Endpoint::table_key).collect();
        let held = connections.iter().map(|connection| connection.endpoint.table_key());
        let taken: HashSet<Endpoint> = held.filter(|key| keys.contains(key)).collect();
        for destination in destinations {
            let Some(count) = refused_counts.get(&destination) else {
                self.risks.end_check(&destination);
                continue;
            };
            let guard = guard_in(NetnsId::from(&destination));
            let look = match &response {
                Ok(seen) => PortLook {
                    ports: Ok(&seen.ports),
                    port_use: seen.uses.get(&destination).copied(),
                    shows_idle: self.shows_idle,
                    guard,
                },
                Err(why) => {
                    log::info!("whether connect() can choose port {} is unknown: {why}", destination.port);
                    PortLook { ports: Err(why), port_use: None, shows_idle: false, guard }
                }
            };
            let is_taken = taken.contains(&destination.table_key());
            if let Some(event) = self.risks.check(&destination, &count, &look, is_taken, now_ns) {
                report(event, now_ns, reporting);
            }
        }
        self.send_next();
        log::debug!("ports at risk: {}", self.at_risk());
    }

    /// Removes expired counts of ports that never crossed a threshold. Ends the ports at risk, and removes the counts,
    /// of the network namespaces that have ended. Walks the whole table.
    pub(super) fn on_snapshot(
        &mut self,
        snapshot: &SocketSnapshot,
        refused_counts: &mut RefusedCounts,
        reporting: &mut Reporting,
    ) {
        let now_ns = clock::boot_ns();
        refused_counts.remove_expired(now_ns, |destination| self.risks.is_tracked(destination));
        let ended = refused_counts.remove_where(|destination, count| {
            count.last_ns < snapshot.began_ns && snapshot.proves_end_of_netns(destination)
        });
        for (destination, count) in ended {
            if let Some(event) = self.risks.end(&destination, &count) {
                report(event, now_ns, reporting);
            }
        }
    }
}

/// Looks up the newest connecting process of a port at risk, and emits the event.
fn report(event: PortRiskEvent, now_ns: u64, reporting: &mut Reporting) {
    let (PortRiskEvent::AtRisk(PortAtRisk { connects, .. }) | PortRiskEvent::Over(connects, _)) = &event;
    let newest = connects.newest;
    if !reporting.is_of_reported(&newest.owner) {
        return;
    }
    // If two CPUs wrote to the count at the same time, the task may be mixed from two attempts. Only a
    // matching start time proves that it is not.
    if newest.start_ns == 0 {
        return emit(&event, now_ns, &ProcessInfo::default(), reporting);
    }
    let target = LookupTarget::Observed(ObservedTask::from_opener(&newest), newest.owner);
    match reporting.lookups.known(&target, now_ns) {
        Some(process) => emit(&event, now_ns, &process, reporting),
        None => reporting.lookups.begin(target, Waiter::PortRisk(Box::new(event), now_ns)),
    }
}

/// Emits the event. `process` is the newest connecting one.
pub(super) fn emit(event: &PortRiskEvent, now_ns: u64, process: &ProcessInfo, reporting: &mut Reporting) {
    let run = reporting.run_id;
    let kind = match event {
        PortRiskEvent::AtRisk(at_risk) => EventKind::AtRisk(Box::new(AtRisk::new(at_risk, run, process))),
        PortRiskEvent::Over(connects, why) => {
            EventKind::AtRiskOver(Box::new(AtRiskOver::new(connects, *why, run, process)))
        }
    };
    reporting.out.emit_at(Offset::now().wall(now_ns), kind);
}

//! Early warning of self-connections: a probe reports a port with many refused connects, the worker reads the
//! port range of its namespace, and `crate::detect::port_risk` decides which event to emit. No timer runs
//! while there is no such port. The worker looks at a few ports of one owner at a time, and owners take turns
//! (`super::waiting_ports`): to find a namespace may take long, and an owner may have many.

use std::{collections::HashSet, io, time::Duration};

use selfconn_ebpf::Endpoint;
use tokio::time::Instant;

use super::{
    port_ranges::{self, PortRangeRequest, PortRangeWorker},
    reporting::{Reporting, Waiter},
    waiting_ports::WaitingPorts,
};
use crate::{
    bpf::loader::{RefusedCounts, Tracer},
    detect::{
        connection::Connections,
        port_risk::{PortChoices, PortLook, PortRiskEvent, PortRisks, RefusedConnects},
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

/// Interval between two looks at who connects to the ports that wait for the worker.
const OWNER_LOOK_INTERVAL_NS: u64 = 200_000_000;

/// The ports with many refused connects, and the worker that reads port ranges.
pub(super) struct PortRiskMonitor {
    risks: PortRisks,
    port_range_worker: PortRangeWorker,
    /// The ports that the worker must look at.
    waiting: WaitingPorts,
    /// Time of the last look at who connects to them: `CLOCK_BOOTTIME`, nanoseconds.
    owners_looked_ns: u64,
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
            waiting: WaitingPorts::default(),
            owners_looked_ns: 0,
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
        let owner_look_ns =
            (!self.waiting.is_empty()).then_some(self.owners_looked_ns + OWNER_LOOK_INTERVAL_NS);
        let due_ns = self.risks.next_check_ns().into_iter().chain(owner_look_ns).min()?;
        Some(Instant::now() + Duration::from_nanos(due_ns.saturating_sub(clock::boot_ns())))
    }

    /// If a check is due, stops tracking ports without recent attempts, and requests the port ranges for the
    /// ports that are due.
    pub(super) fn check_due_ports(&mut self, tracer: &mut Tracer, reporting: &mut Reporting) {
        let now_ns = clock::boot_ns();
        self.look_at_owners(tracer.refused_counts(), now_ns);
        if self.risks.next_check_ns().is_none_or(|check_ns| check_ns > now_ns) {
            return;
        }
        let refused_counts = tracer.refused_counts();
        let mut due = Vec::new();
        for destination in self.risks.begin_check(now_ns) {
            let count = refused_counts.get(&destination);
            match (self.risks.expire(&destination, count.as_ref(), now_ns), count) {
                // Any user can make the first attempt, or the last one.
                (None, Some(count)) => {
                    due.extend([count.owner, count.last_opener.owner].map(|owner| (destination, owner)));
                }
                (expired, _) => {
                    refused_counts.remove(&destination);
                    if let Some(event) = expired.flatten() {
                        report(event, now_ns, reporting);
                    }
                }
            }
        }
        self.waiting.push(due);
        self.send_next(refused_counts);
        tracer.update_watched_ports(self.risks.tracked());
    }

    /// Gives the ports that wait a turn of whoever connected to them last.
    fn look_at_owners(&mut self, refused_counts: &RefusedCounts, now_ns: u64) {
        if self.waiting.is_empty() || now_ns < self.owners_looked_ns + OWNER_LOOK_INTERVAL_NS {
            return;
        }
        self.owners_looked_ns = now_ns;
        let newest = |destination: &Endpoint| {
            refused_counts.get(destination).map(|count| (*destination, count.last_opener.owner))
        };
        let newest: Vec<_> = self.waiting.iter().filter_map(newest).collect();
        self.waiting.push(newest);
    }

    /// Gives the worker the next ports, if it has none.
    fn send_next(&mut self, refused_counts: &RefusedCounts) {
        while self.awaiting_ranges.is_empty()
            && let Some(of_turn) = self.waiting.pop()
        {
            let mut request: Option<PortRangeRequest> = None;
            for destination in of_turn {
                let Some(count) = refused_counts.get(&destination) else {
                    self.risks.end_check(&destination);
                    continue;
                };
                let new = || PortRangeRequest {
                    netns: NetnsId::from(&destination),
                    hint: count.last_opener.task.pid,
                    destinations: Vec::new(),
                };
                let request = request.get_or_insert_with(new);
                request.destinations.push((destination, PortChoices::of(&count)));
                self.awaiting_ranges.push(destination);
            }
            if let Some(request) = request {
                self.port_range_worker.send(request);
            }
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
        // There may be thousands of connections, and a key takes longer than a port.
        let may_be_held = |endpoint: &Endpoint| destinations.iter().any(|at| at.port == endpoint.port);
        let held = connections.iter().map(|connection| &connection.endpoint).filter(|at| may_be_held(at));
        let held = held.map(Endpoint::table_key);
        let taken: HashSet<Endpoint> = held.filter(|key| keys.contains(key)).collect();
        for destination in destinations {
            let seen = response.as_ref().map(|seen| seen.get(&destination));
            let (Some(count), Some(seen)) = (refused_counts.get(&destination), seen.transpose()) else {
                self.risks.end_check(&destination);
                continue;
            };
            let guard = guard_in(NetnsId::from(&destination));
            let look = match seen {
                Ok(seen) => PortLook {
                    reach: Ok(seen.reach),
                    port_use: seen.port_use,
                    shows_idle: self.shows_idle,
                    guard,
                },
                Err(why) => {
                    log::info!("whether connect() can choose port {} is unknown: {why}", destination.port);
                    PortLook { reach: Err(why), port_use: None, shows_idle: false, guard }
                }
            };
            let is_taken = taken.contains(&destination.table_key());
            if let Some(event) = self.risks.check(&destination, &count, &look, is_taken, now_ns) {
                report(event, now_ns, reporting);
            }
        }
        self.send_next(refused_counts);
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

/// Looks up the newest connecting process of a port at risk, and emits the event, after those of the same risk from
/// before.
fn report(event: PortRiskEvent, now_ns: u64, reporting: &mut Reporting) {
    let RefusedConnects { newest, risk, .. } = *event.connects();
    if !reporting.is_of_reported(&newest.owner) {
        return;
    }
    if let Some(following) = reporting.following_port_risks.get_mut(&risk) {
        following.push((event, now_ns));
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
        None => {
            reporting.following_port_risks.insert(risk, Vec::new());
            reporting.lookups.begin(target, Waiter::PortRisk(Box::new(event), now_ns));
        }
    }
}

/// The newest connecting process of this event is looked up.
pub(super) fn on_process(
    event: &PortRiskEvent,
    now_ns: u64,
    process: &ProcessInfo,
    reporting: &mut Reporting,
) {
    emit(event, now_ns, process, reporting);
    let following = reporting.following_port_risks.remove(&event.connects().risk);
    for (event, now_ns) in following.unwrap_or_default() {
        report(event, now_ns, reporting);
    }
}

/// Emits the event. `process` is the newest connecting one.
fn emit(event: &PortRiskEvent, now_ns: u64, process: &ProcessInfo, reporting: &mut Reporting) {
    let run = reporting.run_id;
    let kind = match event {
        PortRiskEvent::AtRisk(at_risk) => EventKind::AtRisk(Box::new(AtRisk::new(at_risk, run, process))),
        PortRiskEvent::Over(connects, why) => {
            EventKind::AtRiskOver(Box::new(AtRiskOver::new(connects, *why, run, process)))
        }
    };
    reporting.out.emit_at(Offset::now().wall(now_ns), kind);
}

#[cfg(test)]
mod tests {
    use std::thread;

    use selfconn_ebpf::refused_connects::RefusedCount;

    use super::*;
    use crate::{
        budget::{cmdline::CmdlineLimit, log::LogRate},
        daemon::reporting::Reported,
        detect::{
            port_risk::{Chance, PortAtRisk, RiskEndReason},
            samples,
        },
        event::Envelope,
        lookup::Lookups,
        output::{OutputLimits, Outputs, log_file::LogFile},
        system::identity::Identity,
    };

    #[test]
    fn the_end_of_a_risk_waits_for_the_process_of_its_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let envelope = Envelope::new(&Identity::read(None).unwrap());
        let limits = OutputLimits { rate: LogRate::DEFAULT, cmdline: CmdlineLimit::Off };
        let out = Outputs::new(None, Some(LogFile::open(&path).unwrap()), envelope, limits).unwrap();
        let lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        let mut reporting = Reporting::new(lookups, Reported { states: false, group: None }, out);
        let connects = |start_ns| {
            let mut connects = RefusedConnects::new(&samples::endpoint("127.0.0.1", 80), &RefusedCount::ZERO);
            connects.risk = 1;
            // Of no process; and without a start time there is nothing to look up.
            (connects.newest.task.pid, connects.newest.start_ns) = (u32::MAX >> 1, start_ns);
            connects
        };
        let at_risk = PortAtRisk {
            connects: connects(1),
            chance: Chance::OneIn(100),
            may_be_bound: false,
            guard: GuardMode::Off,
        };
        report(PortRiskEvent::AtRisk(at_risk), 0, &mut reporting);
        report(PortRiskEvent::Over(connects(0), RiskEndReason::Silence), 0, &mut reporting);
        let (waiter, process) = loop {
            reporting.lookups.update();
            if let Some(completed) = reporting.lookups.next_completed() {
                break completed;
            }
            thread::sleep(Duration::from_millis(1));
        };
        let Waiter::PortRisk(event, now_ns) = waiter else { panic!("another look-up") };
        on_process(&event, now_ns, &process, &mut reporting);
        assert!(reporting.following_port_risks.is_empty());
        reporting.out.flush().unwrap();
        let lines = std::fs::read_to_string(&path).unwrap();
        let kinds = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let kinds: Vec<_> = kinds.map(|event| event["event"].as_str().unwrap().to_owned()).collect();
        assert_eq!(kinds, ["at_risk", "at_risk_over"]);
    }
}

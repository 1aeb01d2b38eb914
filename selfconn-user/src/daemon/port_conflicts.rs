//! `blocked` events: a failed bind, the self-connection that holds its port, and up to three processes, which are
//! looked up one after another: the one that called bind(), the holder, and the opener.

use std::{collections::HashMap, rc::Rc, time::Duration};

use rustix::time::{ClockId, clock_gettime};
use selfconn_ebpf::{BindOptions, bind_failure::BindFailure};
use tokio::time::Instant;

use super::{
    blocked::BlockedReports,
    blocked_event::{KnownHolder, MAX_OTHERS, PendingBlocked, Proof, Step},
    pending::PendingEvents,
    reporting::{Reporting, Waiter, holder_target, opener_target},
};
use crate::{
    budget::PartyTime,
    detect::{
        bind_conflict::{self, BindConflicts, PortHolder, PossibleHolders},
        connection::{Connection, Connections},
    },
    event::{self, ConnectionFields, EventKind},
    lookup::LookupTarget,
    system::{
        clock::Offset,
        process::{Attribution, ObservedTask, ProcessInfo, Subject},
    },
};

/// How long in a second self-connections are searched for what holds the ports of one party's failed binds: thousands
/// may be open at the port of an attacker's.
const SEARCH_TIME: Duration = Duration::from_millis(40);

/// The most that a search takes of this time for each self-connection, open or in TIME_WAIT: ten times what it needs.
/// The rest of a longer search is not its own: interrupts, and on a virtual machine what the host gave to another one.
const MAX_TIME_FOR_ONE: Duration = Duration::from_micros(2);

/// The ports that self-connections hold, and the events about them in preparation.
pub(super) struct PortConflicts {
    pub(super) binds: BindConflicts,
    pub(super) reports: BlockedReports,
    search_time: PartyTime,
}

/// What is known of the open connections.
#[derive(Clone, Copy)]
pub(super) struct KnownConnections<'a> {
    pub(super) connections: &'a Connections,
    /// The process behind each, by the connection's number.
    pub(super) attributions: &'a HashMap<u64, Attribution>,
    /// Those whose process is being looked up.
    pub(super) pending: &'a PendingEvents,
}

impl KnownConnections<'_> {
    fn attribution(&self, connection: &Connection) -> Attribution {
        self.attributions.get(&connection.number).cloned().unwrap_or_default()
    }

    /// The self-connection with this number, if it is still open.
    fn open_holder(&self, number: u64) -> Option<KnownHolder> {
        let connection = self.connections.iter().find(|connection| connection.number == number)?;
        Some(KnownHolder::Open(Box::new(connection.clone()), self.attribution(connection)))
    }
}

impl PortConflicts {
    pub(super) fn new(reports: BlockedReports) -> Self {
        Self { binds: BindConflicts::default(), reports, search_time: PartyTime::new(SEARCH_TIME) }
    }

    /// Handles a failed bind: if a self-connection holds the port and a report is due, looks up the processes, and
    /// emits the event. Beyond the time of its owner's parties it is counted as lost.
    pub(super) fn on_bind_failure(
        &mut self,
        failure: &BindFailure,
        clock: Offset,
        known: KnownConnections<'_>,
        reporting: &mut Reporting,
    ) {
        if !self.search_time.has_some(failure.owner, Instant::now()) {
            return self.binds.servers.losses.count(failure.owner, failure.failures);
        }
        let began = thread_time();
        let found = self.find_possible_holder(failure, clock, known);
        let took = thread_time().saturating_sub(began);
        let searched = known.connections.iter().count() + self.binds.time_waits.endpoints().count();
        self.search_time.take(failure.owner, own_time(took, searched));
        if let Some(blocked) = found {
            let target = LookupTarget::Observed(ObservedTask::from_bind_failure(failure), failure.owner);
            self.look_up(blocked, target, known, reporting);
        }
    }

    /// The self-connection that holds the port of a failed bind, or may. `None`: there is none, or no report is due.
    fn find_possible_holder(
        &mut self,
        failure: &BindFailure,
        clock: Offset,
        known: KnownConnections<'_>,
    ) -> Option<PendingBlocked> {
        let time = clock.wall(failure.at_ns);
        let can_prove = self.reports.can_prove();
        let possible = || {
            let open = known.connections.iter().filter(|connection| connection.socket_ref().is_some());
            bind_conflict::possible_holders(failure, open, 1 + MAX_OTHERS)
        };
        let blocked = match self.binds.find_holder(failure, known.connections.iter()) {
            Some(holder) => {
                let attribution = known.attribution(holder.connection());
                let mut blocked = PendingBlocked::new(*failure, &holder, attribution, time);
                let can_look = can_prove && matches!(holder, PortHolder::Open(_));
                let number = holder.connection().number;
                let is_due = self.record(&mut blocked);
                let is_looked_at = is_due || can_look && self.binds.servers.is_look_due(failure, number);
                if !is_looked_at {
                    self.binds.servers.confirm(failure);
                    return None;
                }
                if can_look {
                    blocked.add_others(&possible());
                }
                blocked
            }
            None => {
                let possible = if can_prove { possible() } else { PossibleHolders::default() };
                let Some(first) = possible.connections.first() else {
                    self.record_unexplained(failure, known);
                    return None;
                };
                let (holder, attribution) = (PortHolder::Open(first), known.attribution(first));
                let mut blocked = PendingBlocked::new(*failure, &holder, attribution, time);
                blocked.proof = Proof::Missing;
                blocked.add_others(&possible);
                blocked
            }
        };
        Some(blocked)
    }

    /// Records the failure as one because of the holder. False: no report is due.
    fn record(&mut self, blocked: &mut PendingBlocked) -> bool {
        let number = blocked.holder.connection().number;
        blocked.is_recorded = true;
        blocked.conflict = self.binds.servers.record_failure(&blocked.failure, number);
        blocked.conflict.is_some()
    }

    /// No known self-connection has refused the bind.
    fn record_unexplained(&mut self, failure: &BindFailure, known: KnownConnections<'_>) {
        let lacks_open_one = known.connections.may_lack_open_at(&failure.endpoint);
        self.binds.record_unexplained(failure, lacks_open_one);
    }

    fn look_up(
        &mut self,
        blocked: PendingBlocked,
        target: LookupTarget,
        known: KnownConnections<'_>,
        reporting: &mut Reporting,
    ) {
        match reporting.lookups.known(&target, blocked.failure.at_ns) {
            Some(process) => self.on_process(blocked, process, known, reporting),
            None => reporting.lookups.begin(target, Waiter::Blocked(Box::new(blocked))),
        }
    }

    /// A process is looked up.
    pub(super) fn on_process(
        &mut self,
        mut blocked: PendingBlocked,
        process: Rc<ProcessInfo>,
        known: KnownConnections<'_>,
        reporting: &mut Reporting,
    ) {
        match blocked.step {
            Step::Binder => {
                blocked.binder = Some(process);
                if let Some(blocked) = self.reports.request(blocked) {
                    self.on_looked_at(blocked, known, reporting);
                }
            }
            Step::Holder => {
                blocked.holder_process = Some(process);
                on_holder_process_known(blocked, known, reporting);
            }
            Step::Opener => {
                if let KnownHolder::Open(_, attribution) = &mut blocked.holder {
                    attribution.set_process(Subject::Opener, process);
                }
                emit(&blocked, known, reporting);
            }
        }
    }

    /// Goes on with the events whose holders are known. Returns the options of self-connections that do not refuse a
    /// bind, by the number of each.
    pub(super) fn serve(
        &mut self,
        known: KnownConnections<'_>,
        reporting: &mut Reporting,
    ) -> HashMap<u64, BindOptions> {
        let mut changed = HashMap::new();
        for mut blocked in self.reports.serve() {
            changed.extend(std::mem::take(&mut blocked.options_now));
            self.on_looked_at(blocked, known, reporting);
        }
        changed
    }

    /// Goes on without the holders: the run ends.
    pub(super) fn give_up_holders(&mut self, known: KnownConnections<'_>, reporting: &mut Reporting) {
        for blocked in self.reports.give_up_all() {
            self.on_looked_at(blocked, known, reporting);
        }
    }

    /// The sockets were looked at, or there was no time for it.
    fn on_looked_at(
        &mut self,
        mut blocked: PendingBlocked,
        known: KnownConnections<'_>,
        reporting: &mut Reporting,
    ) {
        let (proof, was_recorded) = (blocked.proof, blocked.is_recorded);
        if was_recorded && proof != Proof::Known {
            self.binds.servers.take_back(&blocked.failure, blocked.holder.connection().number);
        }
        if !matches!(proof, Proof::Known | Proof::Found) {
            let other = match proof {
                Proof::FoundOther(number) => known.open_holder(number),
                _ => None,
            };
            // The self-connection may have been closed meanwhile. With a recorded holder, no TIME_WAIT was looked for.
            let Some(other) = other.or_else(|| self.time_wait_holder(&blocked.failure)) else {
                // Something else holds the port, or a self-connection that is not tracked.
                if proof == Proof::Refuted && !was_recorded {
                    return self.record_unexplained(&blocked.failure, known);
                }
                // Whether a self-connection has refused the bind is unknown: its options may be newer than that.
                return self.binds.servers.losses.count(blocked.failure.owner, blocked.failure.failures);
            };
            blocked.set_holder(other);
        }
        self.binds.servers.confirm(&blocked.failure);
        if proof != Proof::Known {
            self.record(&mut blocked);
        }
        if blocked.conflict.is_some() {
            self.on_holders_known(blocked, known, reporting);
        }
    }

    fn time_wait_holder(&self, failure: &BindFailure) -> Option<KnownHolder> {
        let entry = self.binds.find_time_wait(failure)?;
        Some(KnownHolder::TimeWait(Box::new(entry.clone())))
    }

    fn on_holders_known(
        &mut self,
        mut blocked: PendingBlocked,
        known: KnownConnections<'_>,
        reporting: &mut Reporting,
    ) {
        let connection = blocked.holder.connection();
        let first = blocked.holders.iter().flatten().next();
        match first.and_then(|holder| holder_target(holder, connection)) {
            Some(target) if reporting.lookups.can_look_up() => {
                blocked.step = Step::Holder;
                self.look_up(blocked, target, known, reporting);
            }
            _ => on_holder_process_known(blocked, known, reporting),
        }
    }
}

/// What a search among this number of self-connections takes of its owner's time.
fn own_time(took: Duration, searched: usize) -> Duration {
    took.min(MAX_TIME_FOR_ONE * u32::try_from(searched).unwrap_or(u32::MAX))
}

/// How long the calling thread has run: whatever preempts it takes none of the owner's time.
fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs().try_into().unwrap_or(0))
}

/// Emits the event, unless the look-up of the opener is in progress.
fn on_holder_process_known(
    mut blocked: PendingBlocked,
    known: KnownConnections<'_>,
    reporting: &mut Reporting,
) {
    if let KnownHolder::Open(connection, _) = &blocked.holder
        && known.pending.contains(connection.number)
        && let Some(target) = opener_target(connection)
    {
        blocked.step = Step::Opener;
        reporting.lookups.begin(target, Waiter::Blocked(Box::new(blocked)));
        return;
    }
    emit(&blocked, known, reporting);
}

fn emit(blocked: &PendingBlocked, known: KnownConnections<'_>, reporting: &mut Reporting) {
    let Some(conflict) = blocked.conflict else { return };
    let of_closed: Attribution;
    let (holder, attribution) = match &blocked.holder {
        KnownHolder::Open(connection, at_failure) => {
            let now = known.attributions.get(&connection.number).unwrap_or(at_failure);
            (PortHolder::Open(connection), now)
        }
        KnownHolder::TimeWait(entry) => {
            of_closed = (&entry.attribution).into();
            (PortHolder::TimeWait(entry), &of_closed)
        }
    };
    let connection = holder.connection();
    if !reporting.is_of_reported(&blocked.failure.owner) && !reporting.is_reported(connection, attribution) {
        return;
    }
    let run_id = reporting.run_id;
    let fields = ConnectionFields::new(connection, run_id, attribution);
    let current = event::CurrentHolder {
        holders: blocked.holders.clone(),
        process: blocked.holder_process.clone().unwrap_or_default(),
    };
    let binder = blocked.binder.clone().unwrap_or_default();
    let id = event::blocked_id(run_id, conflict.number);
    let failure = BindFailure { failures: conflict.failures, ..blocked.failure };
    let report = event::Blocked::new(id, &failure, &binder, &holder, fields, current, Offset::now());
    reporting.out.emit_at(blocked.time, EventKind::Blocked(Box::new(report)));
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::Owner;

    use super::*;
    use crate::{
        budget::{cmdline::CmdlineLimit, log::LogRate},
        daemon::reporting::Reported,
        detect::samples,
        event::Envelope,
        lookup::Lookups,
        output::{OutputLimits, Outputs},
        system::identity::Identity,
    };

    #[test]
    fn a_search_among_few_self_connections_takes_little_of_its_owners_time_however_long_it_takes() {
        let [short, long] = [1, 40].map(Duration::from_millis);
        for (took, searched, own) in [
            (long, 0, Duration::ZERO),
            (long, 100, Duration::from_micros(200)),
            (short, 12_000, short),
            (long, 12_000, Duration::from_millis(24)),
            (long, usize::MAX, long),
        ] {
            assert_eq!(own_time(took, searched), own, "{took:?} {searched}");
        }
    }

    #[test]
    fn the_time_of_searches_for_one_owner_leaves_some_for_the_next() {
        let envelope = Envelope::new(&Identity::read(None).unwrap());
        let limits = OutputLimits { rate: LogRate::DEFAULT, cmdline: CmdlineLimit::Off };
        let out = Outputs::new(None, None, envelope, limits).unwrap();
        let lookups = Lookups::start(true, CmdlineLimit::Off).unwrap();
        let mut reporting = Reporting::new(lookups, Reported { states: false, group: None }, out);
        let mut conflicts = PortConflicts::new(BlockedReports::start(None).unwrap());
        let known = KnownConnections {
            connections: &Connections::default(),
            attributions: &HashMap::new(),
            pending: &PendingEvents::default(),
        };
        let (flood, next) = (Owner::new(1_000, 7), Owner::new(1_001, 8));
        let mut lost = |owner: Owner| {
            let endpoint = samples::endpoint("127.0.0.1", 80);
            let failure = BindFailure { owner, failures: 1, ..samples::bind_failure(endpoint, 0) };
            let before = conflicts.binds.servers.losses.total();
            for _ in 0..3 {
                conflicts.on_bind_failure(&failure, Offset::now(), known, &mut reporting);
                // As if thousands of self-connections were open.
                conflicts.search_time.take(owner, SEARCH_TIME);
            }
            conflicts.binds.servers.losses.total() - before
        };
        assert_eq!([lost(flood), lost(next)], [2, 2]);
    }
}

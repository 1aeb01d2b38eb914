//! The pipeline: turns transitions, snapshots of the socket table and failed binds into events, attributes them to
//! processes, and emits them.

use std::collections::{HashMap, HashSet};

use selfconn_ebpf::{Task, Transition, bind_failure::BindFailure, state};

use super::remediation::Remediation;
use crate::{
    detect::{
        bind_conflict::{BindConflicts, PortHolder, TimeWaitEntry},
        connection::{Connection, ConnectionEvent, Connections, TIME_WAIT_NS},
    },
    event::{self, Closed, ConnectionFields, EventKind, StateChange},
    metrics,
    output::Outputs,
    sockets::SocketSnapshot,
    system::{
        clock::{self, Offset},
        process::{Attribution, Holder, ObservedTask, Processes},
    },
};

/// The tracked connections, everything that is known about them, and the outputs.
pub(super) struct Pipeline {
    /// Identifies this run in every `id`: the time of its start.
    pub(super) run_id: u64,
    pub(super) connections: Connections,
    pub(super) processes: Processes,
    /// The process behind each open connection, by the connection's number.
    pub(super) attributions: HashMap<u64, Attribution>,
    pub(super) report_states: bool,
    pub(super) remediation: Remediation,
    pub(super) bind_conflicts: BindConflicts,
    pub(super) out: Outputs,
    pub(super) established_counts: metrics::ConnectionCounts,
    pub(super) missed: u64,
}

impl Pipeline {
    pub(super) fn new(
        probe_count: u8,
        processes: Processes,
        report_states: bool,
        remediation: Remediation,
        out: Outputs,
    ) -> Self {
        Self {
            run_id: clock::boot_ns(),
            connections: Connections::new(probe_count),
            processes,
            attributions: HashMap::new(),
            report_states,
            remediation,
            bind_conflicts: BindConflicts::default(),
            out,
            established_counts: metrics::ConnectionCounts::default(),
            missed: 0,
        }
    }

    /// Applies a transition, and emits the resulting events.
    pub(super) fn apply(&mut self, transition: &Transition, clock: Offset) {
        let Self {
            run_id,
            connections,
            processes,
            attributions,
            report_states,
            remediation,
            bind_conflicts,
            out,
            established_counts,
            ..
        } = self;
        let at_ns = transition.at_ns;
        let mut closed_numbers = [None; 2];
        connections.apply(transition, |event| {
            let connection = event.connection();
            if matches!(event, ConnectionEvent::Established(_)) {
                established_counts.count(connection);
            }
            // Looked up at the first event, while the process still exists. Later events use the same result.
            let attribution =
                attributions.entry(connection.number).or_insert_with(|| match connection.opener {
                    Some(opener) => Attribution::from_opener(
                        processes.look_up(&ObservedTask::from_opener(&opener), at_ns),
                    ),
                    None => Attribution::default(),
                });
            if let Some(kind) = event_of(event, attribution, *run_id, *report_states, clock) {
                out.emit_at(clock.wall(at_ns), kind);
            }
            if let Some(remedied) = remediation.on_connection_event(event, attribution, *run_id, at_ns) {
                out.emit_at(clock.wall(at_ns), EventKind::Remedied(Box::new(remedied)));
            }
            record_time_wait(bind_conflicts, event, attribution, at_ns);
            if matches!(event, ConnectionEvent::Closed(..) | ConnectionEvent::State(_, _, state::CLOSE)) {
                // One transition can close two connections: the previous one whose close was missed, and the
                // current one.
                closed_numbers = [
                    closed_numbers[1].filter(|number| *number != connection.number),
                    Some(connection.number),
                ];
            }
        });
        for number in closed_numbers.into_iter().flatten() {
            attributions.remove(&number);
        }
    }

    /// Reconciles the connections with a snapshot of the socket table. Returns the number of missed
    /// self-connections.
    pub(super) fn reconcile(&mut self, snapshot: &SocketSnapshot, knows_netns: bool) -> u64 {
        let Self {
            run_id,
            connections,
            processes,
            attributions,
            report_states,
            remediation,
            out,
            established_counts,
            ..
        } = self;
        let clock = Offset::now();
        let mut closed_numbers = Vec::new();
        let is_covered = |connection: &Connection| {
            !knows_netns
                || snapshot.covers(&connection.endpoint)
                || snapshot.proves_end_of_netns(&connection.endpoint)
        };
        // Outside the initial pid namespace the holders' pids in /proc differ from the pids in events.
        let can_look_up = processes.can_look_up();
        let holders_of =
            |connection: &Connection| snapshot.holders_of(connection.inode).map(<[Holder]>::to_vec);
        let missed = connections.reconcile(&snapshot.entries, snapshot.began_ns, is_covered, |event| {
            let connection = event.connection();
            if matches!(event, ConnectionEvent::Established(_)) {
                established_counts.count(connection);
            }
            let attribution =
                attributions.entry(connection.number).or_insert_with(|| match connection.opener {
                    Some(opener) => Attribution::from_opener(
                        processes.look_up(&ObservedTask::from_opener(&opener), snapshot.began_ns),
                    ),
                    None => Attribution::from_holders(holders_of(connection).filter(|_| can_look_up)),
                });
            if let Some(kind) = event_of(event, attribution, *run_id, *report_states, clock) {
                out.emit(kind);
            }
            if let Some(remedied) =
                remediation.on_connection_event(event, attribution, *run_id, snapshot.began_ns)
            {
                out.emit(EventKind::Remedied(Box::new(remedied)));
            }
            if matches!(event, ConnectionEvent::Closed(..)) {
                closed_numbers.push(connection.number);
            }
        });
        for number in closed_numbers {
            attributions.remove(&number);
        }
        for connection in connections.iter() {
            if let (Some(attribution), Some(holders)) =
                (attributions.get_mut(&connection.number), holders_of(connection))
            {
                attribution.holders = Some(holders);
            }
        }
        missed
    }

    /// Handles a failed bind: emits `blocked` if a self-connection holds the port and a report is due.
    pub(super) fn on_bind_failure(&mut self, failure: &BindFailure, clock: Offset) {
        let Self { connections, bind_conflicts, processes, attributions, .. } = self;
        let Some(holder) = bind_conflicts.find_holder(failure, connections.iter()) else { return };
        let connection = holder.connection();
        let unknown = Attribution::default();
        let attribution = match holder {
            PortHolder::Open(connection) => attributions.get(&connection.number).unwrap_or(&unknown),
            PortHolder::TimeWait(entry) => &entry.attribution,
        };
        let fields = ConnectionFields::new(connection, self.run_id, attribution);
        let observed = ObservedTask { task: failure.task, start_ns: failure.start_ns, at_ns: failure.at_ns };
        let process = processes.look_up(&observed, failure.at_ns);
        let mut report = event::Blocked::new(failure, &process, &holder, fields, clock);
        let number = connection.number;
        if let Some(failures) = bind_conflicts.record_failure(failure, number) {
            report.failures = failures;
            self.out.emit_at(clock.wall(failure.at_ns), EventKind::Blocked(Box::new(report)));
        }
    }

    /// Records the TIME_WAIT sockets of self-connections whose close this run did not observe, and removes those
    /// that the kernel does not have any more: they ended early, or with their network namespace.
    pub(super) fn record_time_waits(&mut self, snapshot: &SocketSnapshot) {
        let listed: HashSet<u64> = snapshot.entries.iter().filter_map(|entry| entry.cookie).collect();
        self.bind_conflicts.remove_ended(|TimeWaitEntry { connection, until_ns, .. }| {
            let began_ns = until_ns.saturating_sub(TIME_WAIT_NS);
            let is_missing = connection.cookie.is_some_and(|cookie| !listed.contains(&cookie));
            snapshot.proves_end_of_netns(&connection.endpoint)
                || is_missing
                    && began_ns < snapshot.began_ns
                    && snapshot.without_sock_diag.is_none()
                    && snapshot.covers(&connection.endpoint)
        });
        for entry in &snapshot.entries {
            let Some(time_left) = entry.time_wait_left else { continue };
            debug_assert_eq!(entry.state, state::TIME_WAIT);
            let connection = Connection::from_entry(0, entry);
            let time_left_ns = u64::try_from(time_left.as_nanos()).unwrap_or(u64::MAX);
            let until_ns = snapshot.began_ns.saturating_add(time_left_ns);
            self.bind_conflicts.insert_listed_time_wait(
                TimeWaitEntry { connection, attribution: Attribution::default(), until_ns },
                snapshot.began_ns,
            );
        }
    }
}

/// Records the TIME_WAIT of a self-connection that is closed.
fn record_time_wait(
    bind_conflicts: &mut BindConflicts,
    event: ConnectionEvent<'_>,
    attribution: &Attribution,
    now_ns: u64,
) {
    if let ConnectionEvent::Closed(connection, end) = event
        && let Some(until_ns) = end.port_blocked_until_ns
    {
        let entry =
            TimeWaitEntry { connection: connection.clone(), attribution: attribution.clone(), until_ns };
        bind_conflicts.insert_time_wait(entry, now_ns);
    }
}

/// The event to emit for a connection event, if any.
fn event_of(
    event: ConnectionEvent<'_>,
    attribution: &Attribution,
    run_id: u64,
    report_states: bool,
    clock: Offset,
) -> Option<EventKind> {
    let fields = |connection: &Connection| ConnectionFields::new(connection, run_id, attribution);
    match event {
        ConnectionEvent::Established(connection) => {
            Some(EventKind::Established(Box::new(fields(connection))))
        }
        ConnectionEvent::State(connection, from, to) => {
            report_states.then(|| EventKind::State(Box::new(StateChange::new(fields(connection), from, to))))
        }
        ConnectionEvent::Closed(connection, end) => {
            let closer: Option<&Task> = connection.closer.as_ref();
            Some(EventKind::Closed(Box::new(Closed::new(fields(connection), closer, &end, clock))))
        }
    }
}

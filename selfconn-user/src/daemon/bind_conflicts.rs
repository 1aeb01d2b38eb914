//! Failed binds: a probe reports a bind that failed, `crate::detect::bind_conflict` finds the self-connection that holds
//! the port, and `blocked` is emitted.

use selfconn_ebpf::{bind_failure::BindFailure, state};

use super::pipeline::Pipeline;
use crate::{
    detect::{
        bind_conflict::{BindConflicts, PortHolder, TimeWaitEntry},
        connection::{Connection, ConnectionEvent},
    },
    event::{self, ConnectionFields, EventKind},
    sockets::SocketSnapshot,
    system::{
        clock::Offset,
        process::{Attribution, ObservedTask},
    },
};

/// Records the TIME_WAIT of a self-connection that is closed.
pub(super) fn on_connection_event(
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

impl Pipeline {
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

    /// Records the TIME_WAIT sockets of self-connections whose close this run did not observe.
    pub(super) fn record_time_waits(&mut self, snapshot: &SocketSnapshot) {
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

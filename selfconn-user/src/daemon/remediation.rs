//! Executes the remedy policy: passes established and closed connections to it, and sends its requests to the
//! snapshot worker.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::{
    Daemon,
    worker::{SnapshotRequest, SnapshotResponse},
};
use crate::{
    detect::{
        connection::{Connection, ConnectionEvent},
        remediation::{Remedy, RemedyOutcome, RemedyRequest, RemedyStep},
    },
    event::{ConnectionFields, EventKind, Remedied},
    sockets::Cookie,
    system::{
        clock::{self, Offset},
        process::Attribution,
    },
};

/// Maximum time that the end of a run waits for SOCK_DESTROY requests in progress.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

impl Daemon {
    /// Number of remedies by outcome. Empty without `--remedy`.
    pub fn remedies(&self) -> impl Iterator<Item = (RemedyOutcome, u64)> {
        self.pipeline.remedy.iter().flat_map(Remedy::counts)
    }

    /// Time of the remedy's next step.
    pub(super) fn next_remedy_at(&self) -> Option<Instant> {
        let next_ns = self.pipeline.remedy.as_ref()?.next_ns()?;
        Some(Instant::now() + Duration::from_nanos(next_ns.saturating_sub(clock::boot_ns())))
    }

    /// Executes the steps that are due.
    pub(super) fn start_due_remedies(&mut self) {
        let Some(remedy) = &mut self.pipeline.remedy else { return };
        for step in remedy.due(clock::boot_ns()) {
            self.perform(step);
        }
    }

    /// Handles the result of a lookup by the worker.
    pub(super) fn on_looked_up(&mut self, number: u64, cookie_result: Result<Option<Cookie>, String>) {
        // The socket found is this connection only if the connection has not been closed by now.
        while self.drain_batch() > 0 {}
        let Some(remedy) = &mut self.pipeline.remedy else { return };
        if let Some(step) = remedy.on_looked_up(number, cookie_result) {
            self.perform(step);
        }
    }

    /// Handles the result of SOCK_DESTROY by the worker.
    pub(super) fn on_destroyed(&mut self, number: u64, began_ns: u64, outcome: Result<bool, String>) {
        let Some(remedy) = &mut self.pipeline.remedy else { return };
        if let Some(remedied) = remedy.on_destroyed(number, outcome) {
            // The event's time must be before that of the close which it causes.
            self.pipeline.out.emit_at(Offset::now().wall(began_ns), EventKind::Remedied(Box::new(remedied)));
        }
    }

    fn perform(&mut self, step: RemedyStep) {
        match step {
            RemedyStep::LookUp(request) => self.snapshot_worker.send(SnapshotRequest::LookUp(request)),
            RemedyStep::Destroy(request, cookie) => {
                self.snapshot_worker.send(SnapshotRequest::Destroy(request, cookie));
            }
            RemedyStep::Emit(remedied) => self.pipeline.out.emit(EventKind::Remedied(remedied)),
        }
    }

    /// Waits at the end of a run for SOCK_DESTROY requests in progress. Connections that are only being
    /// looked up are left alone.
    pub(super) async fn finish_remedies(&mut self) {
        let until = Instant::now() + SHUTDOWN_TIMEOUT;
        while self.pipeline.remedy.as_ref().is_some_and(Remedy::is_destroying) {
            match timeout_at(until, self.snapshot_worker.next_response()).await {
                Ok(Some(SnapshotResponse::Destroyed(number, began_ns, outcome))) => {
                    self.on_destroyed(number, began_ns, outcome);
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

/// Passes a connection event of time `at_ns` to the remedy. Returns the event to emit at once, if any.
pub(super) fn on_connection_event(
    remedy: &mut Remedy,
    event: ConnectionEvent<'_>,
    attribution: &Attribution,
    run_id: u64,
    at_ns: u64,
) -> Option<Remedied> {
    match event {
        ConnectionEvent::Established(connection) => {
            let fields = ConnectionFields::new(connection, run_id, attribution);
            let request = request(connection, &fields);
            remedy.on_established(fields, request, at_ns)
        }
        ConnectionEvent::State(..) => None,
        ConnectionEvent::Closed(connection, _) => {
            remedy.on_closed(connection.number);
            None
        }
    }
}

fn request(connection: &Connection, fields: &ConnectionFields) -> RemedyRequest {
    let &Connection { number, endpoint, ifindex, .. } = connection;
    let opener = connection.opener.iter().flat_map(|opener| [opener.task.tid, opener.task.pid]);
    let holders = fields.holders.iter().flatten().map(|holder| holder.pid);
    RemedyRequest { number, endpoint, ifindex, netns_hints: opener.chain(holders).collect() }
}

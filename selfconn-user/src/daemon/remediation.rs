//! Executes the remedy policy: passes established and closed connections to it, and sends its requests to the
//! snapshot worker.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::snapshot_worker::{SnapshotRequest, SnapshotResponse, SnapshotWorker};
use crate::{
    detect::{
        connection::{Connection, ConnectionEvent},
        remediation::{Remedy, RemedyOutcome, RemedyRequest, RemedyStep},
    },
    event::{ConnectionFields, EventKind, Remedied},
    output::Outputs,
    sockets::{Cookie, TargetSocket},
    system::{
        clock::{self, Offset},
        process::Attribution,
    },
};

/// Maximum time that the end of a run waits for SOCK_DESTROY requests in progress.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// The remedy policy, and the connections that it is about. `None`: no remedy is requested.
pub(super) struct Remediation(Option<Remedy>);

impl Remediation {
    pub(super) fn new(remedy: Option<Remedy>) -> Self {
        Self(remedy)
    }

    /// Number of remedies by outcome. Empty without `--remedy`.
    pub(super) fn counts(&self) -> impl Iterator<Item = (RemedyOutcome, u64)> {
        self.0.iter().flat_map(Remedy::counts)
    }

    /// Passes a connection event of time `at_ns` to the policy. Returns the event to emit at once, if any.
    pub(super) fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_>,
        attribution: &Attribution,
        run_id: u64,
        at_ns: u64,
    ) -> Option<Remedied> {
        let remedy = self.0.as_mut()?;
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

    /// Time of the next step.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let next_ns = self.0.as_ref()?.next_ns()?;
        Some(Instant::now() + Duration::from_nanos(next_ns.saturating_sub(clock::boot_ns())))
    }

    /// Executes the steps that are due.
    pub(super) fn start_due_steps(&mut self, worker: &SnapshotWorker, out: &mut Outputs) {
        if let Some(remedy) = &mut self.0 {
            for step in remedy.due(clock::boot_ns()) {
                perform(step, worker, out);
            }
        }
    }

    /// Handles the result of a lookup by the worker. All records so far must have been drained: the socket
    /// found is this connection only if the connection has not been closed by now.
    pub(super) fn on_looked_up(
        &mut self,
        number: u64,
        cookie_result: Result<Option<Cookie>, String>,
        worker: &SnapshotWorker,
        out: &mut Outputs,
    ) {
        if let Some(step) = self.0.as_mut().and_then(|remedy| remedy.on_looked_up(number, cookie_result)) {
            perform(step, worker, out);
        }
    }

    /// Handles the result of SOCK_DESTROY by the worker.
    pub(super) fn on_destroyed(
        &mut self,
        number: u64,
        began_ns: u64,
        outcome: Result<bool, String>,
        out: &mut Outputs,
    ) {
        if let Some(remedied) = self.0.as_mut().and_then(|remedy| remedy.on_destroyed(number, outcome)) {
            // The event's time must be before that of the close which it causes.
            out.emit_at(Offset::now().wall(began_ns), EventKind::Remedied(Box::new(remedied)));
        }
    }

    /// Waits at the end of a run for SOCK_DESTROY requests in progress. Connections that are only being
    /// looked up are left alone.
    pub(super) async fn finish(&mut self, worker: &mut SnapshotWorker, out: &mut Outputs) {
        let until = Instant::now() + SHUTDOWN_TIMEOUT;
        while self.0.as_ref().is_some_and(Remedy::is_destroying) {
            match timeout_at(until, worker.response()).await {
                Ok(SnapshotResponse::Destroyed(number, began_ns, outcome)) => {
                    self.on_destroyed(number, began_ns, outcome, out);
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}

fn perform(step: RemedyStep, worker: &SnapshotWorker, out: &mut Outputs) {
    match step {
        RemedyStep::LookUp(request) => worker.send(SnapshotRequest::LookUp(request)),
        RemedyStep::Destroy(request, cookie) => worker.send(SnapshotRequest::Destroy(request, cookie)),
        RemedyStep::Emit(remedied) => out.emit(EventKind::Remedied(remedied)),
    }
}

fn request(connection: &Connection, fields: &ConnectionFields) -> RemedyRequest {
    let &Connection { number, endpoint, cookie, inode, uid, .. } = connection;
    let opener = connection.opener.iter().flat_map(|opener| [opener.task.tid, opener.task.pid]);
    let holders = fields.holders.iter().flatten().map(|holder| holder.pid);
    let netns_hints = opener.chain(holders).collect();
    let cookie = cookie.and_then(Cookie::new);
    RemedyRequest { number, target: TargetSocket { endpoint, cookie, inode, uid, netns_hints } }
}

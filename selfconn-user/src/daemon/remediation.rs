//! Executes the remedy policy: passes established and closed connections to it, and sends its requests to the
//! remedy worker.

use std::{io, time::Duration};

use tokio::time::{Instant, timeout_at};

use super::remedy_worker::{self, RemedyWorker, SocketRequest, SocketResponse};
use crate::{
    detect::{
        connection::{Connection, ConnectionEvent},
        remediation::{Remedy, RemedyOutcome, RemedyRequest, RemedyStep},
    },
    event::{ConnectionFields, EventKind, Remedied},
    output::Outputs,
    sockets::{Cookie, TargetSocket},
    system::{
        busy::ThreadProblem,
        clock::{self, Offset},
        process::Attribution,
    },
};

/// Maximum time that the end of a run waits for SOCK_DESTROY requests in progress.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(300);

/// The remedy policy, with the connections that it is about, and the worker. `None`: no remedy is requested.
pub(super) struct Remediation(Option<(Remedy, RemedyWorker)>);

impl Remediation {
    /// Starts the worker, if a remedy is requested.
    pub(super) fn start(remedy: Option<Remedy>) -> io::Result<Self> {
        Ok(Self(match remedy {
            Some(remedy) => Some((remedy, remedy_worker::start()?)),
            None => None,
        }))
    }

    /// Waits until the worker has a response. Cancel safe.
    pub(super) async fn ready(&mut self) {
        match &mut self.0 {
            Some((_, worker)) => worker.ready().await,
            None => std::future::pending().await,
        }
    }

    /// The worker's next response, if it is there.
    pub(super) fn try_response(&mut self) -> Option<SocketResponse> {
        self.0.as_mut()?.1.try_response()
    }

    /// The name of the worker, and what is wrong with it.
    pub(super) fn worker_problem(&self) -> Option<(&'static str, ThreadProblem)> {
        self.0.as_ref()?.1.problem()
    }

    /// Number of remedies by outcome. Empty without `--remedy`.
    pub(super) fn counts(&self) -> impl Iterator<Item = (RemedyOutcome, u64)> {
        self.0.iter().flat_map(|(remedy, _)| remedy.counts())
    }

    /// Passes a connection event of time `at_ns` to the policy. Returns the event to emit at once, if any.
    pub(super) fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_>,
        attribution: &Attribution,
        run_id: u64,
        at_ns: u64,
    ) -> Option<Remedied> {
        let (remedy, _) = self.0.as_mut()?;
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
        let next_ns = self.0.as_ref()?.0.next_ns()?;
        Some(Instant::now() + Duration::from_nanos(next_ns.saturating_sub(clock::boot_ns())))
    }

    /// Executes the steps that are due.
    pub(super) fn start_due_steps(&mut self, out: &mut Outputs) {
        if let Some((remedy, worker)) = &mut self.0 {
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
        out: &mut Outputs,
    ) {
        if let Some((remedy, worker)) = &mut self.0
            && let Some(step) = remedy.on_looked_up(number, cookie_result)
        {
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
        if let Some(remedied) = self.0.as_mut().and_then(|(remedy, _)| remedy.on_destroyed(number, outcome)) {
            // The event's time must be before that of the close which it causes.
            out.emit_at(Offset::now().wall(began_ns), EventKind::Remedied(Box::new(remedied)));
        }
    }

    /// Waits at the end of a run for SOCK_DESTROY requests in progress. Connections that are only being
    /// looked up are left alone.
    pub(super) async fn finish(&mut self, out: &mut Outputs) {
        let until = Instant::now() + SHUTDOWN_TIMEOUT;
        while let Some((remedy, worker)) = &mut self.0
            && remedy.is_destroying()
            && timeout_at(until, worker.ready()).await.is_ok()
        {
            if let Some(SocketResponse::Destroyed(number, began_ns, outcome)) = worker.try_response() {
                self.on_destroyed(number, began_ns, outcome, out);
            }
        }
    }
}

fn perform(step: RemedyStep, worker: &RemedyWorker, out: &mut Outputs) {
    match step {
        RemedyStep::LookUp(request) => worker.send(SocketRequest::LookUp(request)),
        RemedyStep::Destroy(request, cookie) => worker.send(SocketRequest::Destroy(request, cookie)),
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

//! Executes the remedy policy: passes established and closed connections to it, and sends its requests to the
//! remedy worker.

use std::{io, time::Duration};

use tokio::time::{Instant, timeout_at};

use super::remedy_worker::{self, DestroyPermission, RemedyWorker, SocketRequest, SocketResponse};
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

/// `None`: no remedy is requested.
pub(super) struct Remediation(Option<Active>);

/// The remedy policy, with the connections that it is about, and the worker.
struct Active {
    remedy: Remedy,
    worker: RemedyWorker,
    permission: DestroyPermission,
}

impl Remediation {
    /// Starts the worker, if a remedy is requested.
    pub(super) fn start(remedy: Option<Remedy>) -> io::Result<Self> {
        let Some(remedy) = remedy else { return Ok(Self(None)) };
        let permission = DestroyPermission::new();
        let worker = remedy_worker::start(remedy.destroys(), permission.clone())?;
        Ok(Self(Some(Active { remedy, worker, permission })))
    }

    /// Waits until the worker has a response. Cancel safe.
    pub(super) async fn ready(&mut self) {
        match &mut self.0 {
            Some(Active { worker, .. }) => worker.ready().await,
            None => std::future::pending().await,
        }
    }

    /// The worker's next response, if it is there.
    pub(super) fn try_response(&mut self) -> Option<SocketResponse> {
        self.0.as_mut()?.worker.try_response()
    }

    /// The name of the worker, and what is wrong with it.
    pub(super) fn worker_problem(&self) -> Option<(&'static str, ThreadProblem)> {
        self.0.as_ref()?.worker.problem()
    }

    /// Number of remedies by outcome. Empty without `--remedy`.
    pub(super) fn counts(&self) -> impl Iterator<Item = (RemedyOutcome, u64)> {
        self.0.iter().flat_map(|active| active.remedy.counts())
    }

    /// Passes a connection event of time `at_ns` to the policy. Returns the event to emit at once, if any.
    pub(super) fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_>,
        attribution: &Attribution,
        run_id: u64,
        at_ns: u64,
    ) -> Option<Remedied> {
        let remedy = &mut self.0.as_mut()?.remedy;
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
        let next_ns = self.0.as_ref()?.remedy.next_ns()?;
        Some(Instant::now() + Duration::from_nanos(next_ns.saturating_sub(clock::boot_ns())))
    }

    /// Executes the steps that are due.
    pub(super) fn start_due_steps(&mut self, out: &mut Outputs) {
        if let Some(Active { remedy, worker, .. }) = &mut self.0 {
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
        if let Some(Active { remedy, worker, .. }) = &mut self.0
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
        if let Some(active) = &mut self.0
            && let Some(remedied) = active.remedy.on_destroyed(number, outcome)
        {
            // The event's time must be before that of the close which it causes.
            out.emit_at(Offset::now().wall(began_ns), EventKind::Remedied(Box::new(remedied)));
        }
    }

    /// Waits at the end of a run for SOCK_DESTROY requests in progress, then withdraws the permission to destroy. Emits
    /// the event of each request that has no result by then. Connections that are only being looked up are left
    /// alone.
    pub(super) async fn finish(&mut self, out: &mut Outputs) {
        let until = Instant::now() + SHUTDOWN_TIMEOUT;
        while let Some(Active { remedy, worker, .. }) = &mut self.0
            && remedy.is_destroying()
            && timeout_at(until, worker.ready()).await.is_ok()
        {
            self.take_last_response(out);
        }
        let Some(begun) = self.0.as_ref().map(|active| active.permission.withdraw()) else { return };
        // A result may have come just before.
        while self.take_last_response(out) {}
        for remedied in self.0.iter_mut().flat_map(|active| active.remedy.end(begun)) {
            out.emit(EventKind::Remedied(Box::new(remedied)));
        }
    }

    /// Handles the worker's next response at the end of a run. False: there is none yet.
    fn take_last_response(&mut self, out: &mut Outputs) -> bool {
        match self.try_response() {
            Some(SocketResponse::Destroyed(number, began_ns, outcome)) => {
                self.on_destroyed(number, began_ns, outcome, out);
                true
            }
            Some(SocketResponse::LookedUp(..)) => true,
            None => false,
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

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        sync::{
            Arc, Mutex,
            mpsc::{Receiver, channel},
        },
        thread,
    };

    use serde_json::Value;
    use tokio::runtime;

    use super::*;
    use crate::{
        budget::{cmdline::CmdlineLimit, log::LogRate},
        detect::{
            filter::Selection,
            remediation::{RemedyMode, RemedyPolicy},
            samples,
        },
        event::Envelope,
        output::{OutputLimits, log_file::LogFile},
        system::identity::Identity,
    };

    const PORTS: [u16; 2] = [40_001, 40_002];

    /// Where the worker of a test waits, until the other end is dropped.
    struct Pauses {
        /// Before the look-up of the second port.
        in_look_up: Option<Receiver<()>>,
        /// After the permission to destroy, as if the kernel gave no answer.
        in_destroy: Option<Receiver<()>>,
    }

    /// A remedy of two connections that are due, and the ports of which the kernel would have been asked to destroy the
    /// socket.
    fn remediation(pauses: Pauses) -> (Remediation, Arc<Mutex<Vec<u16>>>) {
        let policy = RemedyPolicy {
            mode: RemedyMode::Destroy,
            selection: Selection::default(),
            grace_ns: 0,
            rate: 10,
        };
        let mut remedy = Remedy::new(policy);
        for (number, port) in (1..).zip(PORTS) {
            let endpoint = samples::endpoint("127.0.0.1", port);
            let target =
                TargetSocket { endpoint, cookie: None, inode: None, uid: None, netns_hints: Vec::new() };
            let fields = ConnectionFields { port, ..ConnectionFields::sample() };
            assert!(remedy.on_established(fields, RemedyRequest { number, target }, 0).is_none());
        }
        let asked = Arc::new(Mutex::new(Vec::new()));
        let of_worker = Arc::clone(&asked);
        let permission = DestroyPermission::new();
        let Pauses { in_look_up, in_destroy } = pauses;
        let look_up = move |target: &TargetSocket| {
            if let Some(pause) = in_look_up.as_ref().filter(|_| target.endpoint.port == PORTS[1]) {
                let _ = pause.recv();
            }
            Ok(Cookie::new(target.endpoint.port.into()))
        };
        let destroy = move |target: &TargetSocket, _, may_destroy: &(dyn Fn() -> bool + Sync)| {
            if !may_destroy() {
                return Err("not any more".to_owned());
            }
            of_worker.lock().unwrap().push(target.endpoint.port);
            if let Some(pause) = &in_destroy {
                let _ = pause.recv();
            }
            Ok(true)
        };
        let worker = remedy_worker::start_with(true, permission.clone(), look_up, destroy).unwrap();
        (Remediation(Some(Active { remedy, worker, permission })), asked)
    }

    /// The worker's next response.
    async fn response(remediation: &mut Remediation) -> SocketResponse {
        remediation.ready().await;
        remediation.try_response().unwrap()
    }

    /// Ends the run when this number of sockets are to be destroyed and `asked` has this number of ports. Returns port,
    /// result and reason of each event.
    async fn end_while_destroying(
        remediation: &mut Remediation,
        count: usize,
        asked: &Mutex<Vec<u16>>,
        asked_count: usize,
    ) -> Vec<(u64, String, String)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let envelope = Envelope::new(&Identity::read(None).unwrap());
        let limits = OutputLimits { rate: LogRate::DEFAULT, cmdline: CmdlineLimit::Off };
        let mut out = Outputs::new(None, Some(LogFile::open(&path).unwrap()), envelope, limits).unwrap();
        remediation.start_due_steps(&mut out);
        for _ in 0..count {
            let SocketResponse::LookedUp(number, cookie_result) = response(remediation).await else {
                panic!("destroyed before the look-ups");
            };
            remediation.on_looked_up(number, cookie_result, &mut out);
        }
        while asked.lock().unwrap().len() < asked_count {
            thread::sleep(Duration::from_millis(1));
        }
        remediation.finish(&mut out).await;
        out.flush().unwrap();
        remedied(&path)
    }

    fn remedied(log: &Path) -> Vec<(u64, String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let lines = std::fs::read_to_string(log).unwrap();
        let events = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events
            .map(|event| (event["port"].as_u64().unwrap(), text(&event["result"]), text(&event["why"])))
            .collect()
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    #[test]
    fn a_request_that_waits_when_the_run_ends_is_not_made_and_an_event_says_so() {
        block_on(async {
            let (release, in_look_up) = channel::<()>();
            let pauses = Pauses { in_look_up: Some(in_look_up), in_destroy: None };
            let (mut remediation, asked) = remediation(pauses);
            // The request to destroy the first socket stands behind the second look-up.
            let events = end_while_destroying(&mut remediation, 1, &asked, 0).await;
            let why = "the run ended before its socket was destroyed";
            assert_eq!(events, [(40_001, "failed".to_owned(), why.to_owned())]);
            drop(release);
            assert!(matches!(response(&mut remediation).await, SocketResponse::LookedUp(2, Ok(Some(_)))));
            assert!(matches!(response(&mut remediation).await, SocketResponse::Destroyed(1, _, Err(_))));
            assert_eq!(*asked.lock().unwrap(), [0_u16; 0]);
        });
    }

    #[test]
    fn a_request_without_an_answer_when_the_run_ends_is_reported_as_unknown() {
        block_on(async {
            let (release, in_destroy) = channel::<()>();
            let pauses = Pauses { in_look_up: None, in_destroy: Some(in_destroy) };
            let (mut remediation, asked) = remediation(pauses);
            let events = end_while_destroying(&mut remediation, 2, &asked, 1).await;
            let unknown =
                "the run ended before the kernel answered: whether its socket is destroyed is unknown";
            let left = "the run ended before its socket was destroyed";
            let expected = [(40_001, unknown), (40_002, left)];
            assert_eq!(events, expected.map(|(port, why)| (port, "failed".to_owned(), why.to_owned())));
            drop(release);
            assert!(matches!(response(&mut remediation).await, SocketResponse::Destroyed(1, _, Ok(true))));
            assert!(matches!(response(&mut remediation).await, SocketResponse::Destroyed(2, _, Err(_))));
            assert_eq!(*asked.lock().unwrap(), [40_001]);
        });
    }

    #[test]
    fn a_request_with_an_answer_when_the_run_ends_is_reported_as_destroyed() {
        block_on(async {
            let pauses = Pauses { in_look_up: None, in_destroy: None };
            let (mut remediation, asked) = remediation(pauses);
            let events = end_while_destroying(&mut remediation, 2, &asked, 2).await;
            assert_eq!(events, [40_001, 40_002].map(|port| (port, "destroyed".to_owned(), String::new())));
            assert_eq!(*asked.lock().unwrap(), PORTS);
        });
    }
}

//! The failed binds whose event is being prepared: who holds the port is looked up at that moment, because a
//! descriptor can be inherited, passed and closed. One pass answers for all that wait, and the worker rests four
//! times as long as a pass takes, so that failed binds cannot keep it busy.

use std::{collections::HashSet, io, rc::Rc, sync::Arc, time::Duration};

use jiff::Timestamp;
use selfconn_ebpf::bind_failure::BindFailure;
use tokio::time::Instant;

use crate::{
    bpf::descriptors::DescriptorIter,
    budget::SharedLimit,
    detect::{
        bind_conflict::{self, PortHolder, TimeWaitEntry, rules},
        connection::Connection,
    },
    sockets::{self, CurrentHolders, SocketEntry, SocketRef},
    system::{
        busy::ThreadProblem,
        capabilities,
        process::{Attribution, Holder, ProcessInfo},
        worker::Worker,
    },
};

/// Maximum time that an event waits for the holders. Then it is emitted without them.
const DEADLINE: Duration = Duration::from_secs(1);

/// Maximum number of events that wait for the holders, which the owners of the processes that called bind() share.
const MAX_WAITING: usize = 256;

type HolderWorker = Worker<HashSet<SocketRef>, CurrentHolders>;

/// The self-connection that held the port when the bind failed.
pub(super) enum KnownHolder {
    Open(Box<Connection>, Attribution),
    TimeWait(Box<TimeWaitEntry>),
}

/// What is looked up next.
pub(super) enum Step {
    /// The process that called bind().
    Binder,
    /// The process that holds the socket now.
    Holder,
    /// The process that connected.
    Opener,
}

/// A `blocked` event in preparation.
pub(super) struct PendingBlocked {
    /// The number of the conflict.
    pub(super) conflict: u64,
    pub(super) failure: BindFailure,
    pub(super) holder: KnownHolder,
    pub(super) step: Step,
    pub(super) binder: Option<Rc<ProcessInfo>>,
    /// The processes that have the socket open now. `None`: unknown.
    pub(super) holders: Option<Vec<Holder>>,
    /// The first of them.
    pub(super) holder_process: Option<Rc<ProcessInfo>>,
    pub(super) time: Timestamp,
    /// When it is emitted without the holders.
    deadline: Instant,
}

impl PendingBlocked {
    pub(super) fn new(
        failure: BindFailure,
        holder: &PortHolder<'_>,
        attribution: Attribution,
        time: Timestamp,
    ) -> Self {
        let holder = match *holder {
            PortHolder::Open(connection) => KnownHolder::Open(Box::new(connection.clone()), attribution),
            PortHolder::TimeWait(entry) => KnownHolder::TimeWait(Box::new(entry.clone())),
        };
        // Nobody holds what is in TIME_WAIT.
        let holders = matches!(holder, KnownHolder::TimeWait(_)).then(Vec::new);
        Self {
            conflict: 0,
            failure,
            holder,
            step: Step::Binder,
            binder: None,
            holders,
            holder_process: None,
            time,
            deadline: Instant::now() + DEADLINE,
        }
    }

    /// The socket whose holders have to be looked up.
    fn socket(&self) -> Option<SocketRef> {
        match &self.holder {
            KnownHolder::Open(connection, _) => connection.socket_ref(),
            KnownHolder::TimeWait(_) => None,
        }
    }

    /// Adds what is known of the socket now. False: it does not refuse the bind. Its options were changed since
    /// its last transition.
    fn update(&mut self, now: &CurrentHolders) -> bool {
        let Some(socket) = self.socket() else { return true };
        self.holders = now.of_socket(&socket);
        let refuses = |SocketEntry { endpoint, options, uid, .. }: &SocketEntry| {
            let held = rules::BindParty { endpoint: *endpoint, options: *options, uid: *uid };
            rules::refuses(&held, &bind_conflict::requested_by(&self.failure))
        };
        now.entry(&socket).filter(|entry| entry.options.is_known()).is_none_or(refuses)
    }
}

/// The events that wait for the holders, and the worker that looks for them.
pub(super) struct BlockedReports {
    worker: HolderWorker,
    /// They will be in the next request.
    waiting: Vec<PendingBlocked>,
    /// They are in the request in progress.
    requested: Vec<PendingBlocked>,
    /// How many an owner has in both.
    shares: SharedLimit,
    /// When the request in progress was sent. `None`: there is none.
    requested_at: Option<Instant>,
    next_request_at: Instant,
}

impl BlockedReports {
    pub(super) fn start(descriptors: Option<Arc<DescriptorIter>>) -> io::Result<Self> {
        let capability_set = capabilities::holder_worker(descriptors.is_some());
        let find = move |wanted| sockets::find_current_holders(&wanted, descriptors.as_deref());
        Ok(Self::with(Worker::start("holders", capability_set, find)?))
    }

    fn with(worker: HolderWorker) -> Self {
        Self {
            worker,
            waiting: Vec::new(),
            requested: Vec::new(),
            shares: SharedLimit::new(MAX_WAITING),
            requested_at: None,
            next_request_at: Instant::now(),
        }
    }

    /// Waits until the worker has a response. Cancel safe.
    pub(super) async fn ready(&mut self) {
        self.worker.ready().await;
    }

    /// The name of the worker, and what is wrong with it.
    pub(super) fn worker_problem(&self) -> Option<(&'static str, ThreadProblem)> {
        self.worker.problem()
    }

    /// Looks for the holders of this socket. `Some`: there is nothing to look for, or too much waits.
    pub(super) fn request(&mut self, mut blocked: PendingBlocked) -> Option<PendingBlocked> {
        if blocked.socket().is_none() || !self.shares.try_take(blocked.failure.owner, 1) {
            return Some(blocked);
        }
        blocked.deadline = Instant::now() + DEADLINE;
        self.waiting.push(blocked);
        None
    }

    /// When [`Self::serve`] has something to do.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let deadlines = self.requested.iter().chain(&self.waiting).map(|blocked| blocked.deadline);
        let can_request = self.requested_at.is_none() && !self.waiting.is_empty();
        deadlines.chain(can_request.then_some(self.next_request_at)).min()
    }

    /// Sends a request if one is due, and returns the events whose holders are known, or were looked for too long.
    pub(super) fn serve(&mut self) -> Vec<PendingBlocked> {
        let now = Instant::now();
        let mut known = Vec::new();
        if let Some(current) = self.worker.try_response() {
            let took = self.requested_at.take().map_or(Duration::ZERO, |requested_at| now - requested_at);
            self.next_request_at = now + 4 * took;
            known = self.take(|_, requested| std::mem::take(requested));
            known.retain_mut(|blocked| blocked.update(&current));
        }
        let is_overdue = |blocked: &mut PendingBlocked| blocked.deadline <= now;
        known.extend(self.take(|waiting, requested| {
            requested.extract_if(.., is_overdue).chain(waiting.extract_if(.., is_overdue)).collect()
        }));
        if self.requested_at.is_none() && self.next_request_at <= now && !self.waiting.is_empty() {
            self.requested = std::mem::take(&mut self.waiting);
            self.worker.send(self.requested.iter().filter_map(PendingBlocked::socket).collect());
            self.requested_at = Some(now);
        }
        known
    }

    /// All that wait: the run ends.
    pub(super) fn give_up_all(&mut self) -> Vec<PendingBlocked> {
        self.take(|waiting, requested| requested.drain(..).chain(waiting.drain(..)).collect())
    }

    /// Takes events out of the lists, and gives back the room that they had.
    fn take(
        &mut self,
        of: impl FnOnce(&mut Vec<PendingBlocked>, &mut Vec<PendingBlocked>) -> Vec<PendingBlocked>,
    ) -> Vec<PendingBlocked> {
        let taken = of(&mut self.waiting, &mut self.requested);
        for blocked in &taken {
            self.shares.give_back(blocked.failure.owner, 1);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::samples;

    fn reports(find: impl Fn(HashSet<SocketRef>) -> CurrentHolders + Send + 'static) -> BlockedReports {
        BlockedReports::with(Worker::start("holders", capabilities::holder_worker(true), find).unwrap())
    }

    fn blocked(uid: u32) -> PendingBlocked {
        let endpoint = samples::endpoint("127.0.0.1", 80);
        let connection = Connection { inode: Some(7), ..samples::connection(1, endpoint) };
        let owner = selfconn_ebpf::Owner::new(uid, 0);
        let failure = BindFailure { owner, ..samples::bind_failure(endpoint, 0) };
        let holder = PortHolder::Open(&connection);
        PendingBlocked::new(failure, &holder, Attribution::default(), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn each_event_has_its_own_deadline_also_while_another_request_is_in_progress() {
        let mut reports = reports(|_| {
            std::thread::sleep(4 * DEADLINE);
            CurrentHolders::default()
        });
        for is_requested in [true, false] {
            assert!(reports.request(blocked(1)).is_none());
            assert_eq!(reports.serve().len(), 0);
            assert_eq!(reports.requested.len() == 1 && reports.waiting.is_empty(), is_requested);
        }
        let (wake_at, began) = (reports.next_at().unwrap(), Instant::now());
        assert!(wake_at <= began + DEADLINE, "{:?}", wake_at - began);
        std::thread::sleep(DEADLINE);
        let emitted = reports.serve();
        assert_eq!((emitted.len(), reports.shares.used(), reports.next_at()), (2, 0, None));
        assert!(emitted.iter().all(|blocked| blocked.holders.is_none()), "unknown");
    }

    #[test]
    fn one_owner_leaves_room_for_the_events_of_the_next() {
        let mut reports = reports(|_| CurrentHolders::default());
        let mut waiting = |uid| (0..MAX_WAITING).filter(|_| reports.request(blocked(uid)).is_none()).count();
        assert_eq!([waiting(1), waiting(2)], [MAX_WAITING * 3 / 4, MAX_WAITING * 3 / 16]);
        assert_eq!((reports.give_up_all().len(), reports.shares.used()), (MAX_WAITING * 15 / 16, 0));
    }
}

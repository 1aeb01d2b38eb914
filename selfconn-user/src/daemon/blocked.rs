//! The failed binds whose event is being prepared: who holds the port is looked up at that moment, because a
//! descriptor can be inherited, passed and closed, and the options of a socket changed. One pass answers for all that
//! wait. After it the worker rests as long as it took, and for the owners of these events four times as long, so that
//! failed binds cannot keep it busy, and those of one owner delay those of others by a pass at most.

use std::{
    collections::{HashMap, HashSet},
    io,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use selfconn_ebpf::{BindOptions, Owner, bind_failure::BindFailure};
use tokio::time::Instant;

use crate::{
    bpf::descriptors::DescriptorIter,
    budget::SharedLimit,
    detect::{
        bind_conflict::{self, PortHolder, PossibleHolders, TimeWaitEntry, servers::BindConflict},
        connection::Connection,
    },
    sockets::{self, CurrentHolders, SocketRef},
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

/// Maximum number of self-connections that are looked at for one event beside the recorded holder.
pub(super) const MAX_OTHERS: usize = 8;

/// The same for all events that wait, which their owners share.
const MAX_WAITING_OTHERS: usize = 512;

type HolderWorker = Worker<HashSet<SocketRef>, CurrentHolders>;

/// The self-connection that held the port when the bind failed.
pub(super) enum KnownHolder {
    Open(Box<Connection>, Attribution),
    TimeWait(Box<TimeWaitEntry>),
}

impl KnownHolder {
    pub(super) fn connection(&self) -> &Connection {
        match self {
            Self::Open(connection, _) => connection,
            Self::TimeWait(entry) => &entry.connection,
        }
    }
}

/// How it is known that the self-connection refuses the bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// By what was known of its socket when the bind failed.
    Known,
    /// It is not known: see [`bind_conflict::possible_holders`]. None of the self-connections that were looked at refuses
    /// the bind now, and there are others that may hold the port.
    Missing,
    /// By its socket now. It was not known before.
    Found,
    /// The holder does not refuse the bind. The self-connection with this number does, by its socket now.
    FoundOther(u64),
    /// All self-connections that may hold the port were looked at, and none refuses the bind now.
    Refuted,
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
    pub(super) failure: BindFailure,
    /// True if the failure is recorded as one because of the holder.
    pub(super) is_recorded: bool,
    /// What is reported. `None`: nothing yet, or no report is due.
    pub(super) conflict: Option<BindConflict>,
    pub(super) holder: KnownHolder,
    pub(super) proof: Proof,
    /// The other self-connections that may hold the port: their numbers and sockets.
    others: Vec<(u64, SocketRef)>,
    /// True if not all possible holders are looked at.
    has_more: bool,
    /// The options of the self-connections that were looked at and do not refuse the bind, with the number of each.
    pub(super) options_now: Vec<(u64, BindOptions)>,
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
            failure,
            is_recorded: false,
            conflict: None,
            holder,
            proof: Proof::Known,
            others: Vec::new(),
            has_more: false,
            options_now: Vec::new(),
            step: Step::Binder,
            binder: None,
            holders,
            holder_process: None,
            time,
            deadline: Instant::now() + DEADLINE,
        }
    }

    /// Adds the other self-connections that may hold the port. They are looked at, too: the kernel does not say which of
    /// them refuses the bind, and the record of the holder may be wrong by now.
    pub(super) fn add_others(&mut self, possible: &PossibleHolders<'_>) {
        let holder = self.holder.connection().number;
        let others = possible.connections.iter().filter(|connection| connection.number != holder);
        self.others = others.filter_map(|other| Some((other.number, other.socket_ref()?))).collect();
        self.has_more = !possible.are_all;
        self.limit_others(MAX_OTHERS);
    }

    /// Looks at no more than this number of them.
    fn limit_others(&mut self, max: usize) {
        self.has_more |= self.others.len() > max;
        self.others.truncate(max);
    }

    /// The self-connection that refuses the bind is another one.
    pub(super) fn set_holder(&mut self, holder: KnownHolder) {
        if matches!(holder, KnownHolder::TimeWait(_)) {
            // Nobody holds what is in TIME_WAIT.
            self.holders = Some(Vec::new());
        }
        self.holder = holder;
        (self.is_recorded, self.conflict) = (false, None);
    }

    /// The socket of the holder. `None`: nobody has it open.
    fn socket(&self) -> Option<SocketRef> {
        match &self.holder {
            KnownHolder::Open(connection, _) => connection.socket_ref(),
            KnownHolder::TimeWait(_) => None,
        }
    }

    /// The sockets that are looked at.
    fn sockets(&self) -> impl Iterator<Item = SocketRef> {
        self.socket().into_iter().chain(self.others.iter().map(|(_, socket)| *socket))
    }

    /// Adds what is known of the sockets now. Options may have been changed since the last transition.
    fn update(&mut self, now: &CurrentHolders) {
        let Some(socket) = self.socket() else { return };
        let is_known = self.proof == Proof::Known;
        self.holders = now.of_socket(&socket);
        let refuses = self.look_at(self.holder.connection().number, &socket, now);
        self.proof = match refuses {
            Some(true) if is_known => Proof::Known,
            Some(true) => Proof::Found,
            // No pass sees a descriptor that is in flight through a unix socket.
            None if is_known => match self.look_at_others(false, now) {
                Proof::Missing => Proof::Known,
                proof => proof,
            },
            _ => self.look_at_others(refuses.is_some(), now),
        };
    }

    fn look_at_others(&mut self, is_holder_seen: bool, now: &CurrentHolders) -> Proof {
        let mut are_seen = is_holder_seen && !self.has_more;
        for (number, socket) in std::mem::take(&mut self.others) {
            match self.look_at(number, &socket, now) {
                Some(true) => {
                    self.holders = now.of_socket(&socket);
                    return Proof::FoundOther(number);
                }
                Some(false) => {}
                None => are_seen = false,
            }
        }
        if are_seen { Proof::Refuted } else { Proof::Missing }
    }

    /// True if the kernel refuses the bind because of this socket now. `None`: the socket was not seen.
    fn look_at(&mut self, number: u64, socket: &SocketRef, now: &CurrentHolders) -> Option<bool> {
        let entry = now.entry(socket)?;
        let refuses = bind_conflict::is_refused_by_entry(&self.failure, entry)?;
        if !refuses {
            self.options_now.push((number, entry.options));
        }
        Some(refuses)
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
    /// How many self-connections beside the holders are looked at for an owner.
    shares_of_others: SharedLimit,
    /// When the request in progress was sent. `None`: there is none.
    requested_at: Option<Instant>,
    /// When the next one may be sent, and for whom not yet.
    next_request_at: Instant,
    resting: HashMap<Owner, Instant>,
    /// The owners of the events in the request in progress, also if their deadline has passed.
    in_request: HashSet<Owner>,
    has_iterator: bool,
}

impl BlockedReports {
    pub(super) fn start(descriptors: Option<Arc<DescriptorIter>>) -> io::Result<Self> {
        let has_iterator = descriptors.is_some();
        let capability_set = capabilities::holder_worker(has_iterator);
        let find = move |wanted| sockets::find_current_holders(&wanted, descriptors.as_deref());
        Ok(Self::with(Worker::start("holders", capability_set, find)?, has_iterator))
    }

    fn with(worker: HolderWorker, has_iterator: bool) -> Self {
        Self {
            worker,
            waiting: Vec::new(),
            requested: Vec::new(),
            shares: SharedLimit::new(MAX_WAITING),
            shares_of_others: SharedLimit::new(MAX_WAITING_OTHERS),
            requested_at: None,
            next_request_at: Instant::now(),
            resting: HashMap::new(),
            in_request: HashSet::new(),
            has_iterator,
        }
    }

    /// True if a look shows the options of a socket.
    pub(super) fn can_prove(&self) -> bool {
        self.has_iterator
    }

    /// Waits until the worker has a response. Cancel safe.
    pub(super) async fn ready(&mut self) {
        self.worker.ready().await;
    }

    /// The name of the worker, and what is wrong with it.
    pub(super) fn worker_problem(&self) -> Option<(&'static str, ThreadProblem)> {
        self.worker.problem()
    }

    /// Looks at the sockets, and for the holders. `Some`: there is nothing to look at, or too much waits.
    pub(super) fn request(&mut self, mut blocked: PendingBlocked) -> Option<PendingBlocked> {
        let owner = blocked.failure.owner;
        if blocked.socket().is_none() || !self.shares.try_take(owner, 1) {
            return Some(blocked);
        }
        let counts = (1..=blocked.others.len()).rev();
        let room = counts.into_iter().find(|count| self.shares_of_others.try_take(owner, *count));
        blocked.limit_others(room.unwrap_or(0));
        blocked.deadline = Instant::now() + DEADLINE;
        self.waiting.push(blocked);
        None
    }

    /// When [`Self::serve`] has something to do.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let deadlines = self.requested.iter().chain(&self.waiting).map(|blocked| blocked.deadline);
        let is_idle = self.requested_at.is_none();
        let requests = self.waiting.iter().filter(|_| is_idle).map(|blocked| self.request_at(blocked));
        deadlines.chain(requests).min()
    }

    /// When this event can be in a request.
    fn request_at(&self, blocked: &PendingBlocked) -> Instant {
        let rested_at = self.resting.get(&blocked.failure.owner);
        rested_at.map_or(self.next_request_at, |rested_at| self.next_request_at.max(*rested_at))
    }

    /// Sends a request if one is due, and returns the events whose holders are known, or were looked for too long.
    pub(super) fn serve(&mut self) -> Vec<PendingBlocked> {
        let now = Instant::now();
        let mut known = Vec::new();
        if let Some(current) = self.worker.try_response() {
            let took = self.requested_at.take().map_or(Duration::ZERO, |requested_at| now - requested_at);
            self.next_request_at = now + took;
            self.resting.retain(|_, rested_at| now < *rested_at);
            for owner in std::mem::take(&mut self.in_request) {
                self.resting.insert(owner, now + 4 * took);
            }
            known = self.take(|_, requested| std::mem::take(requested));
            known.iter_mut().for_each(|blocked| blocked.update(&current));
        }
        let is_overdue = |blocked: &mut PendingBlocked| blocked.deadline <= now;
        known.extend(self.take(|waiting, requested| {
            requested.extract_if(.., is_overdue).chain(waiting.extract_if(.., is_overdue)).collect()
        }));
        if self.requested_at.is_none() {
            let can_request: Vec<_> =
                self.waiting.iter().map(|blocked| self.request_at(blocked) <= now).collect();
            if can_request.contains(&true) {
                let mut can_request = can_request.into_iter();
                self.requested = self.waiting.extract_if(.., |_| can_request.next() == Some(true)).collect();
                self.in_request = self.requested.iter().map(|blocked| blocked.failure.owner).collect();
                self.worker.send(self.requested.iter().flat_map(PendingBlocked::sockets).collect());
                self.requested_at = Some(now);
            }
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
            self.shares_of_others.give_back(blocked.failure.owner, blocked.others.len());
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{detect::samples, sockets::SocketEntry};

    fn reports(find: impl Fn(HashSet<SocketRef>) -> CurrentHolders + Send + 'static) -> BlockedReports {
        BlockedReports::with(Worker::start("holders", capabilities::holder_worker(true), find).unwrap(), true)
    }

    fn blocked(uid: u32) -> PendingBlocked {
        let endpoint = samples::endpoint("127.0.0.1", 80);
        let connection = Connection { inode: Some(7), ..samples::connection(1, endpoint) };
        let owner = Owner::new(uid, 0);
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

    /// Serves until an event is known. Returns its owner's uid, and how long that took.
    fn served(reports: &mut BlockedReports) -> (u32, Duration) {
        let began = Instant::now();
        loop {
            if let Some(known) = reports.serve().pop() {
                return (known.failure.owner.uid, began.elapsed());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_worker_rests_longer_for_the_owners_of_its_last_request_than_for_others() {
        const PASS: Duration = Duration::from_millis(100);
        let mut reports = reports(|_| {
            std::thread::sleep(PASS);
            CurrentHolders::default()
        });
        assert!(reports.request(blocked(1)).is_none());
        assert_eq!(served(&mut reports).0, 1);
        for uid in [1, 2] {
            assert!(reports.request(blocked(uid)).is_none());
        }
        let (first, took) = served(&mut reports);
        assert!(first == 2 && took >= 2 * PASS, "{first} {took:?}");
        let (second, took) = served(&mut reports);
        assert!(second == 1 && took >= 2 * PASS, "{second} {took:?}");
    }

    const PLAIN: BindOptions = BindOptions::new(false, false, false);
    const REUSE: BindOptions = BindOptions::new(true, false, false);

    /// The number is the inode, the cookie, and the last byte of the address.
    fn connection(number: u64) -> Connection {
        let endpoint = samples::endpoint(&format!("127.0.0.{number}"), 80);
        Connection { inode: Some(number), cookie: Some(number), ..samples::connection(number, endpoint) }
    }

    /// What a look shows of these connections.
    fn look(options: &[(u64, BindOptions)]) -> CurrentHolders {
        let entries = options.iter().map(|(number, options)| {
            let connection = connection(*number);
            let entry = samples::entry(connection.endpoint, selfconn_ebpf::state::ESTABLISHED);
            SocketEntry { inode: *number, cookie: connection.cookie, options: *options, ..entry }
        });
        CurrentHolders::of_entries(entries)
    }

    /// A server of any address that has SO_REUSEADDR.
    fn blocked_by(holder: u64, others: impl Iterator<Item = u64>) -> PendingBlocked {
        let failure =
            BindFailure { options: REUSE, ..samples::bind_failure(samples::endpoint("0.0.0.0", 80), 0) };
        let holder = connection(holder);
        let holder = PortHolder::Open(&holder);
        let mut blocked =
            PendingBlocked::new(failure, &holder, Attribution::default(), Timestamp::UNIX_EPOCH);
        let others: Vec<_> = others.map(connection).collect();
        blocked.add_others(&bind_conflict::possible_holders(&failure, others.iter(), 1 + MAX_OTHERS));
        blocked
    }

    #[test]
    fn what_a_look_shows_proves_or_refutes_that_the_socket_refuses_the_bind() {
        for (before, now, proof) in [
            (Proof::Known, PLAIN, Proof::Known),
            (Proof::Known, REUSE, Proof::Refuted),
            (Proof::Missing, PLAIN, Proof::Found),
            (Proof::Missing, REUSE, Proof::Refuted),
            (Proof::Known, BindOptions::UNKNOWN, Proof::Known),
            (Proof::Missing, BindOptions::UNKNOWN, Proof::Missing),
        ] {
            let mut blocked = PendingBlocked { proof: before, ..blocked_by(1, std::iter::empty()) };
            blocked.update(&look(&[(1, now)]));
            assert_eq!(blocked.proof, proof, "{before:?} {now:?}");
            let changed = (proof == Proof::Refuted).then_some((1, now));
            assert_eq!(blocked.options_now, changed.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn all_that_may_hold_the_port_are_looked_at() {
        let reuse = |numbers: std::ops::RangeInclusive<u64>| numbers.map(|number| (number, REUSE));
        let many = 2 + MAX_OTHERS as u64;
        for (before, others, now, proof) in [
            (Proof::Known, 3, vec![(1, REUSE), (2, REUSE), (3, PLAIN)], Proof::FoundOther(3)),
            (Proof::Missing, 3, vec![(1, REUSE), (3, PLAIN)], Proof::FoundOther(3)),
            (Proof::Missing, 3, vec![(3, PLAIN)], Proof::FoundOther(3)),
            // The holder was not seen, because its descriptor is in flight.
            (Proof::Known, 3, vec![(2, REUSE), (3, PLAIN)], Proof::FoundOther(3)),
            (Proof::Known, 3, vec![(2, REUSE), (3, REUSE)], Proof::Known),
            (Proof::Known, 3, vec![], Proof::Known),
            (Proof::Missing, 3, vec![(2, REUSE), (3, REUSE)], Proof::Missing),
            // Another one was not.
            (Proof::Known, 3, vec![(1, REUSE), (3, REUSE)], Proof::Missing),
            (Proof::Known, 3, reuse(1..=3).collect(), Proof::Refuted),
            (Proof::Missing, many - 1, reuse(1..=many).collect(), Proof::Refuted),
            (Proof::Missing, many, reuse(1..=many).collect(), Proof::Missing),
        ] {
            // The holder may be among them.
            let mut blocked = PendingBlocked { proof: before, ..blocked_by(1, 1..=others) };
            assert_eq!(blocked.sockets().count(), (others as usize).min(1 + MAX_OTHERS));
            blocked.update(&look(&now));
            assert_eq!(blocked.proof, proof, "{before:?} {others} {now:?}");
        }
    }

    #[test]
    fn as_many_others_are_looked_at_as_there_is_room_for() {
        let mut reports = reports(|_| CurrentHolders::default());
        let all = 1 + MAX_OTHERS as u64;
        let share = MAX_WAITING_OTHERS * 3 / 4;
        assert!(share.is_multiple_of(MAX_OTHERS));
        // One of three others leaves room for five of the last.
        assert!(reports.request(blocked_by(1, 2..=4)).is_none());
        for waiting in 1..=share / MAX_OTHERS {
            assert!(reports.request(blocked_by(1, 1..=all)).is_none());
            assert_eq!(reports.shares_of_others.used(), (3 + waiting * MAX_OTHERS).min(share));
        }
        let last = reports.waiting.last().unwrap();
        assert_eq!((last.others.len(), last.has_more), (5, true));
        assert!(reports.request(blocked_by(1, 1..=all)).is_none());
        let last = reports.waiting.last().unwrap();
        assert_eq!((last.others.len(), last.has_more), (0, true));
        let waiting = reports.waiting.len();
        assert_eq!((reports.give_up_all().len(), reports.shares.used()), (waiting, 0));
        assert_eq!(reports.shares_of_others.used(), 0);
    }

    #[test]
    fn one_owner_leaves_room_for_the_events_of_the_next() {
        let mut reports = reports(|_| CurrentHolders::default());
        let mut waiting = |uid| (0..MAX_WAITING).filter(|_| reports.request(blocked(uid)).is_none()).count();
        assert_eq!([waiting(1), waiting(2)], [MAX_WAITING * 3 / 4, MAX_WAITING * 3 / 16]);
        assert_eq!((reports.give_up_all().len(), reports.shares.used()), (MAX_WAITING * 15 / 16, 0));
    }
}

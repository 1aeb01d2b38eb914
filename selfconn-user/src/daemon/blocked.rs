//! The failed binds whose event is being prepared: who holds the port is looked up at that moment, because a
//! descriptor can be inherited, passed and closed, and the options of a socket changed. One pass answers for all that
//! wait. After it the worker rests as long as it took, and for the owners of these events four times as long, so that
//! failed binds cannot keep it busy, and those of one owner delay those of others by a pass at most.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
    time::Duration,
};

use selfconn_ebpf::Owner;
use tokio::time::Instant;

use super::blocked_event::{DEADLINE, PendingBlocked};
use crate::{
    bpf::descriptors::DescriptorIter,
    budget::SharedLimit,
    sockets::{self, CurrentHolders, SocketRef},
    system::{busy::ThreadProblem, capabilities, worker::Worker},
};

/// Maximum number of events that wait for the holders, which the owners of the processes that called bind() share.
const MAX_WAITING: usize = 256;

/// Maximum number of self-connections that are looked at beside the recorded holders, for all events that wait. Their
/// owners share it.
const MAX_WAITING_OTHERS: usize = 512;

type HolderWorker = Worker<HashSet<SocketRef>, CurrentHolders>;

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
        let mut counts = (1..=blocked.others.len()).rev();
        let room = counts.find(|count| self.shares_of_others.try_take(owner, *count));
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
    use jiff::Timestamp;
    use selfconn_ebpf::bind_failure::BindFailure;

    use super::*;
    use crate::{
        daemon::blocked_event::{MAX_OTHERS, tests::blocked_by},
        detect::{bind_conflict::PortHolder, connection::Connection, samples},
        system::process::Attribution,
    };

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

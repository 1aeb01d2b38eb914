//! The threads that read everything of a process but its arguments. A process can make one hang: a read of
//! `/proc/PID/stat` holds the memory of the process (`get_task_mm`, `do_task_stat` in fs/proc/array.c), and if the
//! process ends in that moment, the thread takes that memory down (`mmput`, `exit_mmap`). A shared mapping of a FUSE
//! file with pages that were written to then waits for the file's server (`fuse_vma_close`, fs/fuse/file.c; all at
//! v6.12), which every user can be in a user namespace. So a thread that hangs is left alone.

use std::{
    io,
    task::{Context, Poll},
    time::Duration,
};

use super::{
    DEADLINE, LookupTarget,
    cmdline_readers::SLOW_READ,
    reader_pool::{Busy, MAX_STUCK, ReadRequest, ReaderPool},
};
use crate::system::{
    busy::{MAX_BUSY, ThreadProblem},
    process::{self, ProcessFacts, ProcessProof},
};

/// The names of the threads.
const NAMES: [&str; MAX_STUCK] = ["facts-1", "facts-2", "facts-3", "facts-4"];

/// How all of them together are reported.
const NAME: &str = "facts";

/// Maximum number of requests that a thread has. Some, so that it need not wait for the loop after each.
const MAX_SENT: usize = 4;

/// A read that takes longer hangs. One that only has to wait on a busy host takes less.
const STUCK_AFTER: Duration = DEADLINE.saturating_add(SLOW_READ);

pub(super) type FactsRequest = ReadRequest<LookupTarget>;

pub(super) struct FactsReaders {
    pool: ReaderPool<LookupTarget, Option<ProcessFacts>>,
    stuck_after: Duration,
    abandoned: u64,
}

impl FactsReaders {
    pub(super) fn start() -> io::Result<Self> {
        let is_initial_time_ns = process::is_in_initial_time_ns();
        let read = move |target: LookupTarget| {
            let proof = match target {
                LookupTarget::Observed(observed, _) => ProcessProof::Observed(observed),
                LookupTarget::Holder { start_ticks, .. } => ProcessProof::Started(start_ticks),
            };
            process::read_facts(target.pid(), &proof, is_initial_time_ns)
        };
        Self::start_with(STUCK_AFTER, read)
    }

    pub(super) fn start_with(
        stuck_after: Duration,
        read: impl Fn(LookupTarget) -> Option<ProcessFacts> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let pool = ReaderPool::start(NAMES, MAX_SENT, read)?;
        Ok(Self { pool, stuck_after, abandoned: 0 })
    }

    /// Number of times that a thread was left alone.
    pub(super) fn abandoned(&self) -> u64 {
        self.abandoned
    }

    /// The response is in [`Self::next_response`] later, unless it is forgotten or given up before.
    pub(super) fn request(&mut self, request: FactsRequest) -> Result<(), Busy> {
        self.pool.request(request)
    }

    /// Gives waiting requests to idle threads.
    pub(super) fn dispatch(&mut self) {
        self.pool.dispatch();
    }

    /// The result of this look-up is of no use any more. A thread may have it already.
    pub(super) fn forget(&mut self, id: u64) {
        self.pool.forget(id);
    }

    /// Leaves threads alone whose read hangs. Returns the look-ups that have no result because of that.
    pub(super) fn give_up_hung(&mut self) -> Vec<u64> {
        let stuck_after = self.stuck_after;
        let stuck = self.pool.mark_stuck(|_, took| took >= stuck_after);
        if stuck.is_empty() {
            return Vec::new();
        }
        for request in stuck.iter().filter_map(|requests| requests.first()) {
            log::warn!("reading process {} hangs; it is reported as unknown", request.key.pid());
        }
        self.abandoned += stuck.len() as u64;
        let mut without_result = self.pool.take_refused();
        without_result.extend(stuck.iter().flatten().map(|request| request.id));
        without_result
    }

    /// Waits until a response is there.
    pub(super) fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.pool.poll_ready(context)
    }

    /// The next response that is there: the number of the look-up, and what was read. The caller calls
    /// [`Self::dispatch`] after the last one.
    pub(super) fn next_response(&mut self) -> Option<(u64, Option<ProcessFacts>)> {
        self.pool.next_response().map(|(request, facts, _)| (request.id, facts))
    }

    /// What is wrong with the threads. One that hangs is left alone, and no problem; all of them are.
    pub(super) fn problems(&self) -> impl Iterator<Item = (&'static str, ThreadProblem)> {
        let all_hang = self.all_stuck_for(MAX_BUSY).map(|time| (NAME, ThreadProblem::Busy(time)));
        self.pool.ended().chain(all_hang)
    }

    /// True if the read of this look-up waits for a thread.
    #[cfg(test)]
    pub(super) fn waits(&self, id: u64) -> bool {
        self.pool.waits(id)
    }

    fn all_stuck_for(&self, limit: Duration) -> Option<Duration> {
        self.pool.all_stuck().filter(|time| *time >= limit)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        future::poll_fn,
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        },
        thread,
        time::Instant,
    };

    use selfconn_ebpf::Owner;
    use tokio::{runtime, time::timeout};

    use super::*;

    const VICTIM: Owner = Owner::new(5, 5);

    /// Readers whose threads return nothing while the pid is not below the number. Then they return a name.
    struct Gate(Arc<AtomicU64>);

    impl Gate {
        fn start(stuck_after: Duration) -> (Self, FactsReaders) {
            let open_below = Arc::new(AtomicU64::new(0));
            let below = Arc::clone(&open_below);
            let read = move |target: LookupTarget| {
                while u64::from(target.pid()) >= below.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(1));
                }
                Some(ProcessFacts::default())
            };
            (Self(open_below), FactsReaders::start_with(stuck_after, read).unwrap())
        }

        /// Processes with a lower pid do not hang any more.
        fn open_below(&self, pid: u64) {
            self.0.store(pid, Ordering::Relaxed);
        }
    }

    fn request(readers: &mut FactsReaders, id: u64, owner: Owner) -> Result<(), Busy> {
        let key = LookupTarget::Holder { pid: u32::try_from(id).unwrap(), start_ticks: 1, owner };
        readers.request(FactsRequest { id, key, owner })
    }

    async fn answered(readers: &mut FactsReaders) -> u64 {
        let ready = poll_fn(|context| readers.poll_ready(context));
        timeout(Duration::from_secs(10), ready).await.unwrap();
        let (id, facts) = readers.next_response().unwrap();
        assert!(facts.is_some());
        readers.dispatch();
        id
    }

    fn run(test: impl AsyncFnOnce()) {
        runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(test());
    }

    /// Waits until this number of threads hangs, and returns the look-ups without a result.
    fn give_up(readers: &mut FactsReaders, abandoned: u64) -> Vec<u64> {
        let until = Instant::now() + Duration::from_secs(10);
        let mut without_result = Vec::new();
        while readers.abandoned() < abandoned {
            assert!(Instant::now() < until, "{} of {abandoned}", readers.abandoned());
            without_result.extend(readers.give_up_hung());
            thread::sleep(Duration::from_millis(1));
        }
        without_result.sort_unstable();
        without_result
    }

    #[test]
    fn an_owner_waits_for_few_requests_of_one_that_has_many() {
        const COUNT: u64 = 20;
        let one_user = |_: u64| Owner::new(1_000, 7);
        let sessions_of_a_user = |id: u64| Owner::new(1_000, 100 + id);
        let users_of_a_container = |id: u64| Owner::new(200_000 + id as u32, 7);
        for (flood, threads) in
            [(one_user as fn(u64) -> Owner, 1), (sessions_of_a_user, 3), (users_of_a_container, 2)]
        {
            run(async || {
                let (gate, mut readers) = Gate::start(STUCK_AFTER);
                for id in 1..=COUNT {
                    assert_eq!(request(&mut readers, id, flood(id)), Ok(()));
                }
                assert_eq!(readers.pool.busy_threads(), threads);
                // It has a thread at once.
                assert_eq!(request(&mut readers, COUNT + 1, VICTIM), Ok(()));
                assert_eq!(readers.pool.busy_threads(), threads + 1);
                gate.open_below(COUNT + 2);
                let mut ids = HashSet::new();
                for _ in 0..=COUNT {
                    ids.insert(answered(&mut readers).await);
                }
                assert_eq!(ids, (1..=COUNT + 1).collect());
                assert_eq!(readers.next_response(), None);
            });
        }
    }

    #[test]
    fn an_owner_without_a_thread_waits_for_few_requests_of_others_that_have_many() {
        const COUNT: u64 = 80;
        run(async || {
            let (gate, mut readers) = Gate::start(STUCK_AFTER);
            for id in 1..=COUNT {
                let number = id % MAX_STUCK as u64;
                let owner = Owner::new(1_000 + number as u32, 100 + number);
                assert_eq!(request(&mut readers, id, owner), Ok(()));
            }
            assert_eq!(request(&mut readers, COUNT + 1, VICTIM), Ok(()));
            assert!(readers.waits(COUNT + 1), "all threads have requests");
            gate.open_below(COUNT + 2);
            let mut before = 0;
            while readers.waits(COUNT + 1) {
                answered(&mut readers).await;
                before += 1;
            }
            // The requests that the threads have, and then one of each owner whose requests waited longer.
            assert!(before <= MAX_STUCK * (MAX_SENT + 1), "{before}");
        });
    }

    #[test]
    fn a_thread_has_no_more_than_some_requests_and_a_forgotten_one_is_not_sent() {
        run(async || {
            let (gate, mut readers) = Gate::start(STUCK_AFTER);
            for id in 1..=20 {
                assert_eq!(request(&mut readers, id, VICTIM), Ok(()));
            }
            readers.forget(20);
            // The thread has it already.
            readers.forget(MAX_SENT as u64);
            gate.open_below(100);
            for id in 1..20 {
                assert_eq!(answered(&mut readers).await, id);
            }
            assert_eq!(readers.next_response(), None);
        });
    }

    #[test]
    fn a_process_that_hangs_takes_nothing_from_other_owners_and_four_of_them_are_reported() {
        const HANGS: u64 = 1_000;
        run(async || {
            let (gate, mut readers) = Gate::start(Duration::from_millis(300));
            gate.open_below(HANGS);
            let hostile = Owner::new(1_000, 7);
            assert_eq!(request(&mut readers, HANGS, hostile), Ok(()));
            // These would wait behind it.
            for id in 1..=10 {
                assert_eq!(request(&mut readers, id, hostile), Ok(()));
            }
            let began = Instant::now();
            assert_eq!(request(&mut readers, 20, VICTIM), Ok(()));
            assert_eq!(answered(&mut readers).await, 20);
            println!("another owner waited for {:?}", began.elapsed());
            let expected: Vec<_> = (1..=10).chain([HANGS]).collect();
            assert_eq!(give_up(&mut readers, 1), expected, "the look-ups of the owner end");
            assert!(readers.pool.is_stuck_for(hostile) && !readers.pool.is_stuck_for(VICTIM));
            assert_eq!(request(&mut readers, 11, hostile), Err(Busy), "none of its processes is read");
            // A service with the same uid.
            assert_eq!(request(&mut readers, 12, Owner::new(1_000, 8)), Ok(()));
            assert_eq!(answered(&mut readers).await, 12);
            for number in 1..MAX_STUCK as u64 {
                assert_eq!(readers.all_stuck_for(Duration::ZERO), None);
                assert_eq!(
                    request(&mut readers, HANGS + number, Owner::new(2_000 + number as u32, 0)),
                    Ok(())
                );
                assert_eq!(give_up(&mut readers, 1 + number), [HANGS + number]);
            }
            assert!(readers.pool.is_stuck_for(VICTIM), "no thread is left");
            assert_eq!(request(&mut readers, 21, VICTIM), Err(Busy));
            assert!(readers.all_stuck_for(Duration::ZERO).is_some());
            assert_eq!(readers.problems().count(), 0, "not for long yet");
            // The processes let the threads go on.
            gate.open_below(u64::MAX);
            let mut late = HashSet::new();
            while readers.pool.busy_threads() > 0 {
                late.insert(answered(&mut readers).await);
            }
            assert!((HANGS..HANGS + MAX_STUCK as u64).all(|id| late.contains(&id)), "{late:?}");
            assert_eq!(readers.all_stuck_for(Duration::ZERO), None);
            assert_eq!(request(&mut readers, 13, hostile), Ok(()));
            assert_eq!(answered(&mut readers).await, 13);
        });
    }
}

//! Threads that read something of a process, which may take for ever. A thread whose read does not return in time is
//! left alone: it gets no other request until its read returns, and the others do its work. So that nobody takes all of
//! them, one user has at most one thread at a time in a control group, and one in another only while two are free; the
//! users of a control group have two. Owners take turns.

use std::{
    collections::VecDeque,
    io,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use selfconn_ebpf::Owner;

use crate::{
    budget::{FairQueue, is_share_taken},
    system::{busy::ThreadProblem, capabilities, worker::Worker},
};

/// Number of threads of a pool, which is the maximum number of reads that can be stuck at the same time. All are
/// started with the daemon, because a thread that the loop starts later would have only the loop's capabilities.
pub const MAX_STUCK: usize = 4;

/// A read for a look-up. `K` says what to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadRequest<K> {
    /// Number of the look-up.
    pub(super) id: u64,
    pub(super) key: K,
    pub(super) owner: Owner,
}

/// As many reads as the owner may have are stuck, or all threads are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Busy;

struct Reader<K, T> {
    worker: Worker<K, T>,
    /// The requests that the thread has, all of one owner. It reads for the first one.
    sent: VecDeque<ReadRequest<K>>,
    /// When it began with the first one.
    began: Instant,
    is_stuck: bool,
}

impl<K, T> Reader<K, T> {
    fn owner(&self) -> Option<Owner> {
        self.sent.front().map(|request| request.owner)
    }
}

pub(super) struct ReaderPool<K, T> {
    readers: Vec<Reader<K, T>>,
    /// Maximum number of requests that a thread has.
    max_sent: usize,
    waiting: FairQueue<ReadRequest<K>>,
}

impl<K: Copy + Send + 'static, T: Send + 'static> ReaderPool<K, T> {
    /// Starts threads with these names. Each has at most `max_sent` requests: with more than one it need not wait for
    /// the loop after each, and the others have no result if it gets stuck.
    pub(super) fn start(
        names: [&'static str; MAX_STUCK],
        max_sent: usize,
        read: impl Fn(K) -> T + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let read = Arc::new(read);
        let reader = |name| -> io::Result<Reader<K, T>> {
            let read = Arc::clone(&read);
            let worker = Worker::start(name, capabilities::LOOKUP_WORKER, move |key| read(key))?;
            Ok(Reader { worker, sent: VecDeque::new(), began: Instant::now(), is_stuck: false })
        };
        let readers = names.into_iter().map(reader).collect::<io::Result<_>>()?;
        Ok(Self { readers, max_sent, waiting: FairQueue::default() })
    }

    /// Queues a read. The response is in [`Self::next_response`] later, unless it is forgotten or refused before.
    pub(super) fn request(&mut self, request: ReadRequest<K>) -> Result<(), Busy> {
        if self.is_stuck_for(request.owner) {
            return Err(Busy);
        }
        self.waiting.push(request.owner, request);
        self.dispatch();
        Ok(())
    }

    /// True if this owner has as many threads as it may have, of those for which `counts` is true.
    fn is_share_taken(&self, owner: Owner, counts: impl Fn(&Reader<K, T>) -> bool) -> bool {
        let owners: Vec<_> =
            self.readers.iter().filter(|reader| counts(reader)).filter_map(Reader::owner).collect();
        is_share_taken(owners.iter(), owner, self.readers.len() - owners.len())
    }

    /// True if no thread will read for this owner before a stuck one returns.
    pub(super) fn is_stuck_for(&self, owner: Owner) -> bool {
        let is_stuck = |reader: &Reader<K, T>| reader.is_stuck;
        self.readers.iter().all(is_stuck) || self.is_share_taken(owner, is_stuck)
    }

    /// Gives waiting requests to threads.
    pub(super) fn dispatch(&mut self) {
        while let Some((reader, request)) = self.next_request() {
            let reader = &mut self.readers[reader];
            if reader.sent.is_empty() {
                reader.began = Instant::now();
            }
            reader.worker.send(request.key);
            reader.sent.push_back(request);
        }
    }

    /// A request, and the thread that gets it: an idle one; or the one that reads for the same owner, if nobody waits
    /// for an idle one.
    fn next_request(&mut self) -> Option<(usize, ReadRequest<K>)> {
        let Self { readers, max_sent, waiting } = self;
        let can_read = |reader: &Reader<K, T>| !reader.is_stuck && !reader.worker.has_ended();
        let owners: Vec<_> = readers.iter().filter_map(Reader::owner).collect();
        let free = readers.len() - owners.len();
        let may_read = |owner| !is_share_taken(owners.iter(), owner, free);
        match readers.iter().position(|reader| can_read(reader) && reader.sent.is_empty()) {
            Some(idle) => {
                if let Some((_, request)) = waiting.pop_among(may_read) {
                    return Some((idle, request));
                }
            }
            None if waiting.owners().any(may_read) => return None,
            None => {}
        }
        readers.iter().enumerate().find_map(|(index, reader)| {
            let owner = reader.owner().filter(|_| can_read(reader) && reader.sent.len() < *max_sent)?;
            let (_, request) = waiting.pop_among(|other| other == owner)?;
            Some((index, request))
        })
    }

    /// The result of this look-up is of no use any more. A read that is in progress returns by itself.
    pub(super) fn forget(&mut self, id: u64) {
        self.waiting.retain(|request| request.id != id);
    }

    /// Leaves the threads alone that have been busy with a request for so long that `is_stuck` is true. Returns the
    /// requests that each of them has; it hangs at the first one. It reads the others for nobody, if it goes on.
    pub(super) fn mark_stuck(
        &mut self,
        is_stuck: impl Fn(&ReadRequest<K>, Duration) -> bool,
    ) -> Vec<Vec<ReadRequest<K>>> {
        let mut stuck = Vec::new();
        for reader in self.readers.iter_mut().filter(|reader| !reader.is_stuck) {
            let took = reader.began.elapsed();
            if reader.sent.front().is_some_and(|request| is_stuck(request, took)) {
                reader.is_stuck = true;
                stuck.push(reader.sent.iter().copied().collect());
            }
        }
        stuck
    }

    /// Takes out the waiting requests that are refused because of threads that are stuck. Returns their look-ups.
    pub(super) fn take_refused(&mut self) -> Vec<u64> {
        let waiting = self.waiting.iter().filter(|request| self.is_stuck_for(request.owner));
        let mut refused: Vec<_> = waiting.map(|request| request.id).collect();
        self.waiting.retain(|request| !refused.contains(&request.id));
        refused.sort_unstable();
        refused
    }

    /// Waits until a thread has a response.
    pub(super) fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut is_ready = Poll::Pending;
        for reader in self.readers.iter_mut().filter(|reader| !reader.sent.is_empty()) {
            if reader.worker.poll_ready(context).is_ready() {
                is_ready = Poll::Ready(());
            }
        }
        is_ready
    }

    /// The next response that is there, and how long its read took. The caller calls [`Self::dispatch`] after the last
    /// one, and not after each, so that it comes to an end.
    pub(super) fn next_response(&mut self) -> Option<(ReadRequest<K>, T, Duration)> {
        self.readers.iter_mut().find_map(|reader| {
            let response = reader.worker.try_response()?;
            let (request, took) = (reader.sent.pop_front()?, reader.began.elapsed());
            reader.began = Instant::now();
            reader.is_stuck &= !reader.sent.is_empty();
            Some((request, response, took))
        })
    }

    /// Number of threads that have a request.
    #[cfg(test)]
    pub(super) fn busy_threads(&self) -> usize {
        self.readers.iter().filter(|reader| !reader.sent.is_empty()).count()
    }

    /// True if the read of this look-up waits for a thread.
    #[cfg(test)]
    pub(super) fn waits(&self, id: u64) -> bool {
        self.waiting.iter().any(|request| request.id == id)
    }

    /// The threads that a panic has ended.
    pub(super) fn ended(&self) -> impl Iterator<Item = (&'static str, ThreadProblem)> {
        let problems = self.readers.iter().filter_map(|reader| reader.worker.problem());
        problems.filter(|(_, problem)| *problem == ThreadProblem::Ended)
    }

    /// If all threads are stuck, since when at the latest.
    pub(super) fn all_stuck(&self) -> Option<Duration> {
        let stuck = self.readers.iter().map(|reader| reader.is_stuck.then(|| reader.began.elapsed()));
        stuck.collect::<Option<Vec<_>>>()?.into_iter().min()
    }
}

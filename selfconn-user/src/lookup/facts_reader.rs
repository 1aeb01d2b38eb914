//! The thread that reads everything of a process but its arguments. No process can make it hang, but one owner can
//! cause many requests. So the thread has few at a time, and one of each user. The others wait here, where owners take
//! turns, and where a look-up that has ended leaves no work behind.

use std::{
    collections::VecDeque,
    io,
    task::{Context, Poll},
};

use selfconn_ebpf::Owner;

use super::LookupTarget;
use crate::{
    budget::{FairQueue, is_share_taken},
    system::{
        busy::ThreadProblem,
        capabilities,
        process::{self, ProcessFacts, ProcessProof},
        worker::Worker,
    },
};

/// Maximum number of requests that the thread has.
const MAX_SENT: usize = 8;

/// While the thread has less than this, an owner may have more than its share, if nobody waits who has less. Some, so
/// that the thread need not wait for the loop after each. What comes next of another owner waits for these.
const MIN_SENT: usize = 4;

pub(super) struct FactsRequest {
    pub(super) id: u64,
    pub(super) target: LookupTarget,
}

pub(super) struct FactsReader {
    worker: Worker<FactsRequest, (u64, Option<ProcessFacts>)>,
    waiting: FairQueue<FactsRequest>,
    /// The owners of the requests that the thread has, in their order.
    sent: VecDeque<Owner>,
}

impl FactsReader {
    pub(super) fn start() -> io::Result<Self> {
        let is_initial_time_ns = process::is_in_initial_time_ns();
        let read = move |FactsRequest { id, target }| {
            let proof = match target {
                LookupTarget::Observed(observed, _) => ProcessProof::Observed(observed),
                LookupTarget::Holder { start_ticks, .. } => ProcessProof::Started(start_ticks),
            };
            (id, process::read_facts(target.pid(), &proof, is_initial_time_ns))
        };
        Self::start_with(read)
    }

    pub(super) fn start_with(
        read: impl Fn(FactsRequest) -> (u64, Option<ProcessFacts>) + Send + 'static,
    ) -> io::Result<Self> {
        let worker = Worker::start("facts", capabilities::LOOKUP_WORKER, read)?;
        Ok(Self { worker, waiting: FairQueue::default(), sent: VecDeque::new() })
    }

    /// The response is in [`Self::next_response`] later, unless it is forgotten before.
    pub(super) fn request(&mut self, owner: Owner, request: FactsRequest) {
        self.waiting.push(owner, request);
        self.dispatch();
    }

    /// Gives waiting requests to the thread.
    pub(super) fn dispatch(&mut self) {
        while let Some((owner, request)) = self.next_request() {
            self.worker.send(request);
            self.sent.push_back(owner);
        }
    }

    /// That of an owner whose share the thread does not have yet, if there is one.
    fn next_request(&mut self) -> Option<(Owner, FactsRequest)> {
        let Self { waiting, sent, .. } = self;
        if sent.len() >= MAX_SENT {
            return None;
        }
        let within_share = waiting.pop_among(|owner| !is_share_taken(sent.iter(), owner, 0));
        within_share.or_else(|| if sent.len() < MIN_SENT { waiting.pop() } else { None })
    }

    /// The result of this look-up is of no use any more. The thread may have it already.
    pub(super) fn forget(&mut self, id: u64) {
        self.waiting.retain(|request| request.id != id);
    }

    /// Waits until a response is there.
    pub(super) fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.worker.poll_ready(context)
    }

    /// The next response that is there: the number of the look-up, and what was read. The caller calls
    /// [`Self::dispatch`] after the last one, and not after each, so that it comes to an end.
    pub(super) fn next_response(&mut self) -> Option<(u64, Option<ProcessFacts>)> {
        let response = self.worker.try_response()?;
        self.sent.pop_front();
        Some(response)
    }

    /// The name of the thread, and what is wrong with it.
    pub(super) fn problem(&self) -> Option<(&'static str, ThreadProblem)> {
        self.worker.problem()
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, future::poll_fn, sync::mpsc, time::Duration};

    use tokio::{runtime, time::timeout};

    use super::*;

    /// A reader whose thread answers a request for each permit.
    fn start() -> (mpsc::Sender<()>, FactsReader) {
        let (permit, permits) = mpsc::channel();
        let read = move |FactsRequest { id, .. }| {
            let _ = permits.recv();
            (id, None)
        };
        (permit, FactsReader::start_with(read).unwrap())
    }

    fn request(reader: &mut FactsReader, id: u64, owner: Owner) {
        let target = LookupTarget::Holder { pid: 1, start_ticks: 1, owner };
        reader.request(owner, FactsRequest { id, target });
    }

    /// The requests in the order in which they are answered.
    fn answered(permit: &mpsc::Sender<()>, reader: &mut FactsReader) -> Vec<u64> {
        let runtime = runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut ids = Vec::new();
        runtime.block_on(async {
            while !reader.sent.is_empty() {
                permit.send(()).unwrap();
                let ready = poll_fn(|context| reader.poll_ready(context));
                timeout(Duration::from_secs(10), ready).await.unwrap();
                ids.push(reader.next_response().unwrap().0);
                reader.dispatch();
            }
        });
        ids
    }

    #[test]
    fn an_owner_waits_for_few_requests_of_one_that_has_many() {
        const COUNT: u64 = 20;
        let one_user = |_: u64| Owner::new(1_000, 7);
        let sessions_of_a_user = |id: u64| Owner::new(1_000, 100 + id);
        let users_of_a_container = |id: u64| Owner::new(200_000 + id as u32, 7);
        for flood in [one_user, sessions_of_a_user, users_of_a_container] {
            let (permit, mut reader) = start();
            for id in 0..COUNT {
                request(&mut reader, id, flood(id));
            }
            assert_eq!(reader.sent.len(), MIN_SENT, "the thread need not wait for the loop");
            request(&mut reader, COUNT, Owner::new(5, 5));
            request(&mut reader, COUNT + 1, Owner::new(5, 5));
            let ids = answered(&permit, &mut reader);
            let at = |id| ids.iter().position(|other| *other == id).unwrap();
            assert_eq!(at(COUNT), MIN_SENT, "{ids:?}");
            assert!(at(COUNT + 1) <= 2 * MIN_SENT, "{ids:?}");
            let all: HashSet<_> = ids.iter().copied().collect();
            assert_eq!((all.len(), ids.len() as u64), (ids.len(), COUNT + 2), "{ids:?}");
        }
    }

    #[test]
    fn the_thread_has_no_more_than_some_requests_and_a_forgotten_one_is_not_sent() {
        let (permit, mut reader) = start();
        for id in 0..20 {
            request(&mut reader, id, Owner::new(1_000 + id as u32, 100 + id));
        }
        assert_eq!(reader.sent.len(), MAX_SENT);
        reader.forget(19);
        assert_eq!(answered(&permit, &mut reader), (0..19).collect::<Vec<_>>());
    }
}

//! The thread that reads everything of a process but its arguments. No process can make it hang, but one owner can cause
//! many requests. So the thread has few at a time. The others wait here, where owners take turns, and where a look-up that
//! has ended leaves no work behind.

use std::{
    io,
    task::{Context, Poll},
};

use selfconn_ebpf::Owner;

use super::LookupTarget;
use crate::{
    budget::FairQueue,
    system::{
        capabilities,
        process::{self, ProcessFacts, ProcessProof},
        worker::Worker,
    },
};

/// Maximum number of requests that the thread has. Some, so that it need not wait for the loop after each.
const MAX_SENT: usize = 8;

pub(super) struct FactsRequest {
    pub(super) id: u64,
    pub(super) target: LookupTarget,
}

pub(super) struct FactsReader {
    worker: Worker<FactsRequest, (u64, Option<ProcessFacts>)>,
    waiting: FairQueue<FactsRequest>,
    /// Number of requests that the thread has.
    sent: usize,
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
        let worker = Worker::start("facts", capabilities::LOOKUP_WORKER, read)?;
        Ok(Self { worker, waiting: FairQueue::default(), sent: 0 })
    }

    /// The response is in [`Self::next_response`] later, unless it is forgotten before.
    pub(super) fn request(&mut self, owner: Owner, request: FactsRequest) {
        self.waiting.push(owner, request);
        self.dispatch();
    }

    /// Gives waiting requests to the thread.
    pub(super) fn dispatch(&mut self) {
        while self.sent < MAX_SENT
            && let Some((_, request)) = self.waiting.pop()
        {
            self.worker.send(request);
            self.sent += 1;
        }
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
        self.sent -= 1;
        Some(response)
    }

    /// The name of the thread if a panic has ended it.
    pub(super) fn ended(&self) -> Option<&'static str> {
        self.worker.ended()
    }
}

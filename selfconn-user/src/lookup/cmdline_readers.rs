//! The threads that read `/proc/PID/cmdline`. A thread whose read does not return in time is abandoned: it
//! reads nothing else until its read returns. The others do its work. So that nobody takes all of them, one
//! user has at most one read at a time in a control group, and one in another only while two readers are free; the users
//! of a control group have two, and a process that hung is not read again.

use std::{
    collections::VecDeque,
    io,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use selfconn_ebpf::Owner;

use crate::{
    budget::{cmdline::CmdlineLimit, is_share_taken},
    system::{
        busy::ThreadProblem, capabilities, command_line::CommandLine, process::ProcessKey, worker::Worker,
    },
};

/// Number of readers, which is the maximum number of reads that can be stuck at the same time. All are started
/// with the daemon, because a thread that the loop starts later would have only the loop's capabilities.
pub const MAX_STUCK: usize = 4;

/// Maximum number of processes that hung and are remembered.
const MAX_HUNG: usize = 1_024;

/// A read that returns within this time was slow: the host is busy. The process did not hang.
const SLOW_READ: Duration = Duration::from_secs(1);

/// The names of the threads.
const NAMES: [&str; MAX_STUCK] = ["cmdline-1", "cmdline-2", "cmdline-3", "cmdline-4"];

#[derive(Clone, Copy, Debug)]
pub(super) struct CmdlineRequest {
    /// Number of the look-up.
    pub(super) id: u64,
    pub(super) key: ProcessKey,
    pub(super) owner: Owner,
}

/// Why a process's arguments are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A read of this process hung before.
    Hung,
    /// As many reads as the owner may have are stuck, or all readers are.
    Busy,
}

struct Reader {
    worker: Worker<ProcessKey, Option<CommandLine>>,
    request: Option<CmdlineRequest>,
    began: Instant,
    is_stuck: bool,
}

pub(super) struct CmdlineReaders {
    readers: Vec<Reader>,
    queue: VecDeque<CmdlineRequest>,
    hung: VecDeque<ProcessKey>,
    abandoned: u64,
}

impl CmdlineReaders {
    /// `limit`: what is kept of a command line.
    pub(super) fn start(
        limit: CmdlineLimit,
        read: fn(ProcessKey) -> Option<CommandLine>,
    ) -> io::Result<Self> {
        let reader = |name| -> io::Result<Reader> {
            let handle = move |key| read(key).map(|read| limit.keep(read));
            let worker = Worker::start(name, capabilities::LOOKUP_WORKER, handle)?;
            Ok(Reader { worker, request: None, began: Instant::now(), is_stuck: false })
        };
        let readers = NAMES.into_iter().map(reader).collect::<io::Result<_>>()?;
        Ok(Self { readers, queue: VecDeque::new(), hung: VecDeque::new(), abandoned: 0 })
    }

    /// Number of times that a reader was abandoned.
    pub(super) fn abandoned(&self) -> u64 {
        self.abandoned
    }

    /// Names of the threads that a panic has ended. One that hangs is [abandoned](Self::abandoned), and no problem.
    pub(super) fn problems(&self) -> impl Iterator<Item = (&'static str, ThreadProblem)> {
        let problems = self.readers.iter().filter_map(|reader| reader.worker.problem());
        problems.filter(|(_, problem)| *problem == ThreadProblem::Ended)
    }

    /// Queues a read. The response is in [`Self::next_response`] later, unless it is given up before.
    pub(super) fn request(&mut self, request: CmdlineRequest) -> Result<(), Refusal> {
        if self.hung.contains(&request.key) {
            return Err(Refusal::Hung);
        }
        if self.is_stuck_for(request.owner) {
            return Err(Refusal::Busy);
        }
        self.queue.push_back(request);
        self.dispatch();
        Ok(())
    }

    /// True if this owner has as many reads as it may have, of those for which `counts` is true.
    fn is_share_taken(&self, owner: Owner, counts: impl Fn(&Reader) -> bool) -> bool {
        let readers = self.readers.iter().filter(|reader| counts(reader));
        let owners = readers.filter_map(|reader| reader.request.as_ref()).map(|request| &request.owner);
        let free = self.readers.len() - owners.clone().count();
        is_share_taken(owners, owner, free)
    }

    /// True if no reader will read for this owner before a stuck one returns.
    fn is_stuck_for(&self, owner: Owner) -> bool {
        let is_stuck = |reader: &Reader| reader.is_stuck;
        self.readers.iter().all(is_stuck) || self.is_share_taken(owner, is_stuck)
    }

    /// Gives queued reads to idle readers. A user's reads follow each other.
    fn dispatch(&mut self) {
        let is_idle = |reader: &Reader| reader.request.is_none() && !reader.worker.has_ended();
        while let Some(idle) = self.readers.iter().position(is_idle) {
            let may_read = |request: &CmdlineRequest| !self.is_share_taken(request.owner, |_| true);
            let Some(next) = self.queue.iter().position(may_read) else { break };
            if let Some(request) = self.queue.remove(next) {
                self.readers[idle].worker.send(request.key);
                self.readers[idle].request = Some(request);
                self.readers[idle].began = Instant::now();
            }
        }
    }

    /// The result of this look-up is of no use any more. A read that is in progress returns by itself.
    pub(super) fn forget(&mut self, id: u64) {
        self.queue.retain(|request| request.id != id);
    }

    /// The deadline of this look-up has passed. If its read is in progress, the reader is abandoned. Returns
    /// the look-ups whose reads are refused because of that.
    pub(super) fn give_up(&mut self, id: u64) -> Vec<u64> {
        self.forget(id);
        let is_reading = |reader: &&mut Reader| reader.request.is_some_and(|request| request.id == id);
        let Some(reader) = self.readers.iter_mut().find(is_reading) else { return Vec::new() };
        let Some(CmdlineRequest { key, .. }) = reader.request else { return Vec::new() };
        reader.is_stuck = true;
        self.abandoned += 1;
        if self.hung.len() >= MAX_HUNG {
            self.hung.pop_front();
        }
        self.hung.push_back(key);
        log::warn!("reading the command line of process {} hangs; it is reported as unknown", key.pid);
        let is_refused = |request: &&CmdlineRequest| self.is_stuck_for(request.owner);
        let refused: Vec<u64> = self.queue.iter().filter(is_refused).map(|request| request.id).collect();
        self.queue.retain(|request| !refused.contains(&request.id));
        refused
    }

    /// Waits until a reader has a response.
    pub(super) fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut is_ready = Poll::Pending;
        for reader in self.readers.iter_mut().filter(|reader| reader.request.is_some()) {
            if reader.worker.poll_ready(context).is_ready() {
                is_ready = Poll::Ready(());
            }
        }
        is_ready
    }

    /// The next response that is there.
    pub(super) fn next_response(&mut self) -> Option<(CmdlineRequest, Option<CommandLine>)> {
        let take = |reader: &mut Reader| {
            let cmdline = reader.worker.try_response()?;
            reader.is_stuck = false;
            Some((reader.request.take()?, cmdline, reader.began.elapsed()))
        };
        let (request, cmdline, took) = self.readers.iter_mut().find_map(take)?;
        if took < SLOW_READ {
            self.hung.retain(|key| *key != request.key);
        }
        self.dispatch();
        Some((request, cmdline))
    }
}

//! The threads that read `/proc/PID/cmdline`. A thread whose read does not return in time is abandoned, and a process
//! that hung is not read again.

use std::{
    collections::VecDeque,
    io,
    task::{Context, Poll},
    time::Duration,
};

use super::reader_pool::{Busy, MAX_STUCK, ReadRequest, ReaderPool};
use crate::{
    budget::cmdline::CmdlineLimit,
    system::{busy::ThreadProblem, command_line::CommandLine, process::ProcessKey},
};

/// Maximum number of processes that hung and are remembered.
const MAX_HUNG: usize = 1_024;

/// A read that returns within this time was slow: the host is busy. The process did not hang.
pub(super) const SLOW_READ: Duration = Duration::from_secs(1);

/// The names of the threads.
const NAMES: [&str; MAX_STUCK] = ["cmdline-1", "cmdline-2", "cmdline-3", "cmdline-4"];

/// Maximum number of requests that a thread has.
const MAX_SENT: usize = 1;

pub(super) type CmdlineRequest = ReadRequest<ProcessKey>;

/// Why a process's arguments are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A read of this process hung before.
    Hung,
    /// As many reads as the owner may have are stuck, or all readers are.
    Busy,
}

pub(super) struct CmdlineReaders {
    pool: ReaderPool<ProcessKey, Option<CommandLine>>,
    hung: VecDeque<ProcessKey>,
    abandoned: u64,
}

impl CmdlineReaders {
    /// `limit`: what is kept of a command line.
    pub(super) fn start(
        limit: CmdlineLimit,
        read: fn(ProcessKey) -> Option<CommandLine>,
    ) -> io::Result<Self> {
        let pool = ReaderPool::start(NAMES, MAX_SENT, move |key| read(key).map(|read| limit.keep(read)))?;
        Ok(Self { pool, hung: VecDeque::new(), abandoned: 0 })
    }

    /// Number of times that a reader was abandoned.
    pub(super) fn abandoned(&self) -> u64 {
        self.abandoned
    }

    /// Names of the threads that a panic has ended. One that hangs is [abandoned](Self::abandoned), and no problem.
    pub(super) fn problems(&self) -> impl Iterator<Item = (&'static str, ThreadProblem)> {
        self.pool.ended()
    }

    /// Queues a read. The response is in [`Self::next_response`] later, unless it is given up before.
    pub(super) fn request(&mut self, request: CmdlineRequest) -> Result<(), Refusal> {
        if self.hung.contains(&request.key) {
            return Err(Refusal::Hung);
        }
        self.pool.request(request).map_err(|Busy| Refusal::Busy)
    }

    /// The result of this look-up is of no use any more. A read that is in progress returns by itself.
    pub(super) fn forget(&mut self, id: u64) {
        self.pool.forget(id);
    }

    /// The deadline of this look-up has passed. If its read is in progress, the reader is abandoned. Returns
    /// the look-ups whose reads are refused because of that.
    pub(super) fn give_up(&mut self, id: u64) -> Vec<u64> {
        self.forget(id);
        let stuck = self.pool.mark_stuck(|request, _| request.id == id);
        let Some(CmdlineRequest { key, .. }) = stuck.into_iter().flatten().next() else { return Vec::new() };
        self.abandoned += 1;
        if self.hung.len() >= MAX_HUNG {
            self.hung.pop_front();
        }
        self.hung.push_back(key);
        log::warn!("reading the command line of process {} hangs; it is reported as unknown", key.pid);
        self.pool.take_refused()
    }

    /// Waits until a reader has a response.
    pub(super) fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.pool.poll_ready(context)
    }

    /// The next response that is there.
    pub(super) fn next_response(&mut self) -> Option<(CmdlineRequest, Option<CommandLine>)> {
        let (request, cmdline, took) = self.pool.next_response()?;
        if took < SLOW_READ {
            self.hung.retain(|key| *key != request.key);
        }
        self.pool.dispatch();
        Some((request, cmdline))
    }

    /// True if the read of this look-up waits for a thread.
    #[cfg(test)]
    pub(super) fn waits(&self, id: u64) -> bool {
        self.pool.waits(id)
    }
}

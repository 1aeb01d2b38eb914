//! Looks up processes in `/proc` on worker threads, with a deadline. Another process can delay its own
//! look-up: a read of `/proc/PID/cmdline` waits for that process's `mmap_lock`, which the process can hold
//! forever. So the event loop reads nothing of another process, and what is not read in time is null.
//!
//! `cmdline` has readers of its own (`cmdline_readers`). Everything else is read by other threads (`facts_readers`).
//! Both have a thread left when one hangs (`reader_pool`). `blocking` reads for the commands, which have no event loop.

use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    io,
    rc::Rc,
    task::Poll,
    time::Duration,
};

use selfconn_ebpf::Owner;
use tokio::time::Instant;

use crate::{
    budget::{SharedLimit, cmdline::CmdlineLimit, largest_owner},
    system::{
        busy::ThreadProblem,
        clock,
        command_line::CommandLine,
        process::{self, ObservedTask, ProcessFacts, ProcessInfo, ProcessKey},
    },
};
use cache::{ProcessCache, TaskKey};
use cmdline_readers::{CmdlineReaders, CmdlineRequest, Refusal};
use facts_readers::{FactsReaders, FactsRequest};
use interned::InternedFacts;
use reader_pool::Busy;

pub mod blocking;
mod cache;
mod cmdline_readers;
mod facts_readers;
mod interned;
mod reader_pool;

pub use reader_pool::MAX_STUCK;

/// Time after which an event is emitted without what could not be read. Together with the time that a record
/// waits in the ring buffer it stays below a quarter of a second.
const DEADLINE: Duration = Duration::from_millis(200);

/// Maximum number of look-ups in progress, which owners share. One beyond its owner's share has no result.
const MAX_IN_PROGRESS: usize = 1_024;

/// The process to look up.
#[derive(Clone, Copy, Debug)]
pub enum LookupTarget {
    /// The process of a task that the kernel observed, if its pid still belongs to it.
    Observed(ObservedTask, Owner),
    /// The process with this pid that started at this time, in clock ticks since boot. The owner is that of the socket
    /// that the process holds.
    Holder { pid: u32, start_ticks: u64, owner: Owner },
}

impl LookupTarget {
    fn pid(&self) -> u32 {
        match self {
            Self::Observed(observed, _) => observed.task.pid,
            Self::Holder { pid, .. } => *pid,
        }
    }

    /// Who pays for the look-up.
    fn owner(&self) -> Owner {
        match self {
            Self::Observed(_, owner) | Self::Holder { owner, .. } => *owner,
        }
    }

    fn joint(&self) -> Joint {
        match self {
            Self::Observed(observed, _) => {
                self.key().map_or_else(|| Joint::Task(observed.into()), Joint::Program)
            }
            Self::Holder { pid, start_ticks, .. } => Joint::Holder { pid: *pid, start_ticks: *start_ticks },
        }
    }

    /// The task, if the kernel observed it without its start time.
    fn task(&self) -> Option<&ObservedTask> {
        match self {
            Self::Observed(observed, _) if observed.start_ns == 0 => Some(observed),
            _ => None,
        }
    }

    /// Known before the look-up only if the kernel provides the start time.
    fn key(&self) -> Option<ProcessKey> {
        match self {
            Self::Observed(observed, _) if observed.start_ns != 0 => Some(ProcessKey {
                pid: observed.task.pid,
                start_ticks: process::start_ticks_of(observed.start_ns),
                arg_start: observed.arg_start,
            }),
            _ => None,
        }
    }
}

/// Two look-ups at the same time with the same one have the same result. Those of a task only if it was observed in
/// between: after the first observation, and before the look-up began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Joint {
    Program(ProcessKey),
    Holder { pid: u32, start_ticks: u64 },
    Task(TaskKey),
}

/// Why a look-up ends before everything is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// Its deadline has passed: a read hangs.
    Overdue,
    /// Nobody can wait for it. This says nothing about the process.
    NoTime,
}

/// A part of a look-up.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part<T> {
    NotRequested,
    Requested,
    Read(T),
}

/// A look-up, and who waits for it.
struct InProgress<W> {
    target: LookupTarget,
    began_ns: u64,
    facts: Part<Option<ProcessFacts>>,
    cmdline: Part<Option<CommandLine>>,
    waiters: Vec<W>,
}

impl<W> InProgress<W> {
    /// True if its result is that of this target with the same [`Joint`], too.
    fn is_about(&self, target: &LookupTarget) -> bool {
        match (self.target.task(), target.task()) {
            (Some(first), Some(later)) => (first.at_ns..=self.began_ns).contains(&later.at_ns),
            _ => true,
        }
    }
}

/// The look-ups in progress, the results that are still fresh, and the workers. A waiter `W` says what to do
/// with a result.
pub struct Lookups<W> {
    /// True if the pids in `/proc` are those that the probes report.
    is_initial_pid_ns: bool,
    facts: FactsReaders,
    cmdlines: CmdlineReaders,
    cache: ProcessCache,
    interned: InternedFacts,
    in_progress: HashMap<u64, InProgress<W>>,
    shares: SharedLimit,
    /// The look-ups in progress that others can join.
    joinable: HashMap<Joint, u64>,
    /// All have the same deadline, so they are in order. An id whose look-up has ended is skipped.
    deadlines: VecDeque<(Instant, u64)>,
    completed: VecDeque<(W, Rc<ProcessInfo>)>,
    last_id: u64,
    given_up: u64,
}

impl<W> Lookups<W> {
    /// Starts the workers. Outside the initial pid namespace nothing is looked up, because the same pid is
    /// another process there. `cmdline_limit` is what is kept of a command line.
    ///
    /// # Errors
    /// If a worker cannot be started.
    pub fn start(is_initial_pid_ns: bool, cmdline_limit: CmdlineLimit) -> io::Result<Self> {
        Self::start_with(is_initial_pid_ns, cmdline_limit, process::read_cmdline)
    }

    fn start_with(
        is_initial_pid_ns: bool,
        cmdline_limit: CmdlineLimit,
        read_cmdline: fn(ProcessKey) -> Option<CommandLine>,
    ) -> io::Result<Self> {
        Ok(Self {
            is_initial_pid_ns,
            facts: FactsReaders::start()?,
            cmdlines: CmdlineReaders::start(cmdline_limit, read_cmdline)?,
            cache: ProcessCache::default(),
            interned: InternedFacts::default(),
            in_progress: HashMap::new(),
            shares: SharedLimit::new(MAX_IN_PROGRESS),
            joinable: HashMap::new(),
            deadlines: VecDeque::new(),
            completed: VecDeque::new(),
            last_id: 0,
            given_up: 0,
        })
    }

    /// True if the pids in `/proc` are those in events.
    #[must_use]
    pub fn can_look_up(&self) -> bool {
        self.is_initial_pid_ns
    }

    /// Number of look-ups whose `cmdline`, or more, was given up, or whose result found no room.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.given_up + self.interned.refused()
    }

    /// Number of times that a reader was abandoned because its process did not let it finish.
    #[must_use]
    pub fn abandoned(&self) -> u64 {
        self.cmdlines.abandoned() + self.facts.abandoned()
    }

    /// Names of the workers that do their work no more, and why.
    pub fn worker_problems(&self) -> impl Iterator<Item = (&'static str, ThreadProblem)> {
        self.facts.problems().chain(self.cmdlines.problems())
    }

    /// The result, if it is known without a look-up: the process was looked up a moment before `now_ns`
    /// (`CLOCK_BOOTTIME`), or nothing can be looked up.
    #[must_use]
    pub fn known(&self, target: &LookupTarget, now_ns: u64) -> Option<Rc<ProcessInfo>> {
        if !self.is_initial_pid_ns {
            return Some(Rc::default());
        }
        match target.task() {
            Some(observed) => self.cache.of_task(observed),
            None => self.cache.fresh(target.key()?, now_ns),
        }
    }

    /// Begins a look-up, or joins the one of the same process. The waiter is in [`Self::next_completed`]
    /// after [`DEADLINE`] at the latest.
    pub fn begin(&mut self, target: LookupTarget, waiter: W) {
        let key = target.key();
        let joint = target.joint();
        let same = self.joinable.get(&joint).and_then(|id| self.in_progress.get_mut(id));
        if let Some(same) = same.filter(|same| same.is_about(&target)) {
            same.waiters.push(waiter);
            return;
        }
        let owner = target.owner();
        if !self.shares.try_take(owner, 1) {
            self.given_up += 1;
            self.completed.push_back((waiter, Rc::default()));
            return;
        }
        self.last_id += 1;
        let id = self.last_id;
        self.deadlines.push_back((Instant::now() + DEADLINE, id));
        self.in_progress.insert(
            id,
            InProgress {
                target,
                began_ns: clock::boot_ns(),
                facts: Part::Requested,
                cmdline: Part::NotRequested,
                waiters: vec![waiter],
            },
        );
        self.joinable.insert(joint, id);
        if let Err(Busy) = self.facts.request(FactsRequest { id, key: target, owner }) {
            self.give_up(id, Why::NoTime);
            return;
        }
        if let Some(key) = key {
            self.request_cmdline(CmdlineRequest { id, key, owner });
        }
    }

    fn request_cmdline(&mut self, request: CmdlineRequest) {
        let id = request.id;
        let cmdline = match self.cmdlines.request(request) {
            Ok(()) => Part::Requested,
            Err(refusal) => {
                // A process that hung was counted when it did.
                self.given_up += u64::from(refusal == Refusal::Busy);
                Part::Read(None)
            }
        };
        if let Some(lookup) = self.in_progress.get_mut(&id) {
            lookup.cmdline = cmdline;
        }
    }

    /// Waits until a worker has a response, or a look-up's deadline has passed. Cancel safe.
    pub async fn ready(&mut self) {
        if !self.completed.is_empty() {
            return;
        }
        let deadline = self.next_deadline();
        let Self { facts, cmdlines, .. } = self;
        let response = poll_fn(|context| match (facts.poll_ready(context), cmdlines.poll_ready(context)) {
            (Poll::Pending, Poll::Pending) => Poll::Pending,
            _ => Poll::Ready(()),
        });
        tokio::select! {
            biased;
            () = response => {}
            () = clock::sleep_until_some(deadline) => {}
        }
    }

    fn next_deadline(&mut self) -> Option<Instant> {
        while let Some((deadline, id)) = self.deadlines.front() {
            if self.in_progress.contains_key(id) {
                return Some(*deadline);
            }
            self.deadlines.pop_front();
        }
        None
    }

    /// Takes the responses that are there, and gives up the look-ups whose deadline has passed.
    pub fn update(&mut self) {
        while let Some((id, facts)) = self.facts.next_response() {
            self.on_facts(id, facts);
        }
        self.facts.dispatch();
        for id in self.facts.give_up_hung() {
            if self.in_progress.contains_key(&id) {
                self.give_up(id, Why::NoTime);
            }
        }
        while let Some((request, cmdline)) = self.cmdlines.next_response() {
            match self.in_progress.get_mut(&request.id) {
                Some(lookup) => {
                    lookup.cmdline = Part::Read(cmdline);
                    self.finish_if_read(request.id);
                }
                // Its deadline has passed. Later events have it.
                None => self.add_cmdline(request, cmdline),
            }
        }
        let now = Instant::now();
        while self.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.give_up_oldest(Why::Overdue);
        }
    }

    /// Adds arguments that were read after the deadline.
    fn add_cmdline(&mut self, request: CmdlineRequest, cmdline: Option<CommandLine>) {
        let CmdlineRequest { key, owner, .. } = request;
        if let Some((at_ns, process)) = self.cache.without_cmdline(key) {
            let process = self.interned.intern(key, owner, (*process).clone().with_cmdline(cmdline));
            self.cache.insert(key, process, at_ns);
        }
    }

    fn on_facts(&mut self, id: u64, facts: Option<ProcessFacts>) {
        let Some(lookup) = self.in_progress.get_mut(&id) else { return };
        if let (Some(facts), Part::NotRequested) = (&facts, &lookup.cmdline) {
            let pid = lookup.target.pid();
            // The same program as that of `exe`.
            let &ProcessFacts { start_ticks, arg_start, is_same_program, .. } = facts;
            let key = ProcessKey { pid, start_ticks, arg_start };
            let owner = lookup.target.owner();
            lookup.facts = Part::Read(Some(facts.clone()));
            if is_same_program {
                self.request_cmdline(CmdlineRequest { id, key, owner });
            } else {
                lookup.cmdline = Part::Read(None);
            }
        } else {
            lookup.facts = Part::Read(facts);
        }
        self.finish_if_read(id);
    }

    /// Ends a look-up if nothing is missing. Without a process its arguments are of no use.
    fn finish_if_read(&mut self, id: u64) {
        let Some(lookup) = self.in_progress.get(&id) else { return };
        match (&lookup.facts, &lookup.cmdline) {
            (Part::Read(None), _) => {
                self.cmdlines.forget(id);
                self.finish(id);
            }
            (Part::Read(Some(_)), Part::Read(_)) => self.finish(id),
            _ => {}
        }
    }

    /// Ends the oldest look-up with what has been read.
    fn give_up_oldest(&mut self, why: Why) {
        if self.next_deadline().is_none() {
            return;
        }
        let Some((_, id)) = self.deadlines.pop_front() else { return };
        self.give_up(id, why);
    }

    /// Ends a look-up with what has been read.
    fn give_up(&mut self, id: u64, why: Why) {
        self.given_up += 1;
        self.facts.forget(id);
        let refused = match why {
            Why::Overdue => self.cmdlines.give_up(id),
            Why::NoTime => {
                self.cmdlines.forget(id);
                Vec::new()
            }
        };
        self.finish(id);
        for id in refused {
            self.given_up += 1;
            if let Some(lookup) = self.in_progress.get_mut(&id) {
                lookup.cmdline = Part::Read(None);
                self.finish_if_read(id);
            }
        }
    }

    /// Ends every look-up with what has been read: nobody waits for the rest at the end of a run.
    pub fn give_up_all(&mut self) {
        self.update();
        while self.next_deadline().is_some() {
            self.give_up_oldest(Why::NoTime);
        }
    }

    /// Too many wait: ends the look-up for which the most wait, of the owner for whose look-ups the most wait.
    pub fn give_up_one(&mut self) {
        let waiting = self.in_progress.values().map(|lookup| (lookup.target.owner(), lookup.waiters.len()));
        let Some(owner) = largest_owner(waiting) else { return };
        let of_owner = self.in_progress.iter().filter(|(_, lookup)| lookup.target.owner() == owner);
        if let Some((&id, _)) = of_owner.max_by_key(|(_, lookup)| lookup.waiters.len()) {
            self.give_up(id, Why::NoTime);
        }
    }

    fn finish(&mut self, id: u64) {
        let Some(lookup) = self.in_progress.remove(&id) else { return };
        let InProgress { target, began_ns, facts, cmdline, waiters } = lookup;
        self.shares.give_back(target.owner(), 1);
        let key = target.key();
        // Another one of the same task may have begun since.
        if self.joinable.get(&target.joint()) == Some(&id) {
            self.joinable.remove(&target.joint());
        }
        let cmdline = match cmdline {
            Part::Read(cmdline) => cmdline,
            _ => None,
        };
        let process = match (facts, key) {
            // The process runs another program now, and what is known of the one before is still true.
            (Part::Read(Some(facts)), Some(key))
                if !facts.is_same_program
                    && let Some(known) = self.cache.known(key, began_ns) =>
            {
                known
            }
            (Part::Read(Some(facts)), key) => {
                let ProcessFacts { start_ticks, arg_start, .. } = facts;
                let known_key = ProcessKey { pid: target.pid(), start_ticks, arg_start };
                let process =
                    self.interned.intern(known_key, target.owner(), facts.info.with_cmdline(cmdline));
                if let Some(key) = key {
                    self.cache.insert(key, Rc::clone(&process), clock::boot_ns());
                } else if let Some(observed) = target.task() {
                    self.cache.insert_task(observed, began_ns, Rc::clone(&process));
                }
                process
            }
            (facts, Some(key)) => {
                // The process has exited, and what is known of it is still true.
                let has_exited = facts == Part::Read(None);
                let known = has_exited.then(|| self.cache.known(key, began_ns)).flatten();
                // The read of the arguments has proven by itself whose they are, if the program has an address.
                let cmdline = cmdline.filter(|_| key.arg_start != 0);
                let only_cmdline = cmdline.map(|cmdline| ProcessInfo::default().with_cmdline(Some(cmdline)));
                let intern = |info| self.interned.intern(key, target.owner(), info);
                known.or_else(|| only_cmdline.map(intern)).unwrap_or_default()
            }
            _ => Rc::default(),
        };
        self.completed.extend(waiters.into_iter().map(|waiter| (waiter, Rc::clone(&process))));
    }

    /// The next waiter whose look-up has ended, and the result. The result is empty for a process that has
    /// exited.
    pub fn next_completed(&mut self) -> Option<(W, Rc<ProcessInfo>)> {
        self.completed.pop_front()
    }

    /// True if [`Self::next_completed`] has one.
    #[must_use]
    pub fn has_completed(&self) -> bool {
        !self.completed.is_empty()
    }
}

#[cfg(test)]
mod tests;

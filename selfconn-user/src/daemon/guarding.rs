//! The guard's reports: counts refused connects by process and port, and says when an event is due. The program counts
//! every one of them, so that the events have as many in all, also if a record is lost.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    time::Duration,
};

use selfconn_ebpf::{
    Opener, Owner,
    guard::{GuardRecord, Prevention},
};
use tokio::time::Instant;

use crate::{
    bpf::loader::Tracer,
    budget::{SharedLimit, SharedRate, owner_of_user},
    detect::connection::{Connection, Source},
    event::{EventKind, Unguarded},
    guard::{GuardMode, thread::GuardThread, unguarded::UnguardedNetns, work::GuardCounts},
    output::Outputs,
    sockets::NetnsId,
    system::busy::ThreadProblem,
};

/// Minimum time between a read of the guard's ring buffer that finds something and the next one. The program wakes the
/// daemon for a record only if everything before it has been read: a client that tries again and again pays for one
/// wake-up in this time, not for one at each refusal.
const READ_INTERVAL: Duration = Duration::from_millis(4);

/// Minimum time between two events of the same process and port.
const EVENT_INTERVAL: Duration = Duration::from_millis(100);

/// After this time without an attempt, a process and port are forgotten.
const IDLE: Duration = Duration::from_secs(1);

/// Maximum number of processes and ports that are counted apart, which owners share. The attempts of others are counted
/// together.
const MAX_COUNTED: usize = 1_024;

/// Maximum number of events in a second, which owners share. The attempts beyond it wait for the next second.
const MAX_EVENTS: usize = 100;

/// Time between two looks at what is counted together.
const REST_INTERVAL: Duration = Duration::from_secs(1);

/// Attempts of which an event is due.
#[derive(Debug)]
pub(super) struct DuePrevention {
    /// The newest attempt. `None`: the attempts are not known one by one.
    pub(super) newest: Option<Prevention>,
    pub(super) count: u64,
}

/// The attempts of a process at a port.
#[derive(Debug)]
struct Counted {
    owner: Owner,
    newest: Prevention,
    /// Attempts since the last event.
    pending: u64,
    /// When an event of the pending attempts is due.
    due_at: Instant,
    /// When it is forgotten, if nothing is pending.
    idle_at: Instant,
}

impl Counted {
    /// When something is to be done about it.
    fn next_at(&self) -> Instant {
        if self.pending > 0 { self.due_at } else { self.idle_at }
    }

    /// The event of what is pending, and of the attempts until the next one.
    fn take(&mut self, now: Instant) -> DuePrevention {
        (self.due_at, self.idle_at) = (now + EVENT_INTERVAL, now + IDLE);
        DuePrevention { newest: Some(self.newest), count: std::mem::take(&mut self.pending) }
    }
}

/// The thread of the guard, and what it has refused.
pub(super) struct GuardMonitor {
    mode: GuardMode,
    thread: Option<GuardThread>,
    counts: GuardCounts,
    guarded: HashSet<NetnsId>,
    by_process: HashMap<(u32, u64, u16), Counted>,
    /// The entries of `by_process`, by owner.
    shares: SharedLimit,
    events: SharedRate,
    /// Attempts that are not counted by process and port.
    uncounted: u64,
    /// Attempts of which no record was counted by process and port, and that events have.
    rest: u64,
    /// When to look for attempts that are counted together. `None`: nothing has happened since the last look.
    rest_at: Option<Instant>,
    /// See [`Self::read_at`].
    read_at: Option<Instant>,
}

impl GuardMonitor {
    pub(super) fn new(mode: GuardMode, thread: Option<GuardThread>) -> Self {
        Self {
            mode,
            thread,
            counts: GuardCounts::default(),
            guarded: HashSet::new(),
            by_process: HashMap::new(),
            shares: SharedLimit::new(MAX_COUNTED),
            events: SharedRate::new(MAX_EVENTS),
            uncounted: 0,
            rest: 0,
            rest_at: None,
            read_at: None,
        }
    }

    /// When the ring buffer is to be read without a wake-up, and not before. `None`: when the program wakes the daemon.
    pub(super) fn read_at(&self) -> Option<Instant> {
        self.read_at
    }

    /// The next read waits for nothing.
    pub(super) fn read_at_once(&mut self) {
        self.read_at = None;
    }

    /// Reads at most `limit` records, if it is time, and calls `each` for each event that is due. True if there may be
    /// more.
    pub(super) fn serve_records(
        &mut self,
        tracer: &mut Tracer,
        limit: usize,
        now: Instant,
        mut each: impl FnMut(&DuePrevention),
    ) -> bool {
        if self.read_at.is_some_and(|at| now < at) {
            return false;
        }
        let records = tracer.drain_guard(limit);
        for record in &records {
            match record {
                GuardRecord::Prevention(prevention) => {
                    if let Some(due) = self.on_prevention(prevention, now) {
                        each(&due);
                    }
                }
                GuardRecord::FirstConnect(first) => {
                    if let Some(thread) = &mut self.thread {
                        thread.on_first_connect(*first);
                    }
                }
            }
        }
        let has_more = records.len() == limit;
        self.on_read(records.len(), has_more, now);
        has_more
    }

    /// Sets when to read next, after a read of this many records. `has_more`: the ring buffer may have others.
    fn on_read(&mut self, records: usize, has_more: bool, now: Instant) {
        self.read_at = (records > 0 && !has_more).then(|| now + READ_INTERVAL);
    }

    pub(super) fn mode(&self) -> GuardMode {
        self.mode
    }

    /// `None`: there is no guard.
    pub(super) fn counts(&self) -> Option<GuardCounts> {
        let thread = self.thread.as_ref()?;
        Some(GuardCounts { failures: self.counts.failures + thread.dropped(), ..self.counts })
    }

    /// Waits for a report of the thread.
    pub(super) async fn ready(&mut self) {
        match &mut self.thread {
            Some(thread) => thread.ready().await,
            None => std::future::pending().await,
        }
    }

    /// Takes the thread's reports, and emits an event of each namespace that is not guarded.
    pub(super) fn serve_reports(&mut self, out: &mut Outputs) {
        while let Some(report) = self.thread.as_mut().and_then(GuardThread::try_report) {
            (self.counts, self.guarded) = (report.counts, report.guarded);
            for UnguardedNetns { id, why } in report.unguarded {
                out.emit(EventKind::Unguarded(Unguarded { netns: id.inode, why }));
            }
        }
    }

    /// What this guard does in a network namespace.
    pub(super) fn mode_in(&self, netns: NetnsId) -> GuardMode {
        if self.guarded.contains(&netns) { self.mode } else { GuardMode::Off }
    }

    /// The name of the thread, and what is wrong with it.
    pub(super) fn thread_problem(&self) -> Option<(&'static str, ThreadProblem)> {
        Some(("guard", self.thread.as_ref()?.problem()?))
    }

    /// Turns the program off everywhere. What it has refused is in its ring buffer and its counters now, and does not
    /// change any more.
    pub(super) async fn stop(&mut self) {
        if let Some(thread) = &mut self.thread {
            thread.stop().await;
        }
    }

    /// A connect to itself was refused. `Some`: an event is due.
    fn on_prevention(&mut self, prevention: &Prevention, now: Instant) -> Option<DuePrevention> {
        self.rest_at.get_or_insert(now + REST_INTERVAL);
        let Opener { task, start_ns, at_ns, owner, .. } = prevention.opener;
        let (pid, start_ns, owner) = if at_ns == 0 {
            (0, 0, owner_of_user(Some(prevention.uid)))
        } else {
            (task.pid, start_ns, owner)
        };
        match self.by_process.entry((pid, start_ns, prevention.endpoint.port)) {
            Entry::Occupied(mut known) => {
                let counted = known.get_mut();
                counted.newest = *prevention;
                counted.pending += 1;
                None
            }
            Entry::Vacant(new) if self.shares.try_take(owner, 1) => {
                let counted = Counted { owner, newest: *prevention, pending: 1, due_at: now, idle_at: now };
                let counted = new.insert(counted);
                match self.events.try_take(owner, now) {
                    Ok(()) => Some(counted.take(now)),
                    Err(next_at) => {
                        counted.due_at = next_at;
                        None
                    }
                }
            }
            Entry::Vacant(_) => {
                self.uncounted += 1;
                None
            }
        }
    }

    /// When an event is due, or something is to be forgotten.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.by_process.values().map(Counted::next_at).chain(self.rest_at).min()
    }

    /// The events that are due. `lost`: records that the program could not write so far. `all`: also what is pending,
    /// because the run ends.
    pub(super) fn take_due(&mut self, now: Instant, lost: u64, all: bool) -> Vec<DuePrevention> {
        let mut due = Vec::new();
        let (events, shares) = (&mut self.events, &mut self.shares);
        self.by_process.retain(|_, counted| {
            if counted.pending == 0 {
                let is_kept = now < counted.idle_at;
                if !is_kept {
                    shares.give_back(counted.owner, 1);
                }
                return is_kept;
            }
            if all || counted.due_at <= now {
                match events.try_take(counted.owner, now) {
                    Err(next_at) if !all => counted.due_at = next_at,
                    _ => due.push(counted.take(now)),
                }
            }
            true
        });
        if all || self.rest_at.is_some_and(|at| at <= now) {
            let rest = lost + self.uncounted;
            if rest > self.rest {
                due.push(DuePrevention { newest: None, count: rest - self.rest });
                self.rest = rest;
            }
            self.rest_at = (!all && !self.by_process.is_empty()).then_some(now + REST_INTERVAL);
        }
        due
    }
}

/// The attempt as a connection.
pub(super) fn connection_of(prevention: &Prevention) -> Connection {
    let opener = (prevention.opener.at_ns != 0).then_some(prevention.opener);
    let cookie = (prevention.cookie != 0).then_some(prevention.cookie);
    Connection {
        cookie,
        uid: Some(prevention.uid),
        opener,
        ..Connection::new(0, Source::Live, prevention.endpoint)
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::{Endpoint, Task};
    use zerocopy::FromZeros as _;

    use super::*;

    fn prevention(pid: u32, port: u16) -> Prevention {
        let opener = Opener { at_ns: 1, task: Task { pid, ..Task::UNKNOWN }, ..Opener::UNKNOWN };
        let endpoint = Endpoint { port, ..Endpoint::UNKNOWN };
        Prevention { endpoint, opener, ..Prevention::new_zeroed() }
    }

    fn total(due: &[DuePrevention]) -> u64 {
        due.iter().map(|due| due.count).sum()
    }

    #[test]
    fn events_are_bounded_and_their_counts_are_exact() {
        let mut monitor = GuardMonitor::new(GuardMode::Refuse, None);
        let (mut events, mut counted, mut now) = (0, 0, Instant::now());
        for round in 1..=40 {
            for _ in 0..1_000 {
                let due = monitor.on_prevention(&prevention(7, 80), now);
                events += due.iter().count();
                counted += due.map_or(0, |due| due.count);
            }
            // Three records are lost in the fifth round.
            let due = monitor.take_due(now, if round < 5 { 0 } else { 3 }, false);
            assert!(due.iter().all(|due| due.newest.is_none() == (due.count == 3)), "{due:?}");
            events += due.len();
            counted += total(&due);
            now += Duration::from_millis(50);
        }
        counted += total(&monitor.take_due(now, 3, true));
        assert_eq!(counted, 40_003);
        assert!((18..=24).contains(&events), "{events}");
        assert!(monitor.take_due(now + 2 * IDLE, 3, false).is_empty());
        assert_eq!(monitor.next_at(), None, "nothing is left to do");
    }

    #[test]
    fn processes_and_ports_are_counted_apart_and_owners_share_what_there_is() {
        let mut monitor = GuardMonitor::new(GuardMode::Refuse, None);
        let now = Instant::now();
        for (pid, port) in [(7, 80), (7, 81), (8, 80)] {
            assert_eq!(monitor.on_prevention(&prevention(pid, port), now).map(|due| due.count), Some(1));
        }
        let flood = (100..5_100).filter_map(|pid| monitor.on_prevention(&prevention(pid, 80), now)).count();
        assert_eq!(flood, MAX_EVENTS * 3 / 4 - 3);
        assert_eq!(monitor.by_process.len(), MAX_COUNTED * 3 / 4);
        let mut other = prevention(9, 80);
        other.opener.owner = Owner::new(1_000, 7);
        assert!(monitor.on_prevention(&other, now).is_some(), "another owner has room, and an event");
        let mut rest = 0;
        for seconds in 2..5 {
            let due = monitor.take_due(now + Duration::from_secs(seconds), 0, false);
            assert!(due.len() <= MAX_EVENTS, "{}", due.len());
            rest += total(&due);
        }
        rest += total(&monitor.take_due(now + Duration::from_secs(5), 0, true));
        assert_eq!(rest, 5_000 - flood as u64);
        assert!(monitor.take_due(now + Duration::from_secs(7), 0, false).is_empty());
        assert_eq!((monitor.by_process.len(), monitor.shares.used()), (0, 0), "everything is given back");
    }

    #[test]
    fn a_read_that_finds_records_is_followed_by_another_one_and_not_sooner() {
        let mut monitor = GuardMonitor::new(GuardMode::Refuse, None);
        let now = Instant::now();
        assert_eq!(monitor.read_at(), None, "the first record is read at once");
        for (records, has_more, expected) in
            [(1, false, Some(now + READ_INTERVAL)), (1_024, true, None), (0, false, None)]
        {
            monitor.on_read(records, has_more, now);
            assert_eq!(monitor.read_at(), expected, "{records} {has_more}");
        }
    }

    #[test]
    fn a_second_has_so_many_events_also_if_all_processes_go_on() {
        let mut monitor = GuardMonitor::new(GuardMode::Refuse, None);
        let (began, mut events, mut counted) = (Instant::now(), 0, 0);
        for round in 0..40 {
            let now = began + Duration::from_millis(50) * round;
            for pid in 1..=500 {
                let due = monitor.on_prevention(&prevention(pid, 80), now);
                events += due.iter().count();
                counted += due.map_or(0, |due| due.count);
            }
            let due = monitor.take_due(now, 0, false);
            events += due.len();
            counted += total(&due);
            assert!(monitor.next_at().is_some_and(|at| at > now), "the loop would not sleep");
        }
        assert!((100..=2 * MAX_EVENTS).contains(&events), "{events}");
        counted += total(&monitor.take_due(began + Duration::from_secs(2), 0, true));
        assert_eq!(counted, 40 * 500);
    }
}
